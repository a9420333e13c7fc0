"""Several texts of a row as rows of one batch: an answer and a worse one, a question and its documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from peftx.engines.data.collate import IGNORE, pads_right
from peftx.errors import BatchError

IDS, MASK, LABELS = "input_ids", "attention_mask", "labels"


def together(
    batch: dict[str, Any], texts: Sequence[tuple[str, str | None]], *, pad: int, owner: str
) -> dict[str, Any]:
    """All first texts, then all second ones, and so on.

    Args:
        batch: of B rows; its own text is `input_ids` with an `attention_mask`, further ones are columns of a length of
            their own (`model.column(name, own_length=True)`), -1 behind an end.
        texts: of each text the columns of its ids [B, T] and of its labels, None where it has none.
        pad: id that pads are filled with, on the right. owner: whom errors name.

    Returns:
        k B rows for k texts: ids, mask and, unless no text has any, labels [k B, T]; other columns stand k times.

    Raises:
        PeftxError: a column that is not there, or one that has a value for each token of one of the texts.
    """
    asked = {MASK, *(ids for ids, _ in texts), *(labels for _, labels in texts if labels is not None)}
    if missing := ", ".join(sorted(asked - batch.keys())):
        hint = "train on preference rows; in a loop of your own, on those that stack.prepare returns"
        raise BatchError(f"{owner}: the batch has no {missing}", hint=hint)
    mask, given = batch[MASK], {n: x for n, x in batch.items() if n not in asked | {LABELS}}
    if wrong := next((name for name, x in given.items() if x.shape[1:] == mask.shape[1:]), None):
        raise BatchError(f"{owner}: column '{wrong}' has a value a token of one text", hint="leave it out")
    ids = [batch[name].masked_fill(mask == 0, -1) if name == IDS else batch[name] for name, _ in texts]
    labels = [mask[:, :0] if name is None else batch[name] for _, name in texts]
    width = max(x.shape[1] for x in ids)
    told, learned = (
        torch.cat([F.pad(x, (0, width - x.shape[1]), value=-1) for x in each]) for each in (ids, labels)
    )
    rows = {IDS: told.masked_fill(told < 0, pad), MASK: (told >= 0).long()}
    if any(name is not None for _, name in texts):
        rows[LABELS] = learned.masked_fill(learned < 0, IGNORE)
    return pads_right(rows) | {name: torch.cat([x] * len(texts)) for name, x in given.items()}
