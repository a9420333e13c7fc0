"""DPO with prefix sharing: prompt, chosen and rejected answer in one row, so that the prompt is computed once.

"Accelerating Direct Preference Optimization with Prefix Sharing" (arXiv:2410.20305). A prompt x of P tokens, the chosen
answer y_w and the rejected one y_l become one row of P + |y_w| + |y_l| + 1 tokens, where two rows have P more:

    s = [x_1 .. x_P ; y_w ; x_P ; y_l]        x_P stands twice, so each branch predicts its first token from its own

With c the place of the first x_P and r that of the second, token i sees token j <= i unless i >= r and c <= j < r. Let
part be 0 before c, 1 from c, 2 from r on:

    visible[i, j] = j <= i and (part(j) = 0 or part(j) = part(i))                     [T, T]
    position[i]   = sum_j visible[i, j] - 1             [T]; the second x_P gets that of the first, P - 1

Token, position and visible context are those of the rows [x; y_w] and [x; y_l], so log-probabilities and gradients are
too. With the reference, the model before training (after supervised fine-tuning, say: adapters as they were then):

    h    = log p(y_w|x) - log p(y_l|x) - (the same of the reference)
    loss = -log sigmoid(beta h)   or   max(0, 1 - beta h)   or   (h - 1 / (2 beta))**2

The loss of a micro-batch is the mean over its triples, and a micro-batch weighs in a step as its rows do: a row is a
triple, so each triple weighs the same.

Packed, a row holds several triples, and a token sees none of another triple. A triple then weighs less in a micro-batch
whose rows hold many: how many those of the others hold is not known while one is computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainingData, TrainStep, hookimpl
from peftx.engines.data import IGNORE, Place, Where, check_differ, encode_pair, inside
from peftx.toolkits.evaluation import evaluating
from peftx.toolkits.shared_prompts import check_alike, check_layout, prompt_beside

Triple = tuple[list[int], list[int], list[int]]  # input_ids, labels, part of each token


class DpoPrefixSharingConfig(PluginConfig):
    """Options of DPO with prefix sharing."""

    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference")
    loss: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid", description="sigmoid is DPO, hinge SLiC, ipo IPO"
    )
    packing: bool = Field(False, description="put several triples into a row, as many as max_length holds")


def join(prompt: list[int], chosen: list[int], rejected: list[int]) -> Triple:
    """s of one triple; the labels are the answers, the prompt's last token and its copy begin parts 1 and 2."""
    ids = [*prompt, *chosen, prompt[-1], *rejected]
    labels = [IGNORE] * len(prompt) + chosen + [IGNORE] + rejected
    parts = [0] * (len(prompt) - 1) + [1] * (len(chosen) + 1) + [2] * (len(rejected) + 1)
    return ids, labels, parts


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in bins: longest first, each into the bin with the most room."""
    bins: list[tuple[int, int, list[int]]] = []  # (-room, number, indices), a heap
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = bins and -bins[0][0] >= lengths[index]
        free, number, held = heapq.heappop(bins) if fits else (-capacity, len(bins), [])
        heapq.heappush(bins, (free + lengths[index], number, [*held, index]))
    return [held for _, _, held in sorted(bins, key=lambda found: found[1])]


def row_of(triples: Sequence[Triple]) -> dict[str, list[int]]:
    """Triples behind each other in one row; `token_type_ids` hold the segments."""
    ids, labels, parts = zip(*triples, strict=True)
    segments = [[1 + 3 * n + part for part in each] for n, each in enumerate(parts)]
    columns = {"input_ids": ids, "labels": labels, "token_type_ids": segments}
    return {name: list(chain.from_iterable(lists)) for name, lists in columns.items()}


def layout(segments: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mask and positions of rows.

    Args:
        segments: [B, T] int64, 1 + 3 * (number of the triple in its row) + part; 0 on pads.

    Returns:
        The mask to add to the attention scores [B, 1, T, T], and positions [B, T].
    """
    prompts = segments - (segments - 1) % 3  # of part 0 of each token's triple
    i, j = segments[:, :, None], segments[:, None, :]
    visible = ((j == prompts[:, :, None]) | (j == i)).tril()  # [B, T, T]
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None], visible.sum(-1) - 1


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each labelled token, row by row: [number of labels], float32."""
    kept = labels[:, 1:] != IGNORE  # [B, T - 1]
    return -cross_entropy(logits[:, :-1][kept].float(), labels[:, 1:][kept], reduction="none")


def answer_log_probs(logits: Tensor, labels: Tensor, segments: Tensor) -> Tensor:
    """log p(y_w|x), log p(y_l|x) of every triple: [triples, 2]."""
    scores, kept = token_log_probs(logits, labels), labels[:, 1:] != IGNORE
    # Tokens of one answer stand together, and two answers in a row are never of one segment: y_w, y_l, y_w, ...
    _, answer = segments[:, 1:][kept].unique_consecutive(return_inverse=True)
    return scores.new_zeros(int(answer[-1]) + 1).index_add(0, answer, scores).view(-1, 2)


def preference_loss(h: Tensor, beta: float, loss: str) -> Tensor:
    """h: [triples] -> the loss of each."""
    if loss == "sigmoid":
        return -logsigmoid(beta * h)
    return (1 - beta * h).clamp(min=0) if loss == "hinge" else (h - 1 / (2 * beta)).square()


class DpoPrefixSharing(Plugin):
    """See the module."""

    Config = DpoPrefixSharingConfig
    claims = {Claim.OWN_LAYOUT, Claim.REPLACES_LOSS}
    takes = ("preference",)
    gives = {"preference": "tokenized"}
    architectures = ("mistral",)
    refuses = {"bert": "tokens see both ways", "t5": "prompt and answer are two rows already"}
    example_rows = tuple(  # shorter than the window of the kit's Mistral
        {"prompt": f"User: {word}?\nAssistant:", "chosen": f"yes, {word}", "rejected": "no" + "!" * i}
        for i, word in enumerate(("tea", "rain", "sleep", "noise", "bread", "snow"))
    )
    config: DpoPrefixSharingConfig

    def suits(self, model: ModelView) -> None:
        check_layout(model)  # `prove` looks at windows and recurrent layers, with the rows

    @hookimpl
    def prepare_data(self, data: TrainingData, stack: Stack) -> None:
        """`preference` rows -> `tokenized` ones."""
        data.require(self.takes, by=stack.id_of(self))
        data.rewrite(lambda rows: self._rows(rows, data, stack))

    def _rows(self, rows: Dataset, data: TrainingData, stack: Stack) -> Dataset:
        by = stack.id_of(self)
        triples = [triple_of(row, Place(rows, i), data, by) for i, row in enumerate(rows)]
        if triples:
            prove(stack, max(triples, key=lambda triple: len(triple[0])))
        lengths = [len(ids) for ids, _, _ in triples]
        bins = pack(lengths, data.max_length) if self.config.packing else [[i] for i in range(len(lengths))]
        return Dataset.from_list([row_of([triples[i] for i in chosen]) for chosen in bins])

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        step.require("labels", "token_type_ids", by=step.stack.id_of(self))
        batch = dict(step.batch)
        segments, labels = batch.pop("token_type_ids"), batch.pop("labels")
        mask, positions = layout(segments, step.model.dtype)
        step.batch = {**batch, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        with step.reference("start"):
            reference = answer_log_probs(step.forward().logits, labels, segments)

        def task() -> tuple[Tensor, object]:
            outputs = step.forward()
            ratio = answer_log_probs(outputs.logits, labels, segments) - reference  # [triples, 2]
            h = ratio[:, 0] - ratio[:, 1]
            return preference_loss(h, self.config.beta, self.config.loss).mean(), outputs

        step.replace_task_loss(task, over="rows")
        return (yield)


def triple_of(row: dict[str, Any], where: Where, data: TrainingData, by: str) -> Triple:
    """The prompt is tokenized alone and cut once, so both branches have the same."""
    answers = []
    for name in ("chosen", "rejected"):
        pair = encode_pair(
            data.tokenizer, row["prompt"], row[name], max_length=data.max_length, where=inside(where, name)
        )
        answers.append([label for label in pair.labels if label != IGNORE])
    check_differ(*answers, where=where, by=by)
    return join(prompt_beside(data, row["prompt"], [*map(len, answers)], where, more=1), *answers)


def prove(stack: Stack, triple: Triple) -> None:
    """Raise unless the model gives the answers the same probabilities in one row and in two.

    It does not where tokens are mixed otherwise than by the mask: sliding windows, recurrent layers, ALiBi, both ways.
    """
    model = stack.model
    ids, labels, parts = (torch.tensor(values, device=model.device)[None] for values in triple)  # [1, T]
    mask, positions = layout(parts + 1, model.dtype)

    def scores(row: Tensor, **layout: Tensor) -> Tensor:
        """Of the answers' tokens, in a row of these tokens."""
        logits = model(input_ids=ids[row][None], use_cache=False, **layout).logits
        return token_log_probs(logits, labels[row][None])

    with evaluating(model):
        apart = [scores((parts == 0) | (parts == part)) for part in (1, 2)]
        shared = scores(parts >= 0, attention_mask=mask, position_ids=positions)
    check_alike(model, shared, torch.cat(apart), tokens=ids.shape[1])
