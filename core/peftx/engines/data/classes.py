"""Classification for plugins with a head of their own: texts, or their words, with the number of their class, not label
tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import Tensor

from peftx.engines.data.collate import CLASS_INDEX, IGNORE, Collator
from peftx.engines.data.encoding import (
    encoder_ids,
    following_ids,
    prompt_ids,
    special_frame,
    text_ids,
    without_prefix,
)
from peftx.engines.data.places import Place, Where, row_for_row
from peftx.errors import DataError, StackError, nearest
from peftx.kernel.objective import pad_of
from peftx.kernel.positions import free_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftx.engines.data.training_data import TrainingData
    from peftx.kernel.stack import Stack


def check_labels(labels: Sequence[str]) -> list[str]:
    """The classes that a configuration names.

    Raises:
        DataError: fewer than two, one twice, or one without a letter.
    """
    if len(labels) < 2:
        raise DataError(
            f"{len(labels)} class: classification needs at least two", hint="name them in `labels`"
        )
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise DataError(f"label {twice!r} stands twice in `labels`")
    if not all(label.strip() for label in labels):
        raise DataError("a label in `labels` is empty")
    return list(labels)


def class_index(label: str, labels: Sequence[str], where: Where) -> int:
    """Number of `label` among `labels`; where those are `LABEL_0`, `LABEL_1`, ..., as of a model whose classes have no
    names, `1` is the second. Raises DataError, which names `where` and the nearest label."""
    label = f"LABEL_{label}" if f"LABEL_{label}" in labels else label
    if label not in labels:
        raise DataError(
            f"{where}: label {label!r} is not among {', '.join(labels)}",
            hint=nearest(label, labels) or "name all classes of the rows, as the plugin's `labels` for one",
        )
    return list(labels).index(label)


def class_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int, closed: bool = False
) -> list[int]:
    """A text to be classified: BOS and the text; `closed`: with the tokenizer's end too, as encoders take it.

    Cut at its left, after BOS, to `max_length`.
    """
    if closed:
        return encoder_ids(tokenizer, text, max_length=max_length)
    prefix, _ = special_frame(tokenizer)
    body = without_prefix(prompt_ids(tokenizer, text), prefix)
    return prefix + body[max(0, len(body) - max(0, max_length - len(prefix))) :]


def tokenize_classes(data: TrainingData, labels: Sequence[str], *, closed: bool = False) -> None:
    """Turn classification rows (training and evaluation) into tokenized texts with `class_index`, in place.

    `labels` of the tokens are all IGNORE: the loss is the plugin's own, from `step.batch.pop(CLASS_INDEX)`.

    Raises:
        DataError: rows of another format, a text without tokens, or a label that is not in `labels`.
    """
    _rewrite(data, lambda rows: _tokenized(data, rows, labels, closed))


def tokenize_tags(data: TrainingData, labels: Sequence[str], *, closed: bool = False) -> None:
    """The same for rows whose label is a tag for each word, `{"text": "Ada lives", "label": "PER O"}`: `class_index`
    has a number for each token, that of a word's tag on its first one, and IGNORE on all others. Words are what stands
    between white space; a row is cut at its end.

    Raises:
        DataError: rows of another format, more words or fewer than tags, or a tag that is not in `labels`.
    """
    _rewrite(data, lambda rows: _tagged(data, rows, labels, closed))


def _rewrite(data: TrainingData, make: Callable[[Dataset], Dataset]) -> None:
    if data.format != "classification":
        raise DataError(
            f"the rows are of format '{data.format}', and a head needs rows with 'text' and 'label'",
            hint="data: {train: {path: ..., columns: {text: ..., label: ...}}}",
        )
    data.rewrite(make)


def _tokenized(data: TrainingData, rows: Dataset, labels: Sequence[str], closed: bool) -> Dataset:
    found: dict[str, list[object]] = {"input_ids": [], "labels": [], CLASS_INDEX: []}
    frame = sum(map(len, special_frame(data.tokenizer))) if closed else len(special_frame(data.tokenizer)[0])
    for index, row in enumerate(rows):
        where = Place(rows, index)
        ids = class_ids(data.tokenizer, row["text"], max_length=data.max_length, closed=closed)
        if len(ids) <= frame:
            raise DataError(f"{where}: the text {row['text']!r} has no tokens")
        found["input_ids"].append(ids)
        found["labels"].append([IGNORE] * len(ids))
        found[CLASS_INDEX].append(class_index(row["label"], labels, where))
    if not found["input_ids"]:
        raise DataError("no rows to classify")
    return row_for_row(Dataset.from_dict(found), rows)


def _tagged(data: TrainingData, rows: Dataset, labels: Sequence[str], closed: bool) -> Dataset:
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], CLASS_INDEX: []}
    for index, row in enumerate(rows):
        where, tags = Place(rows, index), row["label"].split()
        ids, starts = _words(data.tokenizer, row["text"], where, closed)
        if len(tags) != len(starts):
            raise DataError(
                f"{where} has {len(starts)} words and {len(tags)} tags",
                hint="a tag for each word of 'text', with blanks between them, in 'label'",
            )
        numbers = [IGNORE] * len(ids)
        for place, tag in zip(starts, tags, strict=True):
            numbers[place] = class_index(tag, labels, where)
        found["input_ids"].append(ids[: data.max_length])
        found["labels"].append([IGNORE] * len(ids[: data.max_length]))
        found[CLASS_INDEX].append(numbers[: data.max_length])
    if not found["input_ids"]:
        raise DataError("no rows to tag")
    return row_for_row(Dataset.from_dict(found), rows)


def _words(
    tokenizer: PreTrainedTokenizerBase, text: str, where: Where, closed: bool
) -> tuple[list[int], list[int]]:
    """Tokens of a text, and where each of its words begins. Each is tokenized by itself: no token has parts of two."""
    before, after = special_frame(tokenizer)
    ids: list[int] = [*before]
    starts: list[int] = []
    for word in text.split():
        own = following_ids(tokenizer, f" {word}") if starts else text_ids(tokenizer, word)
        if not own:
            raise DataError(f"{where}: the word {word!r} has no tokens")
        starts.append(len(ids))
        ids += own
    if not starts:
        raise DataError(f"{where}: the text {text!r} has no words")
    return ids + (after if closed else []), starts


def tag_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int,
    closed: bool = False,
    owner: str,
) -> list[tuple[list[int], list[int]]]:
    """Texts to tag as `tokenize_tags` makes them of rows: the tokens of each, and where its words begin.

    Raises:
        DataError: a text without words, or too long a one; names `owner` and the text.
    """
    found = []
    for index, text in enumerate(texts):
        where = f"{owner}: text {index} (counting from 0)"
        ids, starts = _words(tokenizer, text, where, closed)
        if len(ids) > max_length:
            raise DataError(
                f"{where} has {len(ids)} tokens, and {max_length} fit", hint="tag it sentence by sentence"
            )
        found.append((ids, starts))
    return found


def class_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int,
    closed: bool = False,
    owner: str,
) -> list[list[int]]:
    """Texts to classify as `tokenize_classes` makes them of rows.

    Raises:
        DataError: no text, or one without tokens; names `owner` and the text.
    """
    if not texts:
        raise DataError(f"{owner}: there is no text")
    rows = [class_ids(tokenizer, text, max_length=max_length, closed=closed) for text in texts]
    nothing = class_ids(tokenizer, "", max_length=max_length, closed=closed)
    if nothing in rows:
        index = rows.index(nothing)
        raise DataError(f"{owner}: text {index} (counting from 0), {texts[index]!r}, has no tokens")
    return rows


def batches_of(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Rows of token ids as batches of so many, in order, padded on the right."""
    collate = Collator(pad)
    for start in range(0, len(rows), size):
        batch = collate([{"input_ids": list(row)} for row in rows[start : start + size]])
        yield {name: x.to(device) for name, x in batch.items()}


