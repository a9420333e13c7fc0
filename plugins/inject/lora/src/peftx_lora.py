"""LoRA: a trainable low-rank update beside each frozen linear map.

"LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 4.1:

    h = W x + s B A x        A: [r, in], B: [out, r], W frozen

A starts Kaiming-uniform and B at zero, so the model starts unchanged. s = alpha / r, or alpha / sqrt(r) with
`rank_stabilized` ("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732). Merged,
W' = W + s B A, the adapter costs nothing. With `bias`, HF PEFT's `lora_bias`, an update of b trains with it, from zero:

    h = W x + b + s (B A x + c)        c: [out]
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftx import (
    Claim,
    Delta,
    LowRank,
    ModelView,
    PeftFormat,
    Plugin,
    PluginConfig,
    Targets,
    add_low_rank,
    dropout_linear,
    hookimpl,
)
from peftx.errors import AdapterError, OptionError
from peftx.kernel.anatomy.site import LINEAR_KINDS
from peftx.peft_format import Settings, by_value, most_common, targets_of
from peftx.toolkits.injecting import of_each

MOVED = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts of PEFT that take something off W."""


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
    alphas: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="other alphas for some targets, as in {'attention.q': 32}"
    )
    bias: bool = Field(False, description="train an update c of each layer's bias too")
    targets: Targets = Field(
        Targets("all"), description="linear layers to adapt; 'embedding' too where it is named"
    )


class LoraDelta(Delta):
    """h = y + s (B A dropout(x) + c).

    Args:
        in_features, out_features: of the layer. rank: r. scale: s. dropout: p. bias: is there a c.
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
        bias: bool = False,
        batch: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(*batch, rank, in_features))
        self.B = nn.Parameter(torch.empty(*batch, out_features, rank))
        self.c = nn.Parameter(torch.zeros(out_features)) if bias else None
        bound = 1 / math.sqrt(in_features)  # Kaiming with a = sqrt(5)
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and self.training:
            A, B = self.A.to(y.dtype), self.B.to(y.dtype)
            down = dropout_linear(x.to(y.dtype), A, self.dropout)  # [..., r]
            h = torch.add(y, down @ B.t(), alpha=self.scale)
        else:
            h = add_low_rank(x, y, self.A, self.B, self.scale)
        return h if self.c is None else torch.add(h, self.c.to(h.dtype), alpha=self.scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.c is not None:
            bias = self.scale * self.c.to(weight.dtype) + (0 if bias is None else bias)  # b + s c
        return weight + self.scale * (self.B @ self.A).to(weight.dtype), bias  # W + s B A

    def low_rank(self) -> LowRank | None:
        if self.c is not None or (self.dropout and self.training):
            return None
        own = (
            self._parameters
        )  # as decoding reads it for every layer and token, not through nn.Module's lookup
        return LowRank(own["A"], own["B"], self.scale)


class LoraEmbedding(Delta):
    """e = E[v] + s B A[:, v] for token v.

    Args:
        vocabulary: rows of E. width: of E. rank: r. scale: s. times: what the model multiplies rows by.
    """

    def __init__(self, vocabulary: int, width: int, *, rank: int, scale: float, times: float = 1.0) -> None:
        super().__init__()
        self.scale, self.times = scale, times
        self.embedding_A = nn.Parameter(torch.zeros(rank, vocabulary))
        self.embedding_B = nn.Parameter(torch.randn(width, rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self.embedding_A.to(y.dtype), self.embedding_B.to(y.dtype)
        return torch.add(y, F.embedding(x, A.t()) @ B.t(), alpha=self.scale * self.times)


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    if str(settings.get("init_lora_weights", True)).startswith(MOVED):
        raise AdapterError(
            f"lora: the adapter began with init_lora_weights={settings['init_lora_weights']!r}, which takes something "
            "off W, so that A and B alone do not go with the base",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, or merge it there",
        )
    bias = bool(settings["lora_bias"])
    shapes = settings.adapted("lora_A.weight", "lora_embedding_A")
    ranks, alphas = {}, {}
    for path, shape in shapes.items():
        for matrix in settings.matrices(path):
            place = matrix.removesuffix(".weight")
            alphas[place] = float(settings.pattern("alpha_pattern", matrix, settings.get("lora_alpha", 8)))
            stacked = settings.pattern("rank_pattern", matrix, settings.get("r", 8))
            ranks[place] = shape[0] if matrix == path else stacked  # A of experts lies one behind the other
    rank, alpha = most_common(ranks), most_common(alphas)
    return {
        "rank": rank,
        "alpha": alpha,
        "rank_stabilized": bool(settings["use_rslora"]),
        "dropout": settings.get("lora_dropout", 0.0),
        "ranks": by_value(ranks, rank),
        "alphas": by_value(alphas, alpha),
        "bias": bias,
        "targets": targets_of(ranks),
    }


class Lora(Plugin):
    """See the module."""

    Config = LoraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}
    architectures = ("mixtral", "mamba")
    config: LoraConfig
    example = {"rank": 2}  # the tiny Mamba has a matrix of rank 2
    peft = (
        PeftFormat(
            "LORA",
            tensors={
                "A": "lora_A.weight",
                "B": "lora_B.weight",
                "c": "lora_B.bias",
                "embedding_A": "lora_embedding_A",
                "embedding_B": "lora_embedding_B",
            },
            divided={"B": 0, "c": 0},
            experts=True,
            options=options_of,
            settings=lambda config: {"lora_dropout": config.dropout, "lora_bias": config.bias},
            when=lambda settings: not settings["use_dora"],
        ),
    )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        sites = {
            site.key: site for site in model.sites(self.config.targets, kinds=(*LINEAR_KINDS, "embedding"))
        }
        config, owner = self.config, model.owner
        each = partial(of_each, model, sites, owner=owner, targets=config.targets)
        ranks = each(config.rank, config.ranks, option="ranks")
        alphas = each(config.alpha, config.alphas, option="alphas")
        for key, site in sites.items():
            rank, alpha = ranks[key], alphas[key]
            site.check_rank(rank)
            scale = self.scale(rank, alpha)
            if config.bias and (site.kind == "embedding" or site.batch):
                raise OptionError(
                    f"{owner}: bias: {site.path} {'holds experts' if site.batch else 'is an embedding'}, and an update "
                    "of the bias goes with layers alone",
                    hint="take it out of targets, or leave bias out",
                )
            if site.kind == "embedding":
                times = float(getattr(site.module, "embed_scale", 1.0))  # as Gemma's scales what it looks up
                site.attach(LoraEmbedding(*site.shape, rank=rank, scale=scale, times=times))
                continue
            delta = LoraDelta(
                site.in_features, site.out_features, rank=rank, scale=scale, dropout=config.dropout,
                bias=config.bias, batch=site.batch,
            )  # fmt: skip
            site.attach(delta)

    def scale(self, rank: int, alpha: float | None) -> float:
        """s for a rank."""
        alpha = 2.0 * rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.config.rank_stabilized else rank)
