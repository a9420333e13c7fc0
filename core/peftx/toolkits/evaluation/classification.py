"""Accuracy of the label that a model finds most likely."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftx.engines.data import (
    Collator,
    batches_of,
    class_ids,
    class_index,
    continuation,
    encoder_ids,
    fill_template,
    following_ids,
    prompt_ids,
    special_frame,
    text_ids,
)
from peftx.errors import DataError
from peftx.kernel.heads import Head
from peftx.kernel.modes import evaluating
from peftx.kernel.objective import objective_of, pad_of
from peftx.toolkits.evaluation.likelihood import (
    Progress,
    Request,
    context_window,
    decoder_start,
    opening_ids,
    refuse_masked,
    score_requests,
)
from peftx.toolkits.evaluation.scores import Score, wilson_interval

if TYPE_CHECKING:
    from peftx.kernel.plugin import Plugin
    from peftx.kernel.stack import Stack

Normalise = Literal["none", "tokens", "bytes"]


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """One class: `count` rows are of it, `predicted` were taken for it, `correct` both."""

    label: str
    count: int
    predicted: int
    correct: int

    @property
    def recall(self) -> float | None:
        """correct / count; None for a class without rows."""
        return self.correct / self.count if self.count else None

    @property
    def precision(self) -> float | None:
        """correct / predicted; None for a class that was never predicted."""
        return self.correct / self.predicted if self.predicted else None


@dataclass(frozen=True, kw_only=True)
class AccuracyResult:
    """`score` with its Wilson interval, a table by class in the order of the labels, a prediction for each row."""

    score: Score
    classes: tuple[ClassCounts, ...]
    predictions: tuple[str, ...]


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    labels: Sequence[str] | None = None,
    prompt: str = "{text}",
    normalise: Normalise = "none",
    max_length: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> AccuracyResult:
    """Classification by likelihood: the label with the highest log p(label | prompt) wins.

        log p(label | prompt) = sum_j log p(label_j | prompt, label_<j)      [divided by tokens or bytes]

    The label is tokenized as `peftx.engines.data.continuation` of the prompt, as in training. EOS is not scored: where
    one label's tokens begin another's, the shorter can only win without `normalise`. Ties go to the first label.

    Args:
        rows: mappings with `text` and `label`.
        labels: the classes; those of the rows, sorted, when None.
        prompt: template with `{text}`; an encoder-decoder's encoder reads it.
        normalise: divide the log-probability by the label's `tokens` or `bytes`, or by nothing (`none`).
        max_length: longer prompts are cut at their left; the model's window when None.

    Raises:
        UnsupportedError: a masked language model.
        DataError: no rows, fewer than two labels, a label outside `labels`, or two labels of the same tokens.
    """
    refuse_masked(model)
    if normalise not in ("none", "tokens", "bytes"):
        raise DataError(f"normalise is {normalise!r}; 'none', 'tokens' or 'bytes'")
    examples = list(rows)
    check_rows(examples)
    names = sorted({row["label"] for row in examples}) if labels is None else list(labels)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise DataError(f"classification needs at least two different labels, got {names}")
    for index, row in enumerate(examples):
        class_index(row["label"], names, f"row {index} (counting from 0)")

    texts = [row["text"] for row in examples]
    sums, lengths = label_logs(
        model, tokenizer, texts, names, prompt=prompt, max_length=max_length, batch_size=batch_size, device=device,
        progress=progress,
    )  # fmt: skip
    predictions: list[str] = []
    for log_probs, tokens in zip(sums, lengths, strict=True):
        size_of = {
            "none": [1] * len(names),
            "tokens": tokens,
            "bytes": [len(name.encode()) for name in names],
        }
        ranked = [log / length for log, length in zip(log_probs, size_of[normalise], strict=True)]
        predictions.append(names[ranked.index(max(ranked))])
    return _tally(examples, names, predictions)


def label_logs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    prompt: str = "{text}",
    max_length: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[list[list[float]], list[list[int]]]:
    """log p(label | prompt) and the label's tokens, [text][label]; arguments as those of `accuracy`."""
    size = context_window(model, tokenizer) if max_length is None else max_length
    requests: list[Request] = []
    owners: list[tuple[int, list[int]]] = []  # text, and the label of each alternative
    lengths: list[list[int]] = []
    for index, text in enumerate(texts):
        filled = fill_template(prompt, text)
        targets = _label_ids(model, tokenizer, filled, names)
        lengths.append([len(target) for target in targets])
        for request, of in _label_requests(model, tokenizer, filled, targets, size):
            requests.append(request)
            owners.append((index, of))
    scored = score_requests(model, requests, batch_size=batch_size, device=device, progress=progress)
    sums = [[0.0] * len(names) for _ in texts]
    for (index, of), logs in zip(owners, scored, strict=True):
        for label, log in zip(of, logs, strict=True):
            sums[index][label] = float(log.sum())
    return sums, lengths


def head_of(stack: Stack) -> Plugin | ModelHead | None:
    """The plugin of a stack that classifies by a head of its own, if there is one and it is switched on; else the
    model's own head, if it has one."""
    from peftx.kernel.plugin import Claim

    standing = {m: stack.standing[m.id] for m in stack.members if m.claims(Claim.CLASSIFIES)}
    # Before `inject` there is no head: the base answers by likelihood.
    ready = (at.injected or not m.implements("inject") for m, at in standing.items())
    found = [m for m, is_ready in zip(standing, ready, strict=True) if is_ready and not standing[m].disabled]
    own = ModelHead() if objective_of(stack.model) == "class" else None
    return found[0].plugin if found else own


