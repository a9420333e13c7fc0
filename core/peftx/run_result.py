"""What a run of a pipeline left."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peftx.engines.data.sources import HeldOut
from peftx.engines.training.run import TrainingReport
from peftx.stack import Stack

if TYPE_CHECKING:
    from peftx.toolkits.evaluation import Score


@dataclass
class RunResult:
    """What a run left."""

    stack: Stack
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    """By name of the evaluation stage."""
    training: list[TrainingReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    trainable: int = 0
    output: Path | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    held_out: HeldOut | None = None
    """What was evaluated on, where it was taken from the training data."""
