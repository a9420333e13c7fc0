"""VeRA: all layers share one random low-rank update, and each trains two vectors that scale it.

"VeRA: Vector-based Random Matrix Adaptation" (arXiv:2310.11454), section 3.1:

    h = W x + diag(b) B diag(d) A x        A: [r, in], B: [out, r], random, frozen, one pair for all layers
                                           b: [out], starts at 0; d: [r], starts at 0.1

so the model starts unchanged. A and B are Kaiming-uniform, U(-sqrt(6 / fan), sqrt(6 / fan)) with fan = in and fan = r,
and follow from a seed: a bundle may leave them out. Layers of other sizes take the first columns of A and rows of B,
which are as large as the largest of them. Merged, W' = W + diag(b) B diag(d) A, the vectors cost nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import (
    Claim,
    Delta,
    ModelView,
    PeftFormat,
    Plugin,
    PluginConfig,
    Site,
    Targets,
    dropout_linear,
    hookimpl,
)
from peftx.peft_format import Settings, most_common, targets_of


class VeraConfig(PluginConfig):
    """Options of VeRA; the paper adapts the attention's q and v of RoBERTa and GPT-2, r = 256 or 1024."""

    rank: int = Field(256, ge=1, description="r, the rows of A; may exceed the layers' sizes")
    d_initial: float = Field(0.1, allow_inf_nan=False, description="where d starts")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of zeroing an input of A while training")
    projection_prng_key: int = Field(
        0, ge=0, lt=2**63, description="seed of A and B, whatever the run's seed"
    )
    save_projection: bool = Field(
        True, description="bundles hold A and B; else they are drawn again from the seed"
    )
    targets: Targets = Field(Targets("attention.q,v"), description="linear layers to adapt")


class Projection(nn.Module):
    """A and B, drawn on the CPU in float32 whatever the model's device and dtype.

    Args:
        rank: r. in_features, out_features: largest of all layers. key: the seed. saved: whether bundles hold them.
    """

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, in_features: int, out_features: int, *, key: int, saved: bool) -> None:
        super().__init__()
        A, B = torch.empty(rank, in_features), torch.empty(out_features, rank)
        if not A.is_meta:
            generator = torch.Generator("cpu").manual_seed(key)
            A, B = (
                torch.empty(t.shape, device="cpu", dtype=torch.float32).uniform_(
                    -math.sqrt(6 / t.shape[1]), math.sqrt(6 / t.shape[1]), generator=generator
                )
                for t in (A, B)
            )
        self.register_buffer("A", A, persistent=saved)
        self.register_buffer("B", B, persistent=saved)


class VeraDelta(Delta):
    """h = y + b * (B (d * (A dropout(x)))).

    Args:
        site: where it will stand. projection: A and B; no child of it. d: where d starts. dropout: p.
    """

    full_precision = True  # small vectors, whose steps bfloat16 would round away

    def __init__(self, site: Site, projection: Projection, *, d: float, dropout: float) -> None:
        super().__init__()
        self.projection, self.dropout = (projection,), dropout
        self.sizes = site.in_features, site.out_features
        self.lambda_b = nn.Parameter(torch.zeros(*site.batch, site.out_features))
        self.lambda_d = nn.Parameter(torch.full((*site.batch, len(projection.A)), d))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [r, in], B [out, r], d and b."""
        A, B = self.projection[0].A[:, : self.sizes[0]], self.projection[0].B[: self.sizes[1]]
        return A.to(dtype), B.to(dtype), self.lambda_d.to(dtype), self.lambda_b.to(dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B, d, b = self.factors(y.dtype)
        x = x.to(y.dtype)
        down = dropout_linear(x, A, self.dropout) if self.dropout and self.training else x @ A.t()
        return torch.addcmul(y, b, (d * down) @ B.t())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, d, b = self.factors(weight.dtype)
        return weight + (b.unsqueeze(-1) * B) @ (d.unsqueeze(-1) * A), bias  # W + diag(b) B diag(d) A


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    settings["r"], settings["init_weights"]  # the tensors say it
    shapes = settings.adapted("vera_lambda_d")
    return {
        "rank": most_common({path: shape[0] for path, shape in shapes.items()}),
        "d_initial": settings.get("d_initial", 0.1),
        "dropout": settings.get("vera_dropout", 0.0),
        "projection_prng_key": settings.get("projection_prng_key", 0),
        "save_projection": settings.get("save_projection", True),
        "targets": targets_of(shapes),
    }


class Vera(Plugin):
    """See the module."""

    Config = VeraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}
    example = {"rank": 8}
    config: VeraConfig
    peft = (
        PeftFormat(
            "VERA",
            tensors={"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"},
            kept={"projection.A": "base_model.vera_A", "projection.B": "base_model.vera_B"},
            fused=False,  # PEFT's roles take further rows of B than the first
            options=options_of,
            settings=lambda config: {
                "r": config.rank,
                "d_initial": config.d_initial,
                "vera_dropout": config.dropout,
                "projection_prng_key": config.projection_prng_key,
                "save_projection": config.save_projection,
            },
        ),
    )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config, sites = self.config, model.linears(self.config.targets)
        sizes = max(site.in_features for site in sites), max(site.out_features for site in sites)
        projection = model.keep(
            "projection",
            Projection(config.rank, *sizes, key=config.projection_prng_key, saved=config.save_projection),
        )
        for site in sites:
            site.attach(VeraDelta(site, projection, d=config.d_initial, dropout=config.dropout))
