"""Attributes that modules have for a while: a tape that notes, a draft that is tried, a switch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def lent(owners: Sequence[object], name: str, values: Iterable[Any]) -> Iterator[None]:
    """Inside, each owner's attribute `name` is its value; what it was comes back, whatever happened.

        with lent(self.deltas, "tape", tapes):
            model(**batch)

    Args:
        owners: deltas, edits or other objects, which have the attribute. values: one for each.

    Raises:
        ValueError: more values than owners, or fewer.
    """
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner, value in zip(owners, values, strict=True):
            setattr(owner, name, value)
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            setattr(owner, name, value)
