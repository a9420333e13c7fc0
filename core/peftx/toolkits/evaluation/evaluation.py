"""`Evaluation`: what the `evaluate` hook gets, and the scores of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from peftx.charts import STYLE, Curve, Point, chart
from peftx.engines.data import Collator, tokenize_dataset
from peftx.engines.data.formats import dataset_of
from peftx.errors import DataError, nearest
from peftx.kernel.objective import pad_of
from peftx.kernel.parts import ReplacedPart
from peftx.kernel.plugin import Plugin
from peftx.kernel.stack import Stack
from peftx.quantities import between, plain
from peftx.toolkits.evaluation.likelihood import context_window
from peftx.toolkits.evaluation.scores import Score, bootstrap_ratio, wilson_interval
from peftx_spec.portable import portable


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

    def batches(self, size: int = 1) -> Iterator[dict[str, Tensor]]:
        """The rows of `eval` as the model reads them in training, in order, on its device: so many in a batch, cut at
        what the model can read."""
        model, tokenizer = self.stack.model, self.stack.tokenizer
        data, format = dataset_of(
            [{"text": row} if isinstance(row, str) else row for row in self.rows("eval")]
        )
        pairs = bool(model.config.is_encoder_decoder)
        rows = tokenize_dataset(
            data, tokenizer, format=format, max_length=context_window(model, tokenizer), encoder_decoder=pairs
        )
        collate = Collator(pad_of(model, tokenizer), encoder_decoder=pairs)
        for start in range(0, len(rows), size):
            batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            yield {name: tensor.to(model.device) for name, tensor in batch.items()}

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

    def add_share(self, name: str, part: int, whole: int, unit: str = "") -> Score:
        """Record how many of so many things are right, or refused, or of a kind, with Wilson's interval."""
        low, high = wilson_interval(part, whole)  # refuses a share of nothing
        return self.add(name, part / whole, low, high, whole, unit)

    def add_ratio(
        self, name: str, tops: Sequence[float], bottoms: Sequence[int] | None = None, unit: str = ""
    ) -> Score:
        """Record sum(tops) / sum(bottoms), of pairs that are drawn again for the interval: what was counted in each row
        of what was in it. The mean of `tops` where there are no `bottoms`."""
        bottoms = [1] * len(tops) if bottoms is None else bottoms
        low, high = bootstrap_ratio(tops, bottoms) or (None, None)
        # Summed as the interval is, so that it lies within.
        value = float(np.sum(tops, dtype=np.float64) / np.sum(bottoms, dtype=np.float64))
        return self.add(name, value, low, high, sum(bottoms), unit)

    def add_packed(self, plugin: Plugin) -> list[Any]:
        """Record `packed_bytes` of the layers that a plugin packed, as a bundle holds them, and `bits_per_weight`,
        without biases; 0 before there are any.

        Returns:
            The layers, which have `nbytes_packed`, as those of `peftx.toolkits.compression` do.
        """
        parts = self.stack.ledger.of(self.stack.id_of(plugin), ReplacedPart)
        layers: list[Any] = [part.module for part in parts]
        size = sum(layer.nbytes_packed for layer in layers)
        biases = sum(layer.bias.nbytes for layer in layers if layer.bias is not None)
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        self.add("packed_bytes", size, unit="bytes")
        self.add("bits_per_weight", 8 * (size - biases) / max(weights, 1))
        return layers

    def figure(self, name: str, curves: Mapping[str, Iterable[Point]], *, x: str, y: str) -> None:
        """Draw curves on the page `<name>.html` in `output_dir`, below what was drawn there before; nothing where the
        run keeps none.

        Args:
            curves: name -> (x, y), x rising. x, y: what the axes are of.
        """
        if self.output_dir is None:
            return
        drawn = [Curve(curve, [*points]) for curve, points in curves.items()]
        name = portable(name)
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
