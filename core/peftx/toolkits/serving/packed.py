"""Weights in the order in which oneDNN multiplies them: laid out once for a CPU that serves, not at every product.

The operators are torch's own, and private: they are tried against `F.linear` first, and left alone where they are
missing or compute something else. A weight stays as it is beside its copy, which takes its memory once more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from peftx.engines.machine import free_memory
from peftx.kernel.slots import kind_of, open_slot, slot_of
from peftx.kernel.slots.carrier import PlainLinearCarrier

ROWS = 32
"""Rows that a copy is laid out for; fewer and more are about as fast."""
SHARE = 0.5
"""Of the memory that is free, which the copies may take."""


class Packed:
    """`F.linear` with a copy of one weight; with the weight itself where it was changed, or gradients are wanted."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._place, self._version = weakref.ref(weight), weight.data_ptr(), weight._version
        self._copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        same = weight.data_ptr() == self._place and self._weight() is weight
        if (
            not same
            or weight._version != self._version
            or x.dtype is not torch.float32
            or torch.is_grad_enabled()
        ):
            return F.linear(x, weight, bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._copy, bias, "none", [], "")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied model has weights of its own: without."""
        return _plain, ()


def _plain() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return F.linear


_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight -> `Packed`: models of several bundles share their base's weights, and these copies too."""


def pack(model: nn.Module) -> int:
    """Let the linear layers of a model multiply by packed copies: float32 on a CPU, by nn.Linear's own forward, where
    no plugin has a product of its own. Changed weights, and layers whose plugins change, are as without.

    Returns:
        How many there are; 0 where it cannot be done, or the copies would take more than half of the free memory.
    """
    layers = [module for module in model.modules() if _multiplies(module)]
    new = {id(layer.weight): layer.weight for layer in layers if layer.weight not in _COPIES}
    if not _works() or sum(weight.nbytes for weight in new.values()) > SHARE * free_memory():
        return 0
    for weight in new.values():
        _COPIES[weight] = Packed(weight)
    for layer in layers:
        (slot_of(layer) or open_slot(layer, "plain")).base = _COPIES[layer.weight]
    return len(layers)


def _multiplies(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or kind_of(module) != "plain":
        return False
    if slot_of(module) is not None and not isinstance(module, PlainLinearCarrier):
        return False  # others read its weight, as Mamba does, and find it with what plugins add
    weight, slot = module._parameters["weight"], slot_of(module)
    if (
        weight is None
        or weight.is_inference()
        or weight.dtype is not torch.float32
        or weight.device.type != "cpu"
    ):
        return False
    bias = module._parameters["bias"]
    if bias is not None and not bias.is_contiguous():  # oneDNN reads it wrong
        return False
    return slot is None or (slot.base is F.linear and not slot.weighted)


def _works() -> bool:
    """Are the operators there, and right."""
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not torch.backends.mkldnn.is_available():
        return False
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=draw) for shape in ((48, 32), (48,), (3, 2, 32)))
    with torch.no_grad():
        try:
            found = Packed(weight)(x, weight, bias)
        except (RuntimeError, TypeError):  # of another signature in another torch
            return False
    return torch.allclose(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
