from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_p_tuning import PromptEncoder, PTuning, PTuningConfig
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("p-tuning")

ID = "p-tuning"
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
OPTIONS: dict[str, Any] = {"steps": 3, "batch_size": 2, "learning_rate": 0.05}
ENCODERS = ["lstm", "mlp"]


def stack_of(*others: Any, arch: str = "llama", **options: Any) -> tuple[Stack, PTuning]:
    plugin = PTuning(**{"length": 3, "hidden": 5, **options})
    return Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer()), plugin


def logits(stack: Stack) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding="left"))


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


def their(stack: Stack, plugin: PTuning, task: str, length: int = 3, **options: Any) -> nn.Module:
    """The same adapter of HF PEFT, with the same weights under the same names."""
    from peft import PromptEncoderConfig, get_peft_model

    config = PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=length,
        token_dim=32,
        num_layers=2,
        num_attention_heads=4,
        **options,
    )
    theirs = get_peft_model(tiny(stack.model.config.model_type), config)
    tensors = plugin.prompt.state_dict()
    if task == "SEQ_2_SEQ_LM":  # PEFT holds as many rows for the decoder, and leaves them unused
        tensors["embedding.weight"] = tensors["embedding.weight"].repeat(2, 1)
    theirs.prompt_encoder["default"].load_state_dict(tensors)
    return theirs.eval()


# -- the encoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize(
    ("arch", "encoder", "layers"),
    [
        ("llama", "lstm", 2),
        ("llama", "lstm", 1),
        ("llama", "mlp", 2),
        ("gpt2", "lstm", 2),
        ("gpt2", "mlp", 2),
        ("qwen2", "lstm", 2),
        ("t5", "mlp", 2),  # PEFT's LSTM reads the decoder's rows there too
    ],
)
def test_equals_hf_peft(arch: str, encoder: str, layers: int, padding: str | None) -> None:
    """Logits, loss and gradients. Labels begin behind the first token: PEFT alone predicts that one from P."""
    stack, plugin = stack_of(arch=arch, encoder=encoder, layers=layers)
    stack.model.eval()
    theirs = their(
        stack,
        plugin,
        "SEQ_2_SEQ_LM" if arch == "t5" else "CAUSAL_LM",
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=5,
        encoder_num_layers=layers,
    )
    inputs = example_inputs(stack.model, padding=padding)
    real = inputs["attention_mask"].bool()
    labels = inputs.pop("decoder_input_ids", inputs["input_ids"]).clone()
    if arch != "t5":
        labels[~real] = -100
        labels[:, 0] = -100
    one, two = (model(**inputs, labels=labels) for model in (stack.model, theirs))
    one.loss.backward()
    two.loss.backward()
    behind, kept = two.logits[:, -one.logits.shape[1] :], real if arch != "t5" else slice(None)
    # T5: PEFT multiplies twice as many rows at once, which adds up in another order.
    assert difference(one.logits[kept], behind[kept]) < (3e-6 if arch == "t5" else 1e-6)
    assert difference(one.loss, two.loss) < 1e-6
    gradients = {n: p.grad for n, p in theirs.prompt_encoder["default"].named_parameters()}
    assert gradients.keys() == dict(plugin.prompt.named_parameters()).keys()
    for name, parameter in plugin.prompt.named_parameters():
        assert difference(parameter.grad, gradients[name][: len(parameter)]) < 1e-6, name
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_stored_is_what_hf_peft_stores(encoder: str, tmp_path: Path) -> None:
    stack, plugin = stack_of(encoder=encoder)
    theirs = their(
        stack,
        plugin,
        "CAUSAL_LM",
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=5,
    )
    plugin.collapse()
    (stored,) = load_file(stack.save(tmp_path / "b") / f"{ID}.safetensors").values()
    assert difference(stored, theirs.get_prompt_embedding_to_save("default")) < 1e-6


def test_the_mlp_by_hand() -> None:
    """d = 1, h = 2: W_3 relu(W_2 relu(W_1 e + b_1) + b_2) + b_3."""
    prompt = PromptEncoder(2, 1, PTuningConfig(encoder="mlp", hidden=2))
    one, _, two, _, three = prompt.mlp_head
    with torch.no_grad():
        prompt.embedding.weight.copy_(torch.tensor([[2.0], [-1.0]]))
        one.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        one.bias.copy_(torch.tensor([1.0, 0.0]))  # relu: (3, 0) and (0, 1)
        two.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -4.0]]))
        two.bias.zero_()  # relu: (3, 3) and (1, 0)
        three.weight.copy_(torch.tensor([[10.0, 1.0]]))
        three.bias.fill_(0.5)
    assert prompt.rows().tolist() == [[33.5], [10.5]]


