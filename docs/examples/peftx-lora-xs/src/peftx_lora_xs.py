"""LoRA-XS: r x r trained numbers between frozen singular vectors of each weight.

"LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters" (arXiv:2405.17604). Of W = U S V^T the r
largest singular values and their vectors are frozen beside the weight, and a square matrix between them trains:

    h = W x + A R B x        A = U_r S_r: [out, r], B = V_r^T: [r, in], both frozen; R: [r, r], from N(0, std^2)

r^2 numbers a layer train, whatever its width. Merged, W' = W + A R B, they cost nothing.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, LowRank, ModelView, Plugin, PluginConfig, Targets, add_low_rank, hookimpl


class LoraXsConfig(PluginConfig):
    """Options of LoRA-XS."""

    rank: int = Field(16, ge=1, description="r; r * r numbers train in each layer")
    init_std: float = Field(1e-5, ge=0, description="standard deviation of R's first values")
    targets: Targets = Field(Targets("all"), description="linear layers to adapt")


class LoraXsDelta(Delta):
    """h = y + A R B x.

    Args:
        shape: of the weight, [..., out, in] (leading: stacked experts). rank: r.
    """

    full_precision = True
    A: Tensor
    B: Tensor

    def __init__(self, shape: tuple[int, ...], *, rank: int) -> None:
        super().__init__()
        *batch, out_features, in_features = shape
        self.R = nn.Parameter(torch.zeros(*batch, rank, rank))
        self.register_buffer("A", torch.zeros(*batch, out_features, rank))
        self.register_buffer("B", torch.zeros(*batch, rank, in_features))

    @torch.no_grad()
    def start(self, weight: Tensor, std: float) -> None:
        """A and B from the SVD of the weight [..., out, in], R from a normal distribution."""
        r = self.R.shape[-1]
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        self.A.copy_(U[..., :r] * S[..., None, :r])
        self.B.copy_(Vh[..., :r, :])
        self.R.normal_(std=std)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(x, y, *self.low_rank())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        RB, A, _ = self.low_rank()
        return weight + (A @ RB).to(weight.dtype), bias

    def low_rank(self) -> LowRank:
        return LowRank(self.R @ self.B, self.A, 1.0)


class LoraXs(Plugin):
    """See the module."""

    Config = LoraXsConfig
    claims = {Claim.MERGEABLE}
    config: LoraXsConfig
    example = {"rank": 2, "init_std": 0.1}  # of tiny models; an R of 1e-5 would be lost in rounding

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears(self.config.targets):
            site.check_rank(self.config.rank)
            delta = site.attach(LoraXsDelta(site.shape, rank=self.config.rank))
            if not model.restoring:
                delta.start(site.weight, self.config.init_std)
