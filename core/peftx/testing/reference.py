"""Three small plugins that every other one is stacked with: on weights, on norms, at the input.

They start away from the identity, so that a composition in which one of them is lost shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx.kernel.plugin import Claim, Plugin, PluginConfig, hookimpl
from peftx.kernel.slots import Delta, LowRank, add_low_rank
from peftx.kernel.virtual_tokens import VirtualTokens
from peftx.toolkits.compression import QuantLinear

if TYPE_CHECKING:
    from peftx.kernel.anatomy.site import Site
    from peftx.kernel.view import ModelView


class _LowRankConfig(PluginConfig):
    rank: int = Field(2, ge=1, description="rank of the update")


class _LowRankDelta(Delta):
    """y + B A x, A: [r, in], B: [out, r]."""

    def __init__(self, in_features: int, out_features: int, rank: int, batch: tuple[int, ...]) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(*batch, rank, in_features) * 0.1)
        self.B = nn.Parameter(torch.randn(*batch, out_features, rank) * 0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(x, y, self.A, self.B, 1.0)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.B @ self.A).to(weight.dtype), bias

    def low_rank(self) -> LowRank | None:
        return LowRank(self.A, self.B, 1.0)


class ReferenceLowRank(Plugin):
    """A low-rank update of every linear layer."""

    Config = _LowRankConfig
    claims = {Claim.MERGEABLE}
    config: _LowRankConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("all"):
            site.attach(_LowRankDelta(site.in_features, site.out_features, self.config.rank, site.batch))


class _GainDelta(Delta):
    """y * g, g: [out]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + torch.randn(features) * 0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.gain.to(y.dtype)


class ReferenceGain(Plugin):
    """A gain behind every norm."""

    claims = {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.norms():
            site.attach(_GainDelta(site.out_features))


class _Tokens(VirtualTokens):
    def __init__(self, length: int, hidden: int) -> None:
        super().__init__(length)
        self.embeddings = nn.Parameter(torch.randn(length, hidden) * 0.5)

    def rows(self) -> Tensor:
        return self.embeddings


class _PromptConfig(PluginConfig):
    length: int = Field(3, ge=1, description="number of soft tokens")


class ReferencePrompt(Plugin):
    """Soft tokens in front of the input."""

    Config = _PromptConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    config: _PromptConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.prompt(_Tokens(self.config.length, model.hidden_size))


COMPANION = "reference-low-rank"
"""Id of the `ReferenceLowRank` that trains beside a plugin which has nothing to train of its own."""


class ReferenceColumn(Plugin):
    """Works by a further column of the rows, and changes nothing."""

    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}
    column = "further"

    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column(self.column)


QUANTIZER = "reference-quantizer"
"""Its id."""


class ReferenceQuantizer(Plugin):
    """8-bit integers in place of the weights of every linear layer, without calibration."""

    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS}

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        return [
            (site, prod(site.shape)) for site in model.linears("all", whole=True) if site.kind == "linear"
        ]

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site, _ in self.planned(model):
            site.replace(QuantLinear.from_linear(site.module, bits=8))  # type: ignore[attr-defined]
