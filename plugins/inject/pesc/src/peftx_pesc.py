"""PESC: a dense feed-forward block becomes a mixture of experts that share it and differ by a small adapter.

"Parameter-Efficient Sparsity Crafting from Dense to Mixture-of-Experts for Instruction Tuning on General Tasks"
(arXiv:2401.02731). For a token x that goes into the block FFN of a layer:

    y   = FFN(x)                                  frozen, shared by the E experts
    w   = softmax over the K largest of R x       R: [E, d], float32; 0 for the other experts
    A_e = c U_e gelu(D_e dropout(y))              D_e: [a, d], U_e: [d, a]
    out = sum_e w_e (y + A_e) = y + sum_e w_e A_e       the w of a token sum to 1, so FFN runs once

To the loss comes, as a mean over the layers that ran,

    lambda E sum_e f_e P_e        f_e: share of the tokens that go to e, P_e: mean of softmax(R x)_e, over real tokens

which is lambda K where routing is uniform. D_e and R start Kaiming-uniform and U_e at zero, so the model starts
unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.errors import ArchitectureError
from peftx.kernel.call import Call
from peftx.kernel.slots import kind_of
from peftx.toolkits.injecting import Router, Side, check_experts, routings, side_of, watching


class PescConfig(PluginConfig):
    """Options of PESC; the defaults are those of the released 7B model."""

    experts: int = Field(8, ge=2, description="E, experts of a layer")
    top_k: int = Field(
        2, ge=1, description="K, experts that a token goes to; at 1 the balance alone trains the router"
    )
    bottleneck: int = Field(64, ge=1, description="a, the width of an expert's adapter")
    scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="c, what adapters are multiplied by")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="probability of zeroing an input of the adapters in training"
    )
    balance: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="lambda, weight of the loss that balances experts"
    )

    @model_validator(mode="after")
    def _fit(self) -> PescConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} of {self.experts} experts: at most all of them")
        return self


class Routing(NamedTuple):
    """What a router decided."""

    p: Tensor  # [..., E], softmax over all experts
    chosen: Tensor  # [..., E], bool
    real: Tensor  # [...], bool: which tokens are no pads


class Experts(Router):
    """y + sum_e w_e A_e on what a feed-forward block gives, [..., d]; parameters and routing in float32.

    Args:
        d: width of the model. config: E, K, a, c and the dropout. call: what the model is called on.
        side: whose tokens the block sees.
    """

    def __init__(self, d: int, config: PescConfig, call: Call, side: Side = "source") -> None:
        super().__init__(call, side)
        self.config = config
        E, a, bound = config.experts, config.bottleneck, 1 / math.sqrt(d)  # Kaiming with a slope of sqrt(5)
        self.R = nn.Parameter(torch.empty(E, d).uniform_(-bound, bound))
        self.D = nn.Parameter(torch.empty(E, a, d).uniform_(-bound, bound))
        self.U = nn.Parameter(torch.zeros(d, E, a))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        full = torch.promote_types(self.R.dtype, torch.float32)  # where the whole stack was cast
        logits = F.linear(x.to(full), self.R.to(full))  # [..., E]
        best = logits.topk(self.config.top_k)
        w = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best.indices, True)
        self.tell(lambda: Routing(logits.softmax(-1), chosen, self.real(x)), logits, self.R)
        down = F.linear(F.dropout(y, self.config.dropout, self.training), self.D.flatten(0, 1).to(y.dtype))
        down = F.gelu(down).unflatten(-1, self.D.shape[:2]) * w.unsqueeze(-1).to(y.dtype)  # [..., E, a]
        return torch.add(
            y, F.linear(down.flatten(-2), self.U.flatten(1).to(y.dtype)), alpha=self.config.scale
        )


class Pesc(Plugin):
    """See the module."""

    Config = PescConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.NEEDS_MASK}
    config: PescConfig
    architectures = ("llama4",)
    refuses = {"bert": "no module of it is called on what goes into a feed-forward block"}
    example = {"experts": 4, "bottleneck": 4, "balance": 0.1, "dropout": 0.0}
    exempt = {"accumulation_makes_the_same_step": "the loss has the product of f and P, means over the batch"}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        dense = {(site.tower, site.layer) for site in model.anatomy.sites if site.role == "mlp.down"}
        places = [site for site in model.blocks("mlp") if (site.tower, site.layer) in dense]
        if not places or kind_of(places[0].module) != "output":
            why = "calls no module on what goes into it" if places else "is a mixture of experts already"
            raise ArchitectureError(
                f"pesc: the feed-forward block of {model.config.model_type} {why}",
                hint="a model such as Llama, GPT-2 or T5, or sira, which makes experts of single matrices",
            )
        widths = {site.path: model.towers[site.tower].hidden_size for site in places}
        check_experts(model.owner, self.config.experts, widths)
        for site in places:
            site.attach(Experts(widths[site.path], self.config, model.call, side_of(model, site)))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        id = step.stack.id_of(self)
        with watching(step, self) as layers:
            step.add_loss(id, lambda _: self.loss(layers), over="inputs")
            return (yield)

    def loss(self, layers: Sequence[Experts]) -> Tensor:
        """lambda E sum_e f_e P_e, a mean over the layers that ran, 0-d."""
        ran = routings("pesc", layers)
        return self.config.balance * torch.stack([balance_of(routing) for routing in ran]).mean()


def balance_of(routing: Routing) -> Tensor:
    """E sum_e f_e P_e over the real tokens of one layer, 0-d."""
    p, chosen = routing.p[routing.real], routing.chosen[routing.real].to(routing.p)  # [n, E]
    return p.shape[-1] * chosen.mean(0) @ p.mean(0)
