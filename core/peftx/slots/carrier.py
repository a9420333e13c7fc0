"""Slots: a module becomes a subclass of its own class whose `forward` applies an ordered list of deltas.

The module keeps its identity, class name, parameters and state-dict keys, so checkpoints, `isinstance`, deepcopy,
pickle, `torch.compile`, FSDP2 and HF PEFT on top of it keep working; the deltas are children under the name `peftx`.
Six carriers: `PlainLinear` (nn.Linear itself), `Linear` (its subclasses and Conv1D), `Weight` (modules that hold a
matrix and use it in a forward of their own: stacked experts, routers), `Read` (linear layers whose weight another
module uses), `Called` (those of them that are called too), `Output` (all the rest: norms, embeddings, blocks, quantized
layers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftx.errors import ConflictError, MergeError, UnsupportedError
from peftx.slots.delta import Delta
from peftx.slots.rows import Rows

CHILD = "peftx"
"""Name of the child module that holds the deltas."""
STATE = "_peftx_slot"


@dataclass(eq=False)
class Entry:
    """One attached delta. `rank` is the plugin's place in the stack."""

    name: str
    owner: str
    rank: int
    delta: Delta
    parameter: str
    rows: Rows | None
    enabled: bool = True
    merged: bool = False

    @property
    def active(self) -> bool:
        return self.enabled and not self.merged


class SlotState:
    """Bookkeeping of one slot: the entries in stack order and the weights as they were before the first merge."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.originals: dict[str, nn.Parameter | None] = {}
        self.run: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
        self.nested: tuple[Entry, ...] = ()
        self.low_rank: tuple[Delta, ...] = ()
        self.alone: Delta | None = None
        self.base: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        self.folded: dict[str, tuple[Entry, ...]] = {}

    def rebuild(self) -> None:
        """Recompute what `forward` walks over; called at every change, so that `forward` decides nothing."""
        if len(self.entries) == 1:  # most slots, whenever a stack is built
            only = self.entries[0]
            kind = type(only.delta)
            if only.active and only.rows is None and not kind.has_pre() and not kind.has_base():
                self.base, self.nested = F.linear, ()
                self.run = (only.delta,) if kind.has_forward() else ()
                self.low_rank = self.run if kind.low_rank is not Delta.low_rank else ()
                self.alone = only.delta if self.low_rank else None
                self.folded = {only.parameter: (only,)}
                return
        active = [entry for entry in self.entries if entry.active]
        self.base = next((e.delta.base for e in active if e.delta.has_base()), F.linear)
        outer = [e for e in active if e.delta.has_forward() or e.delta.has_pre()]
        self.nested = tuple(outer) if any(entry.delta.has_pre() for entry in outer) else ()
        self.run = tuple(
            entry.delta if entry.rows is None else RowsRun(entry.delta, entry.rows) for entry in outer
        )
        plain = all(e.rows is None and type(e.delta).low_rank is not Delta.low_rank for e in outer)
        self.low_rank = tuple(entry.delta for entry in outer) if plain else ()
        self.alone = self.low_rank[0] if len(self.low_rank) == 1 else None
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


class Carrier:
    """Mixin of all slot classes; holds no parameters of its own."""

    _peftx_slot: SlotState

    def __reduce_ex__(
        self, protocol: SupportsIndex
    ) -> tuple[Any, ...]:  # the class is made at run time: name its parts
        return _rebuild, (self._peftx_base, self._peftx_carrier), self.__dict__  # type: ignore[attr-defined]


class LinearCarrier(Carrier):
    """nn.Linear and Conv1D: weight [out, in] (Conv1D: [in, out])."""

    def forward(self, x: Tensor) -> Tensor:
        slot = self._peftx_slot
        if slot.nested:
            return _nested(slot.nested, x, super().forward)  # type: ignore[misc]
        y = super().forward(x)  # type: ignore[misc]
        for delta in slot.run:
            y = delta(x, y)
        return y


class PlainLinearCarrier(Carrier):
    """nn.Linear itself, the common case, without the second call."""

    weight: Tensor
    bias: Tensor | None
    in_features: int

    def forward(self, input: Tensor) -> Tensor:
        slot = self._peftx_slot
        if slot.nested:
            return _nested(slot.nested, input, lambda x: slot.base(x, self.weight, self.bias))
        y = slot.base(input, self.weight, self.bias)
        if slot.low_rank and not torch.is_grad_enabled():
            if slot.alone is not None and input.numel() == self.in_features:
                # One adapter and one row, a step of decoding: a product of a matrix and a vector takes half the calls.
                found = slot.alone.low_rank()
                if found is not None and found.A.dtype is y.dtype:
                    y.view(-1).addmv_(found.B, found.A.mv(input.view(-1)), alpha=found.scale)
                    return y
            elif _add_low_rank(slot.low_rank, input, y):
                return y
        for delta in slot.run:
            y = delta(input, y)
        return y


class OutputCarrier(Carrier):
    """Any module: deltas see its first argument and its output (the first one, if it returns several)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self._peftx_slot
        x = args[0] if args else next(iter(kwargs.values()), None)
        if slot.nested:
            raise UnsupportedError(
                f"{type(self).__name__}: only linear layers take a delta that edits the input"
            )
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        first = out[0] if isinstance(out, tuple) else out
        for delta in slot.run:
            first = delta(x, first)
        return (first, *out[1:]) if isinstance(out, tuple) else first


