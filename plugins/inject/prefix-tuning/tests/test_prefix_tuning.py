from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.kernel.parts import AttentionPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.injecting import NetworkPrefix
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_prefix_tuning import PrefixEncoder, PrefixTuning

test_conformance = conformance("prefix-tuning")

ID = "prefix-tuning"
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
OPTIONS: dict[str, Any] = {"steps": 3, "batch_size": 2, "learning_rate": 0.05}


def stack_of(*others: Any, arch: str = "llama", **options: Any) -> tuple[Stack, PrefixTuning]:
    plugin = PrefixTuning(**{"length": 3, "hidden": 5, **options})
    return Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer()), plugin


def encoder(plugin: PrefixTuning) -> PrefixEncoder:
    return plugin.encoders[0][0]


def edits(stack: Stack) -> list[NetworkPrefix]:
    return [part.module for part in stack.ledger.of(ID, AttentionPart)]


def logits(stack: Stack, padding: str | None = "left") -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding=padding))


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


# -- the prefix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_equals_hf_peft(arch: str, hidden: int | None, padding: str | None) -> None:
    """Logits, loss and gradients, on the same weights under the same names."""
    from peft import PrefixTuningConfig, get_peft_model

    stack, plugin = stack_of(arch=arch, length=4, hidden=hidden)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        prefix_projection=hidden is not None,
        encoder_hidden_size=hidden,
    )
    theirs = get_peft_model(tiny(arch), config)
    mine, other = encoder(plugin), theirs.prompt_encoder["default"]
    other.load_state_dict(mine.state_dict())
    inputs = example_inputs(stack.model, padding=padding)
    real = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~real, -100)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(
        min=0
    )  # PEFT counts on from them
    one, two = (model(**inputs, labels=labels) for model in (stack.model.eval(), theirs.eval()))
    one.loss.backward()
    two.loss.backward()
    assert difference(one.logits[real], two.logits[real]) < 1e-6
    assert difference(one.loss, two.loss) < 1e-6
    found = dict(mine.named_parameters())
    assert found.keys() == dict(other.named_parameters()).keys()
    for name, parameter in other.named_parameters():
        assert difference(found[name].grad, parameter.grad) < 1e-6, name
        assert parameter.grad.abs().max() > 1e-4, name
    with stack.disabled(), torch.no_grad():
        assert difference(stack.model(**inputs).logits[real], two.logits[real]) > 0.05


def test_what_is_stored_is_what_hf_peft_stores(tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    stack, plugin = stack_of(length=4, hidden=6)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6
    )
    theirs = get_peft_model(tiny("llama"), config)
    theirs.prompt_encoder["default"].load_state_dict(encoder(plugin).state_dict())
    plugin.collapse()
    tensors = load_file(stack.save(tmp_path / "b") / f"{ID}.safetensors")
    assert len(tensors) == 1
    expected = theirs.get_prompt_embedding_to_save("default")
    assert difference(next(iter(tensors.values())), expected) < 1e-6


