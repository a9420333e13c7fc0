from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.errors import PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.evaluation import Score
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_prompt_tuning import PromptTuning
from peftx_residual_prompt_tuning import ResidualPrompt, ResidualPromptTuning, network

test_conformance = conformance("residual-prompt-tuning")

ID = "residual-prompt-tuning"
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
OPTIONS: dict[str, Any] = {"steps": 4, "batch_size": 2, "learning_rate": 0.05}

# What the official `ResMLP` gives for the waves below, d = 4, m = 5, with a skip connection and LayerNorm (float32):
# P', and the gradients of P and of the network; with one network, and with one for each of three rows. Made once by
# running that class outside this repository; the README says which commit.
OFFICIAL = {
    False: [
        [1.962238, 1.074964, 0.613631, 0.632617],
        [0.9938326, -1.302165, 0.4557948, -0.8256654],
        [1.268407, 0.9006974, 0.6297192, 1.176603],
    ],
    True: [
        [1.962238, 1.074964, 0.613631, 0.632617],
        [1.052246, -0.9840629, 0.3820381, -1.011862],
        [1.501196, 0.6935924, 2.104931, 0.4739696],
    ],
}
OFFICIAL_P = {
    False: [
        [0.9392555, 0.5316064, -0.6326921, -0.7943313],
        [0.1484776, 0.9659005, 0.3233714, -0.78702],
        [-0.7826127, 0.4121774, 0.9921355, 0.1259916],
    ],
    True: [
        [0.9392555, 0.5316064, -0.6326921, -0.7943313],
        [0.1881904, 1.002538, 0.3535338, -0.7671268],
        [-0.8246349, 0.370744, 0.95838, 0.1048757],
    ],
}
OFFICIAL_NETWORK = {
    "down.weight": [
        [0.04154921, 0.07142763, 0.06771251, 0.03215114],
        [-0.00602216, -0.01606968, -0.01855937, -0.01232031],
        [-0.02371361, -0.02905472, -0.02073092, -0.00265705],
        [0.006512284, 0.01618079, 0.01823921, 0.01171945],
        [-0.01697534, -0.04217787, -0.0475435, -0.03054868],
    ],
    "down.bias": [0.0766379, -0.01992784, -0.1925918, -0.01856498, 0.04839267],
    "up.weight": [
        [0.02218941, 0.1297241, 0.1080144, 0.060676, 0.0443697],
        [0.2591146, 0.4337083, 0.2338478, 0.255153, 0.1865822],
        [-0.2339769, -0.4013143, -0.1057288, 0.1418718, 0.1037446],
        [-0.0473271, -0.1621182, -0.2361333, -0.4577008, -0.3346965],
    ],
    "up.bias": [0.03899461, 0.1969877, -0.07535432, -0.160628],
    "norm.weight": [0.4759747, -2.247507, -0.1629034, -0.4803769],
    "norm.bias": [0.4166945, 1.934212, 0.6181049, -1.603527],
}


def stack_of(*others: Any, arch: str = "llama", **options: Any) -> tuple[Stack, ResidualPromptTuning]:
    plugin = ResidualPromptTuning(**{"length": 3, "bottleneck": 5, **options})
    return Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer()), plugin


def logits(stack: Stack) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding="left"))


def wave(*shape: int, f: float) -> Tensor:
    return torch.sin(torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float32) * f).reshape(shape)


def waves(separate: bool) -> ResidualPrompt:
    networks = [network(4, 5) for _ in range(3 if separate else 1)]
    with torch.no_grad():
        for i, each in enumerate(networks):
            for k, p in enumerate(each.parameters()):
                p.copy_(wave(*p.shape, f=0.3 + 0.1 * k + 0.05 * i))
    return ResidualPrompt(wave(3, 4, f=0.7), networks)


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True])
def test_equals_the_official_network(separate: bool) -> None:
    prompt = waves(separate)
    found = prompt.rows()
    (found * wave(3, 4, f=1.3)).sum().backward()
    torch.testing.assert_close(found, torch.tensor(OFFICIAL[separate]), rtol=0, atol=2e-6)
    torch.testing.assert_close(prompt.P.grad, torch.tensor(OFFICIAL_P[separate]), rtol=0, atol=2e-6)
    if not separate:
        for name, expected in OFFICIAL_NETWORK.items():
            gradient = prompt.Phi[0].get_parameter(name).grad
            torch.testing.assert_close(gradient, torch.tensor(expected), rtol=0, atol=2e-6, msg=name)