def take_classes(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of `tokenize_classes`, or `tokenize_tags`, without its labels, and the number of each row's class [B], or
    each token's [B, T].

    Raises:
        DataError: it has none.
    """
    if CLASS_INDEX not in batch:
        raise DataError(
            f"the batch has no {CLASS_INDEX}, but {', '.join(sorted(batch))}",
            hint="stack.train does it by itself; in a loop of your own take the rows that stack.prepare returns",
        )
    rest = {name: x for name, x in batch.items() if name not in (CLASS_INDEX, "labels")}
    return rest, batch[CLASS_INDEX]


@dataclass(frozen=True)
class ClassTexts:
    """The classes of a plugin, and the texts that it names one of, in training and afterwards.

    A plugin's class has one that names none, and tells whoever asks too early what is `missing`; `inject` puts another
    in its place:

        texts = ClassTexts("my-method", missing="there is no head yet")

        self.texts = self.texts.of(self.config.labels, closed="encoder" in model.towers)

    Args:
        owner: whom messages name. missing: what `inject` makes. names: of the classes. closed: as in `class_ids`.
        beside: tokens that the model reads with each text and that are no soft tokens, as those of an answer.
    """

    owner: str
    missing: str
    names: tuple[str, ...] = ()
    closed: bool = False
    beside: int = 0

    def of(self, labels: Sequence[str], *, closed: bool = False, beside: int = 0) -> ClassTexts:
        return replace(self, names=tuple(labels), closed=closed, beside=beside)

    def check(self) -> None:
        """Raises PeftxError where `inject` has not run; everything else below does so too."""
        if not self.names:
            raise StackError(f"{self.owner}: {self.missing}", hint="inject it before prepare and evaluate")

    @property
    def labels(self) -> list[str]:
        """The classes."""
        self.check()
        return list(self.names)

    def room(self, stack: Stack) -> int:
        """Tokens of a text that the model can read."""
        self.check()
        free = free_positions(stack.model)  # without those of soft tokens
        return (int(stack.tokenizer.model_max_length) if free is None else free) - self.beside

    def prepare(self, data: TrainingData, stack: Stack, *, words: bool = False) -> None:
        """`tokenize_classes`, or of words `tokenize_tags`, with texts that the model can read."""
        data.max_length = min(data.max_length, self.room(stack))
        tokenize = tokenize_tags if words else tokenize_classes
        tokenize(data, self.labels, closed=self.closed)

    def check_several(self, data: TrainingData) -> None:
        """Raises DataError where all rows to train on are of one class, behind `prepare`."""
        if data.train is not None and len(found := set(data.train[CLASS_INDEX])) == 1:
            raise DataError(
                f"{self.owner}: all {len(data.train)} rows are of one class, {self.names[found.pop()]!r}, so there is "
                "nothing to tell apart",
                hint="rows of two classes at least",
            )

    def rows(self, stack: Stack, texts: Sequence[str], *, most: int | None = None) -> list[list[int]]:
        """The texts as token ids, cut as those of training are, to `most` tokens if the model can read more.

        Raises:
            DataError: no text, or one without tokens.
        """
        room, tokenizer = self.room(stack), stack.tokenizer
        room = room if most is None else min(room, most)
        return class_rows(tokenizer, texts, max_length=room, closed=self.closed, owner=self.owner)

    def words(self, stack: Stack, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Of each text its token ids, and where its words begin.

        Raises:
            DataError: a text without words, or longer than the model can read.
        """
        room, tokenizer = self.room(stack), stack.tokenizer
        return tag_rows(tokenizer, texts, max_length=room, closed=self.closed, owner=self.owner)

    def batches(self, stack: Stack, texts: Sequence[str], *, size: int = 32) -> Iterator[dict[str, Tensor]]:
        """The texts as batches of so many, in order, padded on the right."""
        rows, pad = self.rows(stack, texts), pad_of(stack.model, stack.tokenizer)
        return batches_of(rows, pad, stack.model.device, size=size)
