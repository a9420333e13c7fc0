"""Attributes that have another value for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lent(name: str, value: object, *to: object) -> Iterator[None]:
    """Inside, this attribute of each of `to` is `value`; afterwards, whatever happened, what it was before."""
    before = [getattr(each, name) for each in to]
    try:
        for each in to:
            setattr(each, name, value)
        yield
    finally:
        for each, old in zip(to, before, strict=True):
            setattr(each, name, old)
