"""Rows of `preference` that say nothing, since what they set against each other is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from peftx.engines.data.places import Place, Where
from peftx.errors import DataError


def check_differ(chosen: Sequence[Any], rejected: Sequence[Any], *, where: Where, by: str) -> None:
    """Two answers of a row, as texts or tokens.

    Args:
        where: the row. by: the plugin's id.

    Raises:
        DataError: they are the same.
    """
    if chosen == rejected:
        raise DataError(
            f"{by}: {where}: chosen and rejected are the same, which says nothing of what is preferred",
            hint="leave out rows whose two answers are equal",
        )


def check_passages(rows: Dataset, *, by: str) -> None:
    """Rows of a query (`prompt`), its passage (`chosen`) and another (`rejected`), told apart by contrast.

    Raises:
        DataError: conversations, a row whose two passages are the same but for blanks around them, or one passage for
            all rows.
    """
    if len(rows) and not isinstance(rows[0]["chosen"], str):
        raise DataError(
            f"{by}: {Place(rows, 0)} is a conversation, and passages are texts",
            hint="rows of three texts: prompt, the query; chosen, its passage; rejected, another one",
        )
    chosen, rejected = ([text.strip() for text in rows[name]] for name in ("chosen", "rejected"))
    for i, texts in enumerate(zip(chosen, rejected, strict=True)):
        check_differ(*texts, where=Place(rows, i), by=by)
    if len(rows) > 1 and len(set(chosen)) == 1:
        raise DataError(
            f"{by}: all {len(rows)} rows have one passage, so there is one class and nothing to tell apart",
            hint="rows whose passages differ",
        )
