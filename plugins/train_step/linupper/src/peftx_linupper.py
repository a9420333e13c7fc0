"""LinUpper: each row of a step weighs by its loss among the others, so that what is learned already counts less.

"Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining" (arXiv:2502.06733). An optimizer
step has B samples; l_i is the mean loss of the n_i labelled tokens of sample i. Without a gradient of the weights,

    h_i = (2 l_i - l_max - l_min) / max(l_max - l_min, 1e-6)                      in [-1, 1]
    f_i = min(h_i + 1, 1)  linupper;   1 - h_i^2  quadratic;   (h_i + 1) / 2  linear;   |h_i|  extremes
    w_i = exp(f_i / r) / sum_j exp(f_j / r)           the argmax over w of  sum_i w_i f_i - r KL(w || uniform)
    L   = B sum_i w_i (n_i / N) l_i                   N = sum_i n_i; uniform weights give the usual loss

Up to `burn_in` the weights are uniform. L is computed as the model's own loss and what the weights change of it,
sum_i (B w_i - 1) (n_i / N) l_i, so that terms that a model adds (for its routers) stay.

The weights are of the whole step. Where it is cut into micro-batches nobody knows them before the last one has run, so
the others are kept as they are, tokens and no graph, and are computed again behind the last one's backward pass.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from peftx import Claim, ModelView, Phase, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.errors import ArchitectureError, BatchError


class LinUpperConfig(PluginConfig):
    """Options of LinUpper; the paper takes 1000 of 20000 steps for `burn_in`, and r = 0.4 for its larger models."""

    strategy: Literal["linupper", "quadratic", "linear", "extremes"] = Field(
        "linupper",
        description="f: which losses weigh more (above the middle; near it; the higher; far from it)",
    )
    r: float = Field(1.0, gt=0, description="temperature of the weights; the higher, the more uniform")
    burn_in: float = Field(
        0.05,
        ge=0,
        description="share of a run's steps with uniform weights; whole from 1 on: how many; 0: none",
    )

    @field_validator("burn_in")
    @classmethod
    def _share_or_steps(cls, burn_in: float) -> float:
        if burn_in >= 1 and burn_in != int(burn_in):
            raise ValueError("from 1 on it is a number of steps, and must be whole")
        return burn_in


def weights(l: Tensor, strategy: str, r: float) -> Tensor:  # noqa: E741
    """w of losses l, both [B] without gradient; they sum to 1."""
    if not len(l):
        return l
    low, high = l.min(), l.max()
    h = (2 * l - high - low) / (high - low).clamp(min=1e-6)
    f = {
        "linupper": (h + 1).clamp(max=1),
        "quadratic": 1 - h.square(),
        "linear": (h + 1) / 2,
        "extremes": h.abs(),
    }[strategy]
    return (f / r).softmax(0)


EACH = ("ForMaskedLM", "ForTokenClassification")
"""Losses whose label i belongs to token i, and not to what stands before it."""


class Part(NamedTuple):
    """One micro-batch of a step."""

    module: nn.Module
    """What is called."""
    model: PreTrainedModel
    """What it wraps, if it wraps one."""
    batch: dict[str, Any]
    share: float
    """Its part of the step's labels."""

    def read(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        """What the model returns; its loss times the share, 0-d; of each sample the loss l and the labels n, [G] float.

        Raises:
            PeftxError: no labels, or numbers as labels.
        """
        labels, outputs = self.batch.get("labels"), self.module(**self.batch)
        if labels is None or labels.is_floating_point() or outputs.loss is None:
            said = "the batch has no labels of tokens or classes, whose losses it would weigh"
            raise BatchError(f"linupper: {said}", hint="rows with a completion, a text or a class")
        logits, sample = outputs.logits, torch.arange(len(labels), device=labels.device)
        if labels.ndim == 1:  # a class each
            logits, labels = logits[:, None], labels[:, None]
        elif not (self.model.config.is_encoder_decoder or self.model.loss_type in EACH):
            logits, labels = logits[:, :-1], labels[:, 1:]
        sample = sample[:, None].expand(labels.shape)
        mask, places = self.batch.get("attention_mask"), self.batch.get("position_ids")
        if places is not None and isinstance(mask, Tensor) and mask.ndim == 4:  # several texts in a row
            sample = ((places == 0).flatten().cumsum(0) - 1).view_as(places)[:, -labels.shape[1] :]
        each = cross_entropy(logits.mT.float(), labels, reduction="none")  # 0 without a label
        none = each.new_zeros(int(sample.max()) + 1)
        n = none.index_add(0, sample.flatten(), (labels != -100).flatten().to(each.dtype))
        l = none.index_add(0, sample.flatten(), each.flatten()) / n.clamp(min=1)  # noqa: E741
        return outputs, self.share * outputs.loss if n.any() else l.sum(), l, n


class LinUpper(Plugin):
    """See the module."""

    Config = LinUpperConfig
    claims = {Claim.NEEDS_LABELS, Claim.NEEDS_GRADIENTS, Claim.REPLACES_LOSS}
    architectures = ("mixtral", "vit")
    refuses = {"clip": "its loss is of pairs of rows"}
    example = {"burn_in": 0}  # a loop of one's own does not know its length, of which 0.05 is a share
    config: LinUpperConfig

    parts: Mapping[int, tuple[Part, Tensor, Tensor]] = {}
    """Of the step at hand, by micro-batch: l and n, [G] each, beside what computes them again."""

    def suits(self, model: ModelView) -> None:
        if "vision" in model.towers and "text" in model.towers:
            said = f"the loss of {type(model.module).__name__} is of pairs of rows, and no row has its own"
            raise ArchitectureError(f"{model.owner}: {said}", hint="a model that predicts tokens or classes")

    def phases(self) -> Sequence[Phase]:
        return [Phase("uniform", self.config.burn_in), Phase("weighted")] if self.config.burn_in else []

    def one_process(self) -> str:
        return "each would weigh its own rows among themselves"

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if self.phases() and step.phase(self).name == "uniform":
            return (yield)
        step.replace_task_loss(partial(self.task, step), over="step")
        self.parts = {} if step.first_micro else self.parts
        loss = yield
        self.parts = {} if step.last_micro else self.parts
        return loss

    def task(self, step: TrainStep) -> tuple[Tensor, Any]:
        """The plain loss of a micro-batch by its value; by its gradient nothing, and in the last one L of all."""
        share = 1 / step.accumulation if step.share is None else step.share["labels"]
        part = Part(step.module, step.model, dict(step.batch), share)
        outputs, plain, l, n = part.read()  # noqa: E741
        self.parts = {**self.parts, step.micro: (part, l.detach(), n)}
        trained = step.parameters()[:1]
        total = sum((p.flatten()[:1].sum() * 0 for p in trained), start=plain.detach())
        if step.last_micro:
            *others, change = self.changes()
            mine = plain + (change * l).sum()
            if mine.requires_grad:
                mine.register_hook(lambda gradient: self.behind(gradient, others))
            total = plain.detach() + (mine - mine.detach())
        return total * step.accumulation, outputs

    def changes(self) -> Sequence[Tensor]:
        """(B w_i - 1) n_i / N of each micro-batch, [G] each."""
        l, n = (torch.cat([part[i] for part in self.parts.values()]) for i in (1, 2))  # noqa: E741
        there, w = n > 0, torch.zeros_like(l)
        w[there] = weights(l[there], self.config.strategy, self.config.r)
        change = (there.sum() * w - 1) * n / n.sum().clamp(min=1)
        return change.split([len(part[1]) for part in self.parts.values()])

    def behind(self, gradient: Tensor, changes: Sequence[Tensor]) -> None:
        """The other micro-batches' gradients, once the backward pass at hand is over: layers that it recomputes must
        not meet another call before. `gradient` is what a loss is multiplied with."""
        parts = [part for part, _, _ in self.parts.values()]

        def run() -> None:
            for part, change in zip(parts, changes, strict=False):  # not of the last
                with torch.enable_grad():
                    _, plain, l, _ = part.read()  # noqa: E741
                    (plain + (change * l).sum()).backward(gradient)

        torch.autograd.Variable._execution_engine.queue_callback(run)  # type: ignore[attr-defined]
