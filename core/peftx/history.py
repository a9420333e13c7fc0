"""What a stack went through: the steps of its trainings, and what was measured in between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

MOST_STEPS = 100_000
"""Steps of all trainings that a file holds: beyond it every second one is left out, or every third, ..."""


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


class History(_Kept):
    """Of a stack; `history.json` of its bundle."""

    trainings: list[TrainingHistory] = []
    evaluations: list[Evaluation] = []

    def __bool__(self) -> bool:
        return bool(self.trainings or self.evaluations)

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
