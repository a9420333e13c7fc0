"""Propulsion: one trainable gain for each output feature of a frozen layer.

"Propulsion: Steering LLM with Tiny Fine-Tuning" (arXiv:2409.10927):

    V = W x + b                       W: [out, in], frozen
    y = V * z**k                      z: [out], starts at 1

k is the degree: at the start dy/dz = k V, k times the gradient of a plain scale, so a small learning rate goes k times
as far. An odd k lets a gain change its sign, an even k does not. Embeddings and norms are scaled by the same rule.
With `train_bias` the bias trains too, kept as a change c of it: V = W x + (b + c), c: [out], starts at 0. Merged,
W' = diag(z**k) W and b' = (b + c) * z**k, the gains cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Stack, Targets, hookimpl
from peftx.composition.conflicts import check
from peftx.errors import OptionError

SCALED_KINDS = ("linear", "quantized", "experts", "router", "embedding", "norm")


class PropulsionConfig(PluginConfig):
    """Options of Propulsion; the paper does best with attention, feed-forward and embedding together."""

    degree: int = Field(15, ge=1, description="k, the exponent; multiplies the gradient of z at the start")
    targets: Targets = Field(
        Targets("attention mlp"),
        description="linear layers, embeddings and norms to scale, as in 'attention.q,k,v'",
    )
    train_bias: bool = Field(False, description="train the bias of each scaled linear layer that has one")


class Push(Delta):
    """y = (V + c) * z**k on a linear layer.

    Args:
        features: out. degree: k. bias: whether c trains. batch: leading dimensions of stacked experts' weights.
    """

    full_precision = True  # k multiplies the rounding error of z: bfloat16's 2**-8 would be 6% at k = 15

    def __init__(
        self, features: int, *, degree: int, bias: bool = False, batch: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.degree = degree
        self.z = nn.Parameter(torch.ones(*batch, features))  # [..., out]
        self.c = nn.Parameter(torch.zeros(*batch, features)) if bias else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.c is not None:
            y = y + self.c.to(y.dtype)
        return y * gain(self.z, self.degree, y.dtype)  # V * z**k

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = gain(self.z, self.degree, weight.dtype)  # [..., out]
        if bias is not None:
            bias = (bias if self.c is None else bias + self.c.to(bias.dtype)) * scale
        return weight * scale.unsqueeze(-1), bias  # diag(z**k) W, (b + c) * z**k


class PushOutput(Delta):
    """y = V * z**k on what an embedding or a norm returns. Does not fold: an embedding's rows may be the head's too.

    Args:
        features: width of the output. degree: k.
    """

    full_precision = True

    def __init__(self, features: int, *, degree: int) -> None:
        super().__init__()
        self.degree = degree
        self.z = nn.Parameter(torch.ones(features))  # [width]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * gain(self.z, self.degree, y.dtype)


def gain(z: Tensor, degree: int, dtype: torch.dtype) -> Tensor:
    """z**k, computed in float32 and rounded once."""
    return z.pow(degree).to(dtype)


class Propulsion(Plugin):
    """See the module."""

    Config = PropulsionConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}
    architectures = ("mixtral",)
    config: PropulsionConfig

    def __init__(self, config: PropulsionConfig | None = None, /, **options: Any) -> None:
        super().__init__(config, **options)
        words = [word for word in self.config.targets.text.split() if not word.startswith("re:")]
        groups = {group for word in words for group in word.partition(".")[0].split(",")}
        if groups & {"embedding", "norm"}:
            self._does_not_fold()

    def _does_not_fold(self) -> None:
        self.claims = type(self).claims - {Claim.MERGEABLE}  # of this one

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        degree = self.config.degree
        biased = 0
        for site in model.sites(self.config.targets, kinds=SCALED_KINDS):
            if site.kind in ("embedding", "norm"):
                site.attach(PushOutput(site.out_features, degree=degree))
                if Claim.MERGEABLE in self.claims:  # a regular expression led here: not known before
                    self._does_not_fold()
                    check(stack.members)
                continue
            bias = self.config.train_bias and site.kind == "linear" and site.bias is not None
            biased += bias
            site.attach(Push(site.out_features, degree=degree, bias=bias, batch=site.batch))
        if self.config.train_bias and not biased:
            raise OptionError(
                f"propulsion: train_bias, but no layer of targets '{self.config.targets}' has a bias",
                hint="leave train_bias out",
            )
