"""Keys and values of the rows that are being written, side by side and right-aligned.

    column   start                 end
    row 0      .  .  a  b  c  d  e |          every row ends at `end`, so one column is written a step,
    row 1      f  g  h  i  j  k  l |          no row is moved when it grows, and what a model sees is
    row 2      .  .  .  .  .  m  n |          what left padding shows it

A row that comes is copied in beside the others; the last row takes the place of one that goes. What is in front of a
row is filled: what another one left there may be no number, and would come through a mask.
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
    """Keys and values of a layer, slots and columns as they are needed; `keys` and `values` are those in use,
    [rows, H, columns, D]."""

    def __init__(self, window: Window, like: CacheLayerMixin) -> None:
        self.window, self.is_sliding = window, isinstance(like, DynamicSlidingWindowLayer)
        self.is_initialized, self.written = True, 0
        if name := vars(like).get("peftx_carried"):
            self.peftx_carried = name  # a plugin's values, which go with the tokens
        self.fill = vars(like).get("peftx_fill", 0)
        self._keys, self._values = (
            kept.new_full((0, kept.shape[1], 0, kept.shape[3]), self.fill)
            for kept in (like.keys, like.values)
        )

    @property
    def room(self) -> tuple[int, int]:
        """Slots and columns that there are."""
        return int(self._keys.shape[0]), int(self._keys.shape[2])

    @property
    def keys(self) -> Tensor:
        return self._used(self._keys)

    @property
    def values(self) -> Tensor:
        return self._used(self._values)

    def _used(self, kept: Tensor) -> Tensor:
        window = self.window
        return kept[: window.rows, :, window.start : window.end + self.written]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """One column [rows, H, 1, D] more -> all columns in use."""
        rows, end = self.window.rows, self.window.end
        self._keys[:rows, :, end], self._values[:rows, :, end] = key_states[:, :, 0], value_states[:, :, 0]
        self.written = 1
        return self.keys, self.values

    def take(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Put a row's last columns, [H, columns, D], into a slot."""
        end = self.window.end
        for kept, own in ((self._keys, keys), (self._values, values)):
            kept[index] = self.fill
            kept[index, :, end - own.shape[1] : end] = own

    def row(self, index: int, columns: int) -> tuple[Tensor, Tensor]:
        """A row's last columns, [H, columns, D]."""
        place = slice(self.window.end - columns, self.window.end)
        return self._keys[index, :, place], self._values[index, :, place]

    def moved(self, slots: int, end: int, columns: int) -> tuple[Tensor, Tensor]:
        """Tensors of other sizes with what is in use, ending at `end`."""
        return self._moved(self._keys, slots, end, columns), self._moved(self._values, slots, end, columns)

    def _moved(self, kept: Tensor, slots: int, end: int, columns: int) -> Tensor:
        window = self.window
        own = kept[: window.rows, :, window.start : window.end]
        found = kept.new_full((slots, kept.shape[1], columns, kept.shape[3]), self.fill)
        found[: len(own), :, end - own.shape[2] : end] = own
        return found

    def settle(self, keys: Tensor, values: Tensor) -> None:
        """Take what `moved` made."""
        self._keys, self._values = keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it is made from a cache that has seen the model."""

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start + self.written

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
        window = self.window
        others = [layer for layer in cache.layers if type(layer) is not DummyLayer]
        for layer, other in zip(self.own, others, strict=True):
            kept = min(columns, other.keys.shape[2])  # a sliding window keeps no more than it looks back
            layer.take(window.rows, other.keys[row, :, -kept:], other.values[row, :, -kept:])
        self.lengths.append(columns)
        window.rows += 1
        window.start = window.end - max(self.lengths)

    def advance(self) -> None:
        """A column was written, in every layer."""
        for layer in self.own:
            layer.written = 0
        self.window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def drop(self, index: int) -> None:
        """A row goes; the last one takes its place."""
        window, last = self.window, self.window.rows - 1
        if index != last:
            for layer in self.own:
                layer.take(index, *layer.row(last, self.lengths[last]))
            self.lengths[index] = self.lengths[last]
        self.lengths.pop()
        window.rows -= 1
        window.start = window.end - max(self.lengths, default=0)

    def row(self, index: int, config: object) -> DynamicCache:
        """A row as a cache of its own."""
        found = DynamicCache(config=config)
        for at, layer in enumerate(self.layers):
            if type(layer) is DummyLayer:
                continue
            keys, values = (x[None].clone() for x in layer.row(index, self.lengths[index]))
            if name := vars(layer).get("peftx_carried"):
                more = DynamicLayer()
                more.peftx_carried, more.peftx_fill = name, layer.fill
                found.layers.append(more)
                more.update(keys, values)
            else:
                found.update(keys, values, at)
        return found

    def ready(self) -> None:
        """Make room for the next column, which no layer has yet."""
        for layer in self.own:
            layer.written = 0  # by a call that failed
        self._make_room(0, self.window.rows)

    def _make_room(self, columns: int, rows: int) -> None:
        """A row of so many columns fits in front of `end`, and one more column behind it; so many rows fit."""
        window = self.window
        held = window.end - window.start
        front = max(columns, held)
        there, capacity = self.own[0].room
        if rows <= there and window.end >= front and window.end < capacity:
            return
        slots = there if rows <= there else max(rows, min(2 * there, self.slots))
        wanted = capacity if 2 * front <= capacity else 2 * front + FIRST
        moved = [layer.moved(slots, front, wanted) for layer in self.own]
        for layer, tensors in zip(self.own, moved, strict=True):  # where memory ends, nothing has changed
            layer.settle(*tensors)
        window.start, window.end = front - held, front


def check_layers(cache: Cache) -> None:
    """Raises UnsupportedError where a layer of a cache keeps other things than keys and values of tokens."""
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UnsupportedError(f"its cache has layers of kind {names}, whose rows cannot come and go")
