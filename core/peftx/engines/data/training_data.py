"""`TrainingData`: the rows on their way to training, as the `prepare_data` hook gets them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftx.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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
    """

    train: Dataset | None
    eval: Dataset | None
    tokenizer: PreTrainedTokenizerBase
    seed: int
    format: str
    max_length: int

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(
                f"max_length is {self.max_length}; an example needs at least 2 tokens to have a loss"
            )

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

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text`, without BOS and EOS."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
