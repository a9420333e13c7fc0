"""Accuracy of the label that a model finds most likely."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
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
from peftx.engines.data.places import Place
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
    check_rows(rows, examples)
    names = sorted({row["label"] for row in examples}) if labels is None else list(labels)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise DataError(f"classification needs at least two different labels, got {names}")
    for index, row in enumerate(examples):
        class_index(row["label"], names, Place(rows, index))

    searches = []
    size = context_window(model, tokenizer) if max_length is None else max_length
    for row in examples:
        answer = _answer(model, tokenizer, fill_template(prompt, row["text"]), names, size)
        sizes = {
            "none": None,
            "tokens": [len(t) for t in answer.targets],
            "bytes": [len(n.encode()) for n in names],
        }
        searches.append(_Search(answer, sizes[normalise]))
    _run_searches(model, searches, batch_size, device, progress)
    predictions = [names[search.best] for search in searches]
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
) -> list[list[float]]:
    """log p(label | prompt), [text][label]; arguments as those of `accuracy`."""
    size = context_window(model, tokenizer) if max_length is None else max_length
    requests: list[Request] = []
    owners: list[tuple[int, list[int]]] = []  # text, and the label of each alternative
    for index, text in enumerate(texts):
        answer = _answer(model, tokenizer, fill_template(prompt, text), names, size)
        for request, of in answer.requests():
            requests.append(request)
            owners.append((index, of))
    scored = score_requests(model, requests, batch_size=batch_size, device=device, progress=progress)
    sums = [[0.0] * len(names) for _ in texts]
    for (index, of), logs in zip(owners, scored, strict=True):
        for label, log in zip(of, logs, strict=True):
            sums[index][label] = float(log.sum())
    return sums


def head_of(stack: Stack) -> Plugin | ModelHead | None:
    """The plugin of a stack that classifies by a head of its own, if there is one and it is switched on; else the
    model's own head, if it has one."""
    from peftx.kernel.plugin import Claim

    heads = [m for m in stack.members if m.claims(Claim.CLASSIFIES)]
    # Before `inject` there is no head: the base answers by likelihood.
    found = [m for m in heads if stack.stands(m.id) and not stack.standing[m.id].disabled]
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
    check_rows(rows, examples)
    labels, scores = classify(stack, head, [row["text"] for row in examples])
    for index, row in enumerate(examples):
        class_index(row["label"], labels, Place(rows, index))
    return _tally(examples, labels, [labels[index] for index in scores.argmax(-1).tolist()])


def check_rows(rows: Iterable[Mapping[str, Any]], examples: list[Mapping[str, Any]]) -> None:
    """Raises DataError where `rows`, of which `examples` are the list, are not of texts and labels."""
    if not examples:
        raise DataError("no rows to classify")
    for index, row in enumerate(examples):
        if not isinstance(row.get("text"), str) or not isinstance(row.get("label"), str):
            raise DataError(f"{Place(rows, index)} needs strings 'text' and 'label'; found {', '.join(row)}")


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


@dataclass(frozen=True)
class _Answer:
    """What a model reads of one row, and the labels' tokens, which follow it."""

    context: list[int]
    encoder: list[int] | None
    targets: list[list[int]]

    def reading(self, start: Sequence[int], targets: list[list[int]]) -> Request:
        """A pass over the row and `start`, the tokens of a label without its last."""
        return Request(
            inputs=[*self.context, *start], first=len(self.context) - 1, targets=targets, encoder=self.encoder
        )

    def requests(self) -> Iterator[tuple[Request, list[int]]]:
        """Passes with the labels each scores: labels that differ only in their last token share one."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for label, target in enumerate(self.targets):
            shared.setdefault(tuple(target[:-1]), []).append(label)
        for start, of in shared.items():
            yield self.reading(start, [self.targets[i] for i in of]), of


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, names: Sequence[str], size: int
) -> _Answer:
    targets = _label_ids(model, tokenizer, prompt, names)
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
    return _Answer(context, encoder, targets)


class _Search:
    """The likeliest label of a row, by as few passes as show that it is.

    A pass over one label tells the first tokens of all, and no further token can add to a sum of logs: what is known of
    a label bounds it from above. So the label of the highest bound is read next, until that one is known wholly.
    """

    def __init__(self, answer: _Answer, sizes: Sequence[int] | None) -> None:
        self.answer = answer
        self.sizes = sizes or [1] * len(answer.targets)
        self.bounds = [0.0] * len(answer.targets)
        self.known = [0] * len(answer.targets)  # tokens

    @property
    def best(self) -> int:
        """Of the highest bound; the first of equals."""
        values = [bound / size for bound, size in zip(self.bounds, self.sizes, strict=True)]
        return values.index(max(values))

    @property
    def done(self) -> bool:
        return self.known[self.best] == len(self.answer.targets[self.best])

    def request(self) -> tuple[Request, list[int]]:
        """A pass over the best label, and the labels that it tells more of: as many tokens as they have in common with
        it, and one more."""
        start, told = self.answer.targets[self.best][:-1], {}
        for label, target in enumerate(self.answer.targets):
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(start, target[:-1], strict=False))
            length = len(list(alike)) + 1
            if length > self.known[label]:
                told[label] = target[:length]
        return self.answer.reading(start, list(told.values())), list(told)

    def learn(self, labels: Sequence[int], logs: Sequence[Tensor]) -> None:
        for label, log in zip(labels, logs, strict=True):
            self.bounds[label], self.known[label] = float(log.sum()), len(log)


def _run_searches(
    model: PreTrainedModel,
    searches: Sequence[_Search],
    batch_size: int,
    device: torch.device | str | None,
    progress: Progress | None,
) -> None:
    waiting = sorted(
        searches, key=lambda search: -len(search.answer.context) - len(search.answer.encoder or ())
    )
    while waiting:
        batch, waiting = waiting[:batch_size], waiting[batch_size:]
        asked = [search.request() for search in batch]
        scored = score_requests(
            model, [request for request, _ in asked], batch_size=batch_size, device=device
        )
        for search, (_, labels), logs in zip(batch, asked, scored, strict=True):
            search.learn(labels, logs)
        waiting = [search for search in batch if not search.done] + waiting  # beside rows of their own length
        if progress is not None:
            progress(len(searches) - len(waiting), len(searches))


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
