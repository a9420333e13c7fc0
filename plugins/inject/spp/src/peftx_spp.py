"""SPP: a pruned model is tuned by gains of rows and columns, and its zeros stay zeros.

"SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models" (arXiv:2405.16057). W: [m, n] is
pruned, in any pattern. A: [r, n] and B: [m] train; row i belongs to the group g(i) = floor(i r / m), so each row of A
is for m / r rows of W:

    W'_ij = W_ij (1 + s A_g(i),j B_i)         s = alpha / r;  A uniform in +-1 / sqrt(n), B = 0: W' = W at the start
    y     = W x + s (A_g * B * W) dropout(x)

W_ij = 0 gives W'_ij = 0, whatever is trained, so W' has the pattern of W, N:M too, and is as fast. The product with W
is as large as W; it is made anew in the backward pass, and not kept.

A model that is not pruned yet may be pruned here first, each matrix by itself and by size: `sparsity` sets a share of
it to zero, `pattern` N:M all but the largest N of each M entries that are neighbours in a row. The base keeps its own
weights, so it comes back when the plugin is removed.
"""

from __future__ import annotations

import re
from math import prod

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.checkpoint import checkpoint

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Site, Stack, Targets, hookimpl
from peftx.errors import ConflictError, OptionError
from peftx.kernel.parts import BasePart, DeltaPart
from peftx.toolkits.injecting import check_each


class SppConfig(PluginConfig):
    """Options of SPP; the paper trains at 4e-3."""

    rank: int = Field(16, ge=1, description="r, rows of A")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="alpha; s = alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="of the trained part's input")
    sparsity: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of each matrix to prune first; the base is pruned already if left out",
    )
    pattern: str | None = Field(
        None, description="prune to N:M first, '2:4': N of M entries of a row are left"
    )
    targets: Targets = Field(Targets("all"), description="linear layers to train, all of which may be pruned")

    @model_validator(mode="after")
    def _one(self) -> SppConfig:
        if self.pattern is not None and self.sparsity is not None:
            raise ValueError("sparsity and pattern both say how to prune: drop one")
        if self.pattern is not None:
            found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.pattern)
            if not found or int(found[1]) >= int(found[2]):
                raise ValueError(f"pattern '{self.pattern}' is not N:M with N below M, as '2:4'")
        return self


class SppDelta(Delta):
    """y + s (A_g * B * W) dropout(x), without what was pruned here.

    Args:
        site: the matrix, [..., m, n] (leading: stacked experts). rank: r. scale: s. dropout: of x.
        pruned: whether `left` says which entries are left.
    """

    full_precision = True

    def __init__(self, site: Site, *, rank: int, scale: float, dropout: float, pruned: bool) -> None:
        super().__init__()
        (*batch, m, n), self.scale, self.p = site.shape, scale, dropout
        self.site = site
        self.A = nn.Parameter(torch.empty(*batch, rank, n).uniform_(-(n**-0.5), n**-0.5))
        self.B = nn.Parameter(torch.zeros(*batch, m))
        self.register_buffer("left", torch.ones(site.shape, dtype=torch.bool) if pruned else None)

    def factor(self) -> Tensor:
        """s A_g(i),j B_i, [..., m, n]."""
        r, m = self.A.shape[-2], self.B.shape[-1]
        groups = torch.arange(m, device=self.A.device) * r // m
        return self.scale * self.A[..., groups, :] * self.B.unsqueeze(-1)

    def parts(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is added to W, and what is taken away, [..., m, n]."""
        added = self.factor().to(W.dtype) * W
        return (added, None) if self.left is None else (added * self.left, W * ~self.left)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p = self.p if self.training else 0.0  # as it is now: the backward pass may come in another mode
        return y + checkpoint(self.product, x, p, use_reentrant=False).to(y.dtype)

    def product(self, x: Tensor, p: float) -> Tensor:
        W = self.site.weight
        added, taken = self.parts(W)
        z = linear(dropout(x.to(W.dtype), p), added)
        return z if taken is None else z - linear(x.to(W.dtype), taken)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        added, taken = self.parts(weight)
        return weight + added if taken is None else weight - taken + added, bias


class Spp(Plugin):
    """See the module."""

    Config = SppConfig
    claims = {Claim.MERGEABLE}
    architectures = ("mixtral", "phi3")
    example = {"rank": 2, "sparsity": 0.5}
    config: SppConfig

    def claimed(self) -> frozenset[Claim]:
        self.pruned = self.config.sparsity is not None or self.config.pattern is not None
        return self.claims if self.pruned else self.claims | {Claim.IDENTITY_AT_START}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        rank = self.config.rank
        plain = {site.key: site for site in model.anatomy.sites if site.kind != "block"}
        options = {"scale": self.config.alpha / rank, "dropout": self.config.dropout, "pruned": self.pruned}
        sites = model.linears(self.config.targets)
        looked_at = not (model.restoring or sites[0].weight.is_meta)
        if looked_at and not self.pruned and all(bool(site.weight.all()) for site in sites):
            raise OptionError(
                f"spp: no matrix of targets '{self.config.targets}' has a zero, so there is no pattern to preserve",
                hint="a pruned model; or sparsity: 0.5, or pattern: '2:4', to prune it by size first",
            )
        if self.config.sparsity is not None:
            check_each(f"{model.owner}: sparsity", self.config.sparsity, sites, goes=True)
        for site in sites:
            site.check_rank(rank)
            delta = SppDelta(plain[site.key], rank=rank, **options)  # type: ignore[arg-type]
            if looked_at and self.pruned:
                delta.left.copy_(largest(site.weight, *self.groups(site)))
            site.attach(delta)

    def groups(self, site: Site) -> tuple[int, int]:
        """(entries that are left, size) of the groups that a matrix is pruned in."""
        size = prod(site.shape[-2:])
        left = size - int((self.config.sparsity or 0) * size)
        if self.config.pattern is not None:
            left, size = map(int, self.config.pattern.split(":"))
        if site.in_features % size and self.config.pattern is not None:
            raise OptionError(
                f"spp: pattern {self.config.pattern}, and rows of {site.path} have {site.in_features} entries",
                hint=f"another pattern, or sparsity; or leave it out of targets: '!{site.role}'",
            )
        return left, size

    def check(self, stack: Stack) -> None:
        id, order = stack.id_of(self), list(stack.plugins)
        mine = {part.key for part in stack.ledger.of(id, DeltaPart)}
        for part in stack.ledger.parts:
            trains = isinstance(part, BasePart) and any(key.partition("@")[0] == part.key for key in mine)
            below = order.index(part.owner) < order.index(id) and isinstance(part, DeltaPart)
            if trains or (below and part.key in mine):
                raise ConflictError(
                    f"{id} scales the weights of {part.key} as they are, and {part.owner} changes them before",
                    hint=f"leave the layer out of one of them{'' if trains else f', or put {part.owner} behind {id}'}",
                )


def largest(W: Tensor, left: int, size: int) -> Tensor:
    """Which are the `left` largest of each `size` entries, bool [..., m, n]; of equal ones the first."""
    order = W.abs().reshape(-1, size).argsort(dim=-1, descending=True, stable=True)[:, :left]
    left_out = torch.zeros(len(order), size, dtype=torch.bool, device=W.device)
    return left_out.scatter(1, order, True).view(W.shape)