class WeightCarrier(Carrier):
    """Modules that use their matrices in a forward of their own: the deltas are folded in at each call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self._peftx_slot
        shadowed = []
        try:
            for name, entries in slot.folded.items():
                weight: Tensor = self._parameters[name]  # type: ignore[attr-defined]
                for entry in entries:
                    weight = _fold_rows(entry, weight, None)[0]
                self.__dict__[name] = weight  # found before the parameter of the same name
                shadowed.append(name)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name in shadowed:
                del self.__dict__[name]


class ReadCarrier(Carrier):
    """Linear layers whose weight others read without calling them: what is read has the deltas folded in."""

    _parameters: dict[str, nn.Parameter | None]

    @property
    def weight(self) -> Tensor:
        return self._peftx_fold()[0]

    @property
    def bias(self) -> Tensor | None:
        return self._peftx_fold()[1]

    def _peftx_fold(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        for entry in self._peftx_slot.folded.get("weight", ()):
            if entry.delta.can_fold():  # Mamba reads it in training also where the kernel is not there
                weight, bias = _fold_rows(entry, weight, bias)
        return weight, bias


class CalledCarrier(ReadCarrier):
    """Linear layers that are called, but for a fused kernel that reads their weight. A call runs the deltas; what is
    read has those folded in that fold, and a delta that does not must see for itself that it was called."""

    def forward(self, input: Tensor) -> Tensor:
        slot = self._peftx_slot
        if slot.nested:
            return _nested(slot.nested, input, self._peftx_plain)
        y = self._peftx_plain(input)
        for delta in slot.run:
            y = delta(input, y)
        return y

    def _peftx_plain(self, input: Tensor) -> Tensor:
        return F.linear(input, self._parameters["weight"], self._parameters["bias"])


_CARRIERS: dict[str, type[Carrier]] = {
    "plain": PlainLinearCarrier,
    "linear": LinearCarrier,
    "weight": WeightCarrier,
    "read": ReadCarrier,
    "called": CalledCarrier,
    "output": OutputCarrier,
}


@cache
def _slot_class(base: type[nn.Module], carrier: str) -> type[nn.Module]:
    """The subclass of `base` with a slot; same name, so reports and repr stay readable."""
    mixin = _CARRIERS[carrier]
    return type(
        base.__name__,
        (mixin, base),
        {
            "_peftx_base": base,
            "_peftx_carrier": carrier,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        },
    )


def _rebuild(base: type[nn.Module], carrier: str) -> nn.Module:
    cls = _slot_class(base, carrier)
    return cls.__new__(cls)


def _add_low_rank(deltas: tuple[Delta, ...], x: Tensor, y: Tensor) -> bool:
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


def _nested(entries: tuple[Entry, ...], x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    """Deltas that edit the input: inputs go from the outermost in, outputs from the innermost out."""
    inputs = []
    for entry in reversed(entries):
        if entry.delta.has_pre():
            x = entry.delta.pre(x)
        inputs.append(x)
    y = base(x)
    for entry, seen in zip(entries, reversed(inputs), strict=True):
        if entry.delta.has_forward():
            y = entry.delta(seen, y) if entry.rows is None else RowsRun(entry.delta, entry.rows)(seen, y)
    return y


def kind_of(module: nn.Module) -> str:
    """The carrier that fits a module."""
    base = base_class(module)
    if base.forward is nn.Linear.forward:
        return "plain"
    return "linear" if issubclass(base, nn.Linear | Conv1D) else "output"


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without the slot."""
    return type(module)._peftx_base if isinstance(module, Carrier) else type(module)  # type: ignore[attr-defined]


