"""`Evaluation`: what the `evaluate` hook gets, and the scores of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftx.charts import STYLE, Curve, Point, chart
from peftx.errors import DataError, nearest
from peftx.kernel.stack import Stack
from peftx.quantities import between, plain
from peftx.toolkits.evaluation.scores import Score


class Evaluation:
    """Data to measure on and the scores so far.

    Attributes:
        stack: the stack that is measured.
        data: name -> texts or rows, as the spec names them.
        scores: name -> Score in the order of `add`; read it, and write through `add`.
        output_dir: where figures go (`figure`), made by whoever writes the first; None where the run keeps none.
    """

    def __init__(
        self,
        *,
        stack: Stack,
        data: Mapping[str, Sequence[Any]] | None = None,
        output_dir: Path | None = None,
    ) -> None:
        self.stack = stack
        self.data = dict(data or {})
        self.output_dir = output_dir
        self.scores: dict[str, Score] = {}
        self._figures: dict[str, list[str]] = {}

    def rows(self, name: str) -> Sequence[Any]:
        """The data set of that name. Raises DataError with the names there are."""
        if name not in self.data:
            held = ", ".join(self.data) or "none"
            raise DataError(
                f"no evaluation data {name!r}; there is: {held}", hint=nearest(name, self.data) or None
            )
        return self.data[name]

    def add(
        self,
        name: str,
        value: float,
        low: float | None = None,
        high: float | None = None,
        count: int | None = None,
        unit: str = "",
    ) -> Score:
        """Record one number; tensors and NumPy numbers become Python's. Raises DataError where the name is taken."""
        return self.add_score(
            Score(
                name=name,
                value=float(value),
                low=None if low is None else float(low),
                high=None if high is None else float(high),
                count=None if count is None else int(count),
                unit=unit,
            )
        )

    def figure(self, name: str, curves: Mapping[str, Iterable[Point]], *, x: str, y: str) -> None:
        """Draw curves on the page `<name>.html` in `output_dir`, below what was drawn there before; nothing where the
        run keeps none.

        Args:
            curves: name -> (x, y), x rising. x, y: what the axes are of.
        """
        if self.output_dir is None:
            return
        drawn = [Curve(curve, [*points]) for curve, points in curves.items()]
        self._figures.setdefault(name, []).append(chart(drawn, x=x, y=y, title=f"{y} by {x}"))
        self.output_dir.mkdir(parents=True, exist_ok=True)
        page = f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{''.join(self._figures[name])}\n"
        (self.output_dir / f"{name}.html").write_text(page, encoding="utf-8")

    def add_score(self, score: Score) -> Score:
        """Record a score as a metric returned it. Raises DataError where the name is taken."""
        if score.name in self.scores:
            raise DataError(
                f"score {score.name!r} is there already, with value {self.scores[score.name].value:g}",
                hint="name it after the data set or the plugin: 'perplexity/held_out'",
            )
        self.scores[score.name] = score
        return score

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of text for a table: name, value, 95 % interval, unit, count."""
        return [
            (
                score.name,
                plain(score.value),
                between(score.low, score.high, 5),
                score.unit,
                "" if score.count is None else f"{score.count:,}",
            )
            for score in self.scores.values()
        ]

    def to_dict(self) -> dict[str, dict[str, float | int | str | None]]:
        """Scores ready for JSON: name -> value, low, high, count, unit. Infinities become "inf" and "-inf"."""
        return {
            score.name: {
                "value": _finite(score.value),
                "low": _finite(score.low),
                "high": _finite(score.high),
                "count": score.count,
                "unit": score.unit,
            }
            for score in self.scores.values()
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text that any parser reads (no NaN, no Infinity)."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(number: float | None) -> float | str | None:
    return str(number) if number is not None and math.isinf(number) else number
