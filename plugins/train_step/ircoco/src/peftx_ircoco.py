"""IRCoCo: an evaluator says of unfinished code how well it can be completed, and each token that is written earns that.

"IRCoCo: Immediate Rewards-Guided Deep Reinforcement Learning for Code Completion" (arXiv:2401.16637). The stack's model
is the actor pi, a row of data a context x and its completion. A run has three phases:

    sft          L = CE of the row, the model's own loss
    evaluator    L = mean (V(c) - s(pi(c), truth))^2                  c: a row's code up to a place drawn at random
                 pi(c): the tokens that the actor finds likeliest, `ahead` at most; s: BLEU or edit similarity; pi rests
    rl           L = CE of the row + weight * mean - r_t log pi(y_t | x, y_<t)   y ~ pi(. | x); over the tokens of all y
                 r_t = V(x, y_<=t), and of an end token that of the token before; V rests

The evaluator V is a small GPT-2 over the actor's tokens, fresh and the plugin's own, with a linear map to a number at
each token; causal, so that one pass over x and y gives all r_t. There is no baseline, no discount and no divergence. In
use pi is what the other plugins have made of it, and V is not asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import GPT2Config, GPT2Model

from peftx import Claim, Evaluation, ModelView, Phase, Plugin, PluginConfig, TrainStep, Worker, hookimpl
from peftx.engines.data import IGNORE, Collator, pair_of
from peftx.engines.training.updates import forget
from peftx.errors import ConflictError
from peftx.kernel.objective import pad_of
from peftx.kernel.stack import Stack
from peftx.toolkits.decoding.text import AS_IT_IS, DRAWN, check_writes, written
from peftx.toolkits.evaluation.likelihood import opening_ids
from peftx.toolkits.working import OfStack


class IrcocoConfig(PluginConfig):
    """Options of IRCoCo; the paper fine-tunes at rate 5e-5, and has a GPT-2 of its own for each score."""

    score: Literal["bleu", "edit"] = Field(
        "bleu", description="s: BLEU of tokens, smoothed; or edit similarity of characters"
    )
    sft: float = Field(
        0.4,
        ge=0,
        description="steps of the first phase: a share of the run's, or from 1 on their number; 0: none",
    )
    evaluator: float = Field(0.3, gt=0, description="steps of the second: the same")
    weight: float = Field(1.0, ge=0, description="of what is drawn, beside the row's own loss")
    ahead: int = Field(10, ge=1, description="tokens that are completed and scored to train V")
    max_new_tokens: int = Field(
        64, ge=1, description="tokens of y at most; fewer where the model's window ends"
    )
    window: int = Field(256, ge=2, description="tokens that V reads, the last ones of a longer text")
    width: int = Field(256, ge=1, description="of V")
    layers: int = Field(4, ge=1, description="of V")
    heads: int = Field(4, ge=1, description="of V's attention")

    @model_validator(mode="after")
    def _fit(self) -> IrcocoConfig:
        if self.window <= self.max_new_tokens:
            raise ValueError("window: V reads all of y and a token before it: more than max_new_tokens")
        if self.width % self.heads:
            raise ValueError("width: it is a multiple of heads")
        return self


OURS = ("input_ids", "attention_mask", "labels")


def bleu(y: Sequence[int], truth: Sequence[int]) -> float:
    """Up to four tokens, one added to all counts; 0 where there are no tokens."""
    if not y or not truth:
        return 0.0
    total = min(0.0, 1 - len(truth) / len(y))
    for n in range(1, 5):
        own, other = (Counter(zip(*(ids[i:] for i in range(n)), strict=False)) for ids in (y, truth))
        total += math.log(((own & other).total() + 1) / (own.total() + 1)) / 4
    return math.exp(total)


def edit(y: str, truth: str) -> float:
    """2 c / (length of both), c: characters of a longest common subsequence; 0 where there are none."""
    row = [0] * (len(truth) + 1)
    for a in y:
        corner = 0
        for j, b in enumerate(truth, 1):
            corner, row[j] = row[j], corner + 1 if a == b else max(row[j], row[j - 1])
    return 2 * row[-1] / max(1, len(y) + len(truth))


class Evaluator(nn.Module):
    """V at each token of a text.

    Args:
        vocabulary: tokens that there are. config: with width, layers, heads and window.
    """

    def __init__(self, vocabulary: int, config: IrcocoConfig) -> None:
        super().__init__()
        sizes = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
        sizes |= {"vocab_size": vocabulary, "n_positions": config.window}
        self.body = GPT2Model(GPT2Config(**sizes, use_cache=False, bos_token_id=None, eos_token_id=None))
        self.linear = nn.Linear(config.width, 1, bias=False)
        self.window = config.window

    def forward(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """Of each text the V of its last tokens, as many as the window has, float32."""
        cut = [row[-self.window :] for row in rows]
        batch = Collator(0, padding_side="right")([{"input_ids": row} for row in cut])
        batch = {name: x.to(self.linear.weight.device) for name, x in batch.items()}
        V = self.linear(self.body(**batch).last_hidden_state)[..., 0]
        return [own[: len(row)] for own, row in zip(V, cut, strict=True)]


class Ircoco(Plugin):
    """See the module."""

    Config = IrcocoConfig
    claims = {
        Claim.IDENTITY_AT_START,
        Claim.BESIDE_WEIGHTS,
        Claim.NEEDS_GRADIENTS,
        Claim.NEEDS_LABELS,
        Claim.NEEDS_MASK,
        Claim.REPLACES_LOSS,
    }
    takes = ("prompt-completion",)
    refuses = {"bert": "it writes no text", "t5": "prompt and answer are not in one row", "vit": "no text"}
    exempt = {"every_parameter_gets_a_gradient": "the evaluator trains in a phase of its own"}
    example = {
        "sft": 1, "evaluator": 1, "ahead": 2, "max_new_tokens": 3, "window": 16, "width": 4, "layers": 1, "heads": 2
    }  # fmt: skip
    config: IrcocoConfig

    def suits(self, model: ModelView) -> None:
        check_writes(model)

    def check(self, stack: Stack) -> None:
        if len(stack.tokenizer) > self.V.body.config.vocab_size:
            said = f"'{stack.id_of(self)}': its evaluator does not know the tokens that a later plugin adds"
            raise ConflictError(said, hint="put that plugin before it")

    def phases(self) -> Sequence[Phase]:
        config, before = self.config, []
        if not self.state.get("evaluated"):
            before = [Phase("sft", config.sft)] * (config.sft > 0) + [Phase("evaluator", config.evaluator)]
        return [*before, Phase("rl")]

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        if not model.restoring:
            self.state = {}
        known = max(len(model.embedding().weight), len(stack.tokenizer))
        self.V = model.keep("evaluator", Evaluator(known, self.config), full_precision=True)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        span, (codes, x, others) = step.phase(self), parts(step)
        if step.index == span.first:
            step.before_update(lambda optimizer: forget(optimizer, step.parameters()))
        if span.name == "evaluator":
            step.replace_task_loss(self.judging(step, codes, others), over="rows")
            return (yield)
        if span.name == "rl":
            self.state["evaluated"] = True
            step.add_loss("rl", self.rewarded(step, x, others), self.config.weight, over="rows")

        def task() -> tuple[Tensor, Any]:
            outputs = step.forward()
            return outputs.loss + 0 * self.V.linear.weight.sum(), outputs

        # V rests. Where nothing else trains there is a backward pass all the same.
        step.replace_task_loss(task)
        step.on_gradients(lambda _: self.V.zero_grad())
        return (yield)

    def judging(
        self, step: TrainStep, codes: list[list[int]], others: dict[str, Tensor]
    ) -> Callable[[], tuple[Tensor, Any]]:
        """The evaluator's loss on codes that are each cut once."""
        ahead = self.config.ahead
        cuts = [int(torch.randint(1, max(2, len(code)), (), device="cpu")) for code in codes]
        c = [code[:cut] for code, cut in zip(codes, cuts, strict=True)]
        truth = [code[cut : cut + ahead] for code, cut in zip(codes, cuts, strict=True)]
        with step.reference(step.model), step.stack.columns(**others):
            s = self.scores(step.stack, written(step.stack, c, ahead, AS_IT_IS), truth)
        target = torch.tensor(s, device=step.model.device)
        # The model's outputs are for terms of other plugins.
        return lambda: (mse_loss(torch.stack([V[-1] for V in self.V(c)]), target), step.forward())

    def scores(self, stack: Stack, y: list[list[int]], truth: list[list[int]]) -> list[float]:
        """s, without end tokens and what stands behind them in a truth."""
        end = ends(stack)
        texts = [[row[: at(row, end)] for row in rows] for rows in (y, truth)]
        if self.config.score == "bleu":
            return [bleu(*pair) for pair in zip(*texts, strict=True)]
        return [edit(*pair) for pair in zip(*map(stack.tokenizer.batch_decode, texts), strict=True)]

    def rewarded(
        self, step: TrainStep, x: list[list[int]], others: dict[str, Tensor]
    ) -> Callable[[Any], Tensor]:
        """The term of what the actor draws to these contexts."""
        stack = step.stack
        with step.reference(step.model), stack.columns(**others):
            y = written(stack, x, self.config.max_new_tokens, DRAWN)
            r = torch.cat(self.rewards(stack, x, y))
        rows = [{"input_ids": a + b, "labels": [IGNORE] * len(a) + b} for a, b in zip(x, y, strict=True)]
        batch = Collator(pad_of(step.model, stack.tokenizer))(rows)
        batch = {name: value.to(r.device) for name, value in batch.items()}
        labels = batch["labels"]  # stay in the call: some plugins ask it which tokens have one
        rewards = torch.zeros_like(labels, dtype=r.dtype).masked_scatter(labels != IGNORE, r)
        return lambda _: reinforced(step.module(**others, **batch).logits, labels, rewards)

    def rewards(self, stack: Stack, x: list[list[int]], y: list[list[int]]) -> list[Tensor]:
        """r of the tokens of each y."""
        found, end = [], ends(stack)
        for V, own in zip(self.V([a + b for a, b in zip(x, y, strict=True)]), y, strict=True):
            before, after = V[-len(own) - 1 : -1], V[-len(own) :]
            found.append(torch.cat((after[:-1], (before if own[-1] in end else after)[-1:])))
        return found

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `completion/edit` and `completion/exact`: of what is likeliest after a prompt, beside its completion."""
        prompts, truths = zip(*map(pair_of, evaluation.rows("eval")), strict=True)
        found = Worker(OfStack(evaluation.stack)).write(prompts, max_new_tokens=self.config.max_new_tokens)
        pairs = [(y.text.strip(), truth.strip()) for y, truth in zip(found, truths, strict=True)]
        exact, count = sum(y == truth for y, truth in pairs), len(pairs)
        evaluation.add("completion/edit", sum(edit(*pair) for pair in pairs) / count, count=count)
        evaluation.add_share("completion/exact", exact, count, "share")


def reinforced(logits: Tensor, labels: Tensor, r: Tensor) -> Tensor:
    """The mean over labelled tokens of - r log pi: logits [B, T, vocabulary], labels and r [B, T], 0-d float32."""
    each = cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], ignore_index=IGNORE, reduction="none")
    return (r[:, 1:] * each).sum() / (labels[:, 1:] != IGNORE).sum()


def parts(step: TrainStep) -> tuple[list[list[int]], list[list[int]], dict[str, Tensor]]:
    """Of each row all tokens, and those of x; and what the batch has beside tokens, mask and labels.

    Raises:
        BatchError: the batch has no labels, or no mask.
    """
    step.require(*OURS, by="ircoco")
    ids, mask, labels = (step.batch[name] for name in OURS)
    real = mask.bool()
    codes = [row[own].tolist() for row, own in zip(ids, real, strict=True)]
    x = [row[own].tolist() for row, own in zip(ids, real & (labels == IGNORE), strict=True)]
    opened = [own or opening_ids(step.stack.tokenizer) for own in x]
    return codes, opened, {name: value for name, value in step.batch.items() if name not in OURS}


def ends(stack: Stack) -> set[int]:
    """Ids that end a text."""
    found = stack.model.generation_config.eos_token_id
    found = stack.tokenizer.eos_token_id if found is None else found
    return set(found) if isinstance(found, list) else {found}


def at(row: list[int], end: set[int]) -> int:
    """Where a text ends."""
    return next((i for i, token in enumerate(row) if token in end), len(row))
