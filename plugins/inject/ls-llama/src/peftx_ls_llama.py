"""LS-LLaMA: the class of a text, or of each of its words, by a head on a decoder's last hidden states.

"Label Supervised LLaMA Finetuning" (arXiv:2310.01208). A decoder's last layer gives H = [h_1 .. h_T], [T, d], of a text
of T tokens; nothing is generated. With C classes:

    sequence:  z   = W pool(H)              W: [C, d]; pool: the last token, or mean or maximum over tokens
    token:     z_t = W dropout(h_t) + b     b: [C]; at the first token of each word
    loss     = - log softmax(z)[class]      the mean over texts, or over words
    unmasked:  token i sees every token j of the text in every layer, not j <= i alone (LS-unLLaMA)

W and b train here. The paper adapts the layers by LoRA too, which is a plugin of its own and stands beside this one.
Pads are no tokens: neither pools nor unmasked attention see them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
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
    hookimpl,
)
from peftx.engines.data import ClassTexts, check_labels, pads_right, take_classes
from peftx.errors import StackError
from peftx.kernel.heads import each_of, last_of, mean_of
from peftx.toolkits.evaluation import evaluating, head_answers
from peftx.toolkits.injecting import see_both_ways


class LsLlamaConfig(PluginConfig):
    """Options of LS-LLaMA. Beside it the paper has LoRA: rank 12, alpha 32, dropout 0.1, targets "attention.q,v"."""

    task: Literal["sequence", "token"] = Field("sequence", description="one class a text, or one a word")
    labels: list[str] = Field(["negative", "positive"], min_length=2, description="the classes")
    unmasked: bool = Field(False, description="let every token see the whole text (LS-unLLaMA)")
    pool: Literal["last", "mean", "max"] | None = Field(
        None, description="what a text is read by; none: its last token, or unmasked the mean of all"
    )
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="of the states under the head of words, while training; that of texts has none",
    )

    @model_validator(mode="after")
    def _fit(self) -> LsLlamaConfig:
        other = "pool" if self.task == "token" else "dropout"
        if getattr(self, other) != type(self).model_fields[other].default:
            raise ValueError(f"{other} is not of the task '{self.task}': leave it out")
        return self


def max_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """The maximum over real tokens, number by number."""
    return hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)


POOLS = {"last": last_of, "mean": mean_of, "max": max_of}


class LsLlama(Plugin):
    """See the module."""

    Config = LsLlamaConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}
    refuses = {"t5": "the head reads one tower"}
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    config: LsLlamaConfig
    texts = ClassTexts("ls-llama", missing="there is no head yet")

    def claimed(self) -> frozenset[Claim]:
        self.labels_option = "labels" if self.config.task == "sequence" else ""
        if not self.config.unmasked:
            return self.claims
        return self.claims - {Claim.IDENTITY_AT_START} | {Claim.REPLACES_ATTENTION}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config, words = self.config, self.config.task == "token"
        model.embedding()  # refuses what reads no tokens
        self.texts = self.texts.of(check_labels(config.labels), closed="encoder" in model.towers)
        pool = each_of if words else POOLS[config.pool or ("mean" if config.unmasked else "last")]
        classes = len(self.texts.names)
        self.head = model.head("head", classes, pool=pool, dropout=words * config.dropout, bias=words)  # W, b
        if config.unmasked:
            see_both_ways(model, "unmasked")

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        self.texts.prepare(data, stack, words=self.config.task == "token")
        if self.config.task == "sequence":
            self.texts.check_several(data)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.batch, target = take_classes(pads_right(step.batch))  # target: [B], or [B, T]

        def loss() -> tuple[Tensor, Any]:
            z, outputs = self.head.read(step.forward, step.batch["attention_mask"])
            return F.cross_entropy(z.flatten(0, -2), target.flatten()), outputs

        step.replace_task_loss(loss, over="labels")
        return (yield)

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        rows = self.asked("sequence").rows(stack, texts)
        return self.texts.labels, torch.cat([*head_answers(stack, self.head, rows)])

    def tag(self, stack: Stack, texts: Sequence[str]) -> list[list[str]]:
        """The class of each word (between white space) of each text."""
        rows = self.asked("token").words(stack, texts)
        with evaluating(stack.model):
            found = head_answers(stack, self.head, [ids for ids, _ in rows])
            best = [row for z in found for row in z.argmax(-1).tolist()]
        both = zip(best, rows, strict=True)
        return [[self.texts.names[row[t]] for t in starts] for row, (_, starts) in both]

    def asked(self, task: str) -> ClassTexts:
        """The texts, if the head has this task."""
        if task != self.config.task:
            hint = "sequences are classified, tokens tagged: plugin.tag(stack, texts)"
            raise StackError(f"{self.texts.owner}: its task is '{self.config.task}', not '{task}'", hint=hint)
        return self.texts
