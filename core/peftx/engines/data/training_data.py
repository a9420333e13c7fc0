"""`TrainingData`: the rows on their way to training, as the `prepare_data` hook gets them."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx.engines.data.gate import COLUMNS
from peftx.engines.data.places import select
from peftx.engines.files import write_parts
from peftx.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not trained on.

    Attributes:
        by: the plugin's id. place: of the row among those that the plugin saw, from 0. reason: why it went. rows: those
            that the plugin saw.
    """

    by: str
    place: int
    reason: str
    rows: Dataset = field(repr=False, compare=False)

    @property
    def row(self) -> dict[str, Any]:
        """Its columns."""
        found: dict[str, Any] = self.rows[self.place]
        return found

    def to_json(self) -> str:
        told = {"by": self.by, "place": self.place, "reason": self.reason, "row": self.row}
        return json.dumps(told, ensure_ascii=False, default=str)


def told(dropped: Sequence[Dropped]) -> str:
    """How many for which reason: '2 too long, 1 empty'."""
    counts = Counter(one.reason for one in dropped).most_common()
    return ", ".join(f"{count} {reason}" for reason, count in counts)


@dataclass(kw_only=True)
class TrainingData:
    """Rows before tokenization. Every `prepare_data` plugin may assign new datasets; the next one sees them.

    Attributes:
        train: rows to train on, in `format`; None where a run does not train.
        eval: rows to watch the loss on, in `format`; None where there are none.
        tokenizer: the model's tokenizer.
        seed: the run's seed; take random numbers from `rng`.
        format: one of `peftx.engines.data.FORMATS`, or `tokenized` (columns `input_ids` and `labels`). A plugin that
            rewrites the rows into another format sets it.
        max_length: tokens an example may have, at least 2.
        dropped: rows that `keep` took from `train`, in order.
        progress: called with (done, of), where somebody wants to see how far a long preparation is.
    """

    train: Dataset | None
    eval: Dataset | None
    tokenizer: PreTrainedTokenizerBase
    seed: int
    format: str
    max_length: int
    dropped: list[Dropped] = field(default_factory=list)
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(
                f"max_length is {self.max_length}; an example needs at least 2 tokens to have a loss"
            )

    def require(self, formats: Sequence[str], *, by: str, hint: str | None = None) -> None:
        """Raises UnsupportedError unless the rows are of one of these formats.

        Args:
            formats: the plugin's `takes`. by: its id. hint: what rows it wants, where the columns do not say it.
        """
        if self.format not in formats:
            columns = ", or ".join(" and ".join(COLUMNS[one]) for one in formats if one in COLUMNS)
            raise UnsupportedError(
                f"{by}: the rows are of format '{self.format}', and it trains on {' or '.join(formats)}",
                hint=hint or f"rows with {columns}",
            )

    def rewrite(self, make: Callable[[Dataset], Dataset]) -> None:
        """Put what `make` gives in the place of the rows of either split; they are `tokenized` then."""
        self.train, self.eval = (None if rows is None else make(rows) for rows in (self.train, self.eval))
        self.format = "tokenized"

    def rng(self, name: str) -> random.Random:
        """A fresh generator seeded by the run's seed and `name` (the plugin's id).

        Two names never share a stream, and the same name gives the same stream again, in every process.
        """
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return random.Random(int.from_bytes(digest, "big"))

    def others(self, count: int, *, name: str, by: str) -> list[list[int]]:
        """For each row of `train` the places of `count` others, as examples of what it is about; fewer where there are
        not so many.

        Args:
            name: the plugin's id, whose stream draws them. by: a column in which the others have the row's value; where
                rows have no such column, all go together.
        """
        assert self.train is not None
        kinds = self.train[by][:] if by in self.train.column_names else [None] * len(self.train)
        places: dict[Any, list[int]] = {}
        for place, kind in enumerate(kinds):
            places.setdefault(kind, []).append(place)
        rng, found = self.rng(name), []
        for place, kind in enumerate(kinds):
            drawn = rng.sample(places[kind], min(count + 1, len(places[kind])))
            found.append([other for other in drawn if other != place][:count])
        return found

    def keep(self, reasons: Sequence[str | None], *, by: str) -> None:
        """Train on the rows that have no reason against them. The others stand in `dropped` with theirs: none is lost.

        Args:
            reasons: of each row of `train` why it goes, None where it stays. by: the plugin's id.

        Raises:
            DataError: not one for each row.
        """
        assert self.train is not None
        if len(reasons) != len(self.train):
            raise DataError(f"{by}: {len(reasons)} reasons for {len(self.train)} rows")
        gone = [(place, why) for place, why in enumerate(reasons) if why is not None]
        self.dropped += [Dropped(by, place, why, self.train) for place, why in gone]
        self.train = select(self.train, (place for place, why in enumerate(reasons) if why is None))

    def write_dropped(self, file: Path) -> str:
        """Write `dropped`, if any, to a file of JSON lines, and say so: '; dropped 3: 2 too long, 1 empty (file)'."""
        if not self.dropped:
            file.unlink(missing_ok=True)  # an earlier run's
            return ""
        write_parts(file, (f"{one.to_json()}\n" for one in self.dropped))
        return f"; dropped {len(self.dropped)}: {told(self.dropped)} ({file})"

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text`, without BOS and EOS."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
