"""SSMLoRA: low-rank adapters on every second layer, with a state that goes from each to the next.

"SSMLoRA: Enhancing Low-Rank Adaptation with State Space Model" (arXiv:2502.04958). The query of layers 0, 2, 4, ... and
the value of layers 1, 3, 5, ... are adapted. Of one kind of matrix, adapter n reads what n - 1 left for the same token:

    u_n = A x                              A: [r, in]
    g_n = h_{n-1} + C h_{n-1} + D u_n      C, D: [r, r]; h_{-1} = 0 in each call
    h_n = (g_n - min g_n) / (max g_n - min g_n + 1e-8)        over the r numbers of a token
    y   = W x + alpha B (u_n + dropout(h_n))                  B: [out, r]

No gradient goes through h_{n-1}. The paper has a LeakyReLU around the dropout, which changes nothing, as h_n >= 0. A
starts normal with a variance of 1 / r, B, C and D at zero: the model starts unchanged, and h_n = 0 is LoRA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Targets, hookimpl
from peftx.errors import OptionError, UnsupportedError
from peftx.kernel.call import Call

EPSILON = 1e-8
"""Of the division; numbers that are all alike become 0."""


class SsmloraConfig(PluginConfig):
    """Options of SSMLoRA; an adapter trains r (in + out + 2 r) numbers."""

    rank: int = Field(8, ge=2, description="r, rank of an adapter and numbers in a state")
    alpha: float = Field(
        16.0, gt=0, allow_inf_nan=False, description="alpha, multiplied as it is, and not by 1 / r"
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="probability of zeroing a number of a state while training"
    )
    even: Targets = Field(Targets("attention.q"), description="linear layers to adapt in layers 0, 2, 4, ...")
    odd: Targets = Field(Targets("attention.v"), description="linear layers to adapt in layers 1, 3, 5, ...")


class StateLora(Delta):
    """y + alpha B (u + dropout(h)); h is computed in float32 at least.

    Args:
        in_features, out_features: of the layer. config: r, alpha and the dropout.
        call: what the model is called on; states of this call are kept with it.
        chain: the name of the adapters that hand on to each other, unique in the model. index: its place in it, from 0.

    Raises:
        UnsupportedError: the layer runs, and the state that the adapter before it left is not known.
    """

    def __init__(
        self, in_features: int, out_features: int, config: SsmloraConfig, call: Call, chain: str, index: int
    ) -> None:
        super().__init__()
        self.config, self.call, self.chain, self.index = config, call, chain, index
        r = config.rank
        self.A = nn.Parameter(torch.randn(r, in_features) / math.sqrt(r))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        self.C, self.D = nn.Parameter(torch.zeros(r, r)), nn.Parameter(torch.zeros(r, r))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u = F.linear(x.to(self.A.dtype), self.A)  # [..., r]
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        states: dict[Any, Tensor | tuple[Tensor, Tensor]] = self.call.once(self.chain, dict)
        before = self.before(wide.detach(), states)
        g = before + F.linear(before, self.C.to(wide)) + F.linear(wide, self.D.to(wide))
        low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
        h = (g - low) / (high - low + EPSILON)
        states["left"] = h.detach()
        change = u + F.dropout(h, self.config.dropout, self.training).to(u.dtype)
        return torch.add(y, F.linear(change, self.B).to(y.dtype), alpha=self.config.alpha)

    def before(self, u: Tensor, states: dict[Any, Any]) -> Tensor:
        """h_{n-1}, [..., r]; what it was then where checkpointing runs a layer a second time."""
        if self.index == 0:
            if not torch.is_grad_enabled():
                states.clear()  # they are of the steps before, which share the cache
            return torch.zeros_like(u)
        first, h = states.setdefault(self.index, (u, states.get("left")))
        alike = first is u or (first.shape == u.shape and torch.allclose(first, u, rtol=1e-3, atol=1e-3))
        if h is None or not alike:  # of another call, or of none
            raise UnsupportedError(
                f"ssmlora: adapter {self.index} of {self.chain} runs, and the state that the one before it left is not "
                "known",
                hint="call the whole model and not a layer; with gradient checkpointing, one call a step",
            )
        found: Tensor = h
        return found


class Ssmlora(Plugin):
    """See the module."""

    Config = SsmloraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.WHOLE_CALLS}
    config: SsmloraConfig
    example = {"rank": 4}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        length: dict[str, int] = {}
        for rest, targets in enumerate((self.config.even, self.config.odd)):
            for site in model.linears(targets):
                site.check_rank(self.config.rank)
                if site.layer is None:
                    raise OptionError(
                        f"ssmlora: {site.path} is in no layer", hint=f"targets without '{site.role}'"
                    )
                if site.layer % 2 == rest:
                    chain = f"{model.owner}-{site.tower}-{site.role}-{rest}"
                    index = length[chain] = length.get(chain, -1) + 1
                    site.attach(
                        StateLora(site.in_features, site.out_features, self.config, model.call, chain, index)
                    )
