"""`TrainingData`: the rows on their way to training, as the `prepare_data` hook gets them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    def count_tokens(self, text: str) -> int:
        """Number of tokens of `text`, without BOS and EOS."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
