"""Quantizers of activations: one scale a token, computed on the fly, or one calibrated scale for all.

dynamic, symmetric     s_t = max|x_t| / qmax                          x ~ x_q * s_t
dynamic, asymmetric    s_t = (max(x_t, 0) - min(x_t, 0)) / (2^b - 1)  x ~ (x_q - z_t) * s_t
static                 x_q = clamp(round(x / s) + z)
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftx.toolkits.compression.packing import from_integer, integer_range, to_integer

__all__ = ["fake_quantize", "in_range", "straight_through", "token_scale"]


def token_scale(x: Tensor, *, bits: int, symmetric: bool = True) -> tuple[Tensor, Tensor | None]:
    """x [..., n] -> scale [..., 1] float32, and zero [..., 1] uint8 when asymmetric. A token of zeros has scale 1."""
    _, high = integer_range(bits, symmetric=symmetric)
    if symmetric:
        scale = x.abs().amax(dim=-1, keepdim=True).float() / high
        return scale.masked_fill_(scale == 0, 1.0), None
    low_value = x.amin(dim=-1, keepdim=True).float().clamp_max(0)
    scale = (x.amax(dim=-1, keepdim=True).float().clamp_min(0) - low_value) / high
    scale = scale.masked_fill_(scale == 0, 1.0)
    return scale, torch.round(-low_value / scale).clamp_(0, high).to(torch.uint8)


def in_range(x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int) -> Tensor:
    """Where `to_integer(x, scale, zero)` does not clip: bool, the shape of x."""
    low, high = integer_range(bits, symmetric=zero is None)
    q = torch.round(x.float() / scale.float())
    q = q if zero is None else q + zero
    return (q >= low) & (q <= high)


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounded value. Backward: the gradient as it came."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The values of `rounded`, bit for bit, with the gradient of `x`."""
    return _StraightThrough.apply(x, rounded)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int) -> Tensor:
    """(clamp(round(x/s) + z) - z) * s, differentiable in `x` and `scale`; rounding passes gradients straight through.

    Values equal `from_integer(to_integer(x, ...))` bit for bit. The gradient to `x` is 1 inside the range and 0
    where `x` is clipped; the gradient to `scale` is round(x/s) - x/s inside and the range's end where clipped.
    `scale` and `zero` (a count in [0, 2^bits - 1], not trained) broadcast against `x`.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
        return from_integer(to_integer(x, scale, zero, bits=bits), scale, zero, x.dtype)
    low, high = integer_range(bits, symmetric=zero is None)
    if zero is not None:
        low, high = low - zero.float(), high - zero.float()
    ratio = x.float() / scale.float()
    rounded = straight_through(ratio, torch.round(ratio.detach()))
    return (rounded.clamp(low, high) * scale.float()).to(x.dtype)