def test_the_network_by_hand() -> None:
    """Two attentions, of 4 and 2 columns: l = k = h = 1 and W_1 = 1, b_1 = 0, so that P is W_2 tanh(P') + b_2."""
    found = PrefixEncoder(1, 1, 1, 6)
    with torch.no_grad():
        found.embedding.weight.fill_(0.5)
        for parameter, value in zip(found.transform[0].parameters(), (1.0, 0.0), strict=True):
            parameter.fill_(value)
        found.transform[2].weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]))
        found.transform[2].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 7.0, 8.0]))
    half = 0.46211715726  # tanh(0.5)
    assert torch.allclose(found(slice(0, 4)), half * torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert torch.allclose(found(slice(4, 6)), torch.tensor([[5 * half + 7, 6 * half + 8]]))


def test_columns_are_all_keys_then_all_values() -> None:
    """Two heads of keys with two numbers, and of values with one: DeepSeek-V3's are narrower too."""
    stack, _ = stack_of()
    found = PrefixEncoder(2, 1, None, 9)
    found.embedding.weight.data = torch.arange(18.0).view(2, 9)
    edit = NetworkPrefix(found, slice(3, 9), edits(stack)[0].call, "rows")
    key, value = edit.keys_values(torch.full((2, 2, 1, 2), 70.0), torch.full((2, 2, 1, 1), 80.0))
    rows = [[[3.0, 4.0], [12.0, 13.0], [70.0, 70.0]], [[5.0, 6.0], [14.0, 15.0], [70.0, 70.0]]]
    assert key.tolist() == 2 * [rows]
    assert value.tolist() == 2 * [[[[7.0], [16.0], [80.0]], [[8.0], [17.0], [80.0]]]]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_equals_a_filled_cache(arch: str) -> None:
    """As the paper says it: the prefix is what a cache holds, and the text goes on behind it."""
    stack, _ = stack_of(arch=arch, length=4)
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        ours, cache = output_of(stack.model, inputs), DynamicCache()
        for layer, edit in enumerate(edits(stack)):
            empty = torch.zeros(2, 4 if arch == "gpt2" else 2, 0, 8)
            cache.update(*edit.keys_values(empty, empty), layer)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (4, 0), value=1)
        with stack.disabled():
            theirs = stack.model(inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
    assert difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_only_positions_tell_it_from_p_tuning_v2(arch: str) -> None:
    """The same rows there give the same once the text's positions are counted back; where nothing is counted on (an
    encoder, distances) they do so at once."""
    from peftx_p_tuning_v2 import PTuningV2

    stack, _ = stack_of(arch=arch, hidden=None)
    other = Stack(tiny(arch), [PTuningV2(length=3)], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for mine, part in zip(edits(stack), other.ledger.of("p-tuning-v2", AttentionPart), strict=True):
            rows = part.module.prompt.rows
            empty = torch.zeros(1, rows.shape[1], 0, rows.shape[-1])
            rows.copy_(torch.stack([x[0] for x in mine.keys_values(empty, empty)]))
        inputs = example_inputs(stack.model)
        one, two = (output_of(s.model.eval(), inputs) for s in (stack, other))
        counted = arch in ("llama", "gpt2")
        assert (difference(one, two) > 1e-3) == counted
        if counted:
            places = torch.arange(-3, inputs["input_ids"].shape[1] - 3)[None]
            again = output_of(stack.model, inputs | {"position_ids": places})
            assert difference(again, two) < 1e-6


def test_parameters_are_as_many_as_the_paper_says() -> None:
    layers, kv, length, h = 2, 16, 3, 5  # two heads of 8 for keys, and as many for values
    assert stack_of(hidden=None)[0].trainable_parameters() == length * layers * 2 * kv
    stack, _ = stack_of()
    assert stack.trainable_parameters() == length * kv + (kv + 1) * h + (h + 1) * layers * 2 * kv
    stack.train(ROWS, **OPTIONS)
    assert stack.trainable_parameters() == length * layers * 2 * kv


def test_a_tower_has_a_network_of_its_own() -> None:
    counts = {}
    for targets in ("attention", "attention tower=decoder", "attention cross_attention layers=1"):
        stack, plugin = stack_of(arch="t5", targets=targets)
        counts[targets] = [len(parts) for _, parts in plugin.encoders]
        assert len(edits(stack)) == sum(counts[targets])
    assert list(counts.values()) == [[2, 2], [2], [1, 1, 1]]
    stack, _ = stack_of(arch="t5", targets="attention tower=decoder")
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        found = stack.model(**inputs)
        with stack.disabled():
            base = stack.model(**inputs)
    assert torch.equal(found.encoder_last_hidden_state, base.encoder_last_hidden_state)
    assert difference(found.logits, base.logits) > 0.01


def test_layers_of_other_widths_share_a_network() -> None:
    """Gemma 4: heads of 8 numbers in the first layer and of 16 behind it; DeepSeek-V3: values narrower than keys."""
    for arch, widths in (("gemma4", None), ("deepseek_v3", [4 * (12 + 8)] * 2)):
        stack, plugin = stack_of(arch=arch)
        found = [part.stop - part.start for _, parts in plugin.encoders for part in parts]
        assert found == widths or (widths is None and len(set(found)) == 2)
        with torch.no_grad(), stack.disabled():
            base = output_of(stack.model, example_inputs(stack.model))
        assert difference(logits(stack, None), base) > 0.01


def test_cached_generation_equals_uncached() -> None:
    stack, _ = stack_of()
    inputs = example_inputs(stack.model, padding="left")
    kept = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    cached, uncached = (stack.model.generate(**inputs, use_cache=use, **kept) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_decoding_runs_the_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, plugin = stack_of()
    calls, forward = [], PrefixEncoder.forward
    monkeypatch.setattr(
        PrefixEncoder, "forward", lambda self, part: calls.append(part) or forward(self, part)
    )
    stack.model.generate(**example_inputs(stack.model), max_new_tokens=6, min_new_tokens=6)
    assert calls == plugin.encoders[0][1]


def test_the_network_trains_through_checkpointed_layers() -> None:
    gradients = []
    for checkpointing in (False, True):
        stack, _ = stack_of()
        stack.model.train()
        if checkpointing:
            stack.model.activation_checkpointing_enable({"use_reentrant": False})
        inputs = example_inputs(stack.model)
        stack.train_step({**inputs, "labels": inputs["input_ids"]})
        gradients.append([p.grad for p in stack.ledger.parameters(ID)])
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients[0])
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-7) for pair in zip(*gradients, strict=True))


