"""What a model is trained to do, by its class: go on with a text, fill in masked tokens, or name a class.

Rows that do not serve the objective are refused before the first step, and so are ids and lengths that the model has no
place for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow.compute as compute
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from peftx.engines.data import class_ids, class_index, special_frame, text_ids, tokenize_dataset
from peftx.engines.data.encoding import without_prefix
from peftx.engines.data.places import Place, Where, row_for_row
from peftx.errors import DataError, UnsupportedError
from peftx.kernel.calls import columns_of
from peftx.kernel.objective import Objective, check_objective, objective_of, vocabulary_of
from peftx.kernel.plugin import Claim
from peftx.kernel.positions import free_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftx.engines.data import TrainingData
    from peftx.kernel.stack import Stack


def examples_of(
    stack: Stack,
    data: TrainingData,
    progress: Callable[[int, int], None] | None = None,
    *,
    only: Sequence[int] | None = None,
) -> Dataset:
    """Rows as the model trains on them: `input_ids`, `labels`. `progress` is called with (rows done, of).

    Args:
        only: of these rows, in this order, where each is an example of its own (`one_by_one`).

    Raises:
        UnsupportedError: rows that do not serve the model's objective.
        DataError: a row that is no row of its format, has an id beyond the embedding, or is longer than the positions.
    """
    rows = encoded(stack, data, progress, only=only)
    _check_places(stack, data, rows)
    return rows


def one_by_one(stack: Stack, data: TrainingData) -> bool:
    """Does each row become an example by itself: no text that is cut into blocks, and nothing tokenized already."""
    return data.format not in ("tokenized", "text") and objective_of(stack.model) == "next-token"


def encoded(
    stack: Stack,
    data: TrainingData,
    progress: Callable[[int, int], None] | None = None,
    *,
    only: Sequence[int] | None = None,
) -> Dataset:
    """The same, whether or not the model has a place for every id and position."""
    assert data.train is not None
    model, tokenizer = stack.model, stack.tokenizer
    kind: Objective = (
        "next-token" if data.format == "tokenized" else objective_of(model)
    )  # a plugin knows what it does
    if kind != "next-token":
        check_objective(model, data.format)
    if kind == "masked-token":
        rows = _to_fill_in(model, tokenizer, data)
    elif kind == "class":
        rows = _to_name(model, tokenizer, data)
    else:
        rows = tokenize_dataset(
            data.train, tokenizer, format=data.format, max_length=data.max_length,
            encoder_decoder=bool(model.config.is_encoder_decoder),
            keep=[name for name in columns_of(model) if name in data.train.column_names],
            progress=progress, only=only,
        )  # fmt: skip
    return rows


def mask_of(stack: Stack, data: TrainingData, seed: int) -> Masks | None:
    """What hides tokens of a batch before each step, where that is the objective."""
    if data.format == "tokenized" or objective_of(stack.model) != "masked-token":
        return None
    return Masks(stack.tokenizer, seed)


class Masks:
    """BERT's masking, by the library's own rule: 15 % of the tokens count; of these 80 % are hidden, 10 % are others.

    What is hidden depends on the run's seed, the step and the micro-batch alone, so a resumed run hides the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.rule = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
        self.seed = seed

    def __call__(self, batch: Mapping[str, Any], step: int, micro: int) -> dict[str, Any]:
        """`input_ids` and `labels` [B, T] of a batch, with tokens hidden; the rest as it is."""
        digest = hashlib.sha256(f"{self.seed}:{step}:{micro}".encode()).digest()
        self.rule.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        ids: Tensor = batch["input_ids"]
        special = torch.tensor(
            [
                self.rule.tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
                for row in ids.tolist()
            ]
        ).bool()
        hidden = special | (batch["attention_mask"].cpu() == 0)
        masked, labels = self.rule.torch_mask_tokens(ids.cpu().clone(), special_tokens_mask=hidden)
        return {**batch, "input_ids": masked.to(ids.device), "labels": labels.to(ids.device)}


