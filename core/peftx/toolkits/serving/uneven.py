"""Attention of rows of very different lengths, each over about as many columns as it has.

Rows of a shelf lie side by side and end together (`shelves`), so that attention reads of every row as many columns as
the longest has. Here each shelf is read by itself, and of a shelf the longest rows each by itself where that is sooner,
and all rows over the columns of the longest of the others:

    lengths   250, and 40 fifteen times       plain: 16 x 250 columns       here: 250 + 16 x 40

Of the same tensors, without a copy; the results of the long rows take the place of what the second call made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftx.toolkits.serving.shelves import Shelved

NAME = "sdpa_by_length"
CALL = 256
"""Columns of one row that take about as long as a call of attention does before it computes anything."""


@dataclass(frozen=True)
class _Part:
    """So many rows of one shelf: `columns` in all, of which `common` are read of every row, and more of those in
    `alone`."""

    rows: int
    columns: int
    common: int
    alone: dict[int, int]
    """Row -> its columns."""


_PARTS: ContextVar[tuple[_Part, ...]] = ContextVar("peftx_columns", default=())


def alone(lengths: Sequence[int], call: int = CALL) -> list[int]:
    """The rows that are best computed by themselves, longest first: those that make the fewest columns in all."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs, apart = list[int](), 0
    for row in order:
        costs.append(apart + len(lengths) * lengths[row])
        apart += lengths[row] + call
    return order[: costs.index(min(costs))] if costs else []


def _part_of(lengths: Sequence[int]) -> _Part:
    """Of a shelf whose rows have these lengths, before a column is written."""
    rows = alone(lengths)
    others = [length for i, length in enumerate(lengths) if i not in rows]
    return _Part(len(lengths), max(lengths) + 1, max(others) + 1, {i: lengths[i] + 1 for i in rows})


@contextmanager
def by_length(model: PreTrainedModel, shelves: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let a call that writes one column behind rows of these lengths, of each shelf, read each row's own columns, where
    that is sooner. Models that attend by another way than torch's are called as they are."""
    parts = tuple(map(_part_of, shelves))
    uneven = len(parts) > 1 or any(part.alone for part in parts)
    config = model.config.get_text_config() if uneven and model._supports_attention_backend else None
    if config is None or config._attn_implementation != "sdpa":
        yield
        return
    token, config._attn_implementation = _PARTS.set(parts), NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        _PARTS.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, H, 1, D], key and value [B, H', columns, D], mask [B, 1, 1, columns] -> [B, 1, H, D]."""
    parts = _PARTS.get()
    keys, values = (x.parts if isinstance(x, Shelved) else [x] for x in (key, value))
    if (
        attention_mask is None
        or options.get("position_bias") is not None
        # Another thread's call, or one with a plugin's own columns in front:
        or [(part.rows, part.columns) for part in parts] != [(len(own), own.shape[2]) for own in keys]
        or not len(query) == len(attention_mask) == sum(part.rows for part in parts)
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def over(rows: slice, own: tuple[Tensor, Tensor]) -> Tensor:
        """The last columns alone, as many as the keys have."""
        mask = attention_mask[rows, ..., -own[0].shape[2] :]
        return sdpa_attention_forward(module, query[rows], *own, mask, **options)[0]

    first, found = 0, list[Tensor]()
    for part, key, value in zip(parts, keys, values, strict=True):
        common = slice(part.columns - part.common, None)
        each = over(slice(first, first + part.rows), (key[:, :, common], value[:, :, common]))
        for row, columns in part.alone.items():
            own = slice(row, row + 1), slice(None), slice(part.columns - columns, None)
            each[row : row + 1] = over(slice(first + row, first + row + 1), (key[own], value[own]))
        found.append(each)
        first += part.rows
    return found[0] if len(found) == 1 else torch.cat(found), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
