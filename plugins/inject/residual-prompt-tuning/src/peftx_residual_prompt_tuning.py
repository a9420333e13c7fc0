"""Residual prompt tuning: a small network with a skip connection writes the soft prompt, in training only.

"Residual Prompt Tuning: Improving Prompt Tuning with Residual Reparameterization" (arXiv:2305.03937). For a prompt P of
n rows and tokens X with embeddings E(X):

    Phi(p) = LayerNorm(W_2 relu(W_1 p + b_1) + b_2)       W_1: [m, d], W_2: [d, m]
    P'_i   = Phi(P_i) + P_i                               each row by itself, with one Phi for all or one for each
    h_0    = [P' ; E(X)]                                  loss = -log p(Y | [P' ; X]), the model is frozen

P, W, b and the LayerNorm train. With the last update of a run P becomes P' and Phi is gone: what is saved is n * d
numbers, a prompt like any other, which computes the same bits.

Departures: the variants of the paper's ablations (no skip connection, two layers, an LSTM) are left out, and so is
early stopping.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Sequence
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, TrainStep, VirtualTokens, hookimpl


class ResidualPromptTuningConfig(PluginConfig):
    """Options of residual prompt tuning; the paper takes 10 and 100 rows, and trains with AdamW at rate 0.3."""

    length: int = Field(10, ge=1, description="n, rows in front of the input")
    bottleneck: int = Field(800, ge=1, description="m, hidden width of the network")
    separate: bool = Field(False, description="a network for each row, instead of one that all share")
    keep_network: bool = Field(
        False,
        description="keep the network when a run ends, to train on with it; `collapse()` throws it away then",
    )


def network(d: int, m: int) -> nn.Module:
    """Phi: [n, d] -> [n, d]."""
    layers = {"down": nn.Linear(d, m), "relu": nn.ReLU(), "up": nn.Linear(m, d), "norm": nn.LayerNorm(d)}
    return nn.Sequential(OrderedDict(layers))


class ResidualPrompt(VirtualTokens):
    """P' = Phi(P) + P.

    Args:
        start: first values of P, [n, d]. networks: one, one for each row, or none: P is P' already.
    """

    def __init__(self, start: Tensor, networks: Sequence[nn.Module]) -> None:
        super().__init__(len(start))
        self.P = nn.Parameter(start)
        self.Phi = nn.ModuleList(networks)

    def rows(self) -> Tensor:
        if not len(self.Phi):
            return self.P
        parts = self.P.split(self.length // len(self.Phi))  # all rows, or one by one
        return torch.cat([Phi(p) for Phi, p in zip(self.Phi, parts, strict=True)]) + self.P

    @torch.no_grad()
    def collapse(self, dtype: torch.dtype) -> None:
        """Put P', as a model of this dtype computes it, in the place of P, and let Phi go."""
        self.P.copy_(deepcopy(self).to(dtype).rows())
        self.Phi = nn.ModuleList()


class ResidualPromptTuning(Plugin):
    """See the module."""

    Config = ResidualPromptTuningConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    architectures = ("gemma",)
    config: ResidualPromptTuningConfig
    prompt: ResidualPrompt

    @hookimpl
    def inject(self, model: ModelView) -> None:
        n, site = self.config.length, model.embedding()
        d = site.out_features
        if not model.restoring:
            self.state = {}
        count = 0 if self.state.get("collapsed") else n if self.config.separate else 1
        prompt = ResidualPrompt(model.embedded(n), [network(d, self.config.bottleneck) for _ in range(count)])
        self.prompt = prompt.to(site.weight)
        model.prompt(self.prompt)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if not self.config.keep_network:
            step.at_end(self.collapse, self.prompt.P)
        return (yield)

    def collapse(self, dtype: torch.dtype | None = None) -> None:
        """Throw the network away: P' is the prompt from now on. `stack.train` does it; a loop of your own has to."""
        self.prompt.collapse(dtype or self.prompt.P.dtype)
        self.state["collapsed"] = True
