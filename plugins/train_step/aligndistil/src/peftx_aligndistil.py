"""AlignDistil: alignment as distillation, from a teacher that is put together anew at every token.

"AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation" (arXiv:2503.02832). Of preferences
(x, y_w, y_l) two models are trained by DPO from one start, pi_ref, the second one on swapped pairs:

    h       = log pi(y_w|x) - log pi(y_l|x) - (the same of pi_ref)                  sums over an answer's tokens
    pi_dpo:   - log sigmoid(beta h)              pi_rev:   - log sigmoid(- beta h)

The reward of a token y in state s is r = beta (log pi_dpo(y|s) - log pi_rev(y|s)). RLHF with it is a distillation from
the teacher p*, whose logits go beyond those of the DPO model, the further the more the two models differ:

    a_s  = strength * sum_v |pi_dpo(v|s) - pi_rev(v|s)| + 1e-3                      adaptive; else a_s = strength
    z*   = z_dpo + a_s (z_dpo - z_rev)                                              p* = softmax(z*)
    loss = beta / a_s * KL(pi_theta(.|s) || p*(.|s))         the mean over an answer's tokens, then over answers

States are prefixes: of the answers in the rows, or of answers that pi_theta draws to their prompts in each step.
Without contrast z* = z_ref + a_s (z_dpo - z_ref), the paper's first theorem, where beta / a_s is the weight of RLHF's
own KL term: a_s = 1 gives p* = pi_dpo.

A run has three phases, "dpo", "reverse" and "distil". What trains goes back to pi_ref between them, and the teachers
are what it was at the ends of the first two; or they are models of their own, and their phases are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import Field, model_validator
from torch import Tensor

from peftx import (
    Claim,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    TrainingData,
    TrainStep,
    companion,
    hookimpl,
)
from peftx.engines.data import IGNORE, Collator, Place, Where, check_differ, encode_pair, inside, together
from peftx.engines.training.restarts import forget_moments, go_back, remember_start
from peftx.kernel.calls import columns_of
from peftx.kernel.modes import as_it_was, eval_mode
from peftx.kernel.objective import pad_of
from peftx.kernel.phases import Phase
from peftx.toolkits.decoding.text import DRAWN, check_writes, written


class AlignDistilConfig(PluginConfig):
    """Options of AlignDistil. The paper trains whole models with them, at learning rate 1e-6."""

    beta: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="of both DPO losses, and of the distillation"
    )
    strength: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="how far the teacher goes beyond the DPO model: a_s a unit of the distance, or a_s itself",
    )
    adaptive: bool = Field(
        True, description="a_s by the distance of the two models at the token; else one for all"
    )
    contrast: bool = Field(True, description="the other model is the reverse DPO one; else the start")
    states: Literal["both", "chosen", "drawn"] = Field(
        "both",
        description="answers whose tokens are distilled on; drawn: the student's own, anew in each step",
    )
    max_new_tokens: int = Field(
        128, ge=1, description="tokens of a drawn answer; fewer where the model's window ends"
    )
    teacher_steps: float = Field(
        0.25, gt=0, description="share of a run's steps for each teacher; whole from 1 on: how many"
    )
    dpo: str | None = Field(None, description="pi_dpo: a bundle, folder or hub id; none: trained in this run")
    reverse: str | None = Field(None, description="pi_rev: the same")

    @model_validator(mode="after")
    def _fit(self) -> AlignDistilConfig:
        if self.teacher_steps >= 1 and self.teacher_steps != int(self.teacher_steps):
            raise ValueError("teacher_steps: from 1 on it is a number of steps, and must be whole")
        if self.reverse is not None and not self.contrast:
            raise ValueError("reverse is not looked at without contrast: leave it out")
        return self


COLUMNS = ("rejected_ids", "rejected_labels")
PAIR = (("input_ids", "labels"), COLUMNS)
"""The text with the chosen answer, and the one with the rejected one."""
Task = Callable[[], tuple[Tensor, Any]]
FLOOR = 1e-3
"""Added to an adaptive a_s, which the loss is divided by."""


def dpo_loss(ratio: Tensor, beta: float) -> Tensor:
    """log pi / pi_ref of the answers, [2 B], the better ones first -> the loss of each pair, [B]."""
    better, worse = ratio.chunk(2)
    return -F.logsigmoid(beta * (better - worse))


def teacher(
    dpo: Tensor, other: Tensor, *, strength: float, adaptive: bool, contrast: bool
) -> tuple[Tensor, Tensor]:
    """Logits of pi_dpo and the other model, [..., V] -> log p*, [..., V], and a_s, [..., 1]."""
    apart = (dpo.softmax(-1) - other.softmax(-1)).abs().sum(-1, keepdim=True)
    a = strength * apart + FLOOR if adaptive else torch.full_like(apart, strength)
    return ((dpo if contrast else other) + a * (dpo - other)).log_softmax(-1), a


def distillation(student: Tensor, log_p: Tensor, a: Tensor, beta: float) -> Tensor:
    """Logits of pi_theta [..., V], and what `teacher` gives -> beta / a_s KL(pi_theta || p*), [...]."""
    log_pi = student.log_softmax(-1)
    return beta * (log_pi.exp() * (log_pi - log_p)).sum(-1) / a.squeeze(-1)


def at_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, T, V] of the states whose next token is labelled, row by row: [N, V] float32."""
    return logits[:, :-1][labels[:, 1:] != IGNORE].float()


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log pi(y|x) of rows: logits [B, T, V], labels [B, T] -> [B] float32."""
    each = F.cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], ignore_index=IGNORE, reduction="none")
    return -each.sum(1)


def row_means(each: Tensor, labels: Tensor) -> Tensor:
    """Numbers of the answers' tokens, [N] -> the mean of the rows' means."""
    kept = labels[:, 1:] != IGNORE  # [B, T - 1]
    weight = kept / kept.sum(1, keepdim=True).clamp(min=1)
    return (each * weight[kept]).sum() / len(labels)


class AlignDistil(Plugin):
    """See the module."""

    Config = AlignDistilConfig
    claims = {
        Claim.IDENTITY_AT_START,
        Claim.BESIDE_WEIGHTS,
        Claim.NEEDS_LABELS,
        Claim.NEEDS_MASK,
        Claim.REPLACES_LOSS,
        Claim.RESTARTS,
    }
    takes, gives = ("preference",), {"preference": "tokenized"}
    refuses = {"bert": "it writes no text", "t5": "prompt and answer are not in one row"}
    example = {"teacher_steps": 1}  # a loop of one's own does not know its length, of which 0.25 is a quarter
    config: AlignDistilConfig

    def suits(self, model: ModelView) -> None:
        check_writes(model)

    def phases(self) -> Sequence[Phase]:
        wanted = ("dpo", "reverse") if self.config.contrast else ("dpo",)
        ours = [name for name in wanted if getattr(self.config, name) is None]
        return [*(Phase(name, self.config.teacher_steps) for name in ours), Phase("distil")]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.owner = model.owner
        for name in COLUMNS:
            model.column(name, own_length=True)

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        data.require(self.takes, by=self.owner)

        def texts(rows: Dataset) -> Dataset:
            pairs = [self.pair(row, Place(rows, i), data) for i, row in enumerate(rows)]
            found = {name: [pair[name] for pair in pairs] for name in ("input_ids", "labels", *COLUMNS)}
            others = set(columns_of(stack.model)) & set(rows.column_names)
            return Dataset.from_dict(found | {name: rows[name][:] for name in others})

        data.rewrite(texts)

    def pair(self, row: dict[str, Any], where: Where, data: TrainingData) -> dict[str, list[int]]:
        """Both texts of a row, and their labels."""
        texts = [
            encode_pair(
                data.tokenizer,
                row["prompt"],
                row[name],
                max_length=data.max_length,
                where=inside(where, name),
            )
            for name in ("chosen", "rejected")
        ]
        answers = [[label for label in text.labels if label != IGNORE] for text in texts]
        check_differ(*answers, where=where, by=self.owner)
        values = (ids for text in texts for ids in (text.input_ids, text.labels))
        return dict(zip(("input_ids", "labels", *COLUMNS), values, strict=True))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        pad = pad_of(step.model, step.stack.tokenizer)
        step.batch = together(step.batch, PAIR, pad=pad, owner=self.owner)
        phase = self.enter(step)
        step.replace_task_loss(self.distil(step) if phase == "distil" else self.dpo(step, phase), over="rows")
        return (yield)

    def enter(self, step: TrainStep) -> str:
        """The phase. As one begins, what the last one trained is kept, and all that trains is as it was at first."""
        phase, known = step.phase(self), remember_start(step, self)
        if step.begins(self):
            if phase.first > 0:
                now = step.stack.ledger.trained()
                known[known["phase"]] = {name: x.detach().clone() for name, x in now.items()}
                go_back(step, known)
            known["phase"] = phase.name
        if 0 < phase.first == step.index:
            forget_moments(step)
        return phase.name

    def logits(self, step: TrainStep, who: str) -> Tensor:
        """Of a frozen model (`start`, `dpo` or `reverse`) on the batch, [B, T, V]."""
        if source := getattr(self.config, who, None):
            with step.reference(companion(step.stack, source)) as model:
                inputs = {name: step.batch[name] for name in ("input_ids", "attention_mask")}
                return model(**inputs).logits  # type: ignore[no-any-return]
        with as_it_was(step.stack.ledger, step.memory[self.owner][who]):
            return step.forward(labels=None).logits  # type: ignore[no-any-return]

    def dpo(self, step: TrainStep, phase: str) -> Task:
        """DPO of the pairs, or of the swapped ones."""
        labels = step.batch["labels"]
        before = log_probs(self.logits(step, "start"), labels)
        sign = 1 if phase == "dpo" else -1

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward(labels=None)
            ratio = sign * (log_probs(outputs.logits, labels) - before)
            return dpo_loss(ratio, self.config.beta).mean(), outputs

        return loss

    def distil(self, step: TrainStep) -> Task:
        config = self.config
        if config.states != "both":
            step.batch = {name: x.chunk(2)[0] for name, x in step.batch.items()}
        if config.states == "drawn":
            step.batch = self.drawn(step)
        labels = step.batch["labels"]
        whose = ("dpo", "reverse" if config.contrast else "start")
        teachers = [at_answers(self.logits(step, who), labels) for who in whose]
        extrapolated = partial(
            teacher, strength=config.strength, adaptive=config.adaptive, contrast=config.contrast
        )

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward(labels=None)
            found = [at_answers(outputs.logits, labels), *teachers]
            size = min(z.shape[-1] for z in found)  # heads of one family are rounded up differently
            student, dpo, other = (z[:, :size] for z in found)
            each = distillation(student, *extrapolated(dpo, other), config.beta)
            return row_means(each, labels), outputs

        return loss

    def drawn(self, step: TrainStep) -> dict[str, Tensor]:
        """Answers that pi_theta draws to the batch's prompts, each up to its end token, in the place of those there."""
        stack, others = step.stack, dict(step.batch)
        ids, mask, labels = (others.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        prompts = [row[x].tolist() for row, x in zip(ids, mask.bool() & (labels == IGNORE), strict=True)]
        with stack.columns(**others), eval_mode(stack.model):
            answers = written(stack, prompts, self.config.max_new_tokens, DRAWN)
        pairs = zip(prompts, answers, strict=True)
        rows = [{"input_ids": x + y, "labels": [IGNORE] * len(x) + y} for x, y in pairs]
        batch = Collator(pad_of(stack.model, stack.tokenizer))(rows)
        return others | {name: value.to(ids.device) for name, value in batch.items()}