def test_rows_in_front_that_are_measured_do_not_take_it_in() -> None:
    """PrefixQuant stores keys and values of outlier tokens: of these alone."""
    from peftx_prefixquant import PrefixQuant, StaticKV

    plugins = [PrefixTuning(length=5, hidden=None), PrefixQuant(eta=1.5)]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    stack.compress(["one two three four five six seven eight nine ten."] * 4)
    stored = {m.prefix.shape[2] for m in stack.model.modules() if isinstance(m, StaticKV)}
    assert stored == {len(stack.plugins["prefixquant"].state["prefix"])}


# -- the network goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_after_training_a_bundle_holds_the_prefix_alone_and_the_same_bits(
    arch: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    def trained(**options: Any) -> tuple[Stack, PrefixTuning]:
        plugin = PrefixTuning(length=3, hidden=5, **options)
        stack = Stack(tiny(arch).to(dtype), [plugin], tokenizer=tiny_tokenizer())
        stack.train(ROWS, **OPTIONS)
        return stack, plugin

    kept, live = trained(keep_network=True)
    stack, plugin = trained()
    P = [torch.cat([each(part) for part in parts], 1).detach() for each, parts in live.encoders]
    tensors = load_file(stack.save(tmp_path / "b") / f"{ID}.safetensors")
    assert [tuple(t.shape) for t in tensors.values()] == [tuple(p.shape) for p in P]
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert all(torch.equal(each.embedding.weight, p) for (each, _), p in zip(plugin.encoders, P, strict=True))
    loaded = peftx.load(tmp_path / "b", model=tiny(arch).to(dtype), tokenizer=tiny_tokenizer())
    assert not any(isinstance(module, torch.nn.Tanh) for module in loaded.model.modules())
    for found in (stack, loaded):
        assert torch.equal(logits(found), logits(kept))


def test_it_goes_with_the_last_update_and_not_before() -> None:
    seen = []
    stack, plugin = stack_of(Lora(rank=2))
    lora = next(stack.ledger.parameters("lora"))

    def look(done: int, total: int, values: Any) -> None:
        seen.append((len(encoder(plugin).transform), lora.detach().clone()))

    report = stack.train(ROWS, gradient_accumulation=2, progress=look, **OPTIONS)
    assert [count for count, _ in seen] == [3, 3, 0]
    assert report.trainable == stack.trainable_parameters()
    assert not torch.equal(seen[1][1], seen[2][1]), "the last update is made before"


