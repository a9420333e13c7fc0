"""Deltas onto a module, off it, and in or out of effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from peftx.errors import ConflictError, MergeError, UnsupportedError
from peftx.kernel.chain import CHILD, children_of
from peftx.kernel.slots.carrier import base_class, close_slot, kind_of, open_slot, slot_of
from peftx.kernel.slots.delta import Delta
from peftx.kernel.slots.folding import merge, snapshot, unmerge
from peftx.kernel.slots.rows import Rows
from peftx.kernel.slots.state import Entry


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
    bias: str = "bias",
    transposed: bool = False,
) -> Entry:
    """Put `delta` into the module's slot, at its plugin's place in stack order.

    Args:
        name: key of the child module, unique in the slot, no dots.
        parameter: the matrix it belongs to. rows: its rows, if the matrix is shared by several roles.
        kind: carrier (`plain`, `linear`, `weight`, `read`, `called`, `output`); `kind_of(module)` if left out.
        bias: the parameter that is added to the matrix's product. transposed: the matrix is stored [..., in, out].

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
    if delta.has_around() and kind != "output":
        raise UnsupportedError(
            f"{type(delta).__name__} stands around a call, which {base_class(module).__name__} does not offer",
            hint="model.blocks(...), or forward and pre on a linear layer",
        )
    acts = (
        delta.has_forward()
        or (kind == "packed" and delta.has_pre())
        or (kind == "output" and delta.has_around())
    )
    if kind in ("output", "packed") and not acts:
        raise UnsupportedError(
            f"{type(delta).__name__} defines no forward, and on {base_class(module).__name__} nothing else can act",
            hint="define forward(x, y), or target linear layers",
        )
    if not (acts or delta.has_pre() or delta.has_base() or delta.can_fold()):
        raise UnsupportedError(f"{type(delta).__name__} defines none of forward, pre, base, around and fold")
    slot = slot_of(module)
    if delta.has_base() and slot is not None:
        other = next((entry.owner for entry in slot.links if entry.edit.has_base()), None)
        if other is not None:
            raise ConflictError(f"'{owner}' and '{other}' both compute one layer", hint="keep one")
    turned = transposed or isinstance(module, Conv1D)
    entry = Entry(name, owner, rank, delta, parameter=parameter, rows=rows, bias=bias, transposed=turned)
    _check_weight_edits(slot.links if slot is not None else [], entry, kind)
    if slot is None:
        slot = open_slot(module, kind)
    elif any(entry.merged for entry in slot.links):
        raise ConflictError(
            f"{owner}: the layer holds merged deltas",
            hint="stack.unmerge() first, or stack.merge(keep=False) for good",
        )
    if name in children_of(module, CHILD):
        raise ConflictError(f"{owner}: a delta named '{name}' already stands on this module")
    slot.add(module, entry)
    return entry


def _check_weight_edits(entries: Sequence[Entry], new: Entry, kind: str) -> None:
    """Raises ConflictError where a delta that only folds would stand over one that does not: it edits the weights, and
    the other one leaves none."""
    if kind not in ("plain", "linear"):
        return
    ordered = sorted([*entries, new], key=lambda entry: entry.rank)
    for index, entry in enumerate(ordered):
        below = next((other for other in ordered[:index] if not other.edit.can_fold()), None)
        if entry.edit.only_folds() and below is not None:
            raise ConflictError(
                f"'{entry.owner}' edits the weights, and '{below.owner}', which stands before it, does not fold into "
                "them",
                hint=f"this order works: {entry.owner}, {below.owner}",
            )


def without_fast_path(model: nn.Module, path: str, module: nn.Module) -> Callable[[], None]:
    """Inside torch's own `TransformerEncoder`, evaluation runs a fused kernel on the bare weights, past every delta. A
    hook on a module inside, and no nested tensors, keep it from that. Returns the way back."""
    around = [model]
    for name in path.split(".")[:-1]:
        around.append(around[-1]._modules[name])  # type: ignore[arg-type]  # get_submodule starts anew each time
    if not any(isinstance(m, nn.TransformerEncoderLayer) for m in around):
        return _nothing
    nested = [m for m in around if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    for encoder in nested:
        encoder.use_nested_tensor = False
    handle = module.register_forward_hook(_seen)

    def give_back() -> None:
        handle.remove()
        for encoder in nested:
            encoder.use_nested_tensor = True

    return give_back


def _nothing() -> None: ...


def _seen(module: nn.Module, inputs: object, output: object) -> None: ...


def detach(module: nn.Module, owner: str) -> None:
    """Take the owner's deltas out; the last one gone gives the module its own class back."""
    slot = slot_of(module)
    if slot is None:
        return
    again: set[str] = set()
    if any(entry.merged and entry.owner == owner for entry in slot.links):
        again = {entry.owner for entry in slot.links if entry.merged and entry.owner != owner}
        unmerge(module)
    empty = slot.drop(module, owner)
    if again:
        merge(module, again)
    if empty:
        close_slot(module)


def enable(module: nn.Module, owner: str, enabled: bool) -> None:
    """Switch the owner's deltas on or off.

    Raises:
        MergeError: it is merged, or is to act under one that is; nothing is changed then.
    """
    slot = slot_of(module)
    if slot is None:
        return
    for i, entry in enumerate(slot.links):
        if entry.owner != owner or entry.enabled == enabled:
            continue
        if entry.merged:
            raise MergeError(f"{owner} is merged and cannot be switched off", hint="stack.unmerge() first")
        outer = [e.owner for e in slot.links[i:] if e.merged and e.parameter == entry.parameter]
        if outer:
            raise MergeError(f"{owner} acts nearer to the weights than {outer[0]}, which is merged into them",
                             hint="stack.unmerge() first")  # fmt: skip
    slot.switch(owner, enabled)


def bake(module: nn.Module, owner: str) -> tuple[str, ...]:
    """Fold the owner's deltas in for good and take them out. Returns the names of the parameters that changed.

    Raises:
        MergeError: see `merge`; nothing is changed then.
    """
    slot = slot_of(module)
    if slot is None:
        return ()
    again = {entry.owner for entry in slot.links if entry.merged and entry.owner != owner}
    restore = snapshot(module)
    try:
        unmerge(module)
        before = dict(module._parameters)
        merge(module, {owner}, keep=False)
    except BaseException:
        restore()
        raise
    for entry in [entry for entry in slot.links if entry.owner == owner]:
        entry.merged = False
    detach(module, owner)
    changed = tuple(
        name for name, p in module._parameters.items() if p is not None and p is not before.get(name)
    )
    merge(module, again)
    return changed
