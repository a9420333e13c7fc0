"""Rows on the disk, mapped into memory: what is read of them comes and goes as the system has room.

    mapped               one table of Arrow, out of a file
    dataset_of_blocks    such tables one after the other
    with_column          rows with a column more
    pieces               a column, piece by piece
    Lazy                 what is made of rows when it is looked at

The files lie where `TMPDIR` says, and have no name from the moment they are mapped, so that nothing is left of them
when the rows are dropped, or the process is killed. (Windows removes no file in use: there they stay in its folder for
temporary files.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from secrets import token_hex
from tempfile import mkstemp
from typing import Any, TypeVar, overload

import pyarrow as pa
from datasets import Dataset

from peftx.engines.data.places import row_for_row
from peftx.errors import DataError

BLOCK = 10_000
"""Rows that are held in memory together."""
WORTH_BYTES = 2**20
"""A table of fewer bytes stays there."""
T = TypeVar("T")


def mapped(table: pa.Table) -> pa.Table:
    """The same rows, out of a file; a small table as it is.

    Raises:
        DataError: there is no room for the file.
    """
    if table.nbytes < WORTH_BYTES:
        return table
    handle, name = mkstemp(prefix="peftx-", suffix=".arrow")
    try:
        with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        with pa.memory_map(name) as source:
            return pa.ipc.open_stream(source).read_all()
    except OSError as error:
        raise DataError(
            f"'{os.path.dirname(name)}' takes no further rows: {error.strerror or error}",
            hint="set TMPDIR to a folder with room",
        ) from error
    finally:
        with suppress(PermissionError):  # Windows
            os.unlink(name)


def dataset_of_blocks(blocks: Iterable[pa.Table], *, like: Dataset | None = None) -> Dataset | None:
    """The blocks one after the other; None of no blocks.

    Args:
        like: rows with the same columns, whose features the result has.

    Raises:
        pa.ArrowException: their types do not join.
    """
    tables = [mapped(block) for block in blocks]
    if not tables:
        return None
    table = pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    # A fingerprint of its own: `datasets` would write out all rows, twice in memory, to make one of them.
    return Dataset(table, info=None if like is None else like.info.copy(), fingerprint=token_hex(8))


def with_column(rows: Dataset, name: str, values: Sequence[Any]) -> Dataset:
    """The rows with a column more, in the place of one that was called so."""
    found = rows.remove_columns([name]) if name in rows.column_names else rows
    if found._indices is not None:  # `datasets` would lay the chosen rows out in memory
        chosen = found.with_format("arrow")
        blocks = (chosen[start : start + BLOCK] for start in range(0, len(found), BLOCK))
        found = dataset_of_blocks(blocks, like=found) or found
    return row_for_row(found.add_column(name, list(values)), rows)


def pieces(rows: Dataset, name: str) -> Iterator[tuple[int, pa.Array | pa.ChunkedArray]]:
    """A column piece by piece, each with the place of its first row: of chosen rows Arrow makes a copy."""
    table = rows.select_columns([name]).with_format("arrow")
    for start in range(0, len(rows), BLOCK):
        yield start, table[start : start + BLOCK][name]


class Lazy(Sequence[T]):
    """`item(0)`, `item(1)` ... `item(count - 1)`, each made when it is looked at, and not kept."""

    def __init__(self, count: int, item: Callable[[int], T]) -> None:
        self.length, self.item = count, item

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        places = range(self.length)[at]
        return self.item(places) if isinstance(places, int) else [self.item(place) for place in places]

    def __iter__(self) -> Iterator[T]:
        return map(self.item, range(self.length))
