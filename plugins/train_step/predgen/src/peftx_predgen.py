"""PredGen: the model writes the answer as tokens, and an adapter reads the prediction off the written places.

"Predicting Through Generation: Why Generation Is Better for Prediction" (arXiv:2502.17817). A row is a prompt x of P
tokens and G tokens y of the answer: the label's words, or a number digit by digit, then EOS up to G. In step t = 1,
2, ... the model is fed

    x + y~        y~ = its own greedy tokens behind x with probability p_t, drawn once for the batch; else y
    p_t = p_min + (p_max - p_min) min(t / T_s, 1)
    L_gen = next-token cross entropy over x + y                             the writer
    Z = logits of the answer's places                                       [B, G, V]
    o = W2 mean_g (W1 Z_g),   L_task = CE(o, class)                         the director; W1: [h, V], W2: [C, h]
    L_task = mean_g (w_g CE(Z_g, y_g)),   w = linspace(G, 2, G) / mean      of a number, which has no o
    L = a + b + m^2 exp(-|a - b|)       a = log(1 + L_gen), b = log(1 + L_task), m = 1 + max(L_gen, L_task)

Targets are the true y in either case. The director's Z_g are the logits where y~_g is read, as released; those of a
number are the logits that predict y_g, one place before. Prediction: the model writes G tokens behind x and reads all
of it once; the class is argmax o, a number is what it wrote.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainingData, TrainStep, hookimpl
from peftx.engines.data import (
    CLASS_INDEX,
    IGNORE,
    ClassTexts,
    Place,
    Where,
    batches_of,
    check_labels,
    class_index,
    class_rows,
    pads_right,
    special_frame,
    text_ids,
    tokenize_classes,
    with_column,
)
from peftx.engines.data.encoding import eos_id
from peftx.engines.data.places import row_for_row
from peftx.errors import ArchitectureError, DataError, StackError
from peftx.toolkits.decoding.text import AS_IT_IS, written
from peftx.toolkits.evaluation import Evaluation, context_window, evaluating

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


class PredgenConfig(PluginConfig):
    """Options of PredGen."""

    labels: list[str] | None = Field(
        ["negative", "positive"],
        min_length=2,
        description="the classes; none: regression, the rows' labels are numbers",
    )
    dense: int = Field(64, ge=1, description="h, width of the director; classes only")
    p_min: float = Field(
        0.0, ge=0, le=1, description="p_0, how often the model reads its own answer at first"
    )
    p_max: float = Field(1.0, ge=0, le=1, description="p_t from step T_s on")
    ramp: int = Field(500, ge=1, description="T_s, steps until p_max")

    @model_validator(mode="after")
    def _fit(self) -> PredgenConfig:
        if self.p_max < self.p_min:
            raise ValueError(f"p_max {self.p_max} is below p_min {self.p_min}: swap them")
        if self.labels is None and self.dense != type(self).model_fields["dense"].default:
            raise ValueError(f"dense is {self.dense}, and numbers have no director: leave it out")
        return self


class Director(nn.Module):
    """o = W2 mean_g (W1 Z_g): logits [B, G, V] -> scores [B, C].

    W1 is U / sqrt(V), and U trains: a step of Adam in W1 itself moves o by the sum of all logits at once.
    """

    def __init__(self, vocabulary: int, dense: int, classes: int) -> None:
        super().__init__()
        self.U = nn.Linear(vocabulary, dense, bias=False)
        self.W2 = nn.Linear(dense, classes, bias=False)
        self.scale = vocabulary**-0.5
        with torch.no_grad():
            self.U.weight /= self.scale  # W1 starts as a linear layer does

    def forward(self, Z: Tensor) -> Tensor:
        scores: Tensor = self.W2(self.U(Z.to(self.U.weight.dtype) * self.scale).mean(1))
        return scores


def alignment(L_gen: Tensor, L_task: Tensor) -> Tensor:
    """The writer-director alignment loss, 0-d."""
    a, b, m = torch.log1p(L_gen), torch.log1p(L_task), 1 + torch.maximum(L_gen, L_task)
    return a + b + m.square() * torch.exp(-(a - b).abs())


def position_weights(G: int) -> Tensor:
    """w [G], of mean 1; from G = 3 on the first digit weighs most."""
    w = torch.linspace(G, 2, G)
    return w / w.mean()


def places(mask: Tensor, G: int) -> Tensor:
    """Of rows padded on the right, the answer's places and the one before them; [B, T] -> [B, 1 + G]."""
    return mask.sum(1, keepdim=True) - 1 + torch.arange(-G, 1, device=mask.device)