def slot_of(module: nn.Module) -> SlotState | None:
    return module.__dict__.get(STATE)


def attach(
    module: nn.Module,
    delta: Delta,
    *,
    name: str,
    owner: str,
    rank: int,
    parameter: str = "weight",
    rows: Rows | None = None,
    kind: str | None = None,
) -> Entry:
    """Put `delta` into the module's slot, at its plugin's place in stack order.

    Args:
        name: key of the child module, unique in the slot, no dots.
        parameter: the matrix it belongs to. rows: its rows, if the matrix is shared by several roles.
        kind: carrier (`plain`, `linear`, `weight`, `read`, `called`, `output`); `kind_of(module)` if left out.

    Raises:
        ConflictError: the name is taken, or the slot holds merged deltas.
        UnsupportedError: a delta that edits the input where the carrier cannot, or cannot fold where it must.
    """
    kind = kind or kind_of(module)
    if kind in ("weight", "read") and not delta.can_fold():
        raise UnsupportedError(
            f"{type(delta).__name__} does not fold, so it cannot act on {base_class(module).__name__}"
        )
    if delta.has_pre() and (kind in ("weight", "read", "output") or rows is not None):
        place = "part of a fused matrix" if rows is not None else base_class(module).__name__
        raise UnsupportedError(
            f"{type(delta).__name__} edits the input, which {place} does not offer",
            hint="target unfused linear layers, for example 'mlp'",
        )
    if delta.has_base() and (kind != "plain" or rows is not None):
        raise UnsupportedError(
            f"{type(delta).__name__} computes the layer itself, which only a whole nn.Linear offers, "
            f"and this is {base_class(module).__name__}"
        )
    slot = slot_of(module)
    if delta.has_base() and slot is not None:
        other = next((entry.owner for entry in slot.entries if entry.delta.has_base()), None)
        if other is not None:
            raise ConflictError(f"'{owner}' and '{other}' both compute one layer", hint="keep one")
    if slot is None:
        slot = SlotState()
        module.__class__ = _slot_class(type(module), kind)
        module.__dict__[STATE] = slot
        children = nn.ModuleDict()
        children.training = module.training
        module._modules[CHILD] = children
    elif any(entry.merged for entry in slot.entries):
        raise ConflictError(
            f"{owner}: the layer holds merged deltas",
            hint="stack.unmerge() first, or stack.merge(keep=False) for good",
        )
    deltas = module._modules[CHILD]._modules  # type: ignore[union-attr]
    if name in deltas:
        raise ConflictError(f"{owner}: a delta named '{name}' already stands on this module")
    deltas[name] = (
        delta  # not through ModuleDict, which refuses `half`, `type` and other names of its methods
    )
    entry = Entry(name, owner, rank, delta, parameter, rows)
    position = next((i for i, other in enumerate(slot.entries) if other.rank > rank), len(slot.entries))
    slot.entries.insert(position, entry)
    slot.rebuild()
    return entry


