"""PTEC: a soft prompt and a linear head, trained together, give a text all of its labels in one pass.

"Prompt Tuned Embedding Classification for Multi-Label Industry Sector Allocation" (arXiv:2309.12075). The model is
frozen; nothing is generated. With n rows P in front of a text x, and C labels, of which any number hold:

    h    = M([P ; E(x)]) at the last token      P: [n, d], first the embeddings of the labels' tokens; h: [d]
    z    = W h                                  W: [C, d], first N(0, 0.02^2)
    p_c  = sigmoid(z_c)                         label c is given if p_c > 0.5
    loss = - mean over c of  w_c y_c log p_c + (1 - y_c) log(1 - p_c)

y is 1 for the labels of the text and 0 for the others, in no order. w_c makes up for labels that few texts have:

    negatives   texts without c / texts with c, of the training rows
    largest     texts with the most frequent label / texts with c, as the released code has it
    none        1

P trains at the run's rate, W at a small share of it: what an update adds to W is multiplied by that share.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftx import (
    Claim,
    Evaluation,
    ModelView,
    Plugin,
    PluginConfig,
    TrainingData,
    TrainStep,
    VirtualTokens,
    hookimpl,
)
from peftx.engines.data import (
    IGNORE,
    ClassTexts,
    Place,
    Where,
    check_labels,
    class_index,
    pads_right,
    text_ids,
)
from peftx.errors import DataError
from peftx.kernel.heads import first_of, last_of
from peftx.kernel.stack import Stack
from peftx.toolkits.evaluation import evaluating, head_answers
from peftx.toolkits.injecting import at_rates

BETWEEN = ";"
"""Stands between the labels of a row."""
LABELS = "multi_hot"
"""Column, and entry of the batch: y, float32 [B, C]."""
SPREAD = 0.02
"""Of W at first, as the classes of transformers that the released code builds on have it."""


class PtecConfig(PluginConfig):
    """Options of PTEC; the release trains 10 epochs, 32 texts a step, P at rate 3e-3, under a one-cycle schedule."""

    labels: list[str] = Field(
        ["negative", "positive"], min_length=2, description="the labels, of which a text has any number"
    )
    length: int = Field(100, ge=1, description="n, rows in front of a text")
    init: Literal["labels", "vocabulary"] = Field(
        "labels",
        description="whose embeddings the rows start as: tokens of the labels, again until all have one; or any",
    )
    weights: Literal["negatives", "largest", "none"] = Field(
        "negatives", description="w, what the texts that have a label count for; see the method"
    )
    head_rate: float = Field(
        0.0033,
        gt=0,
        le=1,
        description="the rate of W as a share of the run's, which is P's; paper: 1e-5 of 3e-3",
    )

    @field_validator("labels")
    @classmethod
    def _can_stand_in_a_row(cls, labels: list[str]) -> list[str]:
        wrong = next((label for label in labels if BETWEEN in label or label != label.strip()), None)
        if wrong is not None:
            raise ValueError(
                f"{wrong!r} has blanks at an end, or '{BETWEEN}', which stands between the labels of a row"
            )
        return labels


class SoftPrompt(VirtualTokens):
    """P.

    Args:
        start: first values, [n, d].
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__(len(start))
        self.P = nn.Parameter(start)

    def rows(self) -> Tensor:
        return self.P


def label_tokens(stack: Stack, labels: Sequence[str]) -> list[int]:
    """Token ids of all labels, one behind the other.

    Raises:
        DataError: a label without tokens, or two of the same tokens.
    """
    found = [text_ids(stack.tokenizer, label) for label in labels]
    for i, (label, ids) in enumerate(zip(labels, found, strict=True)):
        same = f"the tokens of {labels[found.index(ids)]!r}" if ids in found[:i] else "no tokens"
        if not ids or ids in found[:i]:
            raise DataError(f"ptec: label {label!r} has {same}", hint="another word for it in `labels`")
    return [id for ids in found for id in ids]


def filled(ids: Sequence[int], length: int) -> list[int]:
    """So many of the ids, in order: some at random of more, all again and again of fewer."""
    if len(ids) > length:
        return [ids[i] for i in torch.randperm(len(ids), device="cpu")[:length].sort().values]
    return [ids[i % len(ids)] for i in range(length)]


def multi_hot(label: str, labels: Sequence[str], where: Where) -> list[float]:
    """y of a row whose labels are written as 'a; b', [C]; without any 0.

    Raises:
        DataError: one that is not in `labels`.
    """
    told = label.split(BETWEEN) if label.strip() else []
    numbers = {class_index(name.strip(), labels, where) for name in told}
    return [float(c in numbers) for c in range(len(labels))]


