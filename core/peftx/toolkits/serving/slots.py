"""Keys and values of the rows that are being written, side by side and right-aligned.

    column   start                 end
    row 0      .  .  a  b  c  d  e |          every row ends at `end`, so one column is written a step,
    row 1      f  g  h  i  j  k  l |          no row is moved when it grows, and what a model sees is
    row 2      .  .  .  .  .  m  n |          what left padding shows it

A row that comes is copied in beside the others; the last row takes the place of one that goes. What is in front of a
row is zero: what another one left there may be no number, and would come through a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from peftx.errors import UnsupportedError

FIRST = 64  # columns behind the first row's own


@dataclass
class Window:
    """The part of the columns in use: rows 0 to `rows`, columns `start` to `end`."""

    rows: int = 0
    start: int = 0
    end: int = 0


class _Layer(CacheLayerMixin):
    """Keys and values [slots, H, columns, D] of a layer; slots and columns as they are needed."""

    def __init__(self, window: Window, like: CacheLayerMixin) -> None:
        super().__init__()
        self.window, self.is_sliding = window, isinstance(like, DynamicSlidingWindowLayer)
        self.keys, self.values = (
            kept.new_zeros(0, kept.shape[1], 0, kept.shape[3]) for kept in (like.keys, like.values)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """One column [rows, H, 1, D] more -> all columns in use."""
        rows, start, end = self.window.rows, self.window.start, self.window.end
        self.keys[:rows, :, end] = key_states[:, :, 0]
        self.values[:rows, :, end] = value_states[:, :, 0]
        return self.keys[:rows, :, start : end + 1], self.values[:rows, :, start : end + 1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it is made from a cache that has seen the model."""

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Slots(Cache):  # type: ignore[misc]
    """A cache of many rows that come and go.

    Args:
        like: a cache as the model fills it. slots: rows at most.

    Raises:
        UnsupportedError: it holds more than keys and values of tokens.
    """

    def __init__(self, like: Cache, slots: int) -> None:
        check_layers(like)
        self.window, self.lengths, self.slots = Window(), list[int](), slots
        layers = [layer if type(layer) is DummyLayer else _Layer(self.window, layer) for layer in like.layers]
        self.own = [layer for layer in layers if type(layer) is not DummyLayer]  # others read what these keep
        super().__init__(layers=layers)

    def put(self, cache: Cache, row: int, columns: int) -> None:
        """Take over the last so many columns of a row: what stands before them are pads."""
        self._make_room(columns, self.window.rows + 1)
        window, index = self.window, self.window.rows
        others = [layer for layer in cache.layers if type(layer) is not DummyLayer]
        for layer, other in zip(self.own, others, strict=True):
            kept = min(columns, other.keys.shape[2])  # a sliding window keeps no more than it looks back
            place = slice(window.end - kept, window.end)
            layer.keys[index, :, place] = other.keys[row, :, -kept:]
            layer.values[index, :, place] = other.values[row, :, -kept:]
            _clear(layer, index, place.start)
        self.lengths.append(columns)
        window.rows += 1
        window.start = window.end - max(self.lengths)

    def advance(self) -> None:
        """A column was written."""
        self.window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def drop(self, index: int) -> None:
        """A row goes; the last one takes its place."""
        window, last = self.window, self.window.rows - 1
        if index != last:
            place = slice(window.end - self.lengths[last], window.end)
            for layer in self.own:
                layer.keys[index, :, place] = layer.keys[last, :, place]
                layer.values[index, :, place] = layer.values[last, :, place]
                _clear(layer, index, place.start)
            self.lengths[index] = self.lengths[last]
        self.lengths.pop()
        window.rows -= 1
        window.start = window.end - max(self.lengths, default=0)

    def row(self, index: int, config: object) -> DynamicCache:
        """A row as a cache of its own."""
        window, found = self.window, DynamicCache(config=config)
        place = slice(window.end - self.lengths[index], window.end)
        for at, layer in enumerate(self.layers):
            if type(layer) is DummyLayer:
                continue
            found.update(layer.keys[index : index + 1, :, place].clone(),
                         layer.values[index : index + 1, :, place].clone(), at)  # fmt: skip
        return found

    def ready(self) -> None:
        """Make room for the next column."""
        self._make_room(0, self.window.rows)

    def _make_room(self, columns: int, rows: int) -> None:
        """A row of so many columns fits in front of `end`, and one more column behind it; so many rows fit."""
        window = self.window
        held = window.end - window.start
        front = max(columns, held)
        there, _, capacity, _ = self.own[0].keys.shape
        if rows <= there and window.end >= front and window.end < capacity:
            return
        slots = there if rows <= there else max(rows, min(2 * there, self.slots))
        wanted = capacity if 2 * front <= capacity else 2 * front + FIRST
        moved = [
            [_moved(kept, window, front, slots, wanted) for kept in (layer.keys, layer.values)]
            for layer in self.own
        ]  # all of them first: where memory ends, nothing has changed
        for layer, (keys, values) in zip(self.own, moved, strict=True):
            layer.keys, layer.values = keys, values
        window.start, window.end = front - held, front


def _clear(layer: _Layer, index: int, end: int) -> None:
    """Nothing in a row's columns before `end`."""
    layer.keys[index, :, :end] = 0
    layer.values[index, :, :end] = 0


def _moved(kept: Tensor, window: Window, end: int, slots: int, columns: int) -> Tensor:
    """The columns in use, ending at `end` of a new tensor."""
    found = kept.new_zeros(slots, kept.shape[1], columns, kept.shape[3])
    held = window.end - window.start
    found[: window.rows, :, end - held : end] = kept[: window.rows, :, window.start : window.end]
    return found


def check_layers(cache: Cache) -> None:
    """Raises UnsupportedError where a layer of a cache keeps other things than keys and values of tokens."""
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UnsupportedError(f"its cache has layers of kind {names}, whose rows cannot come and go")
