"""The cache of many rows that come and go, each on a shelf for rows of about its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from peftx.errors import UnsupportedError
from peftx.toolkits.serving.shelves import FIRST, Row, Shelf, ShelvedLayer, size_of


class Slots(Cache, Generic[Row]):  # type: ignore[misc]
    """Rows are known by what `put` was given for them, and stand as `rows` has them: by shelves, which is how a model's
    call takes them.

    Args:
        like: a cache as the model fills it. slots: rows at most.

    Raises:
        UnsupportedError: it holds more than keys and values of tokens.
    """

    def __init__(self, like: Cache, slots: int) -> None:
        check_layers(like)
        self.shelves, self.slots = list[Shelf[Row]](), slots
        layers = [
            layer if type(layer) is DummyLayer else ShelvedLayer(self.shelves, layer) for layer in like.layers
        ]
        self.own = [layer for layer in layers if type(layer) is not DummyLayer]  # others read what these keep
        super().__init__(layers=layers)

    @property
    def rows(self) -> list[Row]:
        return [row for shelf in self.shelves for row in shelf.rows]

    @property
    def lengths(self) -> list[int]:
        """Columns of each row."""
        return [length for shelf in self.shelves for length in shelf.lengths]

    def put(self, row: Row, cache: Cache, index: int, columns: int) -> None:
        """Take over the last so many columns of a row of a cache: what stands before them are pads."""
        layers = [layer for layer in cache.layers if type(layer) is not DummyLayer]
        # A sliding window keeps no more than it looks back.
        last = [slice(-min(columns, layer.keys.shape[2]), None) for layer in layers]
        own = [
            (layer.keys[index, :, at], layer.values[index, :, at])
            for layer, at in zip(layers, last, strict=True)
        ]
        self._put(row, own, columns)

    def _put(self, row: Row, own: Sequence[Sequence[Tensor]], columns: int) -> None:
        size = size_of(columns)
        shelf = next((shelf for shelf in self.shelves if shelf.size == size), Shelf[Row](size))
        self._make_room(shelf, columns, len(shelf.rows) + 1)
        if shelf not in self.shelves:
            self.shelves.append(shelf)
            self.shelves.sort(key=lambda one: one.size)
        for layer, each in zip(self.own, own, strict=True):
            layer.take(shelf, len(shelf.rows), each)
        shelf.rows.append(row)
        shelf.lengths.append(columns)

    def drop(self, row: Row) -> None:
        """A row goes; the last one of its shelf takes its place."""
        shelf, slot = self._place(row)
        self._drop(shelf, slot)

    def _drop(self, shelf: Shelf[Row], slot: int) -> None:
        last = len(shelf.rows) - 1
        if slot != last:
            for layer in self.own:
                layer.take(shelf, slot, layer.row(shelf, last))
            shelf.rows[slot], shelf.lengths[slot] = shelf.rows[last], shelf.lengths[last]
        shelf.rows.pop()
        shelf.lengths.pop()
        if not shelf.rows:
            self.shelves.remove(shelf)
            for layer in self.own:
                layer.leave(shelf)

    def ready(self) -> None:
        """Make room for the next column, which no layer has yet; rows that outgrew their shelf go to a longer one."""
        for layer in self.own:
            layer.written = 0  # by a call that failed
        for shelf in [*self.shelves]:
            for row in [
                row for row, length in zip(shelf.rows, shelf.lengths, strict=True) if length >= shelf.size
            ]:
                slot = shelf.rows.index(row)
                self._put(row, [layer.row(shelf, slot) for layer in self.own], shelf.lengths[slot])
                self._drop(shelf, slot)
        for shelf in self.shelves:
            self._make_room(shelf, 0, len(shelf.rows))

    def advance(self) -> None:
        """A column was written, in every layer."""
        for layer in self.own:
            layer.written = 0
        for shelf in self.shelves:
            shelf.end += 1
            shelf.lengths = [length + 1 for length in shelf.lengths]

    def row(self, row: Row, config: object) -> DynamicCache:
        """A row as a cache of its own."""
        shelf, slot = self._place(row)
        found = DynamicCache(config=config)
        for at, layer in enumerate(self.layers):
            if type(layer) is DummyLayer:
                continue
            keys, values = (x[None].clone() for x in layer.row(shelf, slot))
            if name := vars(layer).get("peftx_carried"):
                more = DynamicLayer()
                more.peftx_carried, more.peftx_fill = name, layer.fill
                found.layers.append(more)
                more.update(keys, values)
            else:
                found.update(keys, values, at)
        return found

    def _place(self, row: Row) -> tuple[Shelf[Row], int]:
        return next((shelf, shelf.rows.index(row)) for shelf in self.shelves if row in shelf.rows)

    def _make_room(self, shelf: Shelf[Row], columns: int, rows: int) -> None:
        """A row of so many columns fits in front of `end`, and one more column behind it; so many rows fit."""
        held = shelf.end - shelf.start
        front = max(columns, held)
        there, capacity = self.own[0].room(shelf)
        if rows <= there and shelf.end >= front and shelf.end < capacity:
            return
        slots = there if rows <= there else max(rows, min(2 * there, self.slots))
        wanted = capacity if 2 * front <= capacity else 2 * front + FIRST
        moved = [layer.moved(shelf, slots, front, wanted) for layer in self.own]
        for layer, tensors in zip(self.own, moved, strict=True):  # where memory ends, nothing has changed
            layer.settle(shelf, tensors)
        shelf.end = front


def check_layers(cache: Cache) -> None:
    """Raises UnsupportedError where a layer of a cache keeps other things than keys and values of tokens."""
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UnsupportedError(f"its cache has layers of kind {names}, whose rows cannot come and go")
