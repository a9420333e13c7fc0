"""A sparse matrix beside a layer's own, which trains at its entries alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftx.kernel.slots.delta import Delta


class SparseDelta(Delta):
    """y + D x, where D is zero but for `values`, which stand `at` some places.

    Entries, their gradients and what an optimizer keeps of them are all that it costs beside the layer. D itself and
    the gradient of all of it are made for one layer at a time, and let go.

    Args:
        at: places in the flat D, distinct, [n]. shape: of D, [..., out, in] (leading: stacked experts).

    Attributes:
        at, values: [n]; a plugin may move an entry to another place between two steps. A bundle holds both.
        on_gradient: called in the backward pass with the gradient of all of D [..., out, in], for plugins that choose
            places by it. Set before the forward pass.
    """

    full_precision = True
    at: Tensor

    def __init__(self, at: Tensor, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.values = nn.Parameter(torch.zeros(len(at)))
        self.register_buffer("at", at.to(torch.int32 if prod(self.shape) < 2**31 else torch.int64))
        self.on_gradient: Callable[[Tensor], None] | None = None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """D [..., out, in], differentiable in the values."""
        return _dense(self.values, self.at, self.shape, dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + _Product.apply(x.to(y.dtype), self.values, self.at, self.shape, self.on_gradient)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        D = self.matrix(weight.dtype)
        if D.requires_grad and self.on_gradient is not None:
            D.register_hook(self.on_gradient)
        return weight + D, bias


def _dense(values: Tensor, at: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return values.new_zeros(prod(shape), dtype=dtype).scatter(0, at.long(), values.to(dtype)).view(shape)


class _Product(torch.autograd.Function):
    """x D^T, which keeps x and the entries for the backward pass, and makes D again there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        at: Tensor,
        shape: tuple[int, ...],
        seen: Callable[[Tensor], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values, at)
        ctx.shape, ctx.seen = shape, seen
        return F.linear(x, _dense(values, at, shape, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, at = ctx.saved_tensors
        of_values = None
        if ctx.needs_input_grad[1]:
            of_matrix = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])  # [out, in]
            if ctx.seen is not None:
                ctx.seen(of_matrix)
            of_values = of_matrix.flatten()[at.long()].to(values.dtype)
            del of_matrix
        of_x = grad @ _dense(values, at, ctx.shape, grad.dtype) if ctx.needs_input_grad[0] else None
        return of_x, of_values, None, None, None
