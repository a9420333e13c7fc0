"""Tokenized rows on the disk, under a hash of all that decides about them: the same rows are not tokenized twice.

They lie in `rows` of `peftx_spec.places.cache_folder`. What cannot be read, or is not what was written, is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any

import pyarrow as pa
from datasets import Dataset

from peftx.engines.files import keep_within
from peftx.version import __version__
from peftx_spec.places import cache_folder

WORTH_BYTES = 2**20
"""Rows of fewer bytes are tokenized as they come."""
WORTH_SECONDS = 2.0
"""What was made in less is not written."""
AT_ONCE = 2**14
"""Rows that a file's batches have, and that are hashed together."""
MOST_BYTES = 10 * 2**30
"""Of all that is kept; what was used longest ago goes first."""


def kept(rows: Dataset, about: Callable[[], Mapping[str, Any]], make: Callable[[], Dataset]) -> Dataset:
    """What `make` gives, or gave before for the same rows and the same `about`, mapped from its file.

    Args:
        about: gives, as JSON, what the result depends on beside the rows and the files of this folder.
    """
    place = cache_folder()
    if place is None or rows.data.nbytes < WORTH_BYTES:
        return make()
    folder = place / "rows"
    key = hashlib.sha256(json.dumps([_code(), _digest(rows), about()], sort_keys=True).encode()).hexdigest()
    file = folder / f"{key[:32]}.arrow"
    found = _read(file)
    if found is not None:
        return found
    began = time.perf_counter()
    made = make()
    if time.perf_counter() - began >= WORTH_SECONDS:
        with suppress(OSError):  # a full or read-only disk: then they are tokenized next time too
            _write(made, file)
            keep_within(folder, "*.arrow", most=MOST_BYTES)
    return made


class _Hash:
    """A file that is written to for its digest alone."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.closed = False

    def write(self, piece: bytes) -> int:
        self.sha.update(piece)
        return len(piece)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def _digest(rows: Dataset) -> str:
    """sha256 of the columns' names and values, however they lie in memory; few rows at a time are copied."""
    table, sink = rows.with_format("arrow"), _Hash()
    with (
        pa.PythonFile(sink, mode="w") as file,
        pa.ipc.new_stream(file, table[:0].schema.remove_metadata()) as stream,
    ):
        for start in range(0, len(rows), AT_ONCE):
            part = table[start : start + AT_ONCE].replace_schema_metadata(None)
            # Taken, since slices and joined pieces of the same values are written with other bytes.
            stream.write_table(part.take(pa.array(range(len(part)))).combine_chunks())
    return sink.sha.hexdigest()


@cache
def _code() -> str:
    """Of what makes ids of rows: another version, or a changed file, makes them anew."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join([__version__.encode(), *(f.read_bytes() for f in files)])).hexdigest()


def _read(file: Path) -> Dataset | None:
    if not file.is_file():
        return None
    try:
        with pa.memory_map(str(file)) as source:
            written = (pa.ipc.open_stream(source).schema.metadata or {}).get(b"sha256", b"").decode()
        found = Dataset.from_file(str(file))
        if _digest(found) != written:
            raise ValueError("other values than were written")
    except (OSError, ValueError, pa.ArrowException) as error:
        warnings.warn(f"{file} is damaged and is made again: {error}", stacklevel=2)
        return None
    with suppress(OSError):
        os.utime(file)
    return found


def _write(rows: Dataset, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = rows.with_format("arrow")[:].replace_schema_metadata({"sha256": _digest(rows)})
    beside = file.with_name(f".{file.name}-{token_hex(6)}")
    try:
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=AT_ONCE)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
