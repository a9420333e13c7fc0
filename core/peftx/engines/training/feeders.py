"""Batches of further sources of rows, beside those that a run trains on.

Which rows a batch has follows from the seed, the source's name, the step and the micro-batch alone, so a run that is
resumed gets the same ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from datasets import Dataset
from torch import Tensor

from peftx.errors import DataError, nearest

OWN = "train"
"""The source whose rows are those that a run trains on."""


class Feeder:
    """Batches of one source.

    Args:
        rows: tokenized, or what makes them so, which is called when a plugin asks for a batch.
        collate: rows -> a batch. size: rows in a batch; a smaller source gives all of its rows.
    """

    def __init__(
        self,
        rows: Dataset | Callable[[], Dataset],
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        *,
        size: int,
        seed: int,
        name: str,
    ) -> None:
        self._rows, self.collate, self._size = rows, collate, size
        self.seed, self.name = seed, name
        self._orders: dict[int, list[int]] = {}

    @property
    def rows(self) -> Dataset:
        """Raises DataError where there are none."""
        if not isinstance(self._rows, Dataset):
            self._rows = self._rows()
        if len(self._rows) == 0:
            raise DataError(f"the source '{self.name}' has no rows")
        return self._rows

    @property
    def size(self) -> int:
        return min(self._size, len(self.rows))

    def batch(self, number: int) -> dict[str, Tensor]:
        """The `number`-th batch, from 0: every row once, in an order of its own, before any comes again."""
        wanted = range(number * self.size, (number + 1) * self.size)
        picked = [self._order(place // len(self.rows))[place % len(self.rows)] for place in wanted]
        return self.collate([self.rows[index] for index in picked])

    def first(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Batches of so many rows, all if there are fewer, each once."""
        picked = self._order(0)[:count]
        for start in range(0, len(picked), self.size):
            yield self.collate([self.rows[index] for index in picked[start : start + self.size]])

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            digest = hashlib.sha256(f"{self.seed}:{self.name}:{epoch}".encode()).digest()
            order = list(range(len(self.rows)))
            random.Random(int.from_bytes(digest, "big")).shuffle(order)
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._orders[epoch]


def feeder_of(feeders: Mapping[str, Feeder], name: str) -> Feeder:
    """Raises DataError where no source has the name."""
    check_source(feeders, name)
    return feeders[name]


def check_source(known: Collection[str], name: str, *, owner: str = "") -> None:
    """Raises DataError where no source has the name that the plugin `owner` asks for."""
    if name not in known:
        raise DataError(
            f"{owner}: there is no source '{name}' of rows"
            if owner
            else f"there is no source '{name}' of rows",
            hint=nearest(name, [other for other in known if other != OWN])
            or f"data: {{sources: {{{name}: file}}}}, or stack.train(..., sources={{'{name}': rows}})",
        )
