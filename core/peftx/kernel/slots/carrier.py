"""Slots: a module becomes a subclass of its own class whose `forward` applies an ordered list of deltas.

The module keeps its identity, class name, parameters and state-dict keys, so checkpoints, `isinstance`, deepcopy,
pickle, `torch.compile`, FSDP2 and HF PEFT on top of it keep working; the deltas are children under the name `peftx`.
Six carriers: `PlainLinear` (nn.Linear itself), `Linear` (its subclasses and Conv1D), `Weight` (modules that hold a
matrix and use it in a forward of their own: stacked experts, routers), `Read` (linear layers whose weight another
module uses), `Called` (those of them that are called too), `Output` (all the rest: norms, embeddings, blocks, quantized
layers).
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, SupportsIndex, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftx.errors import UnsupportedError
from peftx.kernel.slots.fused import applies, hooked, linear_with_low_rank
from peftx.kernel.slots.state import SlotState, add_all_low_rank, edited, folded, nested, wrapped

STATE = "_peftx_slot"
M = TypeVar("M", bound=nn.Module)


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
            return nested(slot.nested, x, self._peftx_base_forward)
        y = self._peftx_base_forward(x)
        for delta in slot.run:
            y = delta(x, y)
        return y

    def _peftx_base_forward(self, x: Tensor) -> Tensor:
        weighted = self._peftx_slot.weighted
        if not weighted:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        own: dict[str, Tensor] = self._parameters  # type: ignore[attr-defined]
        transposed = isinstance(self, Conv1D)
        weight, bias = folded(weighted, own["weight"].t() if transposed else own["weight"], own["bias"])
        try:
            # Found before the parameters of the same names.
            self.__dict__["weight"], self.__dict__["bias"] = weight.t() if transposed else weight, bias
            return super().forward(x)  # type: ignore[misc, no-any-return]
        finally:
            del self.__dict__["weight"], self.__dict__["bias"]


class PlainLinearCarrier(Carrier):
    """nn.Linear itself, the common case, without the second call."""

    weight: Tensor
    bias: Tensor | None
    in_features: int

    def forward(self, input: Tensor) -> Tensor:
        slot = self._peftx_slot
        if slot.uncommon:
            weight, bias = folded(slot.weighted, self.weight, self.bias)
            if slot.nested:
                return nested(slot.nested, input, lambda x: slot.base(x, weight, bias))
            y = slot.base(input, weight, bias)
            for delta in slot.run:
                y = delta(input, y)
            return y
        if slot.first is not None and torch.is_grad_enabled() and not hooked(slot.first):
            update = slot.first.low_rank()
            if update is not None and applies(input, self.weight, self.bias, update):
                y = linear_with_low_rank(input, self.weight, self.bias, update)
                for delta in slot.run[1:]:
                    y = delta(input, y)
                return y
        y = slot.base(input, self.weight, self.bias)
        if slot.low_rank and not torch.is_grad_enabled():
            if slot.alone is not None and input.numel() == self.in_features:
                # One adapter and one row, a step of decoding: a product of a matrix and a vector takes half the calls.
                found = slot.alone.low_rank()
                if found is not None and found.A.dtype is y.dtype:
                    y.view(-1).addmv_(found.B, found.A.mv(input.view(-1)), alpha=found.scale)
                    return y
            elif add_all_low_rank(slot.low_rank, input, y):
                return y
        for delta in slot.run:
            y = delta(input, y)
        return y


class PackedCarrier(Carrier):
    """Linear layers in a storage of their own (integers): deltas before and behind, none on the weights."""

    def forward(self, x: Tensor) -> Tensor:
        slot = self._peftx_slot
        if slot.nested:
            return nested(slot.nested, x, super().forward)  # type: ignore[misc]
        y = super().forward(x)  # type: ignore[misc]
        for delta in slot.run:
            y = delta(x, y)
        return y


PACKED: list[type[nn.Module]] = []
"""Classes of such layers: they have `in_features`, `out_features`, and a `weight` that is computed."""


def packed(cls: type[M]) -> type[M]:
    """Make a storage class known as a linear layer, which adapters may stand on. Subclasses are known with it."""
    PACKED.append(cls)
    return cls


class OutputCarrier(Carrier):
    """Any module: deltas see its first argument and its output (the first one, if it returns several)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self._peftx_slot
        first = _first_argument(self._peftx_base)  # type: ignore[attr-defined]
        if not args and first in kwargs:  # attention is called by names, and its deltas know of none
            args = (kwargs.pop(first),)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if slot.nested:
            raise UnsupportedError(
                f"{type(self).__name__}: only linear layers take a delta that edits the input"
            )
        if slot.wraps:
            return wrapped(slot.links, super().forward)(*args, **kwargs)  # type: ignore[misc]
        return edited(super().forward(*args, **kwargs), slot.run, x)  # type: ignore[misc]


