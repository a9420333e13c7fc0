"""Runs that train more than once from where they began."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftx import Claim, ModelView, Phase, Plugin, Stack, TrainStep, hookimpl
from peftx.engines.training.restarts import forget_moments, go_back, remember_start
from peftx.errors import TrainingError
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceGain

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


class Found(nn.Module):
    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.zeros(1))


class Measures(Plugin):
    """Goes by a number that its first step finds."""

    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.found = model.keep("found", Found())

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if step.index == 0 and step.first_micro:
            self.found.share.fill_(0.25)
        return (yield)


class Again(Plugin):
    """The second half begins where the first one did."""

    claims = {Claim.RESTARTS}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def phases(self) -> Sequence[Phase]:
        return (Phase("first", 0.5), Phase("second"))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        known = remember_start(step, self)
        if step.begins(self) and step.index:
            go_back(step, known)
            forget_moments(step)
        self.seen.append(next(step.stack.ledger.parameters("gain")).detach().clone())
        return (yield)


@pytest.mark.parametrize("first", [True, False], ids=["in front", "behind"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_a_first_step_finds_out_is_not_undone(first: bool, micro_batches: int) -> None:
    again, measures = Again(), Measures()
    own = [again, measures] if first else [measures, again]
    stack = Stack(tiny("llama"), [("gain", ReferenceGain()), *own], tokenizer=tiny_tokenizer())
    stack.train(ROWS, steps=4, batch_size=2, gradient_accumulation=micro_batches, learning_rate=1e-2)
    second = 2 * micro_batches
    assert measures.found.share.item() == 0.25
    assert torch.equal(again.seen[second], again.seen[0])
    assert not torch.equal(again.seen[second - 1], again.seen[0])


def test_a_resumed_run_goes_back_to_where_it_began(tmp_path: Path) -> None:
    def built() -> Stack:
        plugins = [("gain", ReferenceGain()), Again(), Measures()]
        return Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())

    options = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 2}
    straight, resumed = built(), built()
    straight.train(ROWS, output=tmp_path, **options)
    resumed.train(ROWS, output=tmp_path, resume=tmp_path / "checkpoint-2", **options)
    for one, other in zip(straight.ledger.parameters("gain"), resumed.ledger.parameters("gain"), strict=True):
        assert torch.equal(one, other)


def test_a_loop_that_forgets_the_start_is_told() -> None:
    stack = Stack(tiny("llama"), [("gain", ReferenceGain()), Again()], tokenizer=tiny_tokenizer())
    with pytest.raises(TrainingError, match="again: step 3 does not remember how the run started"):
        remember_start(TrainStep(stack, {}, index=3, total=4, memory={}), stack.plugins["again"])