def _to_fill_in(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TrainingData) -> Dataset:
    name = type(model).__name__
    if tokenizer.mask_token_id is None:
        raise UnsupportedError(
            f"{name} fills in masked tokens, and the tokenizer has no mask token",
            hint="set tokenizer.mask_token",
        )
    prefix, suffix = special_frame(tokenizer)
    room = data.max_length - len(prefix) - len(suffix)
    found: list[list[int]] = []
    assert data.train is not None
    for index, row in enumerate(data.train):
        body = without_prefix(text_ids(tokenizer, row["text"]), prefix)
        if not body:
            raise DataError(f"{Place(data.train, index)}: the text {row['text']!r} has no tokens")
        found += [[*prefix, *body[at : at + room], *suffix] for at in range(0, len(body), room)]
    return Dataset.from_dict({"input_ids": found, "labels": found})


def _to_name(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TrainingData) -> Dataset:
    config, name = model.config, type(model).__name__
    assert data.train is not None
    if config.pad_token_id is None:
        raise UnsupportedError(
            f"{name} reads a row's last token, and its configuration does not tell which tokens are pads",
            hint="model.config.pad_token_id = tokenizer.pad_token_id, before the stack is built",
        )
    closed = "is_decoder" in config.to_dict() and not config.is_decoder
    names = [config.id2label[i] for i in range(config.num_labels)]
    number = partial(_number) if config.num_labels == 1 else partial(_class, names=names)
    found: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for index, row in enumerate(data.train):
        where = Place(data.train, index)
        ids = class_ids(tokenizer, row["text"], max_length=data.max_length, closed=closed)
        if len(ids) <= sum(map(len, special_frame(tokenizer))) * closed:
            raise DataError(f"{where}: the text {row['text']!r} has no tokens")
        found["input_ids"].append(ids)
        found["labels"].append(number(row["label"], where=where))
    return row_for_row(Dataset.from_dict(found), data.train)


def _class(label: str, *, where: Where, names: Sequence[str]) -> int:
    if label.isdecimal() and label not in names and int(label) < len(names):
        return int(label)
    try:
        return class_index(label, names, where)
    except DataError as error:
        raise DataError(
            f"{error.message} (the model's own names)",
            hint=error.hint
            or "model.config.id2label and label2id name the classes, before the stack is built",
        ) from error


def _number(label: str, *, where: Where) -> float:
    try:
        return float(label)
    except ValueError as error:
        raise DataError(f"{where}: label {label!r} is no number, and the model gives one") from error


def _check_places(stack: Stack, data: TrainingData, rows: Dataset) -> None:
    """Raises DataError for the first row with an id that the embedding lacks, or more tokens than positions."""
    cut = data.format == "text" or mask_of(stack, data, 0) is not None  # into blocks, which are no rows
    size, room = vocabulary_of(stack.model), free_positions(stack.model)
    if any(member.claims(Claim.OWN_LAYOUT) for member in stack.members):
        room = None  # its rows hold several texts, each with positions of its own
    table = rows.with_format("arrow")
    for name in ("input_ids", "labels"):
        column = table[name][:]
        if name not in rows.column_names or not hasattr(column.type, "value_type"):
            continue
        if (
            size is not None
            and len(column)
            and (compute.max(compute.list_flatten(column)).as_py() or 0) >= size
        ):
            index, token = next(
                (i, t) for i, ids in enumerate(column.to_pylist()) if (t := max(ids, default=0)) >= size
            )
            word = stack.tokenizer.convert_ids_to_tokens(token)
            where = _with_token(stack, data, token) if cut else Place(rows, index)
            raise DataError(
                f"{where}: {word!r} has id {token}, and the model's embedding has {size} rows",
                hint="the tokenizer is another model's, or has tokens that the model was never given",
            )
        longest = compute.max(compute.list_value_length(column)).as_py() if len(column) else 0
        if room is not None and longest is not None and longest > room:
            index = next(i for i, n in enumerate(compute.list_value_length(column).to_pylist()) if n > room)
            where = "a block of the texts" if cut else Place(rows, index)
            raise DataError(
                f"{where} has {len(column[index])} {name}, and the model has positions for {room}",
                hint=f"train: {{max_length: {room}}}, or stack.train(..., max_length={room})",
            )


def _with_token(stack: Stack, data: TrainingData, token: int) -> Where:
    """The row of text that a token comes of; what the tokenizer puts around each text is no row's."""
    assert data.train is not None
    own = (i for i, row in enumerate(data.train) if token in text_ids(stack.tokenizer, row["text"]))
    index = next(own, None)
    return "what the tokenizer puts around a text" if index is None else Place(data.train, index)
