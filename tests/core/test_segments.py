"""A loss that is computed segment by segment is the loss, and no more than a segment's logits are there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peftx import Stack
from peftx.engines.training import TrainStep
from peftx.engines.training.segments import has_plain_loss, segmented_loss
from peftx.engines.training.step import run_train_step
from peftx.errors import UnsupportedError
from peftx.testing.models import tiny
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning


def batch() -> dict[str, Tensor]:
    """Two rows of 11 tokens; the first four have no label, and the last three of the second row are pads."""
    ids = torch.randint(5, 300, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("size", [1, 4, 11, 100])
def test_loss_and_gradients_are_those_of_the_whole(size: int) -> None:
    torch.manual_seed(0)
    head, labels = nn.Linear(8, 300, bias=False), batch()["labels"]
    states = torch.randn(2, 11, 8, requires_grad=True)
    whole = nn.functional.cross_entropy(
        head(states)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    found = segmented_loss(states, labels, head, size)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, (states, head.weight)),
        torch.autograd.grad(3 * whole, (states, head.weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_without_labels_it_is_no_number_as_the_models_is() -> None:
    labels = torch.full((1, 4), -100)
    assert segmented_loss(torch.randn(1, 4, 8), labels, nn.Linear(8, 9), 2).isnan()


def step_of(
    arch: str, size: int | None, change: Callable[[TrainStep], None] | None = None
) -> tuple[Tensor, ...]:
    """Loss, gradients of a LoRA that has the head too, and the most rows that the head read at once."""
    torch.manual_seed(0)
    stack = Stack(tiny(arch), [Lora(rank=2, targets="all head")])
    for p in stack.ledger.parameters("lora"):
        nn.init.normal_(p.data, std=0.3)
    rows: list[int] = []
    stack.model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, logits: rows.append(logits.shape[:-1].numel())
    )
    step = TrainStep(stack, batch())
    if size is not None:
        step.segment_task_loss(size)
    if change is not None:
        change(step)
    loss = run_train_step(step)
    gradients = [p.grad for p in stack.ledger.parameters("lora")]
    assert all(g is not None for g in gradients)
    return loss, torch.cat([g.flatten() for g in gradients if g is not None]), torch.tensor(max(rows))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gpt_neox", "mixtral"])
def test_a_step_in_segments_is_the_step(arch: str) -> None:
    loss, gradients, _ = step_of(arch, None)
    ours, theirs, rows = step_of(arch, 3)
    torch.testing.assert_close(ours, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs, gradients, atol=1e-5, rtol=1e-4)
    assert rows == 3


def test_a_short_batch_stays_whole() -> None:
    assert step_of("llama", 22)[2] == 22
    assert step_of("llama", 21)[2] <= 21


def test_a_term_has_the_logits_of_all_tokens() -> None:
    seen: list[Tensor] = []

    def term(step: TrainStep) -> None:
        step.add_loss("largest", lambda outputs: seen.append(outputs.logits) or outputs.logits.max() * 0)

    loss, gradients, _ = step_of("llama", 3, term)
    assert seen[0].shape[:2] == (2, 11)
    whole = step_of("llama", None)
    assert torch.equal(loss, whole[0])
    assert torch.equal(gradients, whole[1])


def test_losses_that_are_more_than_the_heads() -> None:
    """Gemma 2 bounds its logits, BART has an encoder, soft tokens have states of their own."""
    assert not has_plain_loss(tiny("gemma2"))
    assert not has_plain_loss(tiny("bart"))
    assert not has_plain_loss(Stack(tiny("llama"), [PromptTuning(length=2)]).model)
    routed = tiny("mixtral")
    assert has_plain_loss(routed)
    routed.config.output_router_logits = True
    assert not has_plain_loss(routed)
    assert torch.equal(step_of("gemma2", 3)[0], step_of("gemma2", None)[0])


def test_logits_that_somebody_changes_are_refused() -> None:
    def double(step: TrainStep) -> None:
        def twice(_module: nn.Module, _args: object, outputs: dict[str, Tensor]) -> object:
            outputs["logits"] = 2 * outputs["logits"]
            return outputs

        step.model.register_forward_hook(twice)

    with pytest.raises(UnsupportedError, match="the model's logits are not those of its head"):
        step_of("llama", 3, double)
