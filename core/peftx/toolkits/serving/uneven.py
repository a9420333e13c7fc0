"""Attention of rows of very different lengths, each over about as many columns as it has.

Rows lie side by side and end together (`slots`), so that attention reads of every row as many columns as the longest
has. Here the longest rows are computed each by itself, and all rows over the columns of the longest of the others:

    lengths   900 40 38 35       plain: 4 x 900 columns       here: 900 + 4 x 40

Of the same tensors, without a copy; the results of the long rows take the place of what the second call made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_length"
CALL = 256
"""Columns of one row that take about as long as a call of attention does before it computes anything."""


@dataclass(frozen=True)
class _Plan:
    """What is in use: `columns` in all, of which `common` are read of every row, and more of the rows in `alone`."""

    columns: int
    common: int
    alone: dict[int, int]
    """Row -> its columns."""


_PLAN: ContextVar[_Plan | None] = ContextVar("peftx_columns", default=None)


def alone(lengths: Sequence[int], call: int = CALL) -> list[int]:
    """The rows that are best computed by themselves, longest first: those that make the fewest columns in all."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs, apart = list[int](), 0
    for row in order:
        costs.append(apart + len(lengths) * lengths[row])
        apart += lengths[row] + call
    return order[: costs.index(min(costs))] if costs else []


@contextmanager
def by_length(model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
    """Let a call that writes one column behind rows of these lengths read each row's own columns, where that is sooner.
    Models that attend by another way than torch's are called as they are."""
    rows = alone(lengths)
    config = model.config.get_text_config() if rows and model._supports_attention_backend else None
    if config is None or config._attn_implementation != "sdpa":
        yield
        return
    others = [length for i, length in enumerate(lengths) if i not in rows]
    plan = _Plan(max(lengths) + 1, max(others) + 1, {i: lengths[i] + 1 for i in rows})
    token, config._attn_implementation = _PLAN.set(plan), NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        _PLAN.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, H, 1, D], key and value [B, H', columns, D], mask [B, 1, 1, columns] -> [B, 1, H, D]."""
    plan = _PLAN.get()
    if (
        plan is None  # another thread's call
        or attention_mask is None
        or options.get("position_bias") is not None
        or not plan.columns == key.shape[2] == attention_mask.shape[-1]  # a plugin's own stand in front
        or query.shape[0] != len(attention_mask)
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def over(rows: slice, columns: int) -> Tensor:
        last = slice(plan.columns - columns, None)
        return sdpa_attention_forward(
            module, query[rows], key[rows, :, last], value[rows, :, last], attention_mask[rows, ..., last],
            **options,
        )[0]  # fmt: skip

    found = over(slice(None), plan.common)
    for row, columns in plan.alone.items():
        found[row : row + 1] = over(slice(row, row + 1), columns)
    return found, None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