def test_what_was_collapsed_trains_on_as_it_is(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    stack.train(ROWS, **OPTIONS)
    stack.save(tmp_path / "b")
    plain, other = stack_of(hidden=None)
    encoder(other).load_state_dict(encoder(plugin).state_dict())
    loaded = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
    before = encoder(plugin).embedding.weight.detach().clone()
    for each in (stack, plain, loaded):
        each.train(ROWS, **OPTIONS)
        assert torch.equal(next(iter(each.ledger.parameters(ID))), encoder(plugin).embedding.weight)
    assert not torch.equal(encoder(plugin).embedding.weight, before)


def test_a_loop_of_one_s_own_collapses_when_it_says_so(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=0.05)
    inputs = example_inputs(stack.model)
    for _ in range(2):
        stack.train_step(inputs | {"labels": inputs["input_ids"]}, optimizer=optimizer)
    before = logits(stack)
    assert len(load_file(stack.save(tmp_path / "live") / f"{ID}.safetensors")) == 5
    live = peftx.load(tmp_path / "live", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(live), before)
    for each in (stack, live):
        for _ in range(2):  # the second time there is nothing left to do
            each.plugins[ID].collapse()
            assert torch.equal(logits(each), before)
    assert plugin.state == {"collapsed": True}


def test_a_frozen_prefix_keeps_its_network() -> None:
    stack, plugin = stack_of(Lora(rank=2))
    stack.freeze(ID)
    before = logits(stack), encoder(plugin).embedding.weight.detach().clone()
    stack.train(ROWS, **OPTIONS)
    assert len(encoder(plugin).transform) == 3
    assert torch.equal(encoder(plugin).embedding.weight, before[1])
    assert plugin.state == {}
    plugin.collapse()
    assert not encoder(plugin).embedding.weight.requires_grad


def test_a_step_without_gradients_ends_the_same_way() -> None:
    stack, plugin = stack_of(Mezo())
    stack.train(ROWS, **OPTIONS)
    assert len(encoder(plugin).transform) == 0


def test_a_run_that_was_cut_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, plugin = stack_of()
    whole.train(ROWS, output=tmp_path, checkpoint_every=1, **OPTIONS)
    again, other = stack_of()
    again.train(ROWS, output=tmp_path, resume=tmp_path / "checkpoint-2", **OPTIONS)
    assert torch.equal(encoder(plugin).embedding.weight, encoder(other).embedding.weight)
    assert len(encoder(other).transform) == 0


# -- options -----------------------------------------------------------------------------------------------------------


def test_the_paper_s_sizes_are_the_defaults() -> None:
    config = PrefixTuning().config
    assert (config.length, config.hidden, config.keep_network) == (10, 512, False)
    assert stack_of(length=1, hidden=1)[0].trainable_parameters() == 16 + 17 + 2 * 64, "the least"


@pytest.mark.parametrize(
    "options", [{"length": 0}, {"hidden": 0}, {"targets": "layers=1"}, {"keep_network": 3}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"PrefixTuning: {next(iter(options))}"):
        PrefixTuning(**options)


@pytest.mark.parametrize("targets", ["attention layers=2", "cross_attention", "mlp"])
def test_targets_that_are_not_there(targets: str) -> None:
    with pytest.raises(PeftxError, match="prefix-tuning: "):
        stack_of(targets=targets)


def test_a_prefix_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(PeftxError, match="prefix-tuning: 128 "):
        stack_of(arch="gpt2", length=128)


@pytest.mark.parametrize("arch", ["mamba", "bloom", "gptj", "deberta_v2"])
def test_refuses_models_that_do_not_dispatch(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=r"prefix-tuning: .*(no attention layers|does not look its)"):
        stack_of(arch=arch)