def test_an_lstm_s_rows_depend_on_each_other_and_an_mlp_s_do_not() -> None:
    for encoder in ENCODERS:
        prompt = PromptEncoder(4, 6, PTuningConfig(encoder=encoder))
        before = prompt.rows().detach()
        with torch.no_grad():
            prompt.embedding.weight[1] += 1.0
        moved = (prompt.rows() - before).detach().abs().amax(1) > 1e-6
        assert moved.tolist() == ([True] * 4 if encoder == "lstm" else [False, True, False, False])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("hidden", [None, 5])
def test_parameters(hidden: int | None, layers: int) -> None:
    n, d = 3, 32
    h = hidden or d // 2
    first = 4 * h * (d + h + 2)
    later = 4 * h * (2 * h + h + 2)
    mlp = 2 * h * (2 * h + 1) + d * (2 * h + 1)
    stack, _ = stack_of(hidden=hidden, layers=layers)
    assert stack.trainable_parameters() == n * d + 2 * (first + (layers - 1) * later) + mlp
    h = hidden or d
    stack, _ = stack_of(hidden=hidden, encoder="mlp")
    assert stack.trainable_parameters() == n * d + h * (d + 1) + h * (h + 1) + d * (h + 1)
    stack.train(ROWS, **OPTIONS)
    assert stack.trainable_parameters() == n * d


def test_dropout_acts_while_training_and_is_not_in_what_is_kept() -> None:
    _, plugin = stack_of(dropout=0.5, hidden=20)
    prompt = plugin.prompt.train()
    assert not torch.equal(prompt.rows(), prompt.rows())
    with torch.no_grad():
        expected = prompt.eval().rows()
        assert torch.equal(prompt.rows(), expected)
    prompt.train()
    plugin.collapse()
    assert torch.equal(prompt.embedding.weight, expected)


def test_an_odd_width_has_a_state_for_each_number() -> None:
    assert PromptEncoder(2, 7, PTuningConfig()).lstm_head.hidden_size == 4
    assert PromptEncoder(2, 7, PTuningConfig()).rows().shape == (2, 7)


