"""Raw reading: a path becomes text or records, and every fault names file, line and column.

Nothing here knows what a row should hold; that is `formats.py`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from peftx.errors import DataError, nearest
from peftx_spec.rows import json_type
from peftx_spec.shapes import BEGIN, class_names, delimiter_of, named, rows_in

TEXT_SUFFIXES = frozenset({".txt", ".md"})
TABLE_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"})

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SNIPPET = 60  # characters of a faulty line that an error shows


class Record(NamedTuple):
    """One row of a file and where it stands, ready for a message: `train.jsonl:12`; its line, 0 where it has none."""

    place: str
    value: object
    line: int = 0


class Unread:
    """What stands in a file and comes into no row that anything reads: how often, and where first."""

    BLANK = "blank lines between the rows are left out"
    NAMELESS = "values in a column that the header does not name are read by nothing"

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, int]] = {}

    def add(self, what: str, lines: Sequence[int]) -> None:
        if lines:
            count, first = self.found.get(what, (0, lines[0]))
            self.found[what] = count + len(lines), first

    def told(self, path: Path) -> list[str]:
        """A sentence for each kind: `a.jsonl: blank lines between the rows are left out: 3, the first is line 12`."""
        return [
            f"{path}: {what}: {count:,}, the first is line {first}"
            for what, (count, first) in self.found.items()
        ]


def file_suffix(path: Path) -> str:
    """The suffix that tells what a file holds, in lower case: `.jsonl` for `train.JSONL.gz`."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def require_file(path: Path) -> None:
    """Raises DataError unless `path` is a file; names the nearest file in the folder."""
    if path.is_file():
        return
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.is_file())
        held = f"it holds {', '.join(names[:5])}" if names else "it holds no file"
        raise DataError(f"{path} is a folder, not a data file", hint=f"name one file of it; {held}")
    folder = path.parent
    if not folder.is_dir():
        raise DataError(f"{path} does not exist: there is no folder {folder}")
    names = [child.name for child in folder.iterdir() if child.is_file()]
    raise DataError(f"{path} does not exist", hint=nearest(path.name, names) or None)


def read_text(path: Path) -> str:
    """The whole file as text, exactly as it stands (a UTF-8 byte order mark is dropped).

    Raises DataError: missing, empty, binary, not UTF-8, broken gzip.
    """
    return "".join(text for _, text in _lines(path))


