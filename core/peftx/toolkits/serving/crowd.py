"""Rows of different bundles in one call of the base that they share.

    y = W x, then for each bundle of the batch, on its own rows:  y[rows] = delta(x[rows], y[rows])

The product with the base's weights is made once for all rows. A bundle that changes a layer in another way than by what
is done to its output has its own layer called for its rows. Low-rank updates of one adapter a layer are made
together, as products of stacked matrices: y[k] += s B_k (A_k x[k]). Soft tokens take part in reading a prompt, which
the bundle's own model does; afterwards they are columns of the row's cache as any others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftx.copies import base_of, sharing
from peftx.errors import UnsupportedError
from peftx.kernel.chain import is_ours
from peftx.kernel.parts import BasePart, DeltaPart, FreePart, PromptPart
from peftx.kernel.slots import LowRank, kind_of, open_slot, slot_of
from peftx.toolkits.serving.packed import Packed, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.kernel.slots.state import SlotState
    from peftx.kernel.stack import Stack

Run = Callable[[Tensor, Tensor], Tensor]
PADDED = 2.0
"""Rows that equal groups may be padded to, as a share of those that there are; uneven ones go row by row."""


@dataclass
class Seats:
    """Which rows are whose."""

    names: tuple[str, ...] = ()
    """Of each row."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Name -> indices of its rows."""


@dataclass(eq=False)
class _Site:
    """What bundles do to one layer: stands in the layer's slot as the only delta.

    Attributes:
        crowd: knows whose rows are there. runs: name -> its deltas, in order. low: those that are one low-rank update.
    """

    crowd: Crowd
    runs: dict[str, tuple[Run, ...]] = field(default_factory=dict)
    low: dict[str, LowRank] = field(default_factory=dict)
    _stacked: tuple[Seats, tuple[Tensor, ...]] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x [n, T, in], y [n, T, out] -> y, its own tensor."""
        seats = self.crowd.seats
        if any(name in self.low for name in seats.rows):
            self._add_low_rank(seats, x, y)
        for name, rows in seats.rows.items():
            if (run := self.runs.get(name)) is None:
                continue
            if len(rows) == len(seats.names):  # the only bundle
                for delta in run:
                    y = delta(x, y)
                continue
            own, part = x.index_select(0, rows), y.index_select(0, rows)
            for delta in run:
                part = delta(own, part)
            y.index_copy_(0, rows, part)
        return y

    def _add_low_rank(self, seats: Seats, x: Tensor, y: Tensor) -> None:
        """y[rows of k] += s B_k (A_k x[rows of k]) for all k at once."""
        if self._stacked is None or self._stacked[0] is not seats:
            self._stacked = seats, self._stack(seats)
        places, kept, rows, A, B = self._stacked[1]
        K, T = len(A), x.shape[1]
        own = x.index_select(0, places).view(K, -1, x.shape[2])  # [K, g T, in]
        update = (own @ A) @ B  # [K, g T, out]
        update = update.view(len(places), T, -1)
        if len(kept) != len(places):
            update = update.index_select(0, kept)
        y.index_add_(0, rows, update)

    def _stack(self, seats: Seats) -> tuple[Tensor, ...]:
        """Rows in groups of one size [K * g] with those that count, where they go, and A [K, in, r], B [K, r, out]."""
        groups = [(self.low[name], rows) for name, rows in seats.rows.items() if name in self.low]
        total, most = sum(len(rows) for _, rows in groups), max(len(rows) for _, rows in groups)
        if most * len(groups) > PADDED * total:
            groups, most = [(low, row[None]) for low, rows in groups for row in rows], 1
        places = torch.cat([F.pad(rows, (0, most - len(rows)), value=int(rows[0])) for _, rows in groups])
        kept = torch.cat([
            torch.arange(len(rows), device=rows.device) + k * most for k, (_, rows) in enumerate(groups)
        ])  # fmt: skip
        rank = max(len(low.A) for low, _ in groups)
        A = torch.stack([F.pad(low.A, (0, 0, 0, rank - len(low.A))).t() for low, _ in groups])
        B = torch.stack([F.pad(low.B * low.scale, (0, rank - len(low.A))).t() for low, _ in groups])
        return places, kept, torch.cat([rows for _, rows in groups]), A, B


class Crowd:
    """A base, and the bundles that stand on models which share its weights.

    Args:
        base: as it was read. packed: lay its weights out for the CPU's products.
    """

    def __init__(self, base: PreTrainedModel, *, packed: bool) -> None:
        self.base, self.host = base, sharing(base).eval()
        self.seats = Seats()
        self.stacks: dict[str, Stack] = {}
        self._sites: dict[str, _Site] = {}
        self._seen: dict[str, list[tuple[nn.Module, object]]] = {}
        """Name -> its modules, and the state of each when the sites were made."""
        if packed:
            pack(self.host)

    def join(self, name: str, stack: Stack) -> None:
        """Take a bundle in.

        Raises:
            UnsupportedError: it does more to the base than can be done to some of the rows; with the first of it.
        """
        seen = self._seen[name] = []
        for path in edited_places(stack, self.base):
            module = stack.model.get_submodule(path)
            site, slot = self._sites.get(path) or self._open(path), slot_of(module)
            seen.append((module, _state_of(module)))
            if slot is None or not _adds(slot) or _has_own(module, self.base.get_submodule(path)):
                site.runs[name] = (partial(_whole, module),)
                continue
            alone = None if slot.alone is None else slot.alone.low_rank()
            if alone is not None and alone.A.dtype is self.host.dtype:
                site.low[name] = alone
            elif slot.run:
                site.runs[name] = slot.run
        self.stacks[name] = stack
        self.seats = Seats()

    def leave(self, name: str) -> None:
        """Let a bundle go; also one that came only half in."""
        self.stacks.pop(name, None)
        self._seen.pop(name, None)
        for site in self._sites.values():
            site.runs.pop(name, None)
            site.low.pop(name, None)
        self.seats = Seats()

    def seat(self, names: Sequence[str]) -> None:
        """Say whose row is which, before the host is called."""
        for name in dict.fromkeys(names):
            if any(_state_of(module) is not state for module, state in self._seen[name]):
                stack = self.stacks[name]  # adapters were switched, or merged
                self.leave(name)
                self.join(name, stack)
        if self.seats.names == tuple(names):
            return
        rows = {
            name: torch.tensor([i for i, own in enumerate(names) if own == name], device=self.host.device)
            for name in dict.fromkeys(names)
        }
        self.seats = Seats(tuple(names), rows)

    def reader(self, name: str) -> PreTrainedModel:
        """Who reads a bundle's prompts: its own model where soft tokens stand in front of them, else the host."""
        stack = self.stacks[name]
        return stack.model if stack.ledger.all(PromptPart) else self.host

    def _open(self, path: str) -> _Site:
        layer = self.host.get_submodule(path)
        slot = slot_of(layer) or open_slot(layer, kind_of(layer))
        site = self._sites[path] = _Site(self)
        slot.run = (site,)
        return site


