"""DynMoLE: a mixture of LoRA experts that each token's routing entropy makes sparse or dense.

"DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism" (arXiv:2504.00661). Each chosen
layer has N experts and a router of its own; for a token x:

    p   = softmax(W_g x)                          W_g: [N, in], float32
    S   = (1 - sum_i p_i**q) / (q - 1)            Tsallis entropy (Shannon's at q = 1), as a share of its maximum
    w_i = p_i if expert i is on, else 0           not normalised again
    y   = W x + s sum_i w_i B_i A_i x             A_i: [r, in], B_i: [out, r], s = alpha / r, W frozen

Sorted by p, an expert is on while the mass down to it, itself included, is at most rho; the k likeliest always are. If
S >= H, the router is unsure and all are. Over the real tokens of all layers the loss gains

    c_aux N sum_i F_i P_i + c_dyn mean(S)         F_i: share of tokens that expert i is on for, P_i: mean of w_i

A_i starts Kaiming-uniform and B_i at zero, so the model starts unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, Targets, TrainStep, hookimpl
from peftx.kernel.call import Call
from peftx.toolkits.injecting import Router, Side, check_experts, routings, side_of, watching

LEAST = 1e-12
"""Smallest p in the entropy: no logarithm or slope of zero."""
ROUNDING = 1e-6
"""Of a sum of probabilities; with rho = 1 all experts are on."""


class DynmoleConfig(PluginConfig):
    """Options of DynMoLE; the released configuration adapts the feed-forward layers with 6 experts of rank 24."""

    experts: int = Field(6, ge=2, description="N, experts of a layer")
    rank: int = Field(16, ge=1, description="r, rank of an expert")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; twice the rank if left out, so s = 2"
    )
    dropout: float = Field(
        0.05, ge=0, lt=1, description="probability of zeroing an input of the experts while training"
    )
    q: float = Field(1.1, gt=0, le=2, description="q, index of the entropy; 1 is Shannon's")
    threshold: float = Field(
        0.9, gt=0, allow_inf_nan=False, description="H, entropy from which all experts are on"
    )
    relative: bool = Field(
        True, description="measure S as a share of its maximum (H above 1: never all on); false: as it is"
    )
    rho: float = Field(0.75, gt=0, le=1, description="rho, mass of probability that experts are on for")
    k_min: int = Field(2, ge=1, description="k, the likeliest experts, always on")
    balance: float = Field(
        1e-3, ge=0, allow_inf_nan=False, description="c_aux, weight of the loss that balances experts"
    )
    certainty: float = Field(
        1e-2, ge=0, allow_inf_nan=False, description="c_dyn, weight of the entropy in the loss"
    )
    targets: Targets = Field(Targets("mlp"), description="linear layers to adapt")

    @model_validator(mode="after")
    def _fit(self) -> DynmoleConfig:
        if self.k_min > self.experts:
            raise ValueError(f"k_min {self.k_min} of {self.experts} experts: at most all of them")
        return self


class Routing(NamedTuple):
    """What a router decided, one row a token."""

    w: Tensor  # [..., N]
    on: Tensor  # [..., N], bool
    S: Tensor  # [...]


class Mixture(Router):
    """y + s sum_i w_i B_i A_i x.

    Args:
        in_features, out_features: of the layer. config: N, r, s, dropout, and the rule by which experts are on.
        call, side: what the model is called on, and which of its tokens the layer sees.
    """

    def __init__(
        self, in_features: int, out_features: int, config: DynmoleConfig, call: Call, side: Side
    ) -> None:
        super().__init__(call, side)
        self.config = config
        self.scale = 2.0 if config.alpha is None else config.alpha / config.rank
        N, r, bound = config.experts, config.rank, 1 / math.sqrt(in_features)  # Kaiming with a = sqrt(5)
        self.W_g = nn.Parameter(torch.empty(N, in_features).uniform_(-bound, bound))
        self.A = nn.Parameter(torch.empty(N, r, in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(out_features, N, r))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        full = torch.promote_types(self.W_g.dtype, torch.float32)  # where the whole stack was cast
        p = F.linear(x.to(full), self.W_g.to(full)).softmax(-1)  # [..., N]
        routing = route(p, self.config)
        self.tell(lambda: (routing, self.real(x).flatten()), routing.w, self.W_g)
        x = F.dropout(x, self.config.dropout, self.training).to(y.dtype)
        down = F.linear(x, self.A.flatten(0, 1).to(y.dtype))  # [..., N r]
        down = down.unflatten(-1, self.A.shape[:2]) * routing.w.to(y.dtype).unsqueeze(-1)  # [..., N, r]
        return torch.add(y, F.linear(down.flatten(-2), self.B.flatten(1).to(y.dtype)), alpha=self.scale)


def route(p: Tensor, config: DynmoleConfig) -> Routing:
    """Which experts are on for probabilities p, [..., N]."""
    mass, order = p.sort(-1, descending=True)
    on = mass.cumsum(-1) <= config.rho + ROUNDING
    on[..., : config.k_min] = True
    on = torch.zeros_like(on).scatter(-1, order, on)  # back in the experts' order
    S = entropy(p, config.q) / (entropy_of_uniform(p.shape[-1], config.q) if config.relative else 1)
    on = on | (config.threshold <= S).unsqueeze(-1)
    return Routing(p * on, on, S)


def entropy(p: Tensor, q: float) -> Tensor:
    """Tsallis entropy over the last dimension."""
    p = p.clamp(min=LEAST)
    return -(p * p.log()).sum(-1) if q == 1 else (1 - p.pow(q).sum(-1)) / (q - 1)


def entropy_of_uniform(n: int, q: float) -> float:
    """The largest entropy of n experts."""
    return math.log(n) if q == 1 else (1 - n ** (1 - q)) / (q - 1)


class Dynmole(Plugin):
    """See the module."""

    Config = DynmoleConfig
    claims = {Claim.IDENTITY_AT_START, Claim.NEEDS_MASK}
    config: DynmoleConfig
    example = {"rank": 2, "balance": 0.1}  # more than 1e-3, which drowns in the rounding of so small a model
    exempt = {"accumulation_makes_the_same_step": "the loss has the product of F and P, means over the batch"}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        c, sites = self.config, model.linears(self.config.targets)
        check_experts(model.owner, c.experts, {site.path: site.in_features for site in sites})
        for site in sites:
            site.check_rank(c.rank)
            site.attach(Mixture(site.in_features, site.out_features, c, model.call, side_of(model, site)))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        id = step.stack.id_of(self)
        with watching(step, self) as mixtures:
            step.add_loss(id, lambda _: self.loss(mixtures), over="inputs")
            return (yield)

    def loss(self, mixtures: Sequence[Mixture]) -> Tensor:
        """c_aux N sum_i F_i P_i + c_dyn mean(S) over the real tokens of all layers that ran, 0-d."""
        ran, real = zip(*routings("dynmole", mixtures), strict=True)
        w = torch.cat([routing.w.flatten(0, -2) for routing in ran])  # [tokens, N]
        on = torch.cat([routing.on.flatten(0, -2) for routing in ran])
        S = torch.cat([routing.S.flatten() for routing in ran])
        real = torch.cat(real).to(S)
        real = real / real.sum()
        share, mean = real @ on.to(real), real @ w  # F, P
        return self.config.balance * len(mean) * share @ mean + self.config.certainty * real @ S
