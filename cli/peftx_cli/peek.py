"""The first rows of a data file, in milliseconds: enough to see that a pipeline and its data do not go together.

`peftx.engines.data` reads files for a run, to their last row, and explains every fault; it imports a second's worth of
libraries, and this module none. Where a file cannot be read it says nothing: the run will.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, count, islice, pairwise, takewhile
from pathlib import Path
from typing import IO, NamedTuple

from peftx_spec.errors import DataError, PeftxError, nearest
from peftx_spec.models import FORMATS
from peftx_spec.rows import check_learned, check_row, with_further
from peftx_spec.shapes import as_written, class_names, delimiter_of, named, rows_in, shape_of

TEXT = (".txt", ".md")
CELLS = (".csv", ".tsv")
TABLES = (".jsonl", ".ndjson", ".json", *CELLS, ".parquet")
MOST = 1 << 20  # bytes that are looked at
_BETWEEN = re.compile(r"[\s,]*")
_AFTER_NAME = re.compile(r"[\s:]*")
_ARRAY = re.compile(r"\[\s*(?=\{)")
MAP = "map our names to the file's: {path: ..., columns: {prompt: question}}"


class Row(NamedTuple):
    """One row of a file, and where it stands: `train.jsonl:12`."""

    place: str
    values: dict[str, object]


class Unfit(Exception):
    """What is wrong with a data file, and which part of its source says otherwise: path, format or columns."""

    def __init__(self, message: str, *, hint: str = "", part: str = "path") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.part = part


def look(
    file: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    learned: bool = False,
) -> str | None:
    """The format of a file's rows; None where the first row alone does not tell.

    Args:
        file: a path, `peftx:sample/...`, or `hub:owner/name/...`, which is fetched. format, columns, limit: what the
            pipeline says of it. learned: are its rows trained on as they stand.

    Raises:
        Unfit: no such file, nothing in it, or rows that are not what the pipeline says.
    """
    path = _located(file)
    suffix = _suffix(path)
    if suffix not in TABLES:
        return _document(path, suffix, format, columns or {})
    rows = islice(_rows(path, suffix, (columns or {}).get("label", "label")), limit)
    first = next(rows, None)
    if first is None:
        return None if format == "auto" else format
    format = _format(path, first, format, columns or {})
    # A row of a table that is cut short is a fault of the file, which the run explains.
    whole = takewhile(
        lambda row: suffix not in CELLS or None not in row.values.values(), chain([first], rows)
    )
    _check_values(whole, format, columns or {}, learned)
    return format


def _format(path: Path, first: Row, format: str, columns: Mapping[str, str]) -> str:
    """The format of the first row."""
    row = _renamed(str(path), first.values, columns)
    row, known = _arranged(first.place, row, None if format == "auto" else format)
    if known is not None:
        return known
    if format == "auto":
        return _detected(path, row)
    missing = [name for name in FORMATS[format] if name not in row]
    if missing:
        message = f"{path}: {format} needs the column '{missing[0]}', and there are {_names(row)}"
        raise Unfit(message, hint=nearest(missing[0], row) or MAP, part="format")
    return format


def _check_values(rows: Iterable[Row], format: str, columns: Mapping[str, str], learned: bool) -> None:
    """Raises Unfit, which names all of them, where rows do not hold what their format needs."""
    refused: list[tuple[str, DataError]] = []
    for place, values in rows:
        try:
            row, _ = _arranged(place, _renamed(place, values, columns), format)
            check_row(row, place, format, columns=columns)
            if learned:
                check_learned(row, place, format)
        except DataError as error:
            refused.append((place, error))
        except Unfit as error:
            refused.append((place, DataError(error.message, hint=error.hint)))
    if refused:
        told = with_further(refused[0][1], [place for place, _ in refused[1:]])
        raise Unfit(told.message, hint=told.hint or "")


def labels(file: str, *, columns: Mapping[str, str]) -> dict[str, int]:
    """The labels of the rows that are looked at, each with the number of its first row, from 0."""
    path, found = _located(file), dict[str, int]()
    name = columns.get("label", "label")
    for number, row in enumerate(_rows(path, _suffix(path), name)):
        label = as_written({"text": "", "label": row.values.get(name)})["label"]
        if isinstance(label, str):
            found.setdefault(label, number)
    return found


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _located(file: str) -> Path:
    """Where the file is."""
    path = Path(file)
    if file.startswith("hub:"):
        from peftx.engines.hub import rows_path

        try:
            return rows_path(file)
        except PeftxError as error:
            raise Unfit(error.message, hint=error.hint or "") from error
    if file.startswith("peftx:"):
        import peftx

        assets = Path(peftx.__file__).parent / "assets"
        path = assets / file.removeprefix("peftx:")
        if not path.is_file():
            names = sorted(f"peftx:sample/{sample.name}" for sample in (assets / "sample").iterdir())
            hint = nearest(file, names) or f"there are: {', '.join(names)}"
            raise Unfit(f"no packaged data '{file}'", hint=hint)
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent
    names = sorted(child.name for child in folder.iterdir() if child.is_file()) if folder.is_dir() else []
    there = (
        f"in {folder} are: {', '.join(names[:8]) or 'no files'}"
        if folder.is_dir()
        else f"there is no folder {folder}"
    )
    if path.is_dir():
        raise Unfit(f"{path} is a folder, not a data file", hint=there)
    if path.exists():
        raise Unfit(f"{path} is no plain file", hint="rows are read more than once: copy them into a file")
    raise Unfit(f"data file {path} does not exist", hint=nearest(path.name, names) or there)


def _document(path: Path, suffix: str, format: str, columns: Mapping[str, str]) -> str:
    """A file that is one text."""
    if columns:
        raise Unfit(
            f"{path} has no columns: it is one document of text", hint="leave them out", part="columns"
        )
    if format not in ("auto", "text"):
        hint = f"rows are read from {', '.join(TABLES)}"
        raise Unfit(
            f"{path}: {format} needs rows, and this is one document of text", hint=hint, part="format"
        )
    if format == "auto" and suffix not in TEXT:
        hint = f"known are {', '.join((*TEXT, *TABLES))}, each also with .gz; or set 'format: text'"
        raise Unfit(f"{path}: the suffix '{suffix}' does not tell the format", hint=hint)
    _start(path)
    return "text"


def _start(path: Path) -> tuple[str, bool]:
    """The first text of a file, and whether there is more."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
            start = stream.read(MOST + 1)
        text = start[:MOST].decode("utf-8-sig", "strict" if len(start) <= MOST else "ignore")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise Unfit(f"{path} cannot be read as UTF-8 text: {error}", hint="save it as UTF-8") from error
    if not text.strip():
        raise Unfit(f"{path} is empty", hint="give a file with rows")
    return text, len(start) > MOST


