"""What a slot knows of its deltas, and how they act together; `rebuild` decides, so that a call does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftx.kernel.chain import CHILD, Chain, Link
from peftx.kernel.slots.delta import Delta
from peftx.kernel.slots.rows import Rows


@dataclass(eq=False)
class Entry(Link[Delta]):
    """One attached delta."""

    parameter: str = "weight"
    rows: Rows | None = None
    bias: str = "bias"
    """The parameter that is added to the product of the matrix and the input."""
    transposed: bool = False
    """The matrix is stored [..., in, out]."""
    merged: bool = False

    @property
    def active(self) -> bool:
        return self.enabled and not self.merged

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Into [..., out, in] weights, or into its rows of them."""
        if self.rows is None:
            return self.edit.fold(weight, bias)
        part_bias = None if bias is None else self.rows.take(bias)
        new_weight, new_bias = self.edit.fold(self.rows.take(weight, -2), part_bias)
        weight = self.rows.put(weight, new_weight, -2)
        if new_bias is not None:
            bias = self.rows.put(weight.new_zeros(weight.shape[:-1]) if bias is None else bias, new_bias)
        return weight, bias


class SlotState(Chain[Delta]):
    """The chain of a slot, and the weights as they were before the first merge."""

    links: list[Entry]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(CHILD)
        self.originals: dict[str, nn.Parameter | None] = {}
        self.run: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
        self.weighted: tuple[Entry, ...] = ()
        """Up to the last delta that only folds: these act on the weights at each call, those after them as usual."""
        self.nested: tuple[Entry, ...] = ()
        self.wraps = False
        """Does one stand around the call of a block."""
        self.uncommon = False
        self.low_rank: tuple[Delta, ...] = ()
        self.first: Delta | None = None
        """The innermost one, where it is a low-rank update of the layer itself."""
        self.alone: Delta | None = None
        self.base: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        self.folded: dict[str, tuple[Entry, ...]] = {}

    def rebuild(self) -> None:
        """Recompute what `forward` walks over; called at every change, so that `forward` decides nothing."""
        if len(self.links) == 1:  # most slots, whenever a stack is built
            only = self.links[0]
            kind = type(only.edit)
            simple = kind.has_forward() and not (kind.has_pre() or kind.has_base() or kind.has_around())
            if only.active and only.rows is None and simple:
                self.base, self.weighted, self.nested, self.uncommon = F.linear, (), (), False
                self.wraps = False
                self.run = (only.edit,)
                self.low_rank = self.run if kind.low_rank is not Delta.low_rank else ()
                self.alone = self.first = only.edit if self.low_rank else None
                self.folded = {only.parameter: (only,)}
                return
        active = [entry for entry in self.links if entry.active]
        self.wraps = any(entry.edit.has_around() for entry in active)
        self.base = next((e.edit.base for e in active if e.edit.has_base()), F.linear)
        inner = max((i for i, e in enumerate(active, 1) if e.edit.only_folds()), default=0)
        self.weighted = tuple(active[:inner])
        outer = [e for e in active[inner:] if e.edit.has_forward() or e.edit.has_pre()]
        self.nested = tuple(outer) if any(entry.edit.has_pre() for entry in outer) else ()
        self.uncommon = bool(self.weighted or self.nested)
        self.run = tuple(
            entry.edit if entry.rows is None else RowsRun(entry.edit, entry.rows) for entry in outer
        )
        plain = all(e.rows is None and type(e.edit).low_rank is not Delta.low_rank for e in outer)
        self.low_rank = tuple(entry.edit for entry in outer) if plain else ()
        self.alone = self.low_rank[0] if len(self.low_rank) == 1 else None
        innermost = outer[0] if outer and self.base is F.linear and not self.uncommon else None
        low = innermost is not None and innermost.rows is None and _is_low_rank(innermost.edit)
        self.first = innermost.edit if innermost is not None and low else None
        self.folded = {
            name: tuple(entry for entry in active if entry.parameter == name)
            for name in dict.fromkeys(entry.parameter for entry in active)
        }


@dataclass(frozen=True)
class RowsRun:
    """Applies a delta to its rows of the output."""

    delta: Delta
    rows: Rows

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        part = self.rows.take(y)
        if not torch.is_grad_enabled():
            part = part.clone()  # a delta may write into its argument then, and this is a view of y
        return self.rows.put(y, self.delta(x, part))


def add_all_low_rank(deltas: tuple[Delta, ...], x: Tensor, y: Tensor) -> bool:
    """y += s B A x for each, written into `y`, without calling the deltas as modules: what a decode step spends on an
    adapter of rank 8 is mostly Python. False, and `y` untouched, if one is not just a low-rank addition right now."""
    factors = [delta.low_rank() for delta in deltas]
    for found in factors:
        if found is None or found[0].dtype is not y.dtype:
            return False
    rows, inputs = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    for A, B, scale in factors:  # type: ignore[misc]
        rows.addmm_(inputs.mm(A.t()), B.t(), alpha=scale)
    return True


def folded(entries: tuple[Entry, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weights that these deltas make of a layer's own."""
    for entry in entries:
        weight, bias = entry.fold(weight, bias)
    return weight, bias


def wrapped(entries: Sequence[Entry], block: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward with all that stands around it or behind it."""
    for entry in entries:
        if entry.active and entry.edit.has_around():
            block = partial(entry.edit.around, block)
        if entry.active and entry.edit.has_forward():
            block = partial(_behind, entry.edit, block)
    return block


def _behind(delta: Delta, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = block(*args, **kwargs)
    return edited(out, (delta,), args[0] if args else next(iter(kwargs.values()), None))


def edited(out: Any, deltas: Sequence[Callable[[Any, Tensor], Tensor]], x: Any) -> Any:
    """What a module returned, the first of it edited by each."""
    first = out[0] if isinstance(out, tuple) else out
    for delta in deltas:
        first = delta(x, first)
    return (first, *out[1:]) if isinstance(out, tuple) else first


def nested(entries: tuple[Entry, ...], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    """Deltas that edit the input: inputs go from the outermost in, outputs from the innermost out."""
    inputs = []
    for entry in reversed(entries):
        if entry.edit.has_pre():
            x = entry.edit.pre(x)
        inputs.append(x)
    y = base(x)
    for entry, seen in zip(entries, reversed(inputs), strict=True):
        if entry.edit.has_forward():
            y = entry.edit(seen, y) if entry.rows is None else RowsRun(entry.edit, entry.rows)(seen, y)
    return y


def _is_low_rank(delta: Delta) -> bool:
    return type(delta).low_rank is not Delta.low_rank
