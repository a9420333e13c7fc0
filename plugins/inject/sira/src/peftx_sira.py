"""SiRA: each token goes to the k likeliest of many small LoRA experts, and an expert takes so many tokens.

"SiRA: Sparse Mixture of Low Rank Adaptation" (arXiv:2311.09179). Each chosen layer has E experts and a router of its
own; for a token x:

    p   = softmax(theta x)                        theta: [E, in], float32
    G   = TopK(dropout(p))                        the K largest, the others 0; not normalised again
    on  = G > 0, and among the first C tokens of its text that chose the expert
    y   = W x + s sum_{e on} G_e B_e A_e x        A_e: [r, in], B_e: [out, r], s = alpha / r, W frozen

    C = ceil(c n K / E) of a text of n real tokens

Dropout and capacity are of training alone. A token over the limit goes past the expert; W x goes on. The loss gains,
as a mean over the layers that ran,

    lambda E sum_e f_e P_e        f_e: share of the choices that are e, P_e: mean of p_e, over real tokens

which is lambda where routing is uniform. A_e starts Kaiming-uniform and B_e at zero, so the model starts unchanged.
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


class SiraConfig(PluginConfig):
    """Options of SiRA; 16 experts of rank 4, of which a token has 4."""

    experts: int = Field(16, ge=2, description="E, experts of a layer")
    top_k: int = Field(4, ge=1, description="K, experts that a token goes to")
    rank: int = Field(4, ge=1, description="r, rank of an expert")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; the rank if left out, so s = 1"
    )
    capacity: float | None = Field(
        1.25,
        gt=0,
        allow_inf_nan=False,
        description="c, what an expert takes, as a multiple of an even share; none: no limit",
    )
    expert_dropout: float = Field(
        0.1, ge=0, lt=1, description="probability that a token cannot go to an expert, while training"
    )
    balance: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="lambda, weight of the loss that balances experts"
    )
    targets: Targets = Field(Targets("attention mlp"), description="linear layers to adapt")

    @model_validator(mode="after")
    def _fit(self) -> SiraConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} of {self.experts} experts: at most all of them")
        return self


class Routing(NamedTuple):
    """What a router decided in training, of G texts with T tokens."""

    p: Tensor  # [G, T, E]
    chosen: Tensor  # [G, T, E], bool: before the capacity
    on: Tensor  # [G, T, E], bool
    real: Tensor  # [G, T], bool


class Experts(Router):
    """y + s sum_{e on} G_e B_e A_e x.

    Args:
        in_features, out_features: of the layer. config: E, K, r, s, c and the dropout.
        call, side: what the model is called on, and which of its tokens the layer sees.
    """

    def __init__(
        self, in_features: int, out_features: int, config: SiraConfig, call: Call, side: Side
    ) -> None:
        super().__init__(call, side)
        self.config = config
        self.scale = 1.0 if config.alpha is None else config.alpha / config.rank
        E, r, bound = config.experts, config.rank, 1 / math.sqrt(in_features)  # Kaiming with a = sqrt(5)
        self.theta = nn.Parameter(torch.empty(E, in_features).uniform_(-bound, bound))
        self.A = nn.Parameter(torch.empty(E, r, in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(out_features, E, r))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        full = torch.promote_types(self.theta.dtype, torch.float32)  # where the whole stack was cast
        p = F.linear(x.to(full), self.theta.to(full)).softmax(-1)  # [..., E]
        real = self.real(x)
        p = p.view(*real.shape, -1)
        G, chosen = top(F.dropout(p, self.config.expert_dropout, self.training), self.config.top_k)
        on = chosen
        if self.training and self.config.capacity is not None:
            on = within(chosen & real.unsqueeze(-1), self.limit(real, self.config.capacity))
        self.tell(lambda: Routing(p, chosen, on, real), p, self.theta)
        weights = (G * on).view(*x.shape[:-1], -1, 1).to(y.dtype)  # [..., E, 1]
        down = F.linear(x.to(y.dtype), self.A.flatten(0, 1).to(y.dtype)).unflatten(-1, self.A.shape[:2])
        down = (down * weights).flatten(-2)  # [..., E r]
        return torch.add(y, F.linear(down, self.B.flatten(1).to(y.dtype)), alpha=self.scale)

    def limit(self, real: Tensor, c: float) -> Tensor:
        """C of each text, [G]."""
        return (c * real.sum(-1) * self.config.top_k / self.config.experts).ceil()


def top(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of p, [..., E], at their places, and which these are; what dropout took is none of them."""
    found = p.topk(k)
    G = torch.zeros_like(p).scatter(-1, found.indices, found.values)
    return G, G > 0


def within(chosen: Tensor, limit: Tensor) -> Tensor:
    """Of the tokens that chose an expert the first `limit` of each text: [G, T, E] bool, limit [G]."""
    return chosen & (chosen.cumsum(-2) <= limit[:, None, None])


class Sira(Plugin):
    """See the module."""

    Config = SiraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.NEEDS_MASK}
    config: SiraConfig
    example = {"experts": 4, "top_k": 2, "rank": 2, "balance": 0.1, "expert_dropout": 0.0}
    exempt = {"accumulation_makes_the_same_step": "the loss has the product of f and P, means over the batch"}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        sites = model.linears(self.config.targets)
        check_experts(model.owner, self.config.experts, {site.path: site.in_features for site in sites})
        for site in sites:
            site.check_rank(self.config.rank)
            side = side_of(model, site)
            site.attach(Experts(site.in_features, site.out_features, self.config, model.call, side))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        id = step.stack.id_of(self)
        with watching(step, self) as layers:
            step.add_loss(id, lambda _: self.loss(layers), over="inputs")
            step.add_loss(
                f"{id}-dropped", lambda _: dropped(layers), weight=0.0, over="inputs"
            )  # for the log
            return (yield)

    def loss(self, layers: Sequence[Experts]) -> Tensor:
        """lambda E sum_e f_e P_e, a mean over the layers that ran, 0-d."""
        ran = routings("sira", layers)
        return self.config.balance * torch.stack([balance_of(routing) for routing in ran]).mean()


def balance_of(routing: Routing) -> Tensor:
    """E sum_e f_e P_e over the real tokens of one layer."""
    p, chosen = routing.p[routing.real], routing.chosen[routing.real].to(routing.p)  # [n, E]
    return p.shape[-1] * (chosen.sum(0) / chosen.sum().clamp(min=1)) @ p.mean(0)


@torch.no_grad()
def dropped(layers: Sequence[Experts]) -> Tensor:
    """Share of the choices of real tokens that were over the capacity, 0-d."""
    ran = routings("sira", layers)
    chosen = torch.stack([routing.chosen[routing.real].sum() for routing in ran]).sum()
    taken = torch.stack([routing.on[routing.real].sum() for routing in ran]).sum()
    return 1 - taken / chosen.clamp(min=1)
