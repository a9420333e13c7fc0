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

from pydantic import Field

from peftx import Claim, ModelView, Plugin, PluginConfig, Targets, hookimpl
from peftx.toolkits.injecting import LowRankDifference, principal


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
            delta = site.attach(LowRankDifference(site.shape, rank=rank, scale=scale))
            if not model.restoring:
                delta.start(*principal(site.weight, rank, scale=scale, niter=self.config.niter))
