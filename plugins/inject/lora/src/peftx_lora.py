"""LoRA: a trainable low-rank update beside each frozen linear map.

"LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 4.1:

    h = W x + s B A x        A: [r, in], B: [out, r], W frozen

A starts Kaiming-uniform and B at zero, so the model starts unchanged. s = alpha / r, or alpha / sqrt(r) with
`rank_stabilized` ("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732). Merged,
W' = W + s B A, the adapter costs nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftx import (
    Claim,
    Delta,
    LowRank,
    ModelView,
    Plugin,
    PluginConfig,
    Targets,
    add_low_rank,
    dropout_linear,
    hookimpl,
)
from peftx.errors import PeftxError

if TYPE_CHECKING:
    from peftx import Site


class LoraConfig(PluginConfig):
    """Options of LoRA; the paper adapts the attention's q and v with r = 4 to 8."""

    rank: int = Field(8, ge=1, description="r, the rank of the update")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; twice the rank if left out, so s = 2"
    )
    rank_stabilized: bool = Field(
        False, description="s = alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of zeroing an input of A while training")
    ranks: dict[str, PositiveInt] = Field(
        default_factory=dict, description="other ranks for some targets, as in {'attention.q': 4, 'mlp': 16}"
    )
    targets: Targets = Field(Targets("all"), description="linear layers to adapt")


class LoraDelta(Delta):
    """h = y + s B A dropout(x).

    Args:
        in_features, out_features: of the layer. rank: r. scale: s. dropout: p.
        batch: leading dimensions of stacked experts' weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        batch: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(*batch, rank, in_features))
        self.B = nn.Parameter(torch.zeros(*batch, out_features, rank))
        nn.init.uniform_(
            self.A, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features)
        )  # Kaiming with a = sqrt(5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and self.training:
            A, B = self.A.to(y.dtype), self.B.to(y.dtype)
            down = dropout_linear(x.to(y.dtype), A, self.dropout)  # [..., r]
            return torch.add(y, down @ B.t(), alpha=self.scale)
        return add_low_rank(x, y, self.A, self.B, self.scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.B @ self.A).to(weight.dtype), bias  # W + s B A

    def low_rank(self) -> LowRank | None:
        if self.dropout and self.training:
            return None
        own = (
            self._parameters
        )  # as decoding reads it for every layer and token, not through nn.Module's lookup
        return LowRank(own["A"], own["B"], self.scale)


class Lora(Plugin):
    """See the module."""

    Config = LoraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}
    architectures = ("mixtral", "mamba")
    config: LoraConfig
    example = {"rank": 2}  # the tiny Mamba has a matrix of rank 2

    @hookimpl
    def inject(self, model: ModelView) -> None:
        sites = {site.key: site for site in model.linears(self.config.targets)}
        ranks = dict.fromkeys(sites, self.config.rank)
        for target, rank in self.config.ranks.items():
            keys = sites.keys() & {site.key for site in model.linears(target)}
            if not keys:
                raise PeftxError(
                    f"lora: ranks: '{target}' matches nothing inside targets '{self.config.targets}'",
                    hint="add it to targets, or take it out of ranks",
                )
            ranks |= dict.fromkeys(keys, rank)
        for key, site in sites.items():
            rank = ranks[key]
            self._check(site, rank)
            site.attach(
                LoraDelta(
                    site.in_features,
                    site.out_features,
                    rank=rank,
                    scale=self.scale(rank),
                    dropout=self.config.dropout,
                    batch=site.batch,
                )
            )

    def scale(self, rank: int) -> float:
        """s for a rank."""
        alpha = 2.0 * rank if self.config.alpha is None else self.config.alpha
        return alpha / (math.sqrt(rank) if self.config.rank_stabilized else rank)

    @staticmethod
    def _check(site: Site, rank: int) -> None:
        full = min(site.in_features, site.out_features)
        if rank > full:
            raise PeftxError(
                f"lora: rank {rank} exceeds the {site.out_features}x{site.in_features} matrix {site.path}",
                hint=f"rank at most {full}, or leave it out of targets: '!{site.role}'",
            )