def _rows(path: Path, suffix: str, label: str) -> Iterator[Row]:
    """The rows of what is looked at, up to the first that cannot be read."""
    if suffix == ".parquet":
        yield from _parquet(path, label)
        return
    text, more = _start(path)
    try:
        found = _cells(text, suffix, more) if suffix in CELLS else _objects(text, suffix, more)
        for place, value in found:
            if not isinstance(value, dict):
                return
            yield Row(f"{path}:{place}", value)
    except (csv.Error, ValueError, RecursionError):
        return


def _parquet(path: Path, label: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = class_names(file.schema_arrow.metadata, label)
            batches = (batch.to_pylist() for batch in islice(file.iter_batches(batch_size=256), 4))
            for index, row in enumerate(chain.from_iterable(batches)):
                yield Row(f"{path}: row {index} (counting from 0)", named(row, label, names))
    except (pa.ArrowException, OSError) as error:
        raise Unfit(f"{path}: not Parquet that can be read: {error}") from error


def _cells(text: str, suffix: str, more: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """The rows of a table. Where the file goes on, the last one may be cut anywhere, and is left out, unless it is the
    first, which has its columns in any case."""
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else delimiter_of(text)
    )
    names = reader.fieldnames or ()
    cells = ({name: row[name] for name in names} for row in reader)
    rows = ((str(reader.line_num - "".join(filter(None, row.values())).count("\n")), row) for row in cells)
    yield from islice(rows, 1)
    yield from (row for row, _ in pairwise(chain(rows, () if more else (("", {}),))))


def _objects(text: str, suffix: str, more: bool) -> Iterator[tuple[str, object]]:
    """The values of lines, of an array, or of the first array of objects in an object."""
    if suffix != ".json":
        lines = enumerate(text.split("\n"), start=1)
        yield from ((str(number), json.loads(line)) for number, line in lines if line.strip())
        return
    body, decoder, inside, at = text.lstrip(), json.JSONDecoder(), "", 1
    if body.startswith("{"):
        if not more and rows_in(json.loads(body)) is None:
            return
        inside, at = _inside(body, decoder)
    for index in count():
        at = _BETWEEN.match(body, at).end()  # type: ignore[union-attr]  # it matches anywhere
        if at == len(body):
            return
        value, at = decoder.raw_decode(body, at)
        yield f" {inside}row {index} (counting from 0)", value


def _inside(body: str, decoder: json.JSONDecoder) -> tuple[str, int]:
    """The name of the first array of objects in an object, for a place, and where its values begin.

    Raises ValueError: the object is read to its end, or to that of the text, without one.
    """
    at = 1
    while True:
        name, at = decoder.raw_decode(body, _BETWEEN.match(body, at).end())  # type: ignore[union-attr]
        at = _AFTER_NAME.match(body, at).end()  # type: ignore[union-attr]
        if array := _ARRAY.match(body, at):
            return f"{name}, ", array.end()
        _, at = decoder.raw_decode(body, at)


def _renamed(place: str, row: dict[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """The row under our names."""
    for source in columns.values():
        if source not in row:
            hint = nearest(source, row) or f"there are {_names(row)}"
            raise Unfit(f"{place}: there is no column '{source}'", hint=hint, part="columns")
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return {**{ours: row[source] for ours, source in columns.items()}, **rest}


def _arranged(place: str, row: dict[str, object], format: str | None) -> tuple[dict[str, object], str | None]:
    """The row in our columns, and its format, if it is laid out in another way that is well known."""
    shape = shape_of(row, format)
    if shape is None:
        return as_written(row), None
    try:
        return as_written(shape.convert(row)), shape.format
    except PeftxError as error:
        raise Unfit(f"{place}: {error.message}", hint=error.hint or MAP) from error


def _detected(path: Path, row: Mapping[str, object]) -> str:
    """The one format whose columns the row has; of two, the one that explains more of it."""
    fitting = [name for name, needed in FORMATS.items() if set(row) >= set(needed)]
    best = [one for one in fitting if not any(set(FORMATS[one]) < set(FORMATS[other]) for other in fitting)]
    if len(best) == 1:
        return best[0]
    if best:
        raise Unfit(
            f"{path}: the columns {_names(row)} fit {' and '.join(best)}", hint="say which: format: ..."
        )
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    raise Unfit(f"{path}: the columns {_names(row)} fit no format ({known})", hint=MAP)


def _names(row: Mapping[str, object]) -> str:
    return ", ".join(f"'{name}'" for name in row) or "(none)"
