"""Parameters that take longer or shorter steps than the others of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftx.engines.training.step import TrainStep


def at_rates(step: TrainStep, rates: Sequence[tuple[nn.Parameter, float | Tensor]]) -> None:
    """Multiply what this step's update changes of each parameter, whatever the optimizer is.

        p -> p_before + rate (p_after - p_before)

    Args:
        rates: a parameter, and its rate over the run's: a number, or a tensor that broadcasts to the parameter's shape.
    """
    before: list[Tensor] = []

    @torch.no_grad()
    def change(_: object) -> None:
        for (p, rate), old in zip(rates, before, strict=True):
            p.copy_(old.lerp(p, rate))

    step.before_update(lambda _: before.extend(p.detach().clone() for p, _ in rates))
    step.after_update(change)
