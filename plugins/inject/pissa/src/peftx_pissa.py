"""PiSSA: low-rank adapters that begin at the principal singular values and vectors of each weight.

"PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models" (arXiv:2404.02948). Of a
weight W = U S V^T the r largest singular values train, and the rest stays frozen:

    A0 = sqrt(S_r / s) V_r^T      B0 = U_r sqrt(S_r / s)         A: [r, in], B: [out, r], s = alpha / r
    y  = (W - s B0 A0) x + s B A x                               A, B train from A0, B0

W itself is not touched here. The adapter is the difference, of rank 2 r, which a LoRA of that rank can hold:

    y  = W x + s (B A - B0 A0) x = W x + s [B - B0, B0] [A; A - A0] x

Its factors beside each other cancel nothing, and are 0 to the bit at the start. With `niter` the singular vectors come
from a randomized SVD (Halko et al., arXiv:0909.4061) with so many subspace iterations, in a part of the time.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, LowRank, ModelView, Plugin, PluginConfig, Targets, add_low_rank, hookimpl


class PissaConfig(PluginConfig):
    """Options of PiSSA; the paper adapts all linear layers with r = 128 and alpha = r."""

    rank: int = Field(128, ge=1, description="r, the number of singular values that train")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; the rank if left out, so s = 1"
    )
    niter: int | None = Field(
        None, ge=0, description="subspace iterations of a randomized SVD, as in 4; an exact one if left out"
    )
    targets: Targets = Field(Targets("all"), description="linear layers to adapt")


class PissaDelta(Delta):
    """y + s (B A - B0 A0) x.

    Args:
        shape: of the weight, [..., out, in] (leading: stacked experts). rank: r. scale: s.
    """

    full_precision = True  # what A and B have moved is small beside them: bfloat16 would round it away
    A0: Tensor
    B0: Tensor

    def __init__(self, shape: tuple[int, ...], *, rank: int, scale: float) -> None:
        super().__init__()
        *batch, out_features, in_features = shape
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(*batch, rank, in_features))
        self.B = nn.Parameter(torch.zeros(*batch, out_features, rank))
        self.register_buffer("A0", torch.zeros(*batch, rank, in_features))
        self.register_buffer("B0", torch.zeros(*batch, out_features, rank))

    @torch.no_grad()
    def start(self, weight: Tensor, niter: int | None = None) -> None:
        """A = A0 and B = B0, from the SVD of the weight [..., out, in]."""
        r = self.A.shape[-2]
        if niter is None:
            U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(weight.float(), r, niter=niter)
            Vh = V.mT
        root = (S[..., :r] / self.scale).sqrt()
        for A, B in ((self.A, self.B), (self.A0, self.B0)):
            A.copy_(root.unsqueeze(-1) * Vh[..., :r, :])
            B.copy_(U[..., :r] * root.unsqueeze(-2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(x, y, *self.low_rank())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, s = self.low_rank()
        return weight + s * (B @ A).to(weight.dtype), bias

    def low_rank(self) -> LowRank:
        A = torch.cat((self.A, self.A - self.A0), -2)  # [..., 2 r, in]
        B = torch.cat((self.B - self.B0, self.B0), -1)  # [..., out, 2 r]
        return LowRank(A, B, self.scale)


class Pissa(Plugin):
    """See the module."""

    Config = PissaConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}
    architectures = ("mixtral", "mamba")
    config: PissaConfig
    example = {"rank": 2}  # the tiny Mamba has a matrix of rank 2

    @hookimpl
    def inject(self, model: ModelView) -> None:
        rank = self.config.rank
        scale = 1.0 if self.config.alpha is None else self.config.alpha / rank
        for site in model.linears(self.config.targets):
            site.check_rank(rank)
            delta = site.attach(PissaDelta(site.shape, rank=rank, scale=scale))
            if not model.restoring:
                delta.start(site.weight, self.config.niter)
