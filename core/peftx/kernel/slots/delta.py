"""What a plugin attaches to a module: a function of the module's input and output, with parameters of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class LowRank(NamedTuple):
    """delta W = scale * B @ A, which adds scale * B (A x) to the output."""

    A: Tensor
    """[..., rank, in]"""
    B: Tensor
    """[..., out, rank]"""
    scale: float


class Delta(nn.Module):
    """One plugin's edit of one module.

    Deltas on a module nest in stack order: the first wraps the plain module, the second wraps the first, and so on.
    `x` is what this delta's own `pre` returned (the module's input if it has none), `y` what the layers inside gave.

    A subclass implements `forward`; `pre`, `base` and `fold` where the method has them. `fold` alone makes an edit of
    the weights: W' = fold(W) is computed at each call, which costs as much memory as the layer. What it does not define
    is not there: the core looks at the class, never probes instances.
    """

    full_precision: ClassVar[bool] = False
    """Keep the parameters in float32 whatever the dtype of the model; else they take the site's dtype."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Edit the output.

        Args:
            x: input [..., in] (token ids for an embedding). y: output [..., out].

        Returns:
            [..., out], same dtype as `y`; `y` itself must not be changed in place.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def pre(self, x: Tensor) -> Tensor:
        """Edit the input before the layers inside see it: [..., in] -> [..., in]."""
        raise NotImplementedError(f"{type(self).__name__} defines no pre")

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the plain layer in its stead: W x + b, or what the method puts in its place.

        At most one on a layer, and only on `nn.Linear`; it runs inside all deltas.

        Args:
            x: [..., in], after every `pre`. weight: [out, in], merged deltas included. bias: [out] or None.

        Returns:
            [..., out].
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the layer to itself")

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand around the call of a block: run it or not, on other input, and give what it is to give.

        Only on modules that are no linear layers (`model.blocks(...)`, norms). Deltas nest in stack order: `inner` is
        the block with everything that stands before this delta.

        Args:
            inner: takes what the block's forward takes. args, kwargs: what it was called with.

        Returns:
            What the block's forward returns: a tensor, or a tuple whose first is the hidden states.
        """
        raise NotImplementedError(f"{type(self).__name__} does not stand around a call")

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights that make the delta superfluous.

        Args:
            weight: [..., out, in] (leading dimensions for stacked experts), any orientation already undone.
            bias: [..., out] or None.

        Returns:
            New tensors (never the arguments changed in place), differentiable in the delta's parameters. A bias may
            appear where there was none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not fold")

    def low_rank(self) -> LowRank | None:
        """The factors, if the delta is nothing but a low-rank addition right now (no dropout in this mode).

        A delta that defines this is added without being called as a module where no gradient is recorded.
        """
        return None

    @classmethod
    def has_pre(cls) -> bool:
        return cls.pre is not Delta.pre

    @classmethod
    def has_base(cls) -> bool:
        return cls.base is not Delta.base

    @classmethod
    def has_around(cls) -> bool:
        return cls.around is not Delta.around

    @classmethod
    def can_fold(cls) -> bool:
        return cls.fold is not Delta.fold

    @classmethod
    def has_forward(cls) -> bool:
        return cls.forward is not Delta.forward

    @classmethod
    def only_folds(cls) -> bool:
        """Is it an edit of the weights alone, which the carrier makes at each call until it is merged."""
        others = cls.has_forward() or cls.has_pre() or cls.has_base() or cls.has_around()
        return cls.can_fold() and not others


def add_low_rank(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * (x A^T) B^T, with one fused multiply-add in the dtype of `y`.

    Writes into `y` where no gradient is recorded, so a decode step allocates nothing of its size.

    Args:
        x: [..., in]. y: [..., out]. A: [rank, in]. B: [out, rank].
    """
    if A.dtype != y.dtype:
        A, B = A.to(y.dtype), B.to(y.dtype)
    rows = y.reshape(-1, y.shape[-1])
    down = x.reshape(-1, x.shape[-1]).to(y.dtype) @ A.t()  # [N, rank]
    if torch.is_grad_enabled():
        return torch.addmm(rows, down, B.t(), alpha=scale).view(y.shape)
    return rows.addmm_(down, B.t(), alpha=scale).view(y.shape)


class _DropoutLinear(torch.autograd.Function):
    """dropout(x) A^T that keeps `x` (which its neighbours keep anyway) and a seed, not a second copy of `x`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, A: Tensor, p: float, seed: int
    ) -> Tensor:
        ctx.save_for_backward(x, A)
        ctx.p, ctx.seed = p, seed
        keep, scale = dropout_mask(x, p, seed)
        return ((x * keep) @ A.t()).mul_(scale)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A = ctx.saved_tensors
        keep, scale = dropout_mask(x, ctx.p, ctx.seed)
        grad = grad * scale
        grad_x = (grad @ A) * keep if ctx.needs_input_grad[0] else None
        grad_A = grad.flatten(0, -2).t() @ (x * keep).flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_A, None, None


def dropout_mask(x: Tensor, p: float, seed: int) -> tuple[Tensor, float]:
    """A mask of zeros and ones like `x`, and what makes up for the zeros. Four numbers come out of each random one of
    64 bits, so p is rounded to a 65,536th."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    below, n = round(p * 2**16), x.numel()
    drawn = torch.empty(-(-n // 4), dtype=torch.int64, device=x.device)
    drawn.random_(-(2**63), None, generator=generator)
    keep = drawn.view(torch.int16)[:n] >= below - 2**15
    return keep.view(torch.int8).to(x.dtype).view(x.shape), 1 / (1 - below / 2**16)


def dropout_linear(x: Tensor, A: Tensor, p: float) -> Tensor:
    """dropout_p(x) @ A^T whose backward pass draws the mask again from its seed.

    The seed comes from torch's global generator, so `torch.manual_seed` and gradient checkpointing govern it.

    Args:
        x: [..., in]. A: [rank, in], same dtype. p: probability of zero, 0 < p < 1.

    Returns:
        [..., rank].
    """
    seed = int(torch.randint(2**62, ()).item())
    return _DropoutLinear.apply(x, A, p, seed)
