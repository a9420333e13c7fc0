"""Learner modules: low-rank maps beside frozen feed-forward layers, which are primed before the norms train with them.

"Efficient Fine-Tuning of Compressed Language Models with Learners" (arXiv:2208.02070). Its abstract alone was at hand:
small modules train in the place of an overparameterized model, and priming makes them converge fast. How, is ours:

    y = W x + b + U V x         W, b frozen; V [r, in], U [out, r] = 0 at the start: a learner
    priming                     learners and a classification head train alone, in steps of rho times the learning rate
    tuning                      at the learning rate, and the norms train too
    W' = W + U V                merged, a learner costs nothing

A step of rho times the rate is theta + rho (theta' - theta), where theta' is what the optimizer makes of theta.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftx import (
    Claim,
    Delta,
    LowRank,
    ModelView,
    Phase,
    Plugin,
    PluginConfig,
    Targets,
    TrainStep,
    add_low_rank,
    hookimpl,
)
from peftx.kernel.trained import Trained


class LearnerModulesConfig(PluginConfig):
    """Options of learner modules."""

    rank: int = Field(8, ge=1, description="r")
    targets: Targets = Field(Targets("mlp"), description="linear layers that get a learner")
    norms: bool = Field(True, description="train the norms of the base behind the priming")
    priming: float = Field(
        0.1, ge=0, description="share of a run's steps for priming; whole from 1 on: how many; 0: none"
    )
    priming_rate: float = Field(
        2.0, gt=0, allow_inf_nan=False, description="rho, learning rate of the priming over that of the run"
    )

    @field_validator("priming")
    @classmethod
    def _share_or_steps(cls, priming: float) -> float:
        if priming >= 1 and priming != int(priming):
            raise ValueError("from 1 on it is a number of steps, and must be whole")
        return priming


class Learner(Delta):
    """y + U V x.

    Args:
        in_features, out_features: of the layer. rank: r. batch: leading dimensions of stacked experts' weights.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, batch: tuple[int, ...]) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.zeros(*batch, out_features, rank))
        self.V = nn.Parameter(torch.empty(*batch, rank, in_features))
        nn.init.uniform_(self.V, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(x, y, self.V, self.U, 1.0)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.U @ self.V).to(weight.dtype), bias

    def low_rank(self) -> LowRank:
        return LowRank(self.V, self.U, 1.0)


class LearnerModules(Plugin):
    """See the module."""

    Config = LearnerModulesConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.TRAINS_BASE, Claim.NEEDS_GRADIENTS}
    architectures = ("mixtral", "bart")
    exempt = {
        "mixtral-merge_in_bfloat16": "rounding sends a token to other experts, and its logits alone differ"
    }
    refuses = {"mamba": "it has no MLP"}
    example = {"rank": 2, "priming": 1}  # a loop of one's own does not know its length
    config: LearnerModulesConfig

    def claimed(self) -> frozenset[Claim]:
        return self.claims if self.config.norms else self.claims - {Claim.TRAINS_BASE}

    def phases(self) -> Sequence[Phase]:
        primed = self.state.get("primed") or not self.config.priming
        return [*([] if primed else [Phase("priming", self.config.priming)]), Phase("tuning")]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears(self.config.targets):
            site.check_rank(self.config.rank)
            site.attach(Learner(site.in_features, site.out_features, self.config.rank, site.batch))
        self.norms: Sequence[Trained] = list(model.train("norm").values()) if self.config.norms else ()

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        priming = step.phase(self).name == "priming"
        self.state["primed"] = not priming  # a further run has no second one
        for norm in self.norms:
            norm.restrict(torch.zeros_like(norm.theta, dtype=torch.bool) if priming else None)
        if priming and step.last_micro:
            still = {id(norm.theta) for norm in self.norms}
            own = step.stack.ledger.parameters(step.stack.id_of(self))
            before = [(p, p.detach().clone()) for p in own if p.requires_grad and id(p) not in still]
            step.after_update(lambda _: stretch(before, self.config.priming_rate))
        return (yield)


@torch.no_grad()
def stretch(before: Sequence[tuple[nn.Parameter, Tensor]], rho: float) -> None:
    """Take steps rho times as far, from what parameters were."""
    for p, old in before:
        p.copy_(old + rho * (p - old))
