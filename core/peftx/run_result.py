"""What a run of a pipeline left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peftx.engines.data.sources import HeldOut
from peftx.engines.training.run import TrainingReport
from peftx.stack import Stack

if TYPE_CHECKING:
    from peftx.toolkits.evaluation import Score
    from peftx_spec.stages import RunStage


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

    def moment(self, before: Sequence[RunStage]) -> str:
        """A name for an evaluation that has none: behind which change of the model it stands, by the stages before."""
        changes = [stage.kind for stage in before if stage.kind not in ("evaluate", "save")]
        name = f"after {changes[-1]}" if changes else "base"
        same = sum(known == name or known.startswith(f"{name} #") for known in self.scores)
        return f"{name} #{same + 1}" if same else name
