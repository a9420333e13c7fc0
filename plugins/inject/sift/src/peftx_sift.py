"""Sift: a few entries of each weight matrix train, and move to better places while they do.

"Scaling Sparse Fine-Tuning to Large Language Models" (arXiv:2401.16405; the paper calls the method SpIEL). Of each
matrix W, N = density * size entries train, at places eta, as differences phi from their pretrained values:

    W' = W + scatter(phi at eta)              phi = 0 and eta random at the start

The gradient dW of a whole matrix exists for that matrix alone, and what stands at eta is kept of it. Every S steps
k = rate (1 - t / T) N entries move: those with the smallest |phi| are dropped, which gives their weights the pretrained
values back, and as many grow from phi = 0 at the places where one of two criteria is largest:

    gradient    |sum of dW| over the last gamma steps, at N candidates: the largest |dW| in the first of these steps.
                Adam's moments there start from the means of dW and dW**2 over these steps.
    momentum    r_i c_j, of SM3, which divides the gradient g in Adam's stead: for all entries nu = min(r_i, c_j) + g**2
                and phi -= lr g / sqrt(nu); then r_i and c_j are the largest nu so far in row i and column j.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from math import inf, prod
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import SGD, Optimizer

from peftx import Claim, ModelView, Plugin, PluginConfig, SparseDelta, Targets, TrainStep, hookimpl
from peftx.engines.training.updates import forget
from peftx.errors import OptionError
from peftx.toolkits.injecting import check_each


class SiftConfig(PluginConfig):
    """Options of Sift."""

    density: float = Field(0.01, gt=0, le=1, description="N / size, share of each matrix that trains")
    every: int = Field(20, ge=1, description="S, steps from one selection to the next")
    rate: float = Field(
        0.2, ge=0, le=1, description="share of the N that moves; falls linearly to 0 at the end of the run"
    )
    grow: Literal["gradient", "momentum"] = Field(
        "gradient",
        description="what says where entries grow; `momentum` brings SM3 and needs `optimizer: sgd`",
    )
    gamma: int = Field(5, ge=1, description="steps before a selection whose gradients are summed")
    targets: Targets = Field(Targets("all"), description="linear layers to train entries of")

    @model_validator(mode="after")
    def _fits(self) -> SiftConfig:
        if self.gamma > self.every:
            raise ValueError(
                f"gamma {self.gamma} is more than every {self.every}, the steps between selections"
            )
        return self


class Sift(Plugin):
    """See the module."""

    Config = SiftConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_GRADIENTS}
    architectures = ("mixtral", "mamba")
    example = {"density": 0.2, "every": 3, "gamma": 2}
    config: SiftConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.deltas: dict[str, SparseDelta] = {}
        sites, density = model.linears(self.config.targets), self.config.density
        check_each(f"{model.owner}: density", density, sites, whole=True)
        for site in sites:
            N = round(density * prod(site.shape))
            # A place in each of N stretches, so that none comes twice.
            edges = torch.arange(N + 1) * prod(site.shape) // N
            eta = edges[:-1] + (torch.rand(N, dtype=torch.float64) * edges.diff()).long()
            self.deltas[site.key] = site.attach(SparseDelta(eta, site.shape))

    def one_process(self) -> str:
        return "each would grow other entries; or grow: momentum" if self.config.grow == "gradient" else ""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        by_gradient = self.config.grow == "gradient"
        memory = step.memory.setdefault(step.stack.id_of(self), {name: {} for name in self.deltas})
        done = step.index % self.config.every + 1  # with this step, since the last selection
        for name, delta in self.deltas.items():
            mine = memory[name] = {key: t.to(delta.at.device) for key, t in memory[name].items()}
            if step.first_micro:
                mine.pop("now", None)
            watched = by_gradient and done > self.config.every - self.config.gamma
            delta.on_gradient = partial(watch, mine, delta.at) if watched else None
        if not by_gradient:
            step.before_update(lambda optimizer: self.sm3(memory, optimizer))
        if done == self.config.every:
            rate = self.config.rate * (1 - (step.index + 1) / (step.total or inf))
            step.after_update(lambda optimizer: self.select(memory, rate, optimizer))
        loss = yield
        for delta in self.deltas.values():
            delta.on_gradient = None
        return loss

    @torch.no_grad()
    def select(self, memory: dict[str, dict[str, Tensor]], rate: float, optimizer: Optimizer) -> None:
        """Move k = rate N entries of each matrix that trains.

        memory: of each matrix `candidates`, and of dW there `now` (in this step), `sum` and `squares` (over steps); or
        r and c.
        """
        for name, delta in self.deltas.items():
            mine, k = memory[name], int(rate * len(delta.at)) if delta.values.requires_grad else 0
            if "sum" in mine:
                best = mine["sum"].abs().argsort(descending=True)[:k]
                means = [mine[key][best] / self.config.gamma for key in ("sum", "squares")]
                move(delta, mine["candidates"][best], means, optimizer)
                mine.clear()
            elif "r" in mine:
                move(delta, inactive(torch.outer(mine["r"], mine["c"]), delta.at)[:k], [], optimizer)

    @torch.no_grad()
    def sm3(self, memory: dict[str, dict[str, Tensor]], optimizer: Optimizer) -> None:
        """g / sqrt(nu) in the gradient's place, and the new r and c."""
        if not isinstance(optimizer, SGD):
            raise OptionError("sift: SM3 stands in the optimizer's place", hint="train: {optimizer: sgd}")
        for name, delta in self.deltas.items():
            if (g := delta.values.grad) is not None:
                i, j = delta.at.long() // delta.shape[-1], delta.at.long() % delta.shape[-1]
                r = memory[name].setdefault("r", g.new_zeros(prod(delta.shape[:-1])))
                c = memory[name].setdefault("c", g.new_zeros(delta.shape[-1]))
                nu = torch.minimum(r[i], c[j]) + g.square()
                delta.values.grad = g / (nu + 1e-8).sqrt()
                r.scatter_reduce_(0, i, nu, "amax")
                c.scatter_reduce_(0, j, nu, "amax")


