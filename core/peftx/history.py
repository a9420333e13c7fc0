"""What a stack went through: its rows, the steps of its trainings, what was measured, and how long it all took."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

MOST_STEPS = 100_000
"""Steps of all trainings that a file holds: beyond it every second one is left out, or every third, ..."""


MOST_REASONS = 20
"""Reasons of a plugin that a file names, the most frequent: one may tell a number of each row."""
OTHER_REASONS = "other reasons"


class _Kept(BaseModel):
    """Written by us, so entries of a later version may stand beside ours."""

    model_config = ConfigDict(extra="allow", strict=True)


class TrainingHistory(_Kept):
    """One training, a column a quantity and a row an optimizer step that was logged; all of one length.

    Attributes:
        steps: that were planned. trainable: numbers of all plugins that it could move, as it began.
        examples: rows, tokenized.
        step: from 1. loss: mean over the step's micro-batches. learning_rate: that the step was made with.
        grad_norm: before clipping. seconds: since the training began, without what lies between an interruption and
            its resumption.
        terms: name -> value of each term of the loss, in the step's last micro-batch; None where it had no such term.
        phases: plugin -> name of its phase.

    A None in a column: the step did not tell, or the value is no finite number.
    """

    steps: int
    trainable: int | None = None
    examples: int | None = None
    step: list[int] = []
    loss: list[FiniteFloat | None] = []
    learning_rate: list[FiniteFloat | None] = []
    grad_norm: list[FiniteFloat | None] = []
    seconds: list[FiniteFloat | None] = []
    terms: dict[str, list[FiniteFloat | None]] = {}
    phases: dict[str, list[str | None]] = {}

    @model_validator(mode="after")
    def _of_one_length(self) -> TrainingHistory:
        columns = [self.loss, self.learning_rate, self.grad_norm, self.seconds]
        every: list[list[Any]] = [*columns, *self.terms.values(), *self.phases.values()]
        if any(len(column) != len(self.step) for column in every):
            raise ValueError("columns of unlike lengths")
        return self

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(optimizer step, loss), as `TrainingReport.losses`."""
        return [(n, loss) for n, loss in zip(self.step, self.loss, strict=True) if loss is not None]

    def every(self, stride: int) -> TrainingHistory:
        """Each `stride`-th row, and the last."""
        kept = sorted({*range(0, len(self.step), stride), len(self.step) - 1} - {-1})

        def some(column: list[Any]) -> list[Any]:
            return [column[row] for row in kept]

        columns = {
            n: some(getattr(self, n)) for n in ("step", "loss", "learning_rate", "grad_norm", "seconds")
        }
        return self.model_copy(
            update=columns
            | {"terms": {n: some(column) for n, column in self.terms.items()}}
            | {"phases": {n: some(column) for n, column in self.phases.items()}}
        )


class Measured(_Kept):
    """One score. `value`, `low` and `high` are None where they are no finite number, or there is none."""

    value: FiniteFloat | None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    count: int | None = None
    unit: str = ""


class Evaluation(_Kept):
    """What was measured at one moment. `trainings`: how many of them lay behind."""

    name: str
    trainings: int
    scores: dict[str, Measured]


class Preparation(_Kept):
    """What one plugin made of the rows to train on.

    Attributes:
        plugin: its id. trainings: how many lay behind. rows: that it got. left: that it gave. dropped: rows of these
            that it took out, by reason. Where that is not `rows - left`, it made rows, or several of one.
    """

    plugin: str
    trainings: int
    rows: int
    left: int
    dropped: dict[str, int] = {}


class Stage(_Kept):
    """A stage of a run. `detail`: what it did, in a line; empty where another table has its numbers."""

    name: str
    plugins: list[str] = []
    seconds: FiniteFloat
    detail: str = ""


class History(_Kept):
    """Of a stack; `history.json` of its bundle.

    Attributes:
        stages: of runs of a spec, in order. A bundle is written before the stage that saves it is over, so it does not
            hold that one.
    """

    trainings: list[TrainingHistory] = []
    evaluations: list[Evaluation] = []
    preparations: list[Preparation] = []
    stages: list[Stage] = []

    def __bool__(self) -> bool:
        return bool(self.trainings or self.evaluations or self.preparations or self.stages)

    def prepared(self, plugin: str, *, rows: int, left: int, reasons: Sequence[str]) -> None:
        """Add what a plugin made of `rows` rows. `reasons`: one for each row that it dropped."""
        counts = Counter(reasons).most_common()
        dropped = dict(counts[:MOST_REASONS])
        if rest := sum(count for _, count in counts[MOST_REASONS:]):
            dropped[OTHER_REASONS] = dropped.get(OTHER_REASONS, 0) + rest
        behind = len(self.trainings)
        self.preparations.append(
            Preparation(plugin=plugin, trainings=behind, rows=rows, left=left, dropped=dropped)
        )

    def staged(self, kind: str, seconds: float, detail: str, *, name: str, plugins: Sequence[str]) -> None:
        """Add a stage that is over. `detail` is left out where the history has its numbers, or it names a place of this
        machine."""
        kept = "" if kind in ("prepare", "evaluate", "save") else detail
        self.stages.append(Stage(name=name, plugins=list(plugins), seconds=seconds, detail=kept))

    def trained(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        steps: int,
        trainable: int | None = None,
        examples: int | None = None,
    ) -> None:
        """Add a training. `rows`: what was logged of each step, with `step` and `loss`; the rest as its attributes."""
        names = {
            name: dict.fromkeys(key for row in rows for key in row.get(name) or ())
            for name in ("terms", "phases")
        }
        self.trainings.append(
            TrainingHistory(
                steps=steps,
                trainable=trainable,
                examples=examples,
                step=[int(row["step"]) for row in rows],
                loss=[finite(row["loss"]) for row in rows],
                learning_rate=[finite(row.get("learning_rate")) for row in rows],
                grad_norm=[finite(row.get("grad_norm")) for row in rows],
                seconds=[finite(row.get("seconds")) for row in rows],
                terms={n: [finite((row.get("terms") or {}).get(n)) for row in rows] for n in names["terms"]},
                phases={n: [(row.get("phases") or {}).get(n) for row in rows] for n in names["phases"]},
            )
        )

    def evaluated(self, name: str, scores: Mapping[str, Any]) -> None:
        """Add what was measured: name -> `Score`."""
        told = {
            key: Measured(
                value=finite(s.value), low=finite(s.low), high=finite(s.high), count=s.count, unit=s.unit
            )
            for key, s in scores.items()
        }
        self.evaluations.append(Evaluation(name=name, trainings=len(self.trainings), scores=told))

    def text(self) -> str:
        """As JSON, of at most `MOST_STEPS` steps."""
        count = sum(len(training.step) for training in self.trainings)
        kept = self
        if count > MOST_STEPS:
            stride = math.ceil(count / MOST_STEPS)
            kept = self.model_copy(update={"trainings": [t.every(stride) for t in self.trainings]})
        return kept.model_dump_json()


def finite(value: Any) -> float | None:
    """A number that JSON has; None for any other, and for none."""
    return float(value) if value is not None and math.isfinite(value) else None
