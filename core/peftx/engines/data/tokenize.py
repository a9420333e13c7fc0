"""Rows become `input_ids` and `labels`. How a text becomes ids is in `encoding.py` and `messages.py`."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset

from peftx.engines.data.encoding import (
    Example,
    completion_ids,
    continuation,
    encoder_ids,
    eos_id,
    fill_template,
    joined,
    many_following,
    many_ids,
    special_frame,
    text_ids,
    without_prefix,
)
from peftx.engines.data.gate import COLUMNS, FORMATS, check_all_learned, check_rows
from peftx.engines.data.kept import kept
from peftx.engines.data.mapped import dataset_of_blocks
from peftx.engines.data.messages import messages_encoder
from peftx.engines.data.orders import check_orders
from peftx.engines.data.places import Place, Where, row_for_row, select
from peftx.engines.models import tokenizer_digest
from peftx.errors import DataError, UnsupportedError, nearest
from peftx_spec.shapes import PROMPT_TURNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BESIDE = ("tools", PROMPT_TURNS)
"""Columns that decide about a conversation's ids too."""
BLOCK = 500
"""Texts that are tokenized in one call."""
TOKENS = 2**22
"""Of the examples that are in memory together, before they are on the disk."""


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str,
    max_length: int,
    classification_prompt: str = "{text}",
    encoder_decoder: bool = False,
    keep: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    only: Sequence[int] | None = None,
) -> Dataset:
    """Turn rows into examples.

    prompt-completion   loss on the completion and EOS
    classification      prompt `classification_prompt` with the text in place of `{text}`, completion = label
    messages            the tokenizer's chat template; without one, lines `User: ...`, `Assistant: ...`; loss on
                        the assistant's turns; what follows the last one is cut
    text                BOS document EOS BOS document EOS ... cut into blocks of `max_length`; loss everywhere;
                        a last block of one token is dropped, since it has nothing to predict
    tokenized           checked and passed through, with every column

    Too long a prompt (or conversation) is cut at its left, after BOS; a completion is never cut.

    Args:
        dataset: rows in `format`.
        max_length: tokens an example may have; with `encoder_decoder`, each side.
        encoder_decoder: `input_ids` is the prompt as the encoder takes it, `labels` the completion and EOS
            without a leading space. Not for `text` and `messages`.
        keep: columns to carry over, one value a row (weights, ids); not for `text`, whose rows are repacked.
        progress: called with (rows done, of).
        only: of these rows, in this order; all are looked at, and no more than these tokenized. Not for `text`.

    Returns:
        A dataset with lists of integers `input_ids` and `labels`, then the columns of `keep`.

    Raises:
        DataError: a row without anything to learn, or a completion longer than `max_length`; names the row.
        UnsupportedError: `preference` rows, which have two completions; use `encode_pair` for each.
    """
    known = (*FORMATS, "tokenized")
    if format not in known:
        raise DataError(
            f"unknown format {format!r}; formats: {', '.join(known)}", hint=nearest(format, known) or None
        )
    if format != "tokenized" and "input_ids" in dataset.column_names:
        raise DataError(
            f"the rows have 'input_ids' but their format is {format!r}",
            hint="whoever tokenized them sets the format to 'tokenized'",
        )
    missing = [name for name in keep if name not in dataset.column_names]
    if missing:
        raise DataError(f"no column {missing[0]!r} to keep; columns: {', '.join(dataset.column_names)}")
    if format == "tokenized":
        _check_tokenized(dataset, max_length=max_length, encoder_decoder=encoder_decoder)
        return dataset
    if encoder_decoder and format in {"text", "messages"}:
        raise UnsupportedError(f"format {format!r} has no prompt and completion for an encoder and a decoder")
    if format == "preference":
        raise UnsupportedError(
            "preference rows have two completions and no single label",
            hint="a plugin that trains on preferences calls encode_pair for 'chosen' and for 'rejected'",
        )
    if format == "text" and keep:
        raise DataError("text is repacked into blocks, so no column of its rows can be kept")
    columns = [name for name in dataset.column_names if name in {*COLUMNS[format], *BESIDE, *keep}]

    def about() -> dict[str, Any]:
        return {
            "tokenizer": tokenizer_digest(tokenizer), "format": format, "max_length": max_length,
            "prompt": classification_prompt, "encoder_decoder": encoder_decoder, "keep": list(keep),
            "only": None if only is None else [int(index) for index in only],
        }  # fmt: skip

    def examples() -> Dataset:
        check_rows(dataset, format)
        check_all_learned(dataset, format)  # those too that a short run does not come to
        if format == "messages" and only is not None:
            check_orders(dataset, tokenizer)
        if format == "text":
            return dataset_of_examples(_pack(dataset, tokenizer, progress, max_length=max_length))
        chosen = dataset if only is None else dataset.select(only)
        numbers = range(len(dataset)) if only is None else only
        rows = ((Place(dataset, numbers[i]), row) for i, row in _counted(chosen, progress))
        found: Iterator[Example]
        if format == "messages":
            encode = messages_encoder(tokenizer, max_length)
            found = (encode(row, where) for where, row in rows)
        else:
            pairs = ((where, *_pair(row, format, classification_prompt)) for where, row in rows)
            encoded = _two_towers if encoder_decoder else _one_row
            found = encoded(pairs, tokenizer, max_length)
        tokenized = dataset_of_examples(found)
        for name in keep:
            tokenized = tokenized.add_column(name, chosen[name][:])
        return tokenized

    made = kept(dataset.select_columns(columns), about, examples)
    return made if format == "text" else row_for_row(made, dataset if only is None else select(dataset, only))