def read_records(path: Path, unread: Unread | None = None, *, label: str | None = None) -> Iterator[Record]:
    """The records of a .jsonl, .json, .csv or .tsv file in order, read no further than they are asked for
    (a .json file is parsed whole). What comes into no row is counted in `unread`.

    Args:
        label: a column whose numbers become names where Parquet has some for them.

    Raises DataError as `read_text` does, and for anything malformed.
    """
    suffix, unread = file_suffix(path), Unread() if unread is None else unread
    if suffix in {".jsonl", ".ndjson"}:
        return _read_jsonl(path, unread)
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".parquet":
        return _read_parquet(path, label)
    return _read_csv(path, unread, delimiter="\t" if suffix == ".tsv" else None)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end). Only `\\n` ends a line: JSON strings may hold U+2028."""
    require_file(path)
    offset = 0  # bytes before this line, in the unpacked file
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            stream: BinaryIO = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
            for number, line in enumerate(stream, start=1):
                yield number, _decode(path, number, offset, line)
                offset += len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: broken gzip data after byte {offset} of the unpacked text: {error}"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if offset == 0:
        raise DataError(f"{path} is empty")


def _decode(path: Path, number: int, offset: int, line: bytes) -> str:
    if number == 1 and line.startswith(_UTF16_BOMS):
        raise DataError(f"{path} is UTF-16 text, not UTF-8", hint="save it as UTF-8")
    zero = line.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path} is binary: byte {offset + zero} (line {number}) is zero", hint="give a text file"
        )
    start = len(_UTF8_BOM) if number == 1 and line.startswith(_UTF8_BOM) else 0
    try:
        return line[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start
        raise DataError(
            f"{path}: not UTF-8 at byte {offset + at} (line {number}): byte 0x{line[at]:02x}, {error.reason}",
            hint="save the file as UTF-8",
        ) from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"key {twice!r} stands twice in one object")
    return found


def _snippet(line: str, column: int) -> str:
    """The part of a line around `column` (from 1)."""
    start = max(0, column - 1 - _SNIPPET // 2)
    return line[start : start + _SNIPPET].rstrip("\r\n")


def _parse_json(text: str, *, path: Path, first_line: int) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        place = f"{path}:{first_line + error.lineno - 1}:{error.colno}"
        raise DataError(f"{place}: not JSON: {error.msg}: {_snippet(line, error.colno)!r}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}:{first_line}: not JSON that can be read: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path}:{first_line}: JSON nested too deeply") from error
    except DataError as error:
        raise DataError(f"{path}:{first_line}: {error.message}") from error


def _read_jsonl(path: Path, unread: Unread) -> Iterator[Record]:
    blank = list[int]()  # since the last row: at the end of a file they are nothing to tell
    for number, line in _lines(path):
        if line.strip():
            unread.add(Unread.BLANK, blank)
            blank.clear()
            text = line.rstrip("\r\n")  # so that an error at its end is on this line, not on the next
            yield Record(f"{path}:{number}", _parse_json(text, path=path, first_line=number), number)
        else:
            blank.append(number)


def _read_json(path: Path) -> Iterator[Record]:
    value = _parse_json(read_text(path), path=path, first_line=1)
    inside, rows = rows_in(value) or ("", value)
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: expected an array of objects, or an object that holds one, got {json_type(rows)}",
            hint="one object on each line belongs in a .jsonl file",
        )
    for index, row in enumerate(rows):
        yield Record(f"{path}: {f'{inside}, ' if inside else ''}row {index} (counting from 0)", row)


def _read_parquet(path: Path, label: str | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    require_file(path)
    try:
        with parquet.ParquetFile(path) as file:
            count, names = 0, class_names(file.schema_arrow.metadata, label)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield Record(f"{path}: row {count} (counting from 0)", named(row, label, names))
                    count += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet that can be read: {error}") from error


def _ended_lines(path: Path) -> Iterator[str]:
    """The lines of a table, which `\\r` by itself ends too."""
    for _, line in _lines(path):
        yield from io.StringIO(line, newline="") if "\r" in line else (line,)


def _first(lines: Iterator[str], size: int) -> list[str]:
    """The first lines, of so many characters or a few more."""
    found = []
    for line in lines:
        found.append(line)
        size -= len(line)
        if size <= 0:
            break
    return found


def _read_csv(path: Path, unread: Unread, *, delimiter: str | None) -> Iterator[Record]:
    lines, head = _ended_lines(path), list[str]()
    if delimiter is None:
        head = _first(lines, BEGIN)
    reader = csv.reader(chain(head, lines), delimiter=delimiter or delimiter_of("".join(head)), strict=True)
    header: list[str] | None = None
    blank = list[int]()
    while True:
        first_line = reader.line_num + 1
        # The limit on a field's size is a setting of the whole process: lifted for one row, then put back.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{first_line}: not CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if not cells:
            blank.append(first_line)
            continue
        unread.add(Unread.BLANK, blank)
        blank.clear()
        if header is None:
            twice = sorted({name for name in cells if cells.count(name) > 1})
            if twice:
                raise DataError(f"{path}:{first_line}: the header names {', '.join(map(repr, twice))} twice")
            header = cells
        elif len(cells) != len(header):
            raise DataError(
                f"{path}:{first_line}: {len(cells)} fields, but the header has {len(header)} ({', '.join(header)})",
                hint="a field that holds the delimiter, a quote or a line break needs double quotes around it",
            )
        else:
            row = dict(zip(header, cells, strict=True))
            if row.get(""):
                unread.add(Unread.NAMELESS, [first_line])
            yield Record(f"{path}:{first_line}", row, first_line)
