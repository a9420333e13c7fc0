from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_mezo import Mezo
from peftx_prompt_tuning import PromptTuning
from peftx_scaled_prompt_tuning import ScaledPrompt, ScaledPromptTuning

test_conformance = conformance("scaled-prompt-tuning")

ID = "scaled-prompt-tuning"
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
OPTIONS: dict[str, Any] = {"steps": 4, "batch_size": 2, "learning_rate": 0.05}
SCALES = ["features", "rows", "one"]


def stack_of(*others: Any, arch: str = "llama", **options: Any) -> tuple[Stack, ScaledPromptTuning]:
    plugin = ScaledPromptTuning(**{"length": 3, **options})
    return Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer()), plugin


def plain_of(P: Tensor, arch: str = "llama") -> tuple[Stack, torch.nn.Parameter]:
    """Prompt tuning with this prompt."""
    stack = Stack(tiny(arch), [PromptTuning(length=len(P))], tokenizer=tiny_tokenizer())
    (parameter,) = stack.ledger.parameters("prompt-tuning")
    parameter.data.copy_(P)
    return stack, parameter


def logits(stack: Stack) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model, padding="left"))


def run(stack: Stack, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(4):
        inputs = example_inputs(stack.model, seed=seed)
        stack.train_step(inputs | {"labels": inputs["input_ids"]}, optimizer=optimizer)


# -- the scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s", "rows", "s_grad"),
    [
        ([2.0, -1.0], [[2.0, -3.0], [-4.0, -0.5]], [1.0 - 10.0, 6.0 + 2.0]),
        ([[2.0], [-1.0]], [[2.0, 6.0], [2.0, -0.5]], [[1.0 + 6.0], [-10.0 + 2.0]]),
        ([0.5], [[0.5, 1.5], [-1.0, 0.25]], [1.0 + 6.0 - 10.0 + 2.0]),
    ],
)
def test_the_equation_by_hand(s: list[Any], rows: list[list[float]], s_grad: list[Any]) -> None:
    P, slope = torch.tensor([[1.0, 3.0], [-2.0, 0.5]]), torch.tensor([[1.0, 2.0], [5.0, 4.0]])
    prompt = ScaledPrompt(P.clone(), torch.tensor(s))
    found = prompt.rows()
    assert found.tolist() == rows
    (found * slope).sum().backward()
    assert prompt.s.grad.tolist() == s_grad, "the sum over rows of dL/dP~ * P, where s is one for all of them"
    assert torch.equal(prompt.P.grad, prompt.s.detach() * slope)


@pytest.mark.parametrize("scale", SCALES)
def test_the_gradient_of_s_in_a_model(scale: str) -> None:
    stack, plugin = stack_of(scale=scale)
    prompt = plugin.prompt
    prompt.s.data.add_(torch.linspace(-0.5, 0.5, prompt.s.numel()).view_as(prompt.s))
    plain, P = plain_of(prompt.rows().detach())
    inputs = example_inputs(stack.model)
    for each in (stack, plain):
        each.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = P.grad * prompt.P.detach()
    kept = {"features": expected.sum(0), "rows": expected.sum(1, keepdim=True), "one": expected.sum()[None]}
    torch.testing.assert_close(prompt.s.grad, kept[scale], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prompt.P.grad, P.grad * prompt.s.detach(), rtol=1e-4, atol=1e-6)
    assert prompt.s.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("scale", "numbers"), [("features", 32), ("rows", 3), ("one", 1)])
def test_as_many_numbers_more_than_the_prompt(scale: str, numbers: int) -> None:
    stack, _ = stack_of(scale=scale)
    assert stack.trainable_parameters() == 3 * 32 + numbers
    stack.train(ROWS, **OPTIONS)
    assert stack.trainable_parameters() == 3 * 32


@pytest.mark.parametrize(
    ("arch", "scale"),
    [("llama", "features"), ("gpt2", "rows"), ("t5", "one"), ("bert", "features"), ("gemma", "rows")],
)
def test_it_starts_as_plain_prompt_tuning(arch: str, scale: str) -> None:
    stack, plugin = stack_of(arch=arch, scale=scale)
    assert (plugin.prompt.s == 1).all()
    assert torch.equal(logits(stack), logits(plain_of(plugin.prompt.P.detach(), arch)[0]))
    embedding = stack.model.get_input_embeddings()
    every = embedding(torch.arange(embedding.num_embeddings)).detach()  # Gemma's are scaled
    found = [int((every == row).all(1).nonzero()) for row in plugin.prompt.P]
    assert len(set(found)) == 3


def test_with_s_at_rest_it_trains_as_plain_prompt_tuning() -> None:
    stack, plugin = stack_of()
    plain, P = plain_of(plugin.prompt.P.detach())
    run(stack, torch.optim.AdamW([plugin.prompt.P], lr=0.1))
    run(plain, torch.optim.AdamW([P], lr=0.1))
    assert torch.equal(plugin.prompt.P.data, P.data)
    assert torch.equal(logits(stack), logits(plain))


@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_is_learned(scale: str) -> None:
    stack, plugin = stack_of(scale=scale, keep_scale=True)
    plain, P = plain_of(plugin.prompt.P.detach())
    stack.train(ROWS, **OPTIONS)
    plain.train(ROWS, **OPTIONS)
    assert ((plugin.prompt.s - 1).abs() > 1e-3).all()
    assert (plugin.prompt.rows() - P).abs().max() > 1e-2


