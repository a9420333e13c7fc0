"""What a trainer of a stack does with each micro-batch, whoever wrote the rest of the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from peftx.engines.training.shares import Share, shares
from peftx.engines.training.step import TrainStep

if TYPE_CHECKING:
    from peftx.engines.training.feeders import Feeder
    from peftx.kernel.stack import Stack


class Stepping(Trainer):
    """Makes a step of the stack of each micro-batch."""

    stack: Stack
    _micro = 0
    _shares: Sequence[Share] = ()

    def begin(self, batches: Sequence[dict[str, Any]]) -> None:
        """These are the micro-batches of the next optimizer step; what part of it each is, is known from here on."""
        self._micro = 0
        self._shares = shares(self.stack.model, batches) if len(batches) > 1 else ()

    def step_of(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        memory: dict[str, Any],
        sources: Mapping[str, Feeder] | None = None,
    ) -> TrainStep:
        """The step of the next micro-batch."""
        model.train()
        accumulation = self.current_gradient_accumulation_steps
        step = TrainStep(
            self.stack,
            self._prepare_inputs(inputs),
            model=model,
            index=self.state.global_step,
            micro=self._micro,
            accumulation=accumulation,
            total=self.state.max_steps,
            learning_rate=self._get_learning_rate(),
            share=self._shares[self._micro] if self._shares else None,
            memory=memory,
            backward=self.accelerator.backward,
            sources=sources,
        )
        self._micro = (self._micro + 1) % accumulation
        return step