def edited_places(stack: Stack, base: PreTrainedModel) -> list[str]:
    """Paths of the modules that a stack edits, or has parameters of its own in; all can be done for some rows alone.

    Raises:
        UnsupportedError: something on it cannot, or its base is another one.
    """
    if base_of(stack.model) is not base:
        raise UnsupportedError("it does not share its base's weights")
    known = dict(base.named_parameters(remove_duplicate=False))
    own = {
        name.rpartition(".")[0]: f"{name} is not the base's"
        for name, parameter in stack.model.named_parameters(remove_duplicate=False)
        if not is_ours(name) and known.get(name) is not parameter
    }
    for part in stack.ledger.parts:
        if isinstance(part, DeltaPart):
            own.setdefault(part.path, f"'{part.owner}' edits {part.path}")
        elif not isinstance(part, FreePart | PromptPart | BasePart):
            raise UnsupportedError(
                f"'{part.owner}' changes more than what single layers compute ({part.what})"
            )
    for path, what in own.items():
        module = base.get_submodule(path)
        if any(True for _ in module.children()) or not any(True for _ in module.parameters()):
            raise UnsupportedError(f"{what}, which is more than one layer")
    return list(own)


def _state_of(module: nn.Module) -> object:
    """Something of its slot that is made anew at each change."""
    slot = slot_of(module)
    return None if slot is None else slot.folded


def adopt(stack: Stack) -> None:
    """Let frozen parameters that are equal to the base's be the base's: what trained there and was packed since
    (BitDelta) takes no memory. For a stack that is served, and trains no more."""
    known = dict(base_of(stack.model).named_parameters(remove_duplicate=False))
    for name, own in list(stack.model.named_parameters(remove_duplicate=False)):
        old = known.get(name)
        if old is None or old is own or own.requires_grad or own.dtype != old.dtype:
            continue
        if torch.equal(own, old):
            path, _, leaf = name.rpartition(".")
            stack.model.get_submodule(path)._parameters[leaf] = old


def _has_own(module: nn.Module, base: nn.Module) -> bool:
    """Has a layer parameters that are not its base's."""
    theirs = base._parameters
    return any(own is not theirs.get(name) for name, own in module.named_parameters(recurse=False))


def _adds(slot: SlotState) -> bool:
    """Do all of its deltas act on the output of the layer's own product."""
    plain = slot.base is F.linear or isinstance(slot.base, Packed)
    return plain and not slot.uncommon and not slot.wraps


def _whole(module: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    """What a bundle's own layer makes of an input: the layer once more, for those rows."""
    found: Tensor = module(x)
    return found
