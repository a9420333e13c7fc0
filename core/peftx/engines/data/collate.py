"""Examples of several lengths become one rectangular batch of int64 tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from peftx.errors import DataError

IGNORE: Final = -100  # the label that PyTorch's cross entropy leaves out
CLASS_INDEX: Final = "class_index"
"""Column, and entry of the batch: number of the row's class, int64 [B], or of each token's, [B, T]."""

_OWN_PADS: Final[Mapping[str, int]] = {
    "attention_mask": 0,
    "labels": IGNORE,
    CLASS_INDEX: IGNORE,
    "token_type_ids": 0,
}


class Collator:
    """Pads rows to the longest of a batch.

    Args:
        pad_token_id: fills `input_ids`; a model without one takes its EOS, since the mask hides it anyway.
        padding_side: `right` for training and scoring; `left` for generation.
        pad_to_multiple_of: round the length up, but not over `max_length`.
        max_length: refuse longer rows. Nothing is cut here; `tokenize_dataset` does that.
        pad_values: fill for columns of the user's own, `{"speaker_ids": 0}`.
        encoder_decoder: `labels` have a length of their own.
        own_lengths: columns that have one too, filled with -1.
    """

    def __init__(
        self,
        pad_token_id: int | None,
        *,
        padding_side: Literal["right", "left"] = "right",
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        pad_values: Mapping[str, int] | None = None,
        encoder_decoder: bool = False,
        own_lengths: Collection[str] = (),
    ) -> None:
        if pad_token_id is None:
            raise DataError(
                "the tokenizer has no padding token", hint="give its eos_token_id: the mask hides it"
            )
        if padding_side not in ("right", "left"):
            raise DataError(f"padding_side is {padding_side!r}; 'right' or 'left'")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise DataError(f"pad_to_multiple_of is {pad_to_multiple_of}; at least 1")
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length
        self.free = {*own_lengths, *(("labels",) if encoder_decoder else ())}
        self.pad_values = {
            **_OWN_PADS,
            "input_ids": pad_token_id,
            **(pad_values or {}),
            **dict.fromkeys(own_lengths, -1),
        }

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """rows: B mappings with `input_ids` and, alike in all rows, `labels` and other columns.

        Returns:
            `input_ids`, `attention_mask` and every other list column, int64 [B, T]; a column of single numbers
            becomes [B], int64 or float32. `attention_mask` is 1 on the row's own tokens unless rows bring one.

        Raises:
            DataError: no rows, rows of unlike columns or lengths, a row over `max_length`, or a column without
                a padding value.
        """
        if not rows:
            raise DataError("a batch needs at least one row")
        names = list(rows[0])
        for index, row in enumerate(rows):
            if set(row) != set(names):
                raise DataError(
                    f"row {index} of the batch has columns {sorted(row)}, row 0 has {sorted(names)}"
                )
        if "input_ids" not in names:
            raise DataError(f"rows have no 'input_ids'; columns: {', '.join(names)}")

        lists: dict[str, list[list[int]]] = {}
        batch: dict[str, Tensor] = {}
        for name in names:
            values = [row[name] for row in rows]
            if isinstance(values[0], (int, float)):
                batch[name] = _numbers(name, values)
            elif isinstance(values[0], list) and any(isinstance(x, float) for x in values[0]):
                batch[name] = _vectors(name, values)
            else:
                lists[name] = [_integers(name, index, value) for index, value in enumerate(values)]
        if "attention_mask" not in lists:
            lists["attention_mask"] = [[1] * len(ids) for ids in lists["input_ids"]]

        for index, ids in enumerate(lists["input_ids"]):
            for name, column in lists.items():
                if len(column[index]) != len(ids) and name not in self.free:
                    raise DataError(
                        f"row {index} of the batch: {len(ids)} input_ids and {len(column[index])} {name}"
                    )
                if self.max_length is not None and len(column[index]) > self.max_length:
                    raise DataError(
                        f"row {index} of the batch: {len(column[index])} {name}, more than max_length {self.max_length}"
                    )
        batch.update({name: self._pad(name, column) for name, column in lists.items()})
        return batch

    def _pad(self, name: str, column: list[list[int]]) -> Tensor:
        if name not in self.pad_values:
            raise DataError(
                f"column {name!r} has no padding value",
                hint=f"Collator(..., pad_values={{{name!r}: 0}}), or drop it",
            )
        length = max(len(values) for values in column)
        if self.pad_to_multiple_of is not None:
            rounded = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
            length = rounded if self.max_length is None else max(length, min(rounded, self.max_length))
        padded = torch.full((len(column), length), self.pad_values[name], dtype=torch.int64)  # [B, T]
        for index, values in enumerate(column):
            at = (
                slice(0, len(values)) if self.padding_side == "right" else slice(length - len(values), length)
            )
            padded[index, at] = torch.tensor(values, dtype=torch.int64)
        return padded


def _vectors(name: str, values: Sequence[Any]) -> Tensor:
    """One vector a row, [B, k] float32."""
    sizes = sorted({len(vector) for vector in values})
    if len(sizes) > 1:
        raise DataError(f"column {name!r} has vectors of {sizes[0]} and of {sizes[-1]} numbers")
    return torch.tensor(values, dtype=torch.float32)


def pads_right(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their pads behind the text; what is not [B, T] as `attention_mask` is stays as it is."""
    mask = batch["attention_mask"]
    order = mask.argsort(dim=1, descending=True, stable=True)
    return {name: x.gather(1, order) if x.shape == mask.shape else x for name, x in batch.items()}


def _numbers(name: str, values: list[object]) -> Tensor:
    if not all(isinstance(value, (int, float)) for value in values):
        raise DataError(f"column {name!r} mixes single numbers with other values")
    whole = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64 if whole else torch.float32)


def _integers(name: str, index: int, value: object) -> list[int]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, int) for item in value):
        raise DataError(f"row {index} of the batch: {name!r} must be a list of integers, got {value!r:.60}")
    return list(value)
