"""Deltas into the weights and out again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peftx.errors import MergeError
from peftx.kernel.chain import CHILD
from peftx.kernel.slots.carrier import STATE, OutputCarrier, PackedCarrier, base_class, slot_of
from peftx.kernel.slots.delta import Delta
from peftx.kernel.slots.state import Entry


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
    chosen = [entry for entry in slot.links if entry.owner in owners and entry.active]
    if not chosen:
        return
    check_folds(module, chosen)
    last = slot.links.index(chosen[-1])
    between = [
        e
        for e in slot.links[:last]
        if e.active and e not in chosen and e.parameter == chosen[-1].parameter and not _only_base(e.edit)
    ]
    if between:
        raise MergeError(
            f"{chosen[-1].owner} cannot be merged before {between[0].owner}, which acts nearer to the weights",
            hint=f"merge {between[0].owner} as well, or let it come later in the stack",
        )
    for parameter, first in {entry.parameter: entry for entry in chosen}.items():
        old = module._parameters[parameter]
        has_bias = first.bias in module._parameters
        old_bias = module._parameters.get(first.bias)
        weight, bias = fold_into([e for e in chosen if e.parameter == parameter], old.detach(), old_bias)
        if bias is not None and not has_bias:
            raise MergeError(f"{chosen[0].owner}: {base_class(module).__name__} has no place for a bias")
        slot.originals.setdefault(parameter, old)
        module._parameters[parameter] = _like(weight, old)
        if has_bias and bias is not None:
            slot.originals.setdefault(first.bias, old_bias)
            module._parameters[first.bias] = _like(bias, old_bias if old_bias is not None else old)
    for entry in chosen:
        entry.merged = True
    if not keep:
        slot.originals.clear()
    slot.rebuild()


def check_folds(module: nn.Module, entries: Sequence[Entry]) -> None:
    """Raises MergeError where these deltas on a module do not fold into its weights."""
    for entry in entries:
        if not entry.edit.can_fold():
            raise MergeError(f"{entry.owner}: {type(entry.edit).__name__} does not fold into the weights")
    if isinstance(module, OutputCarrier | PackedCarrier):
        raise MergeError(
            f"{entries[0].owner}: deltas on {base_class(module).__name__} do not fold into weights"
        )


def fold_into(entries: Sequence[Entry], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What deltas on one parameter, in this order, make of it and of its bias.

    Args:
        weight: as it is stored. bias: [..., out] or None.

    Returns:
        New weights, as they are stored, not rounded: float32, of float64 float64.
    """
    compute = torch.promote_types(weight.dtype, torch.float32)
    turned = entries[0].transposed
    weight = weight.to(compute).mT if turned else weight.to(compute)
    bias = None if bias is None else bias.detach().to(compute)
    for entry in entries:
        with _widened(entry.edit, compute):
            weight, bias = entry.fold(weight, bias)
    return (weight.mT.contiguous() if turned else weight), bias


@contextmanager
def _widened(delta: Delta, dtype: torch.dtype) -> Iterator[None]:
    """The delta's own numbers, and those of modules that it holds in a tuple, in the dtype that is computed in: also
    products of two narrow factors round."""
    held = [v for value in vars(delta).values() if isinstance(value, tuple) for v in value]
    modules = [delta, *(value for value in held if isinstance(value, nn.Module))]
    narrow = [t for m in modules for t in (*m.parameters(), *m.buffers())
              if t.is_floating_point() and t.dtype != dtype and not t.is_meta]  # fmt: skip
    kept = [(t, t.data) for t in {id(t): t for t in narrow}.values()]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def unmerge(module: nn.Module) -> None:
    """Bring back the very parameters from before the merge."""
    slot = slot_of(module)
    if slot is None or not any(entry.merged for entry in slot.links):
        return
    if not slot.originals:
        raise MergeError("the weights from before the merge were not kept", hint="merge with keep=True")
    for name, parameter in slot.originals.items():
        follow(parameter, module._parameters[name])
        module._parameters[name] = parameter
    slot.originals.clear()
    for entry in slot.links:
        entry.merged = False
    slot.rebuild()


def snapshot(module: nn.Module) -> Callable[[], None]:
    """Note a slot, and the module's own weights, as they are; what is returned brings them back."""
    slot = slot_of(module)
    if slot is None:
        return lambda: None
    cls, weights, originals = type(module), dict(module._parameters), dict(slot.originals)
    holder = module._modules[CHILD]
    assert holder is not None
    deltas = dict(holder._modules)
    entries = [(entry, entry.enabled, entry.merged) for entry in slot.links]

    def restore() -> None:
        module.__class__ = cls
        module.__dict__[STATE] = slot
        module._modules[CHILD] = holder
        holder._modules = deltas
        module._parameters = weights
        slot.originals = originals
        slot.links = [entry for entry, _, _ in entries]
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
    cast = values.to(old.dtype)
    cast = (
        cast.clone() if cast.data_ptr() == old.data_ptr() else cast
    )  # a fold may change nothing: not the original then
    return nn.Parameter(cast, requires_grad=old.requires_grad)