class WeightCarrier(Carrier):
    """Modules that use their matrices in a forward of their own: the deltas are folded in at each call."""

    _parameters: dict[str, nn.Parameter | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self._peftx_slot
        shadowed = []
        try:
            for name, entries in slot.folded.items():
                weight: Tensor = self._parameters[name]
                bias = self._parameters.get(entries[0].bias)
                had_bias, flipped = bias is not None, entries[0].transposed
                weight = weight.mT if flipped else weight
                for entry in entries:
                    weight, bias = entry.fold(weight, bias)
                if bias is not None and not had_bias:
                    raise UnsupportedError(f"{type(self).__name__} has no place for a bias")
                # Found before the parameters of the same names.
                shadowed += [name, entries[0].bias] if had_bias else [name]
                self.__dict__[name] = weight.mT.contiguous() if flipped else weight
                if had_bias:
                    self.__dict__[entries[0].bias] = bias
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name in shadowed:
                self.__dict__.pop(name, None)


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
            if entry.edit.can_fold():  # Mamba reads it in training also where the kernel is not there
                weight, bias = entry.fold(weight, bias)
        return weight, bias


class CalledCarrier(ReadCarrier):
    """Linear layers that are called, but for a fused kernel that reads their weight. A call runs the deltas; what is
    read has those folded in that fold, and a delta that does not must see for itself that it was called."""

    def forward(self, input: Tensor) -> Tensor:
        slot = self._peftx_slot
        if slot.nested:
            return nested(slot.nested, input, self._peftx_plain)
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
    "packed": PackedCarrier,
    "output": OutputCarrier,
}


@cache
def _first_argument(base: type[nn.Module]) -> str:
    """What a module's forward calls its input."""
    names = [*inspect.signature(base.forward).parameters.values()][1:2]
    by_place = [p.name for p in names if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return by_place[0] if by_place else ""


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


def kind_of(module: nn.Module) -> str:
    """The carrier that fits a module."""
    base = base_class(module)
    if base.forward is nn.Linear.forward:
        return "plain"
    if issubclass(base, tuple(PACKED)):
        return "packed"
    return "linear" if issubclass(base, nn.Linear | Conv1D) else "output"


def is_map(module: nn.Module) -> bool:
    """Is a linear layer called as one: a tensor in, a tensor of its output features out. Some subclasses are not, such
    as routers that choose experts themselves."""
    base = base_class(module)
    if issubclass(base, Conv1D) or base.forward is nn.Linear.forward:
        return True
    return _maps(base, module)


_MAPS: dict[type, bool] = {}


def _maps(base: type[nn.Module], module: nn.Module) -> bool:
    if base not in _MAPS:
        shadows = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}
        x = torch.empty(1, 2, module.in_features, dtype=module.weight.dtype, device="meta")
        try:
            found = torch.func.functional_call(module, shadows, (x,))
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            found = None  # it wants something else
        _MAPS[base] = isinstance(found, Tensor) and found.shape == (1, 2, module.out_features)
    return _MAPS[base]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without the slot."""
    return type(module)._peftx_base if isinstance(module, Carrier) else type(module)  # type: ignore[attr-defined]


def slot_of(module: nn.Module) -> SlotState | None:
    return module.__dict__.get(STATE)


def open_slot(module: nn.Module, kind: str) -> SlotState:
    """Give the module an empty slot of this kind of carrier."""
    # Past nn.Module's own `__setattr__`, which looks through all that a module holds: models have hundreds of slots.
    object.__setattr__(module, "__class__", _slot_class(type(module), kind))
    slot = module.__dict__[STATE] = SlotState()
    return slot


def close_slot(module: nn.Module) -> None:
    """Give the module its own class back."""
    del module.__dict__[STATE]
    module.__class__ = base_class(module)
