"""A frozen linear layer and a low-rank update beside it in one step of autograd.

    y = W x + b + s B A x        forward:  d = A x, y += s B d in place: y is fresh
    dA = s (B^T g) x^T,  dB = s g d^T,  dx = W^T g + s A^T B^T g

Autograd by itself makes the thin products in layouts that take up to twice as long, and adds them out of place. The
same is kept for the backward pass: x, and d of rank r. Measured on the CPU; in bfloat16 nothing is gained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftx.kernel.slots.delta import LowRank


class _LinearWithLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        """x: [N, in]. W: [out, in], b: [out], both frozen. A: [r, in]. B: [out, r]. Returns [N, out]."""
        y = F.linear(x, W, b)
        d = A @ x.t()  # [r, N]
        y.addmm_(d.t(), B.t().contiguous(), alpha=s)
        ctx.save_for_backward(x, W, A, B, d)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, d = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this derivative is wanted: d is a function of A and x
            d = A @ x.t()
        e = (B.t().contiguous() @ g.t()) * ctx.s  # [r, N]
        dx = (g @ W).addmm(e.t(), A) if ctx.needs_input_grad[0] else None
        dA = e @ x if ctx.needs_input_grad[3] else None
        dB = ((d @ g) * ctx.s).t() if ctx.needs_input_grad[4] else None
        return dx, None, None, dA, dB, None


def linear_with_low_rank(x: Tensor, W: Tensor, b: Tensor | None, update: LowRank) -> Tensor:
    """W x + b + s B A x for a frozen W and b, with gradients of x, A and B; also twice differentiable.

    Args:
        x: [..., in]. W: [out, in]. b: [out] or None. All float32, as A and B.

    Returns:
        [..., out].
    """
    A, B, scale = update
    y: Tensor = _LinearWithLowRank.apply(x.reshape(-1, x.shape[-1]), W, b, A, B, scale)
    return y.view(*x.shape[:-1], W.shape[0])


def hooked(delta: nn.Module) -> bool:
    """Does somebody watch the calls of the delta, or change them, so that it must be called."""
    return bool(delta._forward_hooks or delta._forward_pre_hooks or delta._backward_hooks)


def applies(x: Tensor, W: Tensor, b: Tensor | None, update: LowRank) -> bool:
    """Is everything float32, computed as such, and only the update trained."""
    if W.requires_grad or x.dtype is not torch.float32 or W.dtype is not torch.float32:
        return False
    if update.A.dtype is not torch.float32 or (b is not None and b.requires_grad):
        return False
    return x.is_meta or not torch.is_autocast_enabled(x.device.type)  # of meta torch raises an error