def write(stack: Stack, ids: Tensor, mask: Tensor, *, G: int) -> Tensor:
    """The rows with the model's own greedy tokens in their last G places, what stands there unread; [B, T]."""
    eos, ends = int(stack.tokenizer.eos_token_id), (mask.sum(1) - G).tolist()
    prompts = [row[:end] for row, end in zip(ids.tolist(), ends, strict=True)]
    with evaluating(stack.model):
        found = written(stack, prompts, G, AS_IT_IS | {"eos_token_id": eos})
    own = [row + [eos] * (G - len(row)) for row in found]
    return ids.scatter(1, places(mask, G)[:, 1:], torch.tensor(own, device=ids.device))


def as_number(label: str, where: Where) -> float:
    """Raises DataError, which names `where`."""
    if not NUMBER.fullmatch(label):
        said = f"predgen: {where}: label {label!r} is no number"
        raise DataError(said, hint="write it in digits, as 3.50; or name the classes in `labels`")
    return float(label)


class Predgen(Plugin):
    """See the module."""

    Config = PredgenConfig
    claims = {Claim.BESIDE_WEIGHTS}
    architectures = ("mistral", "mamba", "bloom")
    refuses = {"bert": "it writes nothing", "t5": "it has two towers"}
    exempt = {
        "accumulation_makes_the_same_step": "L is no mean over rows, but a function of two such means of the batch"
    }
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    labels_option = "labels"
    config: PredgenConfig
    texts = ClassTexts("predgen", missing="there is no director yet")

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        if list(model.towers) != ["decoder"]:
            said = f"{model.owner}: {model.config.model_type} does not write behind its prompt"
            raise ArchitectureError(said, hint="take a decoder")
        eos_id(stack.tokenizer)  # refuses one that has none
        if self.config.labels is not None:
            labels, V = check_labels(self.config.labels), model.site("head").out_features
            self.state["G"] = max(map(len, self.answers(stack.tokenizer, labels)))
            director = Director(V, self.config.dense, len(labels))
            self.director = model.keep("director", director, full_precision=True)
            self.texts = self.texts.of(labels)

    def answers(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[list[int]]:
        """Tokens of every label, EOS included: a word as it follows a text, or a number character by character.

        Raises:
            DataError: a label without tokens, or two of the same.
        """
        found: dict[tuple[int, ...], str] = {}
        for label in labels:
            pieces = [f" {label.strip()}"] if self.config.labels else label
            ids = tuple(id for piece in pieces for id in text_ids(tokenizer, piece))
            if not ids or ids in found:
                said = (
                    f"labels {found[ids]!r} and {label!r} have the same" if ids else f"label {label!r} has no"
                )
                raise DataError(f"predgen: {said} tokens", hint="another word")
            found[ids] = label
        return [[*ids, eos_id(tokenizer)] for ids in found]

    # -- training ------------------------------------------------------------------------------------------------

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        labels = self.numerals(data) if self.config.labels is None else check_labels(self.config.labels)
        answers = self.answers(data.tokenizer, labels)
        self.state["G"] = G = max(map(len, answers), default=1)
        limit = min(data.max_length, context_window(stack.model, data.tokenizer))
        data.max_length = limit - G
        if data.max_length <= len(special_frame(data.tokenizer)[0]):
            said = f"predgen: answers of {G} tokens leave no room for a text in max_length {limit}"
            raise DataError(said, hint="raise max_length, or shorten the labels")
        tokenize_classes(data, labels)
        data.max_length = limit
        data.rewrite(partial(self.answered, answers=answers))

    def numerals(self, data: TrainingData) -> list[str]:
        """The numbers that the rows have for labels, each way of writing one once; `tokenize_classes` takes it on."""
        found: dict[str, float] = {}
        for rows in (data.train, data.eval):
            labels = rows["label"] if rows and data.format == "classification" else ()
            values = [as_number(label, Place(rows or (), i)) for i, label in enumerate(labels)]
            found |= dict(zip(labels, values, strict=True))
            if values and rows is data.train:
                self.state["mean"] = sum(values) / len(values)
        return sorted(found)

    def answered(self, rows: Dataset, answers: list[list[int]]) -> Dataset:
        """Tokenized texts, with their answers behind them: G tokens, learned up to the first EOS."""
        pairs = [*zip(rows["input_ids"], (answers[k] for k in rows[CLASS_INDEX]), strict=True)]
        for name, fill in (("input_ids", answers[0][-1]), ("labels", IGNORE)):
            filled = [[*ids, *y, *[fill] * (self.state["G"] - len(y))] for ids, y in pairs]
            rows = with_column(rows, name, filled)
        bare = rows.remove_columns(CLASS_INDEX)
        return row_for_row(bare, rows) if self.config.labels is None else rows

    def probability(self, t: int) -> float:
        """p_t, t from 1."""
        config = self.config
        return config.p_min + (config.p_max - config.p_min) * min(t / config.ramp, 1)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        batch = pads_right(step.batch)
        G, labels, target = self.state["G"], batch["labels"], batch.get(CLASS_INDEX)
        step.batch = {name: x for name, x in batch.items() if name not in (CLASS_INDEX, "labels")}
        ids, mask = step.batch["input_ids"], step.batch["attention_mask"]
        p = self.probability(step.index + 1)
        if p > 0 and float(torch.rand(())) < p:
            ids = write(step.stack, ids, mask, G=G)

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward(input_ids=ids)
            logits, at = outputs.logits.float(), places(mask, G)  # [B, T, V], [B, 1 + G]
            L_gen = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
            )
            Z = logits.take_along_dim(at[..., None], 1)  # [B, 1 + G, V]
            if self.config.labels is None:
                L_task = self.digit_loss(Z[:, :-1], labels.gather(1, at[:, 1:]))
            else:
                L_task = F.cross_entropy(self.director(Z[:, 1:]).float(), target)
            return alignment(L_gen, L_task), outputs

        step.replace_task_loss(loss, over="rows")
        return (yield)

    @staticmethod
    def digit_loss(Z: Tensor, y: Tensor) -> Tensor:
        """mean of w_g CE(Z_g, y_g) over the tokens of the answers; [B, G, V], [B, G] -> 0-d."""
        each = F.cross_entropy(Z.transpose(1, 2), y, ignore_index=IGNORE, reduction="none")  # [B, G]
        return (each * position_weights(y.shape[1]).to(each.device)).sum() / (y != IGNORE).sum()

    # -- prediction ----------------------------------------------------------------------------------------------

    def predict(self, stack: Stack, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the model writes behind each text, [N, G], and the director's scores of that, [N, C] ([N, 0])."""
        numbers, model, tokenizer = self.config.labels is None, stack.model, stack.tokenizer
        if not numbers:
            self.texts.check()
        elif "G" not in self.state:
            raise StackError("predgen: how long the numbers are is not known yet", hint="train first")
        G, eos = self.state["G"], int(tokenizer.eos_token_id)
        rows = class_rows(tokenizer, texts, max_length=context_window(model, tokenizer) - G, owner="predgen")
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        written, scores = [], []
        for batch in batches_of([[*rows[index], *[eos] * G] for index in order], eos, model.device):
            mask = batch["attention_mask"]
            ids, at = write(stack, batch["input_ids"], mask, G=G), places(mask, G)[:, 1:]
            written.append(ids.gather(1, at))
            if not numbers:
                logits = model(input_ids=ids, attention_mask=mask).logits
                scores.append(self.director(logits.take_along_dim(at[..., None], 1)))  # of [B, G, V]
        back = torch.tensor(order, device=model.device).argsort()
        return torch.cat(written)[back], torch.cat(scores)[back] if scores else torch.empty(len(rows), 0)

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        if self.config.labels is None:
            raise StackError("predgen: numbers are no classes", hint="`numbers`, or the metric predgen")
        return self.texts.labels, self.predict(stack, texts)[1]

    def numbers(self, stack: Stack, texts: Sequence[str]) -> list[float | None]:
        """The number that the model writes behind each text; None where it writes none."""
        if self.config.labels is not None:
            raise StackError("predgen: classes are no numbers", hint="`stack.classify`, or labels=None")
        found, eos = [], stack.tokenizer.eos_token_id
        for row in self.predict(stack, texts)[0].tolist():
            text = stack.tokenizer.decode(row[: [*row, eos].index(eos)])
            number = NUMBER.search("".join(text.split()))
            found.append(float(number.group()) if number else None)
        return found

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """`mae` and `numbers_written`, or `accuracy_director` and `accuracy_writer`; nothing without rows."""
        if "eval" not in evaluation.data:
            return  # a run that has only training data
        stack, labels, rows = evaluation.stack, self.config.labels, evaluation.rows("eval")
        if not all({"text", "label"} <= set(row) for row in rows):
            raise DataError("predgen: every row needs 'text' and 'label'", hint="data: {eval: {path: ...}}")
        texts, count = [row["text"] for row in rows], len(rows)
        named = [(row["label"], Place(rows, index)) for index, row in enumerate(rows)]
        if labels is None:
            truth = [as_number(*label) for label in named]
            found = self.numbers(stack, texts)
            guess = self.state["mean"]  # where nothing is written
            errors = [abs((guess if x is None else x) - y) for x, y in zip(found, truth, strict=True)]
            evaluation.add_ratio("mae", errors)
            evaluation.add_share("numbers_written", count - found.count(None), count)
            return
        classes = torch.tensor([class_index(label, labels, where) for label, where in named])
        answers = self.answers(stack.tokenizer, labels)
        written, scores = self.predict(stack, texts)
        evaluation.add_share("accuracy_director", int((scores.argmax(-1).cpu() == classes).sum()), count)
        pairs = zip(written.tolist(), (answers[k] for k in classes.tolist()), strict=True)
        evaluation.add_share("accuracy_writer", sum(row[: len(y)] == y for row, y in pairs), count)