# -- the encoder goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arch", "encoder"), [("llama", "lstm"), ("gpt2", "mlp"), ("t5", "lstm")])
def test_after_training_a_bundle_holds_l_times_d_numbers_and_the_same_bits(
    arch: str, encoder: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    def trained(**options: Any) -> tuple[Stack, PromptEncoder]:
        plugin = PTuning(length=3, hidden=5, encoder=encoder, **options)
        stack = Stack(tiny(arch).to(dtype), [plugin], tokenizer=tiny_tokenizer())
        stack.train(ROWS, **OPTIONS)
        return stack, plugin.prompt

    kept, live = trained(keep_encoder=True)
    with torch.no_grad():  # an LSTM may take another kernel where it makes no gradients
        P = live.eval().rows()
    stack, prompt = trained()
    assert [name for name, _ in prompt.named_parameters()] == ["embedding.weight"]
    tensors = load_file(stack.save(tmp_path / "b") / f"{ID}.safetensors")
    assert [(t.dtype, tuple(t.shape)) for t in tensors.values()] == [(dtype, (3, 32))]
    assert torch.equal(next(iter(tensors.values())), P)
    loaded = peftx.load(tmp_path / "b", model=tiny(arch).to(dtype), tokenizer=tiny_tokenizer())
    assert len(list(loaded.plugins[ID].prompt.parameters())) == 1
    plain = Stack(tiny(arch).to(dtype), [PromptTuning(length=3)], tokenizer=tiny_tokenizer())
    next(plain.ledger.parameters("prompt-tuning")).data.copy_(P)
    for found in (stack, loaded, plain):
        assert torch.equal(logits(found), logits(kept))


def test_it_goes_with_the_last_update_and_not_before() -> None:
    seen = []
    stack, plugin = stack_of(Lora(rank=2))
    lora = next(stack.ledger.parameters("lora"))

    def look(done: int, total: int, values: Any) -> None:
        seen.append((len(plugin.prompt.mlp_head), lora.detach().clone()))

    report = stack.train(ROWS, gradient_accumulation=2, progress=look, **OPTIONS)
    assert [count for count, _ in seen] == [3, 3, 0]
    assert plugin.prompt.lstm_head is None
    assert report.trainable == stack.trainable_parameters()
    assert not torch.equal(seen[1][1], seen[2][1]), "the last update is made before"


def test_what_was_collapsed_trains_on_as_a_plain_prompt(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    stack.train(ROWS, **OPTIONS)
    stack.save(tmp_path / "b")
    plain = Stack(tiny("llama"), [PromptTuning(length=3)], tokenizer=tiny_tokenizer())
    next(plain.ledger.parameters("prompt-tuning")).data.copy_(plugin.prompt.embedding.weight.data)
    loaded = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
    for each in (stack, plain, loaded):
        each.train(ROWS, **OPTIONS)
    (expected,) = plain.ledger.parameters("prompt-tuning")
    for each in (stack, loaded):
        (P,) = each.ledger.parameters(ID)
        assert torch.equal(P, expected)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_loop_of_one_s_own_collapses_when_it_says_so(encoder: str, tmp_path: Path) -> None:
    stack, plugin = stack_of(encoder=encoder)
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=0.05)
    inputs = example_inputs(stack.model)
    for _ in range(2):
        stack.train_step(inputs | {"labels": inputs["input_ids"]}, optimizer=optimizer)
    before = logits(stack)
    stack.save(tmp_path / "live")
    count = 1 + (16 + 4 if encoder == "lstm" else 6)
    assert len(load_file(tmp_path / "live" / f"{ID}.safetensors")) == count
    live = peftx.load(tmp_path / "live", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(live), before)
    for each in (stack, live):
        for _ in range(2):  # the second time there is nothing left to do
            each.plugins[ID].collapse()
            assert torch.equal(logits(each), before)
    assert plugin.state == {"collapsed": True}


def test_a_frozen_prompt_keeps_its_encoder() -> None:
    stack, plugin = stack_of(Lora(rank=2))
    stack.freeze(ID)
    before = plugin.prompt.embedding.weight.detach().clone()
    stack.train(ROWS, **OPTIONS)
    assert len(plugin.prompt.mlp_head) == 3
    assert torch.equal(plugin.prompt.embedding.weight, before)
    assert plugin.state == {}


def test_a_step_without_gradients_ends_the_same_way() -> None:
    stack, plugin = stack_of(Mezo())
    stack.train(ROWS, **OPTIONS)
    assert plugin.prompt.lstm_head is None


def test_a_run_that_was_cut_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, plugin = stack_of()
    whole.train(ROWS, output=tmp_path, checkpoint_every=1, **OPTIONS)
    again, other = stack_of()
    again.train(ROWS, output=tmp_path, resume=tmp_path / "checkpoint-2", **OPTIONS)
    assert torch.equal(plugin.prompt.embedding.weight, other.prompt.embedding.weight)
    assert other.prompt.lstm_head is None


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_computes_in_the_model_s_dtype(encoder: str) -> None:
    plugin = PTuning(length=3, hidden=5, encoder=encoder)
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    assert {p.dtype for p in plugin.prompt.parameters()} == {torch.bfloat16}
    before = logits(stack)
    plugin.collapse()
    assert torch.equal(logits(stack), before)


# -- options -----------------------------------------------------------------------------------------------------------


def test_the_released_sizes_are_the_defaults() -> None:
    config = PTuning().config
    assert (config.length, config.encoder, config.hidden, config.layers) == (9, "lstm", None, 2)
    assert (config.dropout, config.keep_encoder) == (0.0, False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"length": 0}, "length"),
        ({"encoder": "gru"}, "encoder"),
        ({"hidden": 0}, "hidden"),
        ({"layers": 0}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"encoder": "mlp", "layers": 3}, "of the LSTM, and this is the MLP"),
        ({"encoder": "mlp", "dropout": 0.1}, "of the LSTM, and this is the MLP"),
        ({"layers": 1, "dropout": 0.1}, "between layers, and layers is 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PeftxError, match=match):
        PTuning(**options)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(PeftxError, match="p-tuning: 128 soft tokens"):
        stack_of(length=128, arch="gpt2")


def test_refuses_models_without_tokens() -> None:
    with pytest.raises(ArchitectureError, match=r"p-tuning: vit has no token embedding"):
        stack_of(arch="vit")