def detach(module: nn.Module, owner: str) -> None:
    """Take the owner's deltas out; the last one gone gives the module its own class back."""
    slot = slot_of(module)
    if slot is None:
        return
    again: set[str] = set()
    if any(entry.merged and entry.owner == owner for entry in slot.entries):
        again = {entry.owner for entry in slot.entries if entry.merged and entry.owner != owner}
        unmerge(module)
    for entry in [entry for entry in slot.entries if entry.owner == owner]:
        slot.entries.remove(entry)
        del module.get_submodule(CHILD)[entry.name]  # type: ignore[operator]
    slot.rebuild()
    if again:
        merge(module, again)
    if not slot.entries:
        del module._modules[CHILD]
        del module.__dict__[STATE]
        module.__class__ = base_class(module)


def enable(module: nn.Module, owner: str, enabled: bool) -> None:
    """Switch the owner's deltas on or off.

    Raises:
        MergeError: it is merged, or is to act under one that is; nothing is changed then.
    """
    slot = slot_of(module)
    if slot is None:
        return
    for i, entry in enumerate(slot.entries):
        if entry.owner != owner or entry.enabled == enabled:
            continue
        if entry.merged:
            raise MergeError(f"{owner} is merged and cannot be switched off", hint="stack.unmerge() first")
        outer = [e.owner for e in slot.entries[i:] if e.merged and e.parameter == entry.parameter]
        if outer:
            raise MergeError(f"{owner} acts nearer to the weights than {outer[0]}, which is merged into them",
                             hint="stack.unmerge() first")  # fmt: skip
    for entry in slot.entries:
        if entry.owner == owner:
            entry.enabled = enabled
    slot.rebuild()