def inactive(score: Tensor, eta: Tensor) -> Tensor:
    """The places with the largest scores outside of eta, best first, and at most as many as eta has."""
    count = min(len(eta), score.numel() - len(eta))
    return score.flatten().index_fill(0, eta.long(), -1.0).topk(count).indices


def watch(mine: dict[str, Tensor], eta: Tensor, gradient: Tensor) -> None:
    """Add up dW of one backward pass; the first pass says which places are candidates."""
    if "candidates" not in mine:
        mine["candidates"] = inactive(gradient.abs(), eta)
    g = gradient.flatten()[mine["candidates"]].float()
    mine["squares"] = mine.get("squares", 0.0) + g * (2 * mine.get("now", 0.0) + g)  # (now + g)**2 - now**2
    mine["now"], mine["sum"] = (mine.get(key, 0.0) + g for key in ("now", "sum"))


def move(delta: SparseDelta, grown: Tensor, means: list[Tensor], optimizer: Optimizer) -> None:
    """The entries with the smallest |phi| go to the places `grown`, and start from 0; means: of dW and dW**2 there."""
    eta, phi, state = delta.at, delta.values, optimizer.state.get(delta.values, {})
    weakest = phi.abs().topk(len(grown), largest=False).indices
    eta[weakest], phi[weakest] = grown.to(eta.dtype), 0.0
    forget(optimizer, [phi], at=weakest)
    for group in optimizer.param_groups:
        if means and "exp_avg" in state and any(p is phi for p in group["params"]):
            for key, mean, beta in zip(("exp_avg", "exp_avg_sq"), means, group["betas"], strict=True):
                state[key][weakest] = mean * (1 - beta ** float(state["step"]))  # which Adam divides by
