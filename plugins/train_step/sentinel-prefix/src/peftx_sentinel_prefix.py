"""Sentinel: a small model learns from rewards what to write before a prompt, so that a black box answers safely.

"Tiny Refinements Elicit Resilience: Toward Efficient Prefix-Model Against LLM Red-Teaming" (arXiv:2405.12604): its
sentinel. The stack's model is the policy pi. It reads a prompt p and writes s, N tokens at most; a target T that nobody
sees into answers y = T(s p), and R(y) says from 0 to 1 how unsafe that is. Token j of s, the last one being J, earns

    r_j  = - beta log(pi_old(s_j | p, s_<j) / pi_0(s_j | p, s_<j)) - [j = J] R(y)         pi_0: as the run began

and is judged by a head V on pi's last hidden states, which starts at 0:

    A_j  = sum_{i >= j} lambda^(i - j) (r_i + V_{i + 1} - V_i),  V_{J + 1} = 0            V as it was when s was drawn
    rho  = pi(s_j | p, s_<j) / pi_old(s_j | p, s_<j)
    loss = mean over rows and tokens of  max(-rho A, -clip(rho, 1 - eps, 1 + eps) A) + c (V - (A + V_old))^2

pi_old is pi when s was drawn; each s is learned from in `epochs` updates. T is asked, and is never trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

import peftx
from peftx import Claim, Evaluation, ModelView, Plugin, PluginConfig, TrainStep, Worker, hookimpl
from peftx.engines.data import IGNORE, Collator, continuation, pair_of
from peftx.engines.training.base import base_alone
from peftx.kernel.heads import each_of
from peftx.kernel.objective import pad_of
from peftx.kernel.stack import Stack
from peftx.toolkits.decoding.text import DRAWN, check_writes, written
from peftx.toolkits.evaluation.likelihood import opening_ids
from peftx.toolkits.working import OfStack

OURS = ("input_ids", "attention_mask", "labels")


class SentinelPrefixConfig(PluginConfig):
    """Options of the sentinel; the paper adds fewer than 30 tokens."""

    unsafe: tuple[str, ...] = Field(
        min_length=1, description="regular expressions, case aside: an answer in which one is found is unsafe"
    )
    target: str | None = Field(
        None, description="T: a folder or hub id; none: the model without its plugins (see Use for servers)"
    )
    length: int = Field(29, ge=1, description="N, most tokens of s")
    max_new_tokens: int = Field(64, ge=1, description="tokens of an answer of T")
    epochs: int = Field(4, ge=1, description="updates that learn from the same s")
    clip: float = Field(0.2, gt=0, lt=1, description="eps")
    beta: float = Field(0.05, ge=0, description="weight of the divergence from pi_0")
    decay: float = Field(0.95, ge=0, le=1, description="lambda")
    value: float = Field(0.1, gt=0, description="c, weight of V's loss")

    @field_validator("unsafe")
    @classmethod
    def _regular(cls, unsafe: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in unsafe:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"no regular expression: {pattern!r}: {error}") from error
        return unsafe


def log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """log pi of each labelled token, 0 for the others: logits [B, T, V], labels [B, T] -> float32 [B, T - 1]."""
    return -cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], ignore_index=IGNORE, reduction="none")


def advantages(r: Tensor, V: Tensor, real: Tensor, decay: float) -> Tensor:
    """A of rewards and values [B, T], of whose places `real` are tokens of s, one behind the other; 0 elsewhere."""
    A, following, found = r.new_zeros(len(r)), r.new_zeros(len(r)), []
    for j in reversed(range(r.shape[1])):
        A = torch.where(real[:, j], r[:, j] + following - V[:, j] + decay * A, 0.0)
        following = torch.where(real[:, j], V[:, j], 0.0)
        found.append(A)
    return torch.stack(found[::-1], 1)


def ppo(log_rho: Tensor, A: Tensor, clip: float) -> Tensor:
    """The clipped loss of each token."""
    rho = log_rho.exp()
    return torch.maximum(-rho * A, -rho.clamp(1 - clip, 1 + clip) * A)


def mean(x: Tensor, real: Tensor) -> Tensor:
    """Over the real tokens of each row, and then over rows."""
    return ((x * real).sum(1) / real.sum(1)).mean()


class SentinelPrefix(Plugin):
    """See the module. `worker`, who asks T, and `scorer`, which is R, may be set before a run."""

    Config = SentinelPrefixConfig
    claims = {
        Claim.IDENTITY_AT_START,
        Claim.BESIDE_WEIGHTS,
        Claim.NEEDS_LABELS,
        Claim.NEEDS_MASK,
        Claim.REPLACES_LOSS,
    }
    takes = ("prompt-completion", "messages")
    example = {"unsafe": (".*",), "length": 3, "max_new_tokens": 3}
    refuses = {
        "bert": "it writes no text",
        "t5": "what it writes does not stand behind the prompt",
        "vit": "no text",
    }
    exempt = {"accumulation_makes_the_same_step": "prefixes are drawn for a micro-batch at once"}
    config: SentinelPrefixConfig
    worker: Worker | None = None
    scorer: Callable[[Sequence[str]], Sequence[float]] | None = None

    @hookimpl
    def inject(self, model: ModelView) -> None:
        check_writes(model)
        self.V = model.head("value", 1, pool=each_of)
        if not model.restoring:
            with torch.no_grad():
                self.V.linear.weight.zero_()
                self.V.linear.bias.zero_()

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        config, memory = self.config, step.memory.setdefault(step.stack.id_of(self), {})
        if step.index % config.epochs == 0 or str(step.micro) not in memory:
            memory[str(step.micro)] = self.rollout(step)
        drawn = {name: x.to(step.model.device) for name, x in memory[str(step.micro)].items()}
        labels, A, returns = drawn["labels"], drawn.pop("A"), drawn.pop("returns")
        old, real = drawn.pop("log_p"), labels[:, 1:] != IGNORE
        step.batch = drawn  # which terms of other plugins read

        def loss() -> tuple[Tensor, Any]:
            V, outputs = self.V.read(partial(step.forward, labels=None), drawn["attention_mask"])
            log_rho = log_p(outputs.logits, labels) - old
            each = ppo(log_rho, A, config.clip) + config.value * (V[:, :-1, 0] - returns).square()
            return mean(each, real), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    def rollout(self, step: TrainStep) -> dict[str, Tensor]:
        """The batch of p and s with the labels of s, and of each token log pi_old, A and A + V, [B, T - 1].

        Raises:
            BatchError: the batch has no prompts.
        """
        stack, device = step.stack, step.model.device
        step.require(*OURS, by=stack.id_of(self))
        ids, asked = (
            step.batch["input_ids"],
            step.batch["attention_mask"].bool() & (step.batch["labels"] == IGNORE),
        )
        p = [row[own].tolist() or opening_ids(stack.tokenizer) for row, own in zip(ids, asked, strict=True)]
        others = {name: x for name, x in step.batch.items() if name not in OURS}
        with step.reference(step.model) as pi, stack.columns(**others):
            s = self.draw(stack, p)
            rows = [{"input_ids": x + y, "labels": [IGNORE] * len(x) + y} for x, y in zip(p, s, strict=True)]
            batch = {
                n: x.to(device)
                for n, x in Collator(pad_of(pi, stack.tokenizer), padding_side="right")(rows).items()
            }
            labels, mask = batch["labels"], batch["attention_mask"]
            V, outputs = self.V.read(partial(pi, input_ids=batch["input_ids"], attention_mask=mask), mask)
            old, V = log_p(outputs.logits, labels), V[:, :-1, 0].float()
            texts = zip(
                *(stack.tokenizer.batch_decode(x, skip_special_tokens=True) for x in (s, p)), strict=True
            )
            R = self.R(self.answers(stack, [joined(*pair) for pair in texts]))
        with step.reference("start") as pi_0, stack.columns(**others):
            before = log_p(pi_0(input_ids=batch["input_ids"], attention_mask=mask).logits, labels)
        real = labels[:, 1:] != IGNORE
        last = real & (real.cumsum(1) == real.sum(1, keepdim=True))
        r = self.config.beta * (before - old) - last * torch.tensor(R, device=device)[:, None]
        A = advantages(r, V, real, self.config.decay)
        return {**others, **batch, "log_p": old, "A": A, "returns": (A + V) * real}

    def draw(self, stack: Stack, p: list[list[int]]) -> list[list[int]]:
        """s of each prompt, up to its end token, from the model as it stands."""
        return written(stack, p, self.config.length, DRAWN)

    def answers(self, stack: Stack, texts: Sequence[str]) -> list[str]:
        """y, what T says; nothing where nothing is asked: to an empty prompt behind a prefix of white space."""
        own = self.worker is None and self.config.target is None
        if self.worker is None and not own:
            self.worker = Worker(OfStack(peftx.Stack(self.config.target)))
        with base_alone(stack) if own else nullcontext():
            worker = Worker(OfStack(stack)) if self.worker is None else self.worker
            asked = [text for text in texts if text]
            found = iter(worker.write(asked, max_new_tokens=self.config.max_new_tokens))
        return [next(found).text if text else "" for text in texts]

    def R(self, answers: Sequence[str]) -> list[float]:
        """How unsafe answers are, 0 to 1."""
        if self.scorer is not None:
            return [float(score) for score in self.scorer(answers)]
        return [float(any(re.search(x, y, re.IGNORECASE) for x in self.config.unsafe)) for y in answers]

    def guard(self, stack: Stack, prompts: Sequence[str]) -> list[str]:
        """What T is to be asked in the place of each prompt: the likeliest s, and the prompt."""
        found = Worker(OfStack(stack)).write(prompts, max_new_tokens=self.config.length)
        return [joined(s.text, prompt) for s, prompt in zip(found, prompts, strict=True)]

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `unsafe/before` and `unsafe/after`: the share of answers with R over 1/2, to prompts as they are and to
        guarded ones."""
        stack, prompts = evaluation.stack, [pair_of(row)[0] for row in evaluation.rows("eval")]
        for name, texts in (("before", prompts), ("after", self.guard(stack, prompts))):
            bad = sum(score > 0.5 for score in self.R(self.answers(stack, texts)))
            evaluation.add_share(f"unsafe/{name}", bad, len(texts), "share")


def joined(s: str, prompt: str) -> str:
    """s and the prompt; the prompt alone where s is white space."""
    return s.strip() + continuation(s.strip(), prompt) if s.strip() else prompt
