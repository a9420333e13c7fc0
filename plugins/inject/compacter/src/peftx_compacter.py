"""Compacter: adapters whose matrices are sums of Kronecker products with shared and rank-one factors.

"Compacter: Efficient Low-Rank Hypercomplex Adapter Layers" (arXiv:2106.04647), behind each attention and each
feed-forward block:

    h' = h + U gelu(D h + b_D) + b_U           h: [d], D: [k, d], U: [d, k]
    D, U = sum_i A_i (x) s_i t_i^T             i = 1..n; (x) the Kronecker product
    A_i: [n, n]                                slow weights: one set for D and U of all adapters
    s_i: [out/n, r], t_i: [in/n, r]            fast weights: own ones of each matrix

h is what the block gives, before the residual sum. A matrix costs (k + d) r fast weights, the model n^3 slow ones. The
norms train too. Compacter++ has adapters behind feed-forward blocks only. W x is computed from the factors:

    (W x)_p = sum_i s_i sum_q A_i[p, q] t_i^T x_q        x in n parts x_q, W x in n parts
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Site, hookimpl
from peftx.errors import OptionError


class CompacterConfig(PluginConfig):
    """Options of Compacter; the paper's for T5-base."""

    n: int = Field(
        4, ge=1, description="n, the number of Kronecker products; divides k and the hidden size d"
    )
    rank: int = Field(1, ge=1, description="r, the rank of s_i t_i^T")
    bottleneck: int = Field(24, ge=1, description="k, the width of the adapters")
    variant: Literal["compacter", "compacter++"] = Field(
        "compacter", description="compacter++: adapters behind feed-forward blocks only"
    )
    slow_std: float = Field(0.01, gt=0, description="standard deviation of the slow weights A at the start")
    train_norms: bool = Field(True, description="train the norms of the base as well")


class Slow(nn.Module):
    """A: [n, n, n], normal with standard deviation `std`."""

    def __init__(self, *, n: int, std: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(n, n, n) * std)


class LPHM(nn.Module):
    """W x + b, W = sum_i A_i (x) s_i t_i^T.

    Args:
        slow: holds A; shared. in_features, out_features: of W. n: of A. rank: r.
    """

    def __init__(self, slow: Slow, in_features: int, out_features: int, *, n: int, rank: int) -> None:
        super().__init__()
        self.slow = (slow,)  # in a tuple: no child of this module
        self.s = nn.Parameter(torch.empty(n, out_features // n, rank))
        self.t = nn.Parameter(torch.empty(n, in_features // n, rank))
        self.b = nn.Parameter(torch.zeros(out_features))
        for factor in (*self.s, *self.t):
            nn.init.xavier_uniform_(factor)

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.s)
        parts = x.unflatten(-1, (n, -1))  # [..., q, in/n]
        u = torch.einsum("...qm,imr->...iqr", parts, self.t)  # t_i^T x_q
        v = torch.einsum("ipq,...iqr->...ipr", self.slow[0].A, u)
        return torch.einsum("...ipr,ior->...po", v, self.s).flatten(-2) + self.b  # [..., out]


class Adapter(Delta):
    """y + U gelu(D y + b_D) + b_U.

    Args:
        slow: the shared slow weights. features: d. bottleneck: k. n: of A. rank: r.
    """

    def __init__(self, slow: Slow, features: int, *, bottleneck: int, n: int, rank: int) -> None:
        super().__init__()
        self.D = LPHM(slow, features, bottleneck, n=n, rank=rank)
        self.U = LPHM(slow, bottleneck, features, n=n, rank=rank)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.U(F.gelu(self.D(y), approximate="tanh"))


class Compacter(Plugin):
    """See the module."""

    Config = CompacterConfig
    claims = {Claim.TRAINS_BASE}
    architectures = ("mixtral", "bloom")
    config: CompacterConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        n, rank, k = self.config.n, self.config.rank, self.config.bottleneck
        slow = model.keep("slow", Slow(n=n, std=self.config.slow_std))
        roles = ("attention", "mlp") if self.config.variant == "compacter" else ("mlp",)
        for role in roles:
            for site in model.blocks(role):
                d = model.towers[site.tower].hidden_size
                self._check(site, d)
                site.attach(Adapter(slow, d, bottleneck=k, n=n, rank=rank))
        if self.config.train_norms:
            for site in model.norms():
                site.train()

    def _check(self, site: Site, d: int) -> None:
        n, rank, k = self.config.n, self.config.rank, self.config.bottleneck
        for name, size in (("the bottleneck", k), (f"the width of {site.path},", d)):
            if size % n:
                raise OptionError(
                    f"compacter: n = {n} does not divide {name} {size}", hint="take a divisor of both for n"
                )
        if rank > min(k, d) // n:
            raise OptionError(
                f"compacter: rank {rank} exceeds the {k // n}x{d // n} matrices s t^T",
                hint=f"rank at most {min(k, d) // n}, a smaller n or a larger bottleneck",
            )