def test_the_seed_draws_the_tokens() -> None:
    P = [
        Stack(tiny("llama"), [ScaledPromptTuning(length=3)], seed=seed).plugins[ID].prompt.P.detach()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(P[0], P[1])
    assert not torch.equal(P[0], P[2])


def test_more_rows_than_tokens_start_as_tokens_too() -> None:
    small = Stack(tiny("llama", vocab_size=16), [ScaledPromptTuning(length=40)], tokenizer=tiny_tokenizer())
    P = small.plugins[ID].prompt.P.detach()
    assert torch.equal(P[:16], P[16:32])
    assert len(P.unique(dim=0)) == 16
    _, plugin = stack_of(length=40)
    assert len(plugin.prompt.P.unique(dim=0)) == 40


# -- it folds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "arch"), [("features", "llama"), ("rows", "llama"), ("one", "gpt2"), ("features", "t5")]
)
def test_a_bundle_holds_the_product_and_the_same_bits(
    scale: str, arch: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    def trained(**options: Any) -> tuple[Stack, ScaledPrompt]:
        plugin = ScaledPromptTuning(length=3, scale=scale, **options)
        stack = Stack(tiny(arch).to(dtype), [plugin], tokenizer=tiny_tokenizer())
        stack.train(ROWS, **OPTIONS)
        return stack, plugin.prompt

    kept, live = trained(keep_scale=True)
    product = (live.s * live.P).detach()
    assert not torch.equal(product, live.P)
    stack, prompt = trained()
    assert prompt.s is None
    stack.save(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / f"{ID}.safetensors")
    assert [(t.dtype, tuple(t.shape)) for t in tensors.values()] == [(dtype, (3, 32))]
    assert torch.equal(next(iter(tensors.values())), product)
    loaded = peftx.load(tmp_path / "b", model=tiny(arch).to(dtype), tokenizer=tiny_tokenizer())
    for found in (stack, loaded):
        assert torch.equal(logits(found), logits(kept))


def test_it_folds_with_the_last_update_and_not_before() -> None:
    seen = []
    stack, plugin = stack_of(Lora(rank=2))

    def look(done: int, total: int, values: Any) -> None:
        seen.append(plugin.prompt.s is not None)

    report = stack.train(ROWS, gradient_accumulation=2, progress=look, **OPTIONS)
    assert seen == [True, True, True, False]
    assert report.trainable == stack.trainable_parameters()


def test_what_was_folded_trains_on_as_a_plain_prompt(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    stack.train(ROWS, **OPTIONS)
    stack.save(tmp_path / "b")
    plain, expected = plain_of(plugin.prompt.P.detach())
    loaded = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
    for each in (stack, plain, loaded):
        each.train(ROWS, **OPTIONS)
    for each in (stack, loaded):
        (P,) = each.ledger.parameters(ID)
        assert torch.equal(P, expected)


def test_prompt_and_scale_go_to_another_task(tmp_path: Path) -> None:
    """Intermediate SPT: what a bundle brings trains on there as if it had never been saved, and folds at the end."""
    stack, plugin = stack_of(keep_scale=True)
    stack.train(ROWS, **OPTIONS)
    s = plugin.prompt.s.detach().clone()
    stack.save(tmp_path / "source")
    loaded = peftx.load(tmp_path / "source", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(loaded.plugins[ID].prompt.s, s)
    assert torch.equal(logits(loaded), logits(stack))
    target = [{"prompt": f"after {n}:", "completion": f" {n * 2}"} for n in range(8)]
    for each in (stack, loaded):
        each.train(target, **OPTIONS)
        assert not torch.equal(each.plugins[ID].prompt.s, s)
    before = logits(loaded)
    assert torch.equal(before, logits(stack))
    for _ in range(2):  # the second time there is nothing left to do
        loaded.plugins[ID].fold()
        assert torch.equal(logits(loaded), before)
    assert loaded.plugins[ID].state == {"folded": True}


def test_a_loop_of_one_s_own_folds_when_it_says_so(tmp_path: Path) -> None:
    stack, plugin = stack_of()
    run(stack, torch.optim.AdamW(stack.ledger.parameters(ID), lr=0.05))
    before = logits(stack)
    stack.save(tmp_path / "live")
    assert len(load_file(tmp_path / "live" / f"{ID}.safetensors")) == 2
    plugin.fold()
    assert torch.equal(logits(stack), before)
    stack.save(tmp_path / "b")
    assert len(load_file(tmp_path / "b" / f"{ID}.safetensors")) == 1
    again = peftx.load(tmp_path / "b", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again), before)


def test_a_frozen_prompt_keeps_its_scale() -> None:
    stack, plugin = stack_of(Lora(rank=2))
    stack.freeze(ID)
    stack.train(ROWS, **OPTIONS)
    assert (plugin.prompt.s == 1).all()
    assert "folded" not in plugin.state


def test_a_step_without_gradients_ends_the_same_way() -> None:
    stack, plugin = stack_of(Mezo())
    stack.train(ROWS, **OPTIONS)
    assert plugin.prompt.s is None


def test_a_run_that_was_cut_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, plugin = stack_of()
    whole.train(ROWS, output=tmp_path, checkpoint_every=3, **OPTIONS)
    again, other = stack_of()
    again.train(ROWS, output=tmp_path, checkpoint_every=3, resume=tmp_path / "checkpoint-3", **OPTIONS)
    assert torch.equal(plugin.prompt.P, other.prompt.P)
    assert other.prompt.s is None


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"length": 0}, {"scale": "layers"}, {"keep_scale": 2}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))):
        ScaledPromptTuning(**options)
