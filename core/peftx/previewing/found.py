"""What became of rows: counts, and lengths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftx.engines.data import CLASS_INDEX, IGNORE
from peftx.kernel.objective import Objective

if TYPE_CHECKING:
    from datasets import Dataset

    from peftx.engines.data import TrainingData
    from peftx.kernel.stack import Stack


@dataclass(frozen=True)
class Prepared:
    """What one plugin's `prepare_data` did.

    Attributes:
        plugin: its id. rows, left: before and after. dropped: rows that it took away, by reason. format, gives: of the
            rows before and after.
    """

    plugin: str
    rows: int
    left: int
    dropped: dict[str, int]
    format: str
    gives: str

    @property
    def remade(self) -> bool:
        """Did it make rows of several, or several of one."""
        return self.left != self.rows - sum(self.dropped.values())


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples, without pads: the smallest, the middle, what 95 % do not exceed, the largest, all."""

    min: int
    median: int
    p95: int
    max: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Rows as a run would train on them.

    Attributes:
        source: `train`, `eval`, or the name of one of `data.sources`. file: where the rows come from.
        objective: what the model is trained to do. max_length: tokens that an example may have.
        read: rows of the file, up to `limit`. held_out: of these, those that are evaluated on instead. prepared: what
            each plugin did to the others, in order.
        rows: as they were tokenized. examples: tokenized, `input_ids` and `labels`.
        cut: rows of which a part is gone, since they are longer than `max_length`; None where a plugin tokenized them,
            who alone knows. full: examples that fill `max_length`.
        weights: had the base's weights to be loaded, since a plugin reads the rows with the model.
        classes: of examples that are each of one class, how many are of which. names: of all classes, by number.
    """

    source: str
    file: str
    objective: Objective
    max_length: int
    read: int
    held_out: int
    prepared: Sequence[Prepared]
    rows: TrainingData
    examples: Dataset
    cut: int | None
    full: int
    weights: bool
    classes: dict[str, int]
    names: Sequence[str]
    stack: Stack
    seed: int

    @property
    def of_file(self) -> Sequence[Prepared]:
        """What was done to the file's own rows, up to the first plugin that makes others of them."""
        first = next((n for n, step in enumerate(self.prepared) if step.remade), len(self.prepared))
        return self.prepared[: first + 1]

    @property
    def dropped(self) -> int:
        """Rows of the file that plugins took away; what they took of rows that others made, `prepared` tells."""
        return sum(sum(step.dropped.values()) for step in self.of_file)

    @property
    def kept(self) -> int:
        """Rows that are neither held out nor dropped."""
        return self.read - self.held_out - self.dropped

    @property
    def packed(self) -> str:
        """How examples came of another number of rows; empty where each row is one."""
        if self.rows.format == "text" and self.objective == "next-token":
            return f"texts are joined, and cut into blocks of {self.max_length} tokens"
        if self.rows.format == "text" and len(self.examples) != len(self.rows.train or ()):
            return f"texts longer than {self.max_length} tokens are split"
        makers = [step.plugin for step in self.prepared if step.remade]
        return f"{', '.join(makers)} makes examples of several rows, or several of one" if makers else ""

    @property
    def two_sided(self) -> bool:
        """Has the model an encoder, which reads `input_ids`, and a decoder, which writes `labels`."""
        return bool(self.stack.model.config.is_encoder_decoder)

    def lengths(self) -> dict[str, Lengths]:
        """Of `tokens`; of two towers `input` and `target`; of what has a label `labelled`, unless others have one in
        each step."""
        inputs = sizes_of(self.examples, "input_ids")
        found = {"input" if self.two_sided else "tokens": inputs}
        if self.two_sided:
            found["target"] = sizes_of(self.examples, "labels")
        if self.objective != "masked-token":
            found["labelled"] = self.labelled()
        return {name: _lengths(sizes) for name, sizes in found.items()}

    def labelled(self) -> np.ndarray:
        """Tokens of each example that have a label, or a class of their own; int64 [N]."""
        name = CLASS_INDEX if CLASS_INDEX in self.examples.column_names else "labels"
        column = self.examples.with_format("arrow")[name][:]
        if not hasattr(column.type, "value_type"):  # one number a row: its class
            return np.zeros(len(self.examples), dtype=np.int64)
        column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
        marks = np.concatenate([[0], np.cumsum(column.flatten().to_numpy(zero_copy_only=False) != IGNORE)])
        ends = np.cumsum(sizes_of(self.examples, name))
        return np.diff(np.concatenate([[0], marks[ends]])).astype(np.int64)

    def share(self) -> float | None:
        """Of the tokens that have a label: of the targets, where there are two towers; None where each step hides
        others."""
        if self.objective == "masked-token":
            return None
        total = int(sizes_of(self.examples, "labels" if self.two_sided else "input_ids").sum())
        return int(self.labelled().sum()) / max(1, total)

    def to_json(self) -> dict[str, Any]:
        """All of it but the examples."""
        return {
            "model": self.stack.base_id,
            "source": self.source,
            "file": self.file,
            "format": self.rows.format,
            "objective": self.objective,
            "max_length": self.max_length,
            "weights_loaded": self.weights,
            "rows": {
                "read": self.read,
                "held_out": self.held_out,
                "dropped": self.dropped,
                "kept": self.kept,
            },
            "prepared": [asdict(step) for step in self.prepared],
            "examples": len(self.examples),
            "cut": self.cut,
            "full": self.full,
            "packed": self.packed or None,
            "lengths": {name: asdict(found) for name, found in self.lengths().items()},
            "labelled_share": self.share(),
            "classes": self.classes,
        }


def sizes_of(examples: Dataset, name: str) -> np.ndarray:
    """How long each example's list is, int64 [N]."""
    import pyarrow.compute as compute

    column = examples.with_format("arrow")[name][:]
    return compute.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)


def _lengths(sizes: np.ndarray) -> Lengths:
    ordered = np.sort(sizes)

    def at(share: float) -> int:
        return int(ordered[max(0, math.ceil(share * len(ordered)) - 1)])

    return Lengths(int(ordered[0]), at(0.5), at(0.95), int(ordered[-1]), int(ordered.sum()))


def classes_of(examples: Dataset, names: Sequence[str]) -> dict[str, int]:
    """How many examples are of which class, the largest first; empty where a row is not of one class."""
    name = CLASS_INDEX if CLASS_INDEX in examples.column_names else "labels"
    column = examples.with_format("arrow")[name][:]
    if hasattr(column.type, "value_type"):
        return {}
    numbers = Counter(column.to_pylist()).most_common()
    if any(isinstance(number, float) for number, _ in numbers):  # a score: no classes
        return {}
    return {names[n] if n < len(names) else str(n): count for n, count in numbers}