def _pair(row: Mapping[str, Any], format: str, template: str) -> tuple[str, str]:
    """Prompt and completion."""
    if format == "classification":
        return fill_template(template, row["text"]), row["label"]
    return row["prompt"], row["completion"]


Pairs = Iterable[tuple[Where, str, str]]
"""(Where it stands, prompt, completion)."""


def _one_row(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Example]:
    """Prompt and completion one after the other, tokenized many at a time."""
    prefix, _ = special_frame(tokenizer)
    pairs = iter(pairs)
    while block := list(islice(pairs, BLOCK)):
        texts = [continuation(prompt, completion) for _, prompt, completion in block]
        heads = many_ids(tokenizer, [prompt for _, prompt, _ in block])
        tails = zip(texts, many_following(tokenizer, texts), strict=True)
        for (where, _, _), head, tail in zip(block, heads, tails, strict=True):
            yield joined(tokenizer, prefix, head, tail, max_length, where)


def _two_towers(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Example]:
    """The prompt as the encoder takes it, the completion and EOS for the decoder."""
    for where, prompt, completion in pairs:
        labels = [*completion_ids(tokenizer, completion, where, alone=True), eos_id(tokenizer)]
        if len(labels) > max_length:
            raise DataError(
                f"{where}: the completion has {len(labels)} tokens with EOS; max_length is {max_length}"
            )
        yield Example(encoder_ids(tokenizer, prompt, max_length=max_length), labels)


def _counted(
    dataset: Dataset, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows, numbered; how far they are is told every hundred."""
    for index, row in enumerate(dataset):
        if progress is not None and index % 100 == 0:
            progress(index, len(dataset))
        yield index, row


def _pack(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int], None] | None,
    *,
    max_length: int,
) -> Iterator[Example]:
    prefix, _ = special_frame(tokenizer)
    eos = eos_id(tokenizer)
    waiting: list[int] = []
    for index, row in _counted(rows, progress):
        body = without_prefix(text_ids(tokenizer, row["text"]), prefix)
        if not body:
            raise DataError(f"{Place(rows, index)}: the text {row['text']!r} has no tokens")
        waiting += [*prefix, *body, eos]
        whole = len(waiting) - len(waiting) % max_length
        for start in range(0, whole, max_length):
            block = waiting[start : start + max_length]
            yield Example(block, block)
        waiting = waiting[whole:]
    if len(waiting) > 1:
        yield Example(waiting, waiting)


def dataset_of_examples(examples: Iterable[Example]) -> Dataset:
    """A dataset without Python integers in between: 12 bytes a token of a block, then on the disk.

    The types are those `datasets` gives these names (32 bits for `input_ids`, 64 for `labels`), so that rows made
    here and rows that a plugin makes join. The offsets have 32 bits: OverflowError past 2**31 tokens of one row.
    """
    found = dataset_of_blocks(_blocks(examples))
    if found is None:
        raise DataError("no rows to tokenize")
    return found


def _blocks(examples: Iterable[Example]) -> Iterator[pa.Table]:
    examples = iter(examples)
    for first in examples:
        tokens, labels = array("i"), array("q")
        token_ends, label_ends = array("i", [0]), array("i", [0])
        for example in chain([first], examples):
            tokens.extend(example.input_ids)
            labels.extend(example.labels)
            token_ends.append(len(tokens))
            label_ends.append(len(labels))
            if len(tokens) + len(labels) >= TOKENS:
                break
        ids = pa.ListArray.from_arrays(_arrow(token_ends, pa.int32()), _arrow(tokens, pa.int32()))
        learned = pa.ListArray.from_arrays(_arrow(label_ends, pa.int32()), _arrow(labels, pa.int64()))
        yield pa.table({"input_ids": ids, "labels": learned})


def _arrow(values: array[int], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _check_tokenized(dataset: Dataset, *, max_length: int, encoder_decoder: bool) -> None:
    for name in ("input_ids", "labels"):
        if name not in dataset.column_names:
            raise DataError(f"tokenized rows need {name!r}; columns: {', '.join(dataset.column_names)}")
    lengths = {name: [len(ids) for ids in dataset[name]] for name in ("input_ids", "labels")}
    for index, (inputs, labels) in enumerate(zip(lengths["input_ids"], lengths["labels"], strict=True)):
        where = Place(dataset, index)
        if not inputs or max(inputs, labels) > max_length:
            raise DataError(
                f"{where} has {max(inputs, labels)} tokens; between 1 and max_length {max_length} fit"
            )
        if inputs != labels and not encoder_decoder:
            raise DataError(f"{where} has {inputs} input_ids and {labels} labels; one label for each token")
    if not lengths["input_ids"]:
        raise DataError("no rows to tokenize")
