"""Scaled prompt tuning: a soft prompt with a trained scale that folds into it.

"Scaled Prompt-Tuning for Few-Shot Natural Language Generation" (arXiv:2309.06759). With few samples a prompt whose rows
are not as long as real embeddings learns slowly, and a scale of its own sets that length in a few steps:

    P~  = s * P                    P: [l, d], s: [d], one number for each feature, the same in all rows; 1 at first
    h_0 = [P~ ; E(X)],             loss = -log p(Y | [P~ ; X]), the model is frozen
    dL/ds = sum_i dL/dP~_i * P_i,  dL/dP = s * dL/dP~

P and s train. With the last update of a run P becomes s * P and s is gone: what is saved is l * d numbers, a prompt
like any other, which computes the same bits.

The paper's text was not at hand: that s has a number for each feature and starts at 1 is ours. A number for each row,
or one in all, are options.
"""

from __future__ import annotations

from collections.abc import Generator
from copy import deepcopy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, TrainStep, VirtualTokens, hookimpl


class ScaledPromptTuningConfig(PluginConfig):
    """Options of scaled prompt tuning."""

    length: int = Field(20, ge=1, description="l, rows in front of the input")
    scale: Literal["features", "rows", "one"] = Field(
        "features", description="what has a number in s: each feature, each row, or all of the prompt"
    )
    keep_scale: bool = Field(
        False, description="keep s when a run ends, to train on with it; `fold()` puts it into P then"
    )


class ScaledPrompt(VirtualTokens):
    """P~ = s * P.

    Args:
        start: first values of P, [l, d]. scale: first values of s, [d], [l, 1] or [1]; None: P is P~ already.
    """

    def __init__(self, start: Tensor, scale: Tensor | None) -> None:
        super().__init__(len(start))
        self.P = nn.Parameter(start)
        self.s = None if scale is None else nn.Parameter(scale)

    def rows(self) -> Tensor:
        return self.P if self.s is None else self.s * self.P

    @torch.no_grad()
    def fold(self, dtype: torch.dtype) -> None:
        """Put P~, as a model of this dtype computes it, in the place of P, and let s go."""
        self.P.copy_(deepcopy(self).to(dtype).rows())
        self.s = None


class ScaledPromptTuning(Plugin):
    """See the module."""

    Config = ScaledPromptTuningConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS}
    architectures = ("gemma",)
    config: ScaledPromptTuningConfig
    prompt: ScaledPrompt

    @hookimpl
    def inject(self, model: ModelView) -> None:
        n, site = self.config.length, model.embedding()
        if not model.restoring:
            self.state = {}
        shape = {"features": (site.out_features,), "rows": (n, 1), "one": (1,)}[self.config.scale]
        self.prompt = ScaledPrompt(model.embedded(n), None if self.state.get("folded") else torch.ones(shape))
        model.prompt(self.prompt.to(site.weight))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if not self.config.keep_scale:
            step.at_end(self.fold, self.prompt.P)
        return (yield)

    def fold(self, dtype: torch.dtype | None = None) -> None:
        """Put s into P: s * P is the prompt from now on. `stack.train` does it; a loop of your own has to."""
        self.prompt.fold(dtype or self.prompt.P.dtype)
        self.state["folded"] = True
