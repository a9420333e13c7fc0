"""Runs that train more than once from where they began: phase by phase anew, or all but what a phase is for."""

from __future__ import annotations

from typing import Any

import torch

from peftx.engines.training.step import TrainStep
from peftx.engines.training.updates import forget
from peftx.errors import TrainingError
from peftx.kernel.plugin import Plugin

START = "start"
"""In a plugin's memory of a run."""


def remember_start(step: TrainStep, plugin: Plugin, *, but: str = "") -> dict[str, Any]:
    """The plugin's memory of the run, kept in checkpoints, which has under `start` what all that trains was at first,
    as `Ledger.trained` names it. To be called in each step that is to know it.

    That is as of the first update: in its first step a plugin may measure what it goes by, or begin where the data
    says, and this is not to be undone.

    Args:
        but: an owner that is left out.

    Raises:
        TrainingError: a step behind the first one, which remembers no start.
    """
    known: dict[str, Any] = step.memory.setdefault(step.stack.id_of(plugin), {})

    def note(_: object = None) -> None:
        known[START] = {name: x.detach().clone() for name, x in step.stack.ledger.trained(but=but).items()}

    if step.index == 0:
        if step.first_micro:
            known.clear()
            note()  # for what this very step asks of it
        step.before_update(note)
    if START not in known:
        raise TrainingError(
            f"{step.stack.id_of(plugin)}: step {step.index} does not remember how the run started",
            hint="begin at step 0; give all steps of a loop of your own one `memory`",
        )
    return known


@torch.no_grad()
def go_back(step: TrainStep, known: dict[str, Any]) -> None:
    """All that `remember_start` noted is as it was at first."""
    now = step.stack.ledger.trained()
    for name, value in known[START].items():
        now[name].copy_(value)


def forget_moments(step: TrainStep) -> None:
    """The update of this step is the first of its phase, for the optimizer too."""
    if step.last_micro:
        step.before_update(lambda optimizer: forget(optimizer, step.parameters()))
