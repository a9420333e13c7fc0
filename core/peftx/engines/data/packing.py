"""Several texts in one row, each of which sees itself alone: fewer pads, the same loss."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from peftx.engines.data.collate import IGNORE, Collator


def bins_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in bins of so many tokens: longest first, each into the bin with the most room."""
    bins: list[tuple[int, int, list[int]]] = []  # (-room, number, indices), a heap
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = bins and -bins[0][0] >= lengths[index]
        free, number, held = heapq.heappop(bins) if fits else (-capacity, len(bins), [])
        heapq.heappush(bins, (free + lengths[index], number, [*held, index]))
    return [held for _, _, held in sorted(bins, key=lambda found: found[1])]


def own_tokens(segments: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What each token sees, and where it stands in its text.

    Args:
        segments: [R, T] int64, the number of a token's text in its row, from 1; 0 on pads.

    Returns:
        The mask to add to the attention's scores, [R, 1, T, T], and positions [R, T]. A pad sees pads.
    """
    before = (segments[:, :, None] == segments[:, None, :]).tril()
    mask = torch.zeros(before.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~before, torch.finfo(dtype).min)[:, None], before.sum(-1) - 1


class Packing:
    """Collates as `collator` does, the rows of a batch behind each other in as few rows as hold them.

    Args:
        capacity: tokens of a row at most. dtype: of the mask, the model's.
    """

    def __init__(self, collator: Collator, capacity: int, dtype: torch.dtype) -> None:
        self.collator, self.capacity, self.dtype = collator, capacity, dtype

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids` [R, T] and `attention_mask` [R, 1, T, T]; a text's first token has
        no label, since what stands before it is another's."""
        lengths = [len(row["input_ids"]) for row in rows]
        together = []
        for held in bins_of(lengths, max(self.capacity, *lengths)):
            texts = [rows[index] for index in held]
            together.append({
                "input_ids": list(chain.from_iterable(text["input_ids"] for text in texts)),
                "labels": list(chain.from_iterable([IGNORE, *text["labels"][1:]] for text in texts)),
                "token_type_ids": [n for n, text in enumerate(texts, 1) for _ in text["input_ids"]],
            })  # fmt: skip
        batch = self.collator(together)
        mask, positions = own_tokens(batch.pop("token_type_ids"), self.dtype)
        return {**batch, "attention_mask": mask, "position_ids": positions}