class ModelHead:
    """The head of a sequence classifier, as a plugin's."""

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        """(the classes' names, scores [N, C])."""
        model, config = stack.model, stack.model.config
        size = context_window(model, stack.tokenizer)
        closed = "is_decoder" in config.to_dict() and not config.is_decoder
        rows = [class_ids(stack.tokenizer, text, max_length=size, closed=closed) for text in texts]
        collator, scores = Collator(pad_of(model, stack.tokenizer)), []
        for start in range(0, len(rows), 16):
            batch = collator([{"input_ids": row} for row in rows[start : start + 16]])
            scores.append(model(**{name: x.to(model.device) for name, x in batch.items()}).logits.float())
        return [config.id2label[i] for i in range(config.num_labels)], torch.cat(scores)


def head_answers(
    stack: Stack, head: Head, rows: Sequence[Sequence[int]], *, size: int = 32
) -> Iterator[Tensor]:
    """What a plugin's `model.head` gives for rows of token ids (`class_rows`, `tag_rows`), batch by batch."""
    model = stack.model
    for batch in batches_of(rows, pad_of(model, stack.tokenizer), model.device, size=size):
        yield head.read(partial(model, **batch), batch["attention_mask"])[0]


def classify(stack: Stack, head: Plugin | ModelHead, texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """(labels, scores [N, C]) of a plugin's own head, in evaluation mode and without gradients."""
    with evaluating(stack.model):
        return head.classify(stack, texts)


def accuracy_of_head(
    stack: Stack, head: Plugin | ModelHead, rows: Iterable[Mapping[str, Any]]
) -> AccuracyResult:
    """As `accuracy`, by a plugin's own head.

    Raises:
        DataError: no rows, or a label that the head does not know.
    """
    examples = list(rows)
    check_rows(examples)
    labels, scores = classify(stack, head, [row["text"] for row in examples])
    for index, row in enumerate(examples):
        class_index(row["label"], labels, f"row {index} (counting from 0)")
    return _tally(examples, labels, [labels[index] for index in scores.argmax(-1).tolist()])


def check_rows(examples: list[Mapping[str, Any]]) -> None:
    if not examples:
        raise DataError("no rows to classify")
    for index, row in enumerate(examples):
        if not isinstance(row.get("text"), str) or not isinstance(row.get("label"), str):
            raise DataError(
                f"row {index} (counting from 0) needs strings 'text' and 'label'; found {', '.join(row)}"
            )


def _label_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, names: Sequence[str]
) -> list[list[int]]:
    """Ids of every label as it follows the prompt."""
    in_decoder = model.config.is_encoder_decoder
    targets = [
        text_ids(tokenizer, name) if in_decoder else following_ids(tokenizer, continuation(prompt, name))
        for name in names
    ]
    for index, target in enumerate(targets):
        if not target:
            raise DataError(f"label {names[index]!r} has no tokens")
        if target in targets[:index]:
            raise DataError(
                f"labels {names[targets.index(target)]!r} and {names[index]!r} have the same tokens"
            )
    return targets


def _label_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    targets: list[list[int]],
    size: int,
) -> Iterator[tuple[Request, list[int]]]:
    """Passes over one row with the labels each scores: labels that differ only in their last token share one."""
    longest = max(map(len, targets))
    if model.config.is_encoder_decoder:
        context, encoder = [decoder_start(model)], encoder_ids(tokenizer, prompt, max_length=size)
    else:
        prefix, _ = special_frame(tokenizer)
        body = prompt_ids(tokenizer, prompt)[len(prefix) :]
        # Every label sees the same context, so the longest decides what is cut.
        room = size - len(prefix) - (longest - 1)
        context, encoder = prefix + body[max(0, len(body) - max(0, room)) :] or opening_ids(tokenizer), None
    if len(context) + longest - 1 > size:
        raise DataError(f"a label of {longest} tokens does not fit in max_length {size}")
    shared: dict[tuple[int, ...], list[int]] = {}
    for label, target in enumerate(targets):
        shared.setdefault(tuple(target[:-1]), []).append(label)
    for start, of in shared.items():
        yield (
            Request(
                inputs=[*context, *start],
                first=len(context) - 1,
                targets=[targets[i] for i in of],
                encoder=encoder,
            ),
            of,
        )


def _tally(examples: list[Mapping[str, Any]], names: list[str], predictions: list[str]) -> AccuracyResult:
    truth = [row["label"] for row in examples]
    hits = [t for t, p in zip(truth, predictions, strict=True) if t == p]
    low, high = wilson_interval(len(hits), len(truth))
    return AccuracyResult(
        score=Score(name="accuracy", value=len(hits) / len(truth), low=low, high=high, count=len(truth)),
        classes=tuple(
            ClassCounts(
                label=name,
                count=truth.count(name),
                predicted=predictions.count(name),
                correct=hits.count(name),
            )
            for name in names
        ),
        predictions=tuple(predictions),
    )
