"""XPrompt: a soft prompt that loses its worst tokens and pieces, and trains again.

"XPrompt: Exploring the Extreme of Prompt Tuning" (arXiv:2210.04457). Some tokens of a trained prompt do harm, so a run
has four phases:

    tune      P: [m, d], rows in front of the input, trained on the task; the model is frozen
    tokens    I_i   = E_x |dL(x)/dgamma_i|,   p_i <- gamma_i p_i,      gamma: [m]      and the lowest go
    pieces    I_i,j = E_x |dL(x)/dzeta_i,j|,  p_i,j <- zeta_i,j p_i,j, zeta:  [m, k]   and the lowest go
    retune    P again from its first values, without what went

A row of P is cut into k pieces of d/k numbers. gamma and zeta are 1 for what is kept and 0 for what went; a token
without pieces leaves the input. While scores are taken P rests.

Departures: the shares that go are options (the paper tries a grid of them on held-out data); a text's score weighs as
its labels do in the loss of its batch; one schedule of the learning rate runs through all phases.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Phase, Plugin, PluginConfig, TrainStep, VirtualTokens, hookimpl
from peftx.engines.training.updates import forget
from peftx.errors import OptionError
from peftx.kernel.call import Call


class XpromptConfig(PluginConfig):
    """Options of XPrompt; the paper prunes 10% to 90% of 20 tokens, and trains with Adafactor at rate 0.3."""

    length: int = Field(20, ge=1, description="m, rows in front of the input")
    pieces: int = Field(16, ge=1, description="k, pieces of a row; a divisor of the model's width")
    tokens_off: float = Field(0.3, ge=0, lt=1, description="share of the tokens that go; one stays")
    pieces_off: float = Field(0.3, ge=0, lt=1, description="share of the pieces left that go; one stays")
    tune: float = Field(
        0.45, gt=0, description="steps of the first phase: a share of the run's, or from 1 on their number"
    )
    score: int = Field(
        10, ge=1, description="steps over which scores are taken, of tokens and again of pieces"
    )
    rewind: Literal["start", "tuned"] = Field(
        "start", description="what P trains again from: its first values, or those after the first phase"
    )
    frequent: int = Field(5000, ge=1, description="rows start as tokens drawn among these: the lowest ids")


class Ticket(VirtualTokens):
    """P, and which pieces of it are left.

    Args:
        start: first values of P, [m, d]. pieces: k. call: of the model.
    """

    def __init__(self, start: Tensor, pieces: int, call: Call) -> None:
        super().__init__(len(start))
        self.P = nn.Parameter(start)
        self.register_buffer("zeta", torch.ones(len(start), pieces, dtype=torch.bool))
        self.call = call
        self.masks: list[Tensor] | None = None
        """While scores are taken: the masks of the texts of each forward pass, [B, m, k], all 1."""

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens that are left, as zeta is now: a plugin may set back what trains for a while. All of them where it has
        no values, on the meta device."""
        return self.most if self.zeta.is_meta else int(self.zeta.any(1).sum())

    @length.setter
    def length(self, rows: int) -> None:
        self.most = rows

    def rows(self) -> Tensor:
        p = self.pieces(self.P)
        if self.masks is not None:
            mask = torch.ones(self.call.shape[0], *self.zeta.shape, device=p.device, dtype=p.dtype)
            self.masks.append(mask.requires_grad_())
            p = mask.unsqueeze(-1) * p  # [B, m, k, d / k]
        return p.flatten(-2)[..., self.zeta.any(1), :]

    def pieces(self, P: Tensor) -> Tensor:
        """zeta_ij p_ij, [m, k, d / k]."""
        return self.zeta[..., None] * P.unflatten(1, (self.zeta.shape[1], -1))

    @torch.no_grad()
    def keep(self, zeta: Tensor, P: Tensor) -> None:
        """Go on from P with these pieces of it."""
        self.zeta.copy_(zeta)
        self.P.copy_(self.pieces(P).flatten(1))


def without_lowest(scores: Tensor, kept: Tensor, share: float) -> Tensor:
    """`kept`, bool like the scores, without this share of it, that of the lowest scores; one stays."""
    number = min(round(share * int(kept.sum())), int(kept.sum()) - 1)
    lowest = scores.to(kept.device).masked_fill(~kept, math.inf).flatten().topk(number, largest=False).indices
    return kept.flatten().index_fill(0, lowest, False).view_as(kept)


class Xprompt(Plugin):
    """See the module."""

    Config = XpromptConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS, Claim.NEEDS_GRADIENTS}
    architectures = ("gemma",)
    example = {"tune": 2, "score": 1}  # a loop of one's own does not know its length
    config: XpromptConfig
    ticket: Ticket

    def phases(self) -> Sequence[Phase]:
        retune, score = Phase("retune"), self.config.score
        if self.state.get("found"):  # what has lost its worst trains on as it is
            return (retune,)
        return Phase("tune", self.config.tune), Phase("tokens", score), Phase("pieces", score), retune

    @hookimpl
    def inject(self, model: ModelView) -> None:
        m, k, site = self.config.length, self.config.pieces, model.embedding()
        if (d := site.out_features) % k:
            raise OptionError(f"xprompt: {d} numbers make no {k} pieces", hint=f"pieces: {math.gcd(d, k)}")
        self.ticket = Ticket(model.embedded(m, among=self.config.frequent), k, model.call)
        model.prompt(self.ticket)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        ticket, span = self.ticket, step.phase(self)
        memory = step.memory.setdefault(step.stack.id_of(self), {})
        if step.begins(self):
            self.begin(span.name, memory)
        if span.name == "retune" and step.index == span.first:
            step.before_update(lambda optimizer: forget(optimizer, [ticket.P]))
        if span.name not in ("tokens", "pieces"):
            return (yield)
        step.on_gradients(lambda parameters: setattr(ticket.P, "grad", None))  # P rests
        ticket.masks = []
        try:
            loss = yield
            for g in [mask.grad.float() for mask in ticket.masks if mask.grad is not None]:  # [B, m, k]
                # gamma is in all pieces of its token
                scores = (g.sum(2, keepdim=True) if span.name == "tokens" else g).abs().sum(0)
                memory["I"] = torch.as_tensor(memory.get("I", 0)).to(scores) + scores
            return loss
        finally:
            ticket.masks = None

    def begin(self, phase: str, memory: dict[str, Any]) -> None:
        """What is settled before a phase's first step."""
        ticket, zeta, scores = self.ticket, self.ticket.zeta, memory.pop("I", None)
        if phase == "tune":
            memory["P_0"] = ticket.P.detach().clone()
        elif phase == "pieces":
            gamma = without_lowest(scores, zeta.any(1, keepdim=True), self.config.tokens_off)  # [m, 1]
            ticket.keep(zeta & gamma, ticket.P)
        elif scores is not None:
            P = memory["P_0"].to(ticket.P) if self.config.rewind == "start" else ticket.P
            ticket.keep(without_lowest(scores, zeta, self.config.pieces_off), P)
            self.state["found"] = True
