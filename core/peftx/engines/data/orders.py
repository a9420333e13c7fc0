"""Conversations that cannot be trained on are found before the first step, those too that a short run does not come to.

A chat template refuses by who speaks when, and whether tools are called. One conversation of each such order is written
out, and none is tokenized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
from datasets import Dataset

from peftx.engines.data.messages import check_rendered
from peftx.engines.data.places import Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 200
"""Orders that are tried; of more those of the first rows."""


def check_orders(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError, which names the row, where the first conversation of some order cannot be trained on."""
    for index in sorted(_firsts(rows))[:MOST]:
        check_rendered(tokenizer, rows[index], Place(rows, index))


def _firsts(rows: Dataset) -> list[int]:
    """The first row of each order, by whole columns; the first rows where their messages are not laid out as usual."""
    column = rows.with_format("arrow")["messages"][:]
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    orders = [_orders(chunk) for chunk in chunks]
    if any(order is None for order in orders):
        return list(range(len(rows)))
    codes = pa.chunked_array(orders).combine_chunks().dictionary_encode().indices.to_numpy()
    return [int(index) for index in np.unique(codes, return_index=True)[1]]


def _orders(messages: pa.Array) -> pa.Array | None:
    """Who speaks, a line for each turn, with a mark where tools are called; None where there are no such columns."""
    kind = messages.type
    if not (pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)):
        return None
    turns = messages.flatten()
    fields = dict(zip((field.name for field in kind.value_type), turns.flatten(), strict=True))
    said = fields["role"]
    if "tool_calls" in fields:
        called = compute.if_else(compute.is_valid(fields["tool_calls"]), " calls", "")
        said = compute.binary_join_element_wise(said, called, "")
    ends = compute.cumulative_sum(compute.list_value_length(messages))
    starts = pa.concat_arrays([pa.array([0], ends.type), ends])
    return compute.binary_join(pa.ListArray.from_arrays(starts, said), "\n")
