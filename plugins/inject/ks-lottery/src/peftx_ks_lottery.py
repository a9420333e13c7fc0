"""KS-Lottery: a Kolmogorov-Smirnov test finds the few token embeddings that fine-tuning needs.

"KS-Lottery: Finding Certified Lottery Tickets for Multilingual Language Models" (arXiv:2402.02801). A probe trains the
embedding alone, E -> E' [V, d]. The d numbers of a row are taken as a sample of a distribution, before and after:

    D_j = sup_t |F_j(t) - F'_j(t)|              Kolmogorov-Smirnov, of two samples of d
    p_j = P(D >= D_j | one distribution)        exact: 2 sum_{k>=1} (-1)^(k-1) C(2d, d - k h) / C(2d, d), h = d D_j
    T   = {j : p_j <= alpha}                    the winning tickets
    partial tuning      E again, and only the rows of T train
    partial transfer    the rows E'_T in E, and nothing trains any more

What the other rows would have changed is bounded. Of a prediction with the two largest probabilities p_A > p_B, R =
(p_A - p_B) / 2 is how far each may move before they change places; for a probability that is monotone in a number drawn
from F_j, exchanging F_j and F'_j moves its mean by D_j at most. So a prediction is certified where the sum of D_j over
the tokens before it that are no tickets stays below R.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from math import exp, lgamma
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftx import Claim, Evaluation, ModelView, Phase, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.engines.data import IGNORE
from peftx.engines.training.updates import forget
from peftx.errors import ConflictError, TrainingError
from peftx.kernel.objective import objective_of
from peftx.kernel.trained import Trained


class KsLotteryConfig(PluginConfig):
    """Options of KS-Lottery."""

    alpha: float = Field(
        0.05, gt=0, le=1, description="significance of the test; the lower, the fewer tickets"
    )
    probe: float = Field(
        0.5, gt=0, description="share of a run's steps for the probe; whole from 1 on: how many (tuning)"
    )
    use: Literal["tuning", "transfer"] = Field(
        "tuning", description="train the tickets from E, or keep what a probe of the whole run made of them"
    )

    @field_validator("probe")
    @classmethod
    def _share_or_steps(cls, probe: float) -> float:
        if probe >= 1 and probe != int(probe):
            raise ValueError("from 1 on it is a number of steps, and must be whole")
        return probe


def ks_counts(before: Tensor, after: Tensor) -> Tensor:
    """h = d D of each row of two matrices [V, d]: int64 [V]."""
    found = []
    for a, b in zip(before.split(1024), after.split(1024), strict=True):
        a, b = a.float().sort(-1).values, b.float().sort(-1).values
        t = torch.cat([a, b], -1)
        under = (torch.searchsorted(x.contiguous(), t, right=True) for x in (a, b))
        found.append((next(under) - next(under)).abs().amax(-1))
    return torch.cat(found)


def p_values(d: int) -> list[float]:
    """p of h = 0..d for two samples of d, by Gnedenko and Korolyuk."""

    def ratio(m: int) -> float:  # C(2d, d - m) / C(2d, d)
        return exp(2 * lgamma(d + 1) - lgamma(d - m + 1) - lgamma(d + m + 1))

    tails = (2 * sum((-1) ** (k - 1) * ratio(k * h) for k in range(1, d // h + 1)) for h in range(1, d + 1))
    return [1.0, *(min(1.0, max(0.0, p)) for p in tails)]


class Tickets(nn.Module):
    """float32 distance [V], D of each token; bool chosen [V], T."""

    distance: Tensor
    chosen: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.register_buffer("distance", torch.zeros(tokens))
        self.register_buffer("chosen", torch.zeros(tokens, dtype=torch.bool))


class KsLottery(Plugin):
    """See the module."""

    Config = KsLotteryConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.NEEDS_GRADIENTS}
    architectures = ("mixtral", "gemma2")
    # A loop of one's own does not know its length, and one step moves little: every token is a ticket.
    example = {"probe": 1, "alpha": 1.0}
    config: KsLotteryConfig

    place: Trained
    """E' and E."""
    tickets: Tickets

    @property
    def chosen(self) -> bool:
        """Are there tickets. Said in the state, since it decides about phases before there is a model."""
        return bool(self.state.get("chosen"))

    def phases(self) -> Sequence[Phase]:
        probe = [] if self.chosen else [Phase("probe", self.config.probe)]
        return [Phase("probe")] if probe and self.config.use == "transfer" else [*probe, Phase("tune")]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        site = model.embedding()
        found = model.train(f"re:^{re.escape(site.path)}$", named=lambda name: name == "weight")
        if not found:
            said = f"{site.path} is quantized, and integers do not train"
            raise ConflictError(f"{model.owner}: {said}", hint="quantize behind this plugin")
        (self.place,) = found.values()
        self.tickets = model.keep("tickets", Tickets(len(self.place.start)))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        phase = step.phase(self)
        if phase.name == "tune" and not self.chosen:
            if not step.begins(self):
                raise TrainingError(
                    "ks-lottery: tuning without tickets", hint="start at step 0, or at the rewind"
                )
            self.choose()
            self.place.rewind()
        if step.last_micro:
            self.place.restrict(self.rows() if self.chosen else None)
            if 0 < phase.first == step.index:  # the probe ended here
                step.before_update(lambda optimizer: forget(optimizer, [self.place.theta]))
            if phase.name == "probe" and step.index + 1 == phase.end and self.config.use == "transfer":
                step.after_update(lambda _: self.transfer())
        return (yield)

    @torch.no_grad()
    def choose(self) -> None:
        """T of the embedding as it is now.

        Raises:
            PeftxError: no row moved enough.
        """
        h, d = ks_counts(self.place.theta_0, self.place.theta), self.place.start.shape[1]
        p = torch.tensor(p_values(d), device=h.device)[h]
        if not (p <= self.config.alpha).any():
            said = f"no row of the embedding moved enough: the smallest p is {float(p.min()):.3g}"
            hint = "a longer probe, a higher learning rate, or a higher alpha"
            raise TrainingError(f"ks-lottery: {said}, and alpha {self.config.alpha:g}", hint=hint)
        self.tickets.distance.copy_(h / d)
        self.tickets.chosen.copy_(p <= self.config.alpha)
        self.state["chosen"] = True

    def rows(self) -> Tensor:
        """The entries of T's rows, bool [V, d]."""
        return self.tickets.chosen[:, None].expand(self.place.theta.shape)

    @torch.no_grad()
    def transfer(self) -> None:
        """Choose, and bring all other rows back. At the end of a run with `use: transfer`; in a loop of your own, yours
        to call."""
        self.choose()
        self.place.theta.copy_(torch.where(self.rows(), self.place.theta, self.place.theta_0))

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `tickets`, their number, and of decoders whose head is not the embedding `certified`: the share of
        predictions of labelled tokens that the rows which are no tickets cannot change."""
        model, found = evaluation.stack.model, list[Tensor]()
        evaluation.add("tickets", int(self.tickets.chosen.sum()), unit="tokens")
        head = model.get_output_embeddings()
        tied = head is None or head.weight is self.place.theta
        if not self.chosen or tied or model.config.is_encoder_decoder or objective_of(model) != "next-token":
            return
        for batch in evaluation.batches():
            logits = model(input_ids=batch["input_ids"]).logits[0]
            known = batch["labels"][0, 1:] != IGNORE
            found.append(self.certified(batch["input_ids"][0], logits)[:-1][known])
        share = torch.cat(found).float()
        evaluation.add("certified", share.mean().item(), count=len(share), unit="share")

    def certified(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Of each prediction of a text, ids [t], logits [t, V]: is it certified, bool [t]."""
        top = logits.float().softmax(-1).topk(2).values
        first = (ids[:, None] == ids).long().argmax(1) == torch.arange(len(ids), device=ids.device)
        moves = self.tickets.distance[ids] * ~self.tickets.chosen[ids] * first
        return moves.cumsum(0) < (top[:, 0] - top[:, 1]) / 2
