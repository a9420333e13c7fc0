"""State-offset tuning: a trained constant beside the state of every selective state space layer.

"State-offset Tuning: State-based Parameter-Efficient Fine-Tuning for State Space Models" (arXiv:2503.03499). A Mamba
layer makes u, z, C_t of its input and computes, for d channels with n states each,

    h_t = A_t h_{t-1} + B_t u_t             h: [d, n]
    y_t = h_t C_t + D u_t                   C_t: [n], y_t: [d]
    out = W_out (y_t * silu(z_t))           z_t: [d], the gate

and the offset joins where the state is read, never where it is carried on, so it weighs the same at every step:

    (h)  y_t = (h_t + H') C_t + D u_t       H': [d, n], starts at 0; or H' = B A with `rank`, A: [r, n], B: [d, r]
    (y)  y_t = h_t C_t + D u_t + y'         y': [d], starts at 0

What enters W_out therefore gains (H' C_t) * silu(z_t), in a scan over a text and in a step of decoding alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Site, hookimpl
from peftx.errors import ArchitectureError, OptionError, UnsupportedError

ROLES = ("ssm.in", "ssm.x", "ssm.dt", "ssm.out", "block.ssm")


class StateOffsetTuningConfig(PluginConfig):
    """Options of state-offset tuning; the paper trains Mamba-130M at 4e-4 in batches of 4."""

    variant: Literal["h", "y"] = Field("h", description="offset of the state, [d, n], or of the output, [d]")
    rank: int | None = Field(
        None, ge=1, description="r of H' = B A, for variant h; none: H' is trained as it is"
    )


@dataclass(eq=False)
class Call:
    """What a layer's offset needs of the call that is under way."""

    z: Tensor | None = None  # [batch, T, d]
    C: Tensor | None = None  # [batch, T, n]


class Gate(Delta):
    """On W_in, which gives [u ; z]: notes z."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.call.z = noted(y.chunk(2, -1)[1])
        return y


class Readout(Delta):
    """On W_x, which gives [dt ; B ; C]: notes C."""

    def __init__(self, call: Call, n: int) -> None:
        super().__init__()
        self.call = call
        self.n = n

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.call.C = noted(y[..., -self.n :])
        return y


def noted(part: Tensor) -> Tensor:
    """A part of y as it is now: where no gradient is recorded, a delta that comes behind may write into y."""
    return part if torch.is_grad_enabled() else part.clone()


class StateOffset(Delta):
    """On W_out: adds (H' C_t) * silu(z_t) to what enters it.

    Args:
        d, n: channels, and states of each. rank: r, or none.
    """

    def __init__(self, call: Call, d: int, n: int, *, rank: int | None) -> None:
        super().__init__()
        self.call = call
        self.rank = rank
        if rank is None:
            self.H = nn.Parameter(torch.zeros(d, n))
        else:
            self.A = nn.Parameter(torch.empty(rank, n).uniform_(-1, 1) / math.sqrt(n))  # Kaiming, a = sqrt(5)
            self.B = nn.Parameter(torch.zeros(d, rank))

    def pre(self, x: Tensor) -> Tensor:
        H = self.H if self.rank is None else self.B @ self.A  # [d, n]
        x = x + (self.call.C @ H.t()) * F.silu(self.call.z)  # [batch, T, d]
        self.call.C = self.call.z = None
        return x


class OutputOffset(Delta):
    """On W_out: adds y' * silu(z_t) to what enters it."""

    def __init__(self, call: Call, d: int) -> None:
        super().__init__()
        self.call = call
        self.y = nn.Parameter(torch.zeros(d))

    def pre(self, x: Tensor) -> Tensor:
        x = x + self.y * F.silu(self.call.z)
        self.call.z = None
        return x


class Applied(Delta):
    """On the whole layer: refuses a call in which W_out was read and not called, so that no offset was added."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.call.z is not None:
            self.call.C = self.call.z = None
            raise UnsupportedError(
                "state-offset-tuning: a fused kernel computed the whole layer, and has no place for the offset",
                hint="train without the kernels of mamba-ssm; generation may use them",
            )
        return y


def without_readers(site: Site) -> Site:
    """A packed layer as one that is called alone: nothing folds into what a fused kernel would read of it, which is no
    matter here, since `Applied` refuses such a call."""
    return replace(site, read=False, called=False) if site.kind == "quantized" else site


class StateOffsetTuning(Plugin):
    """See the module."""

    Config = StateOffsetTuningConfig
    claims = {Claim.IDENTITY_AT_START, Claim.EDITS_INPUTS}
    architectures = ("mamba",)
    refuses = dict.fromkeys(("llama", "gpt2", "qwen2", "bert", "t5"), "its layers have no state")
    config: StateOffsetTuningConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        there = {site.role for site in model.anatomy.sites}
        for role in ROLES:
            if role not in there:
                raise ArchitectureError(
                    f"state-offset-tuning: {model.config.model_type} has no '{role}', so no layer with a state",
                    hint="it works on Mamba",
                )
        for inner, x, dt, out, layer in zip(*(model.sites(role) for role in ROLES), strict=True):
            x, out = without_readers(x), without_readers(out)
            d, n = out.in_features, (x.out_features - dt.in_features) // 2
            self._check(d, n)
            call = Call()
            inner.attach(Gate(call))
            if self.config.variant == "h":
                x.attach(Readout(call, n))
                out.attach(StateOffset(call, d, n, rank=self.config.rank))
            else:
                out.attach(OutputOffset(call, d))
            layer.attach(Applied(call))

    def _check(self, d: int, n: int) -> None:
        rank = self.config.rank
        if rank is not None and self.config.variant == "y":
            raise OptionError(
                f"state-offset-tuning: rank {rank} with variant y, whose offset is a vector",
                hint="variant: h",
            )
        if rank is not None and rank > min(d, n):
            raise OptionError(
                f"state-offset-tuning: rank {rank} exceeds the {d}x{n} state",
                hint=f"rank at most {min(d, n)}",
            )