def test_the_equation_by_hand() -> None:
    """d = 2, m = 1: LayerNorm makes (a, b) with a > b into (1, -1), but for its epsilon."""
    Phi = network(2, 1)
    with torch.no_grad():
        Phi.down.weight.copy_(torch.tensor([[1.0, 2.0]]))
        Phi.down.bias.fill_(-1.0)
        Phi.up.weight.copy_(torch.tensor([[3.0], [1.0]]))
        Phi.up.bias.copy_(torch.tensor([0.0, 10.0]))
        Phi.norm.weight.copy_(torch.tensor([2.0, 5.0]))
        Phi.norm.bias.copy_(torch.tensor([0.5, 0.0]))
    found = ResidualPrompt(torch.tensor([[1.0, 0.5], [40.0, 1.0], [-9.0, 1.0]]), [Phi]).rows()
    # relu: 1, 41, 0; W_2 h + b_2: (3, 11), (123, 51), (0, 10)
    expected = torch.tensor([[1 - 1.5, 0.5 + 5], [40 + 2.5, 1 - 5], [-9 - 1.5, 1 + 5]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_rows_are_mapped_each_by_itself() -> None:
    prompt, order = waves(False), torch.tensor([2, 0, 1])
    found = prompt.rows()
    moved = ResidualPrompt(prompt.P.detach()[order], prompt.Phi).rows()
    torch.testing.assert_close(moved, found[order], rtol=0, atol=1e-7)
    each = waves(True)
    for row in range(3):
        alone = ResidualPrompt(each.P.detach()[row : row + 1], [each.Phi[row]]).rows()
        torch.testing.assert_close(alone, each.rows()[row : row + 1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "bert", "gemma"])
@torch.no_grad()
def test_without_what_the_network_adds_it_is_prompt_tuning(arch: str) -> None:
    stack, plugin = stack_of(arch=arch)
    plain = Stack(tiny(arch), [PromptTuning(length=3)], tokenizer=tiny_tokenizer())
    (P,) = plain.ledger.parameters("prompt-tuning")
    P.copy_(plugin.prompt.P)
    assert (logits(stack) - logits(plain)).abs().max() > 1e-3, "there is no zero start"
    (Phi,) = plugin.prompt.Phi
    for parameter in (*Phi.up.parameters(), *Phi.norm.parameters()):
        parameter.zero_()
    assert torch.equal(logits(stack), logits(plain))


@pytest.mark.parametrize(("separate", "networks"), [(False, 1), (True, 3)])
def test_parameters_are_as_many_as_the_paper_says(separate: bool, networks: int) -> None:
    n, d, m = 3, 32, 5
    stack, _ = stack_of(separate=separate)
    assert stack.trainable_parameters() == n * d + networks * (2 * d * m + m + d + 2 * d)
    stack.train(ROWS, **OPTIONS)
    assert stack.trainable_parameters() == n * d


def test_the_paper_s_sizes_are_the_defaults() -> None:
    config = ResidualPromptTuning().config
    assert (config.length, config.bottleneck, config.separate, config.keep_network) == (10, 800, False, False)


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_rows_start_as_embeddings_of_tokens_and_none_twice(arch: str) -> None:
    stack, plugin = stack_of(arch=arch, length=8)
    embedding = stack.model.get_input_embeddings()
    every = embedding(torch.arange(embedding.num_embeddings)).detach()  # Gemma's are scaled
    found = [int((every == row).all(1).nonzero()) for row in plugin.prompt.P]
    assert len(set(found)) == 8
    other = Stack(tiny(arch), [ResidualPromptTuning(length=8)], tokenizer=tiny_tokenizer(), seed=1)
    assert not torch.equal(next(other.ledger.parameters(ID)), plugin.prompt.P)


def test_more_rows_than_tokens_start_as_tokens_too() -> None:
    _, plugin = stack_of(length=40, arch="llama")
    small = Stack(tiny("llama", vocab_size=16), [ResidualPromptTuning(length=40)], tokenizer=tiny_tokenizer())
    P = small.plugins[ID].prompt.P.detach()
    assert torch.equal(P[:16], P[16:32])
    assert len(P.unique(dim=0)) == 16
    assert len(plugin.prompt.P.unique(dim=0)) == 40


# -- the network goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("separate", [False, True])
def test_after_training_a_bundle_holds_n_times_d_numbers_and_the_same_bits(
    separate: bool, arch: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    def trained(**options: Any) -> tuple[Stack, ResidualPrompt]:
        plugin = ResidualPromptTuning(length=3, bottleneck=5, separate=separate, **options)
        stack = Stack(tiny(arch).to(dtype), [plugin], tokenizer=tiny_tokenizer())
        stack.train(ROWS, **OPTIONS)
        return stack, plugin.prompt

    kept, live = trained(keep_network=True)
    P = live.rows().detach()
    assert len(live.Phi) == (3 if separate else 1)
    stack, prompt = trained()
    assert len(prompt.Phi) == 0
    stack.save(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / f"{ID}.safetensors")
    assert [(t.dtype, tuple(t.shape)) for t in tensors.values()] == [(dtype, (3, 32))]
    assert torch.equal(next(iter(tensors.values())), P)
    loaded = peftx.load(tmp_path / "b", model=tiny(arch).to(dtype), tokenizer=tiny_tokenizer())
    assert not any(isinstance(module, nn.LayerNorm) for module in loaded.plugins[ID].prompt.modules())
    plain = Stack(tiny(arch).to(dtype), [PromptTuning(length=3)], tokenizer=tiny_tokenizer())
    next(plain.ledger.parameters("prompt-tuning")).data.copy_(P)
    for found in (stack, loaded, plain):
        assert torch.equal(logits(found), logits(kept))


def test_it_goes_with_the_last_update_and_not_before() -> None:
    seen = []
    stack, plugin = stack_of(Lora(rank=2))
    lora = next(stack.ledger.parameters("lora"))

    def look(done: int, total: int, values: Any) -> None:
        seen.append((len(plugin.prompt.Phi), plugin.prompt.P.detach().clone(), lora.detach().clone()))

    report = stack.train(ROWS, gradient_accumulation=2, progress=look, **OPTIONS)
    assert [count for count, _, _ in seen] == [1, 1, 1, 0]
    assert report.trainable == stack.trainable_parameters()
    assert not torch.equal(seen[2][2], seen[3][2]), "the last update is made before"


def test_the_last_update_reaches_the_stored_prompt() -> None:
    """By one plain step: P' of the updated P and Phi."""
    stack, plugin = stack_of()
    stack.train(ROWS, **{**OPTIONS, "steps": 1})
    kept, other = stack_of(keep_network=True)
    before = other.prompt.rows().detach().clone()
    kept.train(ROWS, **{**OPTIONS, "steps": 1})
    assert not torch.equal(other.prompt.rows(), before)
    assert torch.equal(plugin.prompt.P, other.prompt.rows())


def test_what_was_collapsed_trains_on_as_a_plain_prompt(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    stack.train(ROWS, **OPTIONS)
    stack.save(tmp_path / "b")
    plain = Stack(tiny("llama"), [PromptTuning(length=3)], tokenizer=tiny_tokenizer())
    next(plain.ledger.parameters("prompt-tuning")).data.copy_(plugin.prompt.P.data)
    loaded = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
    for each in (stack, plain, loaded):
        each.train(ROWS, **OPTIONS)
    (expected,) = plain.ledger.parameters("prompt-tuning")
    for each in (stack, loaded):
        (P,) = each.ledger.parameters(ID)
        assert torch.equal(P, expected)


def test_a_loop_of_one_s_own_collapses_when_it_says_so(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    optimizer = torch.optim.AdamW([p for p in stack.model.parameters() if p.requires_grad], lr=0.05)
    inputs = example_inputs(stack.model)
    for _ in range(2):
        stack.train_step(inputs | {"labels": inputs["input_ids"]}, optimizer=optimizer)
    before = logits(stack)
    stack.save(tmp_path / "live")
    assert len(load_file(tmp_path / "live" / f"{ID}.safetensors")) == 7
    live = peftx.load(tmp_path / "live", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(live), before)
    for each in (stack, live):
        for _ in range(2):  # the second time there is nothing left to do
            each.plugins[ID].collapse()
            assert torch.equal(logits(each), before)
    stack.save(tmp_path / "b")
    assert len(load_file(tmp_path / "b" / f"{ID}.safetensors")) == 1
    assert plugin.state == {"collapsed": True}


def test_a_frozen_prompt_keeps_its_network() -> None:
    stack, plugin = stack_of(Lora(rank=2))
    stack.freeze(ID)
    before = logits(stack), plugin.prompt.P.detach().clone()
    stack.train(ROWS, **OPTIONS)
    assert len(plugin.prompt.Phi) == 1
    assert torch.equal(plugin.prompt.P, before[1])
    assert "collapsed" not in plugin.state


def test_the_best_state_comes_back_with_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    values, seen = iter([1.0, 2.0, 3.0]), []
    monkeypatch.setattr(
        Stack, "measuring", lambda self, rows: lambda name, _: {name: Score(name=name, value=next(values))}
    )
    stack, plugin = stack_of()
    x = example_inputs(stack.model)

    def look(*_: Any) -> None:
        stack.model.eval()
        with torch.no_grad():
            seen.append(output_of(stack.model, x))
        stack.model.train()

    options = {"eval_steps": 1, "load_best_model_at_end": True, "progress": look, "measured": ROWS}
    stack.train(ROWS, steps=3, batch_size=2, learning_rate=1e-2, **options)
    assert "collapsed" not in plugin.state
    with torch.no_grad():
        assert torch.equal(output_of(stack.model, x), seen[0])


def test_a_step_without_gradients_ends_the_same_way() -> None:
    stack, plugin = stack_of(Mezo())
    stack.train(ROWS, **OPTIONS)
    assert len(plugin.prompt.Phi) == 0


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_that_was_cut_ends_in_the_same_bits(at: int, tmp_path: Path) -> None:
    whole, plugin = stack_of()
    whole.train(ROWS, output=tmp_path, checkpoint_every=at, **OPTIONS)
    again, other = stack_of()
    again.train(ROWS, output=tmp_path, checkpoint_every=at, resume=tmp_path / "checkpoint-3", **OPTIONS)
    assert torch.equal(plugin.prompt.P, other.prompt.P)
    assert len(other.prompt.Phi) == 0


def test_a_run_that_keeps_its_network_can_be_lengthened(tmp_path: Path) -> None:
    whole, plugin = stack_of(keep_network=True)
    options = {**OPTIONS, "schedule": "constant", "output": tmp_path}
    whole.train(ROWS, **options)
    again, other = stack_of(keep_network=True)
    again.train(ROWS, resume=True, **{**options, "steps": 6})
    straight, expected = stack_of(keep_network=True)
    straight.train(ROWS, **{**options, "steps": 6, "output": None})
    assert torch.equal(other.prompt.rows(), expected.prompt.rows())
    assert not torch.equal(other.prompt.rows(), plugin.prompt.rows())


def test_the_network_computes_in_the_model_s_dtype(tmp_path: Path) -> None:
    plugin = ResidualPromptTuning(length=3, bottleneck=5)
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    assert {p.dtype for p in plugin.prompt.parameters()} == {torch.bfloat16}
    before = logits(stack)
    plugin.collapse()
    assert torch.equal(logits(stack), before)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"length": 0}, {"bottleneck": 0}, {"separate": 2}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        ResidualPromptTuning(**options)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(PeftxError, match="residual-prompt-tuning: 128 soft tokens"):
        stack_of(length=128, arch="gpt2")