def weights_of(y: Tensor, kind: str) -> Tensor:
    """w, [C], of training rows [N, C]; 1 for a label that no row has, and by 'negatives' for one that all have."""
    have = y.sum(0)
    counted = {"negatives": len(y) - have, "largest": have.max().expand_as(have), "none": have}[kind]
    w = counted / have
    return torch.where((w > 0) & w.isfinite(), w, 1.0)


def macro_f1(given: Tensor, y: Tensor) -> float:
    """The mean of the labels' F1, of what was given and what holds, bool [N, C]; 0 for a label of neither."""
    both, one = (given & y).sum(0), given.sum(0) + y.sum(0)
    return float((2 * both / one.clamp(min=1)).mean())


class Ptec(Plugin):
    """See the module."""

    Config = PtecConfig
    claims = {Claim.BESIDE_WEIGHTS, Claim.VIRTUAL_TOKENS, Claim.NEEDS_GRADIENTS}
    refuses = {"t5": "the head reads one tower"}
    example = {"length": 4}
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    config: PtecConfig
    texts = ClassTexts("ptec", missing="there is no prompt and no head yet")

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        config, encoder = self.config, "encoder" in model.towers
        site, ids = model.embedding(), label_tokens(stack, check_labels(config.labels))
        model.last_hidden()  # refuses two towers
        if config.init == "vocabulary":
            P = model.embedded(config.length)
        else:
            P = site.module(torch.tensor(filled(ids, config.length), device=site.weight.device)).detach()
        # What trains is not in half precision, which would lose small steps; it is rounded where the model reads it.
        P = P.to(torch.promote_types(P.dtype, torch.float32))
        model.prompt(SoftPrompt(P)).to(P)
        C, pool = len(config.labels), first_of if encoder else last_of
        self.head = model.head("head", C, pool=pool, bias=False)
        self.head.start_from(SPREAD * torch.randn(C, model.hidden_size))
        self.texts, self.w = self.texts.of(config.labels, closed=encoder), torch.ones(C)

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """Rows get `multi_hot`; w is of those to train on."""
        data.require(self.takes, by="ptec", hint=f"rows with text and label, labels as in 'a{BETWEEN} b'")
        data.rewrite(lambda rows: self.encoded(rows, stack, data.max_length))
        if data.train is not None:
            self.w = weights_of(torch.tensor(data.train[LABELS][:]), self.config.weights)

    def encoded(self, rows: Dataset, stack: Stack, most: int) -> Dataset:
        """Texts of `most` tokens at most, and y."""
        ids, names = self.texts.rows(stack, rows["text"][:], most=most), self.texts.labels
        y = [multi_hot(label, names, Place(rows, i)) for i, label in enumerate(rows["label"])]
        labels = [[IGNORE] * len(row) for row in ids]
        return Dataset.from_dict({"input_ids": ids, "labels": labels, LABELS: y})

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.require(LABELS, by="ptec")
        y = step.batch[LABELS]
        step.batch = pads_right({k: x for k, x in step.batch.items() if k not in (LABELS, "labels")})

        def loss() -> tuple[Tensor, Any]:
            z, outputs = self.head.read(step.forward, step.batch["attention_mask"])
            return F.binary_cross_entropy_with_logits(z, y.to(z), pos_weight=self.w.to(z)), outputs

        step.replace_task_loss(loss, over="rows")
        at_rates(step, [(self.head.linear.weight, self.config.head_rate)])
        return (yield)

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        rows = self.texts.rows(stack, texts)
        return self.texts.labels, torch.cat([*head_answers(stack, self.head, rows)])

    def confidences(self, stack: Stack, texts: Sequence[str]) -> Tensor:
        """p of each label of each text, [N, C] float32, in the order of `labels`."""
        with evaluating(stack.model):
            return self.classify(stack, texts)[1].sigmoid()

    def assign(self, stack: Stack, texts: Sequence[str], *, above: float = 0.5) -> list[list[str]]:
        """The labels of each text: those with p over `above`."""
        found = (self.confidences(stack, texts) > above).tolist()
        return [[name for name, given in zip(self.texts.names, row, strict=True) if given] for row in found]

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `macro-f1` of the labels that `assign` gives the rows."""
        rows, names = evaluation.rows("eval"), self.texts.labels
        y = [multi_hot(row["label"], names, Place(rows, i)) for i, row in enumerate(rows)]
        p = self.confidences(evaluation.stack, [row["text"] for row in rows])
        evaluation.add("macro-f1", macro_f1((p > 0.5).cpu(), torch.tensor(y) > 0), count=len(rows))
