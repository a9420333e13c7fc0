"""Keys and values of rows of very different lengths: on shelves, by how long they are, and right-aligned.

    shelf of 256    start             end        shelf of 1024   start                       end
       row 0          .  .  a  b  c  d |            row 2          n  n  n  n  n  n  n  n  n  n |
       row 1          f  g  h  i  j  k |

A row may have half as many columns on its shelf as there are, or more; so a long one does not make the others' longer.
Every row of a shelf ends at `end`: one column is written a step, no row is moved when it grows, and what a model sees
is what left padding shows it. A row that comes is copied in beside the others; the last one takes the place of one that
goes. What is in front of a row is filled: what another one left there may be no number, and would come through a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

Row = TypeVar("Row")
LEAST = 256
"""Columns up to which rows share a shelf."""
FIRST = 64
"""Columns behind those of the first row of a shelf."""


@dataclass(eq=False)
class Shelf(Generic[Row]):
    """Rows in the order of their slots, the columns of each, and where all of them end.

    Args:
        size: columns of a row at most, the one that is written next among them.
    """

    size: int
    rows: list[Row] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    end: int = 0

    @property
    def start(self) -> int:
        return self.end - max(self.lengths, default=0)


def size_of(columns: int) -> int:
    """Of the shelf for a row of so many columns."""
    return max(LEAST, 1 << columns.bit_length())


class ShelvedLayer(CacheLayerMixin):
    """Keys and values of a layer, slots and columns of each shelf as they are needed.

    `keys` and `values` are [rows, H, columns, D] of the columns in use: a view where all rows stand on one shelf, else
    a `Shelved`.

    Args:
        shelves: those in use, shortest rows first; the owner changes it.
        like: a layer as the model fills it.
    """

    def __init__(self, shelves: list[Shelf[Any]], like: CacheLayerMixin) -> None:
        self.shelves, self.is_sliding = shelves, isinstance(like, DynamicSlidingWindowLayer)
        self.is_initialized, self.written = True, 0
        if name := vars(like).get("peftx_carried"):
            self.peftx_carried = name  # a plugin's values, which go with the tokens
        self.fill = vars(like).get("peftx_fill", 0)
        self._empty = [
            kept.new_empty((0, kept.shape[1], 0, kept.shape[3])) for kept in (like.keys, like.values)
        ]
        self._kept: dict[Shelf[Any], list[Tensor]] = {}

    def room(self, shelf: Shelf[Any]) -> tuple[int, int]:
        """Slots and columns that there are."""
        keys = self._kept.get(shelf, self._empty)[0]
        return int(keys.shape[0]), int(keys.shape[2])

    @property
    def keys(self) -> Tensor:
        return self._used(0)

    @property
    def values(self) -> Tensor:
        return self._used(1)

    def _used(self, which: int) -> Tensor:
        parts = [
            self._kept[shelf][which][: len(shelf.rows), :, shelf.start : shelf.end + self.written]
            for shelf in self.shelves
        ]
        if len(parts) > 1:
            return Shelved(parts, self.fill)
        return parts[0] if parts else self._empty[which]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """One column [rows, H, 1, D] more -> all columns in use."""
        row = 0
        for shelf in self.shelves:
            count = len(shelf.rows)
            for kept, new in zip(self._kept[shelf], (key_states, value_states), strict=True):
                kept[:count, :, shelf.end] = new[row : row + count, :, 0]
            row += count
        self.written = 1
        return self.keys, self.values

    def take(self, shelf: Shelf[Any], slot: int, own: Sequence[Tensor]) -> None:
        """Put a row's last columns, keys and values [H, columns, D], into a slot."""
        for kept, new in zip(self._kept[shelf], own, strict=True):
            kept[slot] = self.fill
            kept[slot, :, shelf.end - new.shape[1] : shelf.end] = new

    def row(self, shelf: Shelf[Any], slot: int) -> list[Tensor]:
        """Keys and values of a row, [H, columns, D]."""
        place = slice(shelf.end - shelf.lengths[slot], shelf.end)
        return [kept[slot, :, place] for kept in self._kept[shelf]]

    def moved(self, shelf: Shelf[Any], slots: int, end: int, columns: int) -> list[Tensor]:
        """Tensors of other sizes with what is in use of a shelf, ending at `end`."""
        found = []
        for kept in self._kept.get(shelf, self._empty):
            own = kept[: len(shelf.rows), :, shelf.start : shelf.end]
            new = kept.new_full((slots, kept.shape[1], columns, kept.shape[3]), self.fill)
            new[: len(own), :, end - own.shape[2] : end] = own
            found.append(new)
        return found

    def settle(self, shelf: Shelf[Any], tensors: list[Tensor]) -> None:
        """Take what `moved` made."""
        self._kept[shelf] = tensors

    def leave(self, shelf: Shelf[Any]) -> None:
        """Give the memory of an empty shelf back."""
        del self._kept[shelf]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it is made from a cache that has seen the model."""

    def get_seq_length(self) -> int:
        return max((shelf.end - shelf.start for shelf in self.shelves), default=0) + self.written

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Shelved(Tensor):
    """Keys or values of several shelves, as one tensor [rows, H, columns, D] that is made when somebody computes with
    it, and again for the next one. Who knows of it reads `parts`, those of each shelf, and nothing is copied."""

    parts: list[Tensor]
    fill: float

    @staticmethod
    def __new__(cls, parts: list[Tensor], fill: float) -> Shelved:
        first = parts[0]
        shape = (
            sum(len(part) for part in parts), first.shape[1], max(part.shape[2] for part in parts),
            first.shape[3],
        )  # fmt: skip
        found: Shelved = Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=first.device)
        found.parts, found.fill = parts, fill
        return found

    def whole(self) -> Tensor:
        """What is in front of a row is filled."""
        found, row = self.parts[0].new_full(self.shape, self.fill), 0
        for part in self.parts:
            found[row : row + len(part), :, found.shape[2] - part.shape[2] :] = part
            row += len(part)
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Shelved, Shelved.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