def _fold_rows(entry: Entry, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Fold one entry into [..., out, in] weights, or into its rows of them."""
    if entry.rows is None:
        return entry.delta.fold(weight, bias)
    rows = entry.rows
    part_bias = None if bias is None else rows.take(bias)
    new_weight, new_bias = entry.delta.fold(rows.take(weight, -2), part_bias)
    weight = rows.put(weight, new_weight, -2)
    if new_bias is not None:
        bias = rows.put(weight.new_zeros(weight.shape[:-1]) if bias is None else bias, new_bias)
    return weight, bias


@torch.no_grad()
def merge(module: nn.Module, owners: set[str], *, keep: bool = True) -> None:
    """Fold the owners' deltas into the weights; computed in float32 (float64 stays), rounded once.

    Args:
        keep: keep the untouched weights, so that `unmerge` is bit-exact.

    Raises:
        MergeError: a delta that does not fold, or one that is not merged stands nearer to the weights.
    """
    slot = slot_of(module)
    if slot is None:
        return
    chosen = [entry for entry in slot.entries if entry.owner in owners and entry.active]
    if not chosen:
        return
    for entry in chosen:
        if not entry.delta.can_fold():
            raise MergeError(f"{entry.owner}: {type(entry.delta).__name__} does not fold into the weights")
    last = slot.entries.index(chosen[-1])
    between = [
        e
        for e in slot.entries[:last]
        if e.active and e not in chosen and e.parameter == chosen[-1].parameter and not _only_base(e.delta)
    ]
    if between:
        raise MergeError(
            f"{chosen[-1].owner} cannot be merged before {between[0].owner}, which acts nearer to the weights",
            hint=f"merge {between[0].owner} as well, or let it come later in the stack",
        )
    if isinstance(module, OutputCarrier):
        raise MergeError(
            f"{chosen[0].owner}: deltas on {base_class(module).__name__} do not fold into weights"
        )
    transposed = isinstance(module, Conv1D)
    for parameter in dict.fromkeys(entry.parameter for entry in chosen):
        old = module._parameters[parameter]
        has_bias = parameter == "weight" and isinstance(module, nn.Linear | Conv1D)
        old_bias = module._parameters.get("bias") if has_bias else None
        compute = torch.promote_types(old.dtype, torch.float32)
        weight = old.detach().to(compute)
        weight = weight.t() if transposed else weight
        bias = None if old_bias is None else old_bias.detach().to(compute)
        for entry in chosen:
            if entry.parameter == parameter:
                weight, bias = _fold_rows(entry, weight, bias)
        if bias is not None and not has_bias:
            raise MergeError(f"{chosen[0].owner}: {base_class(module).__name__} has no place for a bias")
        weight = weight.t().contiguous() if transposed else weight
        slot.originals.setdefault(parameter, old)
        module._parameters[parameter] = _like(weight, old)
        if has_bias and bias is not None:
            slot.originals.setdefault("bias", old_bias)
            module._parameters["bias"] = _like(bias, old_bias if old_bias is not None else old)
    for entry in chosen:
        entry.merged = True
    if not keep:
        slot.originals.clear()
    slot.rebuild()


def bake(module: nn.Module, owner: str) -> tuple[str, ...]:
    """Fold the owner's deltas in for good and take them out. Returns the names of the parameters that changed.

    Raises:
        MergeError: see `merge`; nothing is changed then.
    """
    slot = slot_of(module)
    if slot is None:
        return ()
    again = {entry.owner for entry in slot.entries if entry.merged and entry.owner != owner}
    restore = snapshot(module)
    try:
        unmerge(module)
        before = dict(module._parameters)
        merge(module, {owner}, keep=False)
    except BaseException:
        restore()
        raise
    for entry in [entry for entry in slot.entries if entry.owner == owner]:
        entry.merged = False
    detach(module, owner)
    changed = tuple(
        name for name, p in module._parameters.items() if p is not None and p is not before.get(name)
    )
    merge(module, again)
    return changed


def snapshot(module: nn.Module) -> Callable[[], None]:
    """Note a slot, and the module's own weights, as they are; what is returned brings them back."""
    slot = slot_of(module)
    if slot is None:
        return lambda: None
    cls, weights, originals = type(module), dict(module._parameters), dict(slot.originals)
    holder = module._modules[CHILD]
    assert holder is not None
    deltas = dict(holder._modules)
    entries = [(entry, entry.enabled, entry.merged) for entry in slot.entries]

    def restore() -> None:
        module.__class__ = cls
        module.__dict__[STATE] = slot
        module._modules[CHILD] = holder
        holder._modules = deltas
        module._parameters = weights
        slot.originals = originals
        slot.entries = [entry for entry, _, _ in entries]
        for entry, enabled, merged in entries:
            entry.enabled, entry.merged = enabled, merged
        slot.rebuild()

    return restore


def follow(kept: nn.Parameter | None, now: nn.Parameter | None) -> None:
    """Move and cast a parameter that stood aside, in place, as its stand-in was: `model.to` cannot see it."""
    if kept is None or now is None or kept.is_meta or now.is_meta:
        return
    if kept.device != now.device or kept.dtype != now.dtype:
        kept.data = kept.data.to(now.device, now.dtype)


def _only_base(delta: Delta) -> bool:
    """Does it compute the layer and nothing around it, so that it reads merged weights as it reads the others."""
    return delta.has_base() and not delta.has_forward() and not delta.has_pre()


def _like(values: Tensor, old: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.to(old.dtype), requires_grad=old.requires_grad)


def unmerge(module: nn.Module) -> None:
    """Bring back the very parameters from before the merge."""
    slot = slot_of(module)
    if slot is None or not any(entry.merged for entry in slot.entries):
        return
    if not slot.originals:
        raise MergeError("the weights from before the merge were not kept", hint="merge with keep=True")
    for name, parameter in slot.originals.items():
        follow(parameter, module._parameters[name])
        module._parameters[name] = parameter
    slot.originals.clear()
    for entry in slot.entries:
        entry.merged = False
    slot.rebuild()
