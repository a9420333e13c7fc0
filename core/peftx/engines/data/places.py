"""Where rows stand, in the words that an error names them by: `train.jsonl:12`, however far they have come since.

It is kept beside each dataset, and in no column of it: whoever sees the rows does not see it. What nobody told here
where it comes from, as rows of a program, is known by its number alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from datasets import Dataset


class _File(NamedTuple):
    """A file, and the line of each of its rows, from 1; none where its rows have no lines, as in Parquet."""

    path: str
    lines: Sequence[int]


class _Rows(NamedTuple):
    """Rows that these came of, and which one each was; None where only what is in a row tells, after a plugin."""

    before: Dataset
    indices: Sequence[int] | None
    by: str


_ORIGINS: WeakKeyDictionary[Dataset, _File | _Rows] = WeakKeyDictionary()


def read_from(rows: Dataset, path: str, lines: Sequence[int]) -> Dataset:
    """The rows, known to stand in a file. lines: of each its line, from 1; empty where rows have none."""
    _ORIGINS[rows] = _File(path, lines)
    return rows


def row_for_row(made: Dataset, before: Dataset) -> Dataset:
    """`made`, known to have a row for each of those before, in their order."""
    if made is not before:
        _ORIGINS[made] = _Rows(before, range(len(before)), "")
    return made


def select(rows: Dataset, indices: Iterable[int]) -> Dataset:
    """These of the rows, known to be those."""
    chosen = array("q", indices)
    found = rows.select(chosen)
    _ORIGINS[found] = _Rows(rows, chosen, "")
    return found


def left_by(made: Dataset, before: Dataset, by: str) -> None:
    """`made` is what the plugin `by` left of the rows before: each is known by what is in it, if that is unchanged."""
    if made is not before and made not in _ORIGINS:
        _ORIGINS[made] = _Rows(before, None, by)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a row stands, found out once it is told: `train.jsonl:12`, `train.parquet: row 3 (counting from 0)`,
    `row 3 (counting from 0)`, and behind that which part of the row, where that is said."""

    rows: Dataset | Iterable[Any]
    index: int
    part: str = ""

    def __str__(self) -> str:
        return _told(self.rows, self.index) + (f", {self.part}" if self.part else "")


Where: TypeAlias = str | Place
"""What messages begin with."""


def inside(where: Where, part: str) -> Where:
    """Where a part of the row stands: `train.jsonl:12, chosen`."""
    return replace(where, part=part) if isinstance(where, Place) else f"{where}, {part}"


class Listed(list[Any]):
    """Rows as a list, which know where they stand."""

    def __init__(self, rows: Dataset) -> None:
        super().__init__(rows)
        self.rows = rows


def _told(rows: Any, index: int) -> str:
    rows, number = rows.rows if isinstance(rows, Listed) else rows, f"row {index} (counting from 0)"
    origin = _ORIGINS.get(rows) if isinstance(rows, Dataset) else None
    if origin is None:
        return number
    if isinstance(origin, _File):
        return f"{origin.path}:{origin.lines[index]}" if origin.lines else f"{origin.path}: {number}"
    if origin.indices is not None:
        return _told(origin.before, origin.indices[index])
    found = _like(origin.before, rows[index])
    return f"{number} of what '{origin.by}' left" if found is None else _told(origin.before, found)


def _like(rows: Dataset, row: Mapping[str, Any]) -> int | None:
    """The first of the rows whose columns hold what they hold in `row`: its own, or one that is at fault alike."""
    if not row.keys() >= set(rows.column_names):
        return None
    wanted = {name: row[name] for name in rows.column_names}
    return next((index for index, other in enumerate(rows) if other == wanted), None)
