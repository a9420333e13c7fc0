"""Local files become `datasets.Dataset`s. Five formats:

    text               {text}                        one document a file (.txt, .md), or one a row
    prompt-completion  {prompt, completion}
    messages           {messages: [{role, content}]}  roles: system, user, assistant
    classification     {text, label}                 labels are texts; a whole number is its digits
    preference         {prompt, chosen, rejected}

All but `messages` may stand in .jsonl/.ndjson, .json (an array, alone or in an object), .parquet, .csv (any delimiter)
or .tsv; `messages` not in the last two. Layouts that are well known (Alpaca, ShareGPT, question and answer) are read as
these, see `peftx_spec.shapes`. Every file may be gzipped (seen by its first bytes, not its name). Columns beyond a
format's own stay as they are. Rows are read in blocks and lie on the disk then (`mapped.py`).
"""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final

import pyarrow as pa
from datasets import ClassLabel, Dataset

from peftx.engines.data.files import (
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Record,
    Unread,
    file_suffix,
    read_records,
    read_text,
    require_file,
)
from peftx.engines.data.gate import COLUMNS, FORMATS, check_rows
from peftx.engines.data.mapped import BLOCK, dataset_of_blocks
from peftx.engines.data.places import Place, read_from, row_for_row
from peftx.errors import DataError, PeftxError, nearest
from peftx_spec.rows import check_row, json_type, names_of, with_further
from peftx_spec.shapes import Shape, as_written, shape_of

LETTERS = 2**24
"""Of the texts that are held as objects of Python while a file is read, with which a block ends."""

# What Arrow raises for mixed types, for integers over 64 bits, and for lone surrogates.
_NOT_ARROW: Final = (pa.ArrowException, OverflowError, UnicodeEncodeError)


def read_dataset(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """Read one local file.

    Args:
        path: the file.
        format: one of `FORMATS`, or `auto` (see `detect_format`).
        columns: our name -> the file's name: `{"prompt": "question"}` reads `prompt` from `question`.
        limit: read only the first `limit` rows; at least 1.

    Returns:
        A dataset with the format's columns first, then the file's other columns (None where a row
        lacks one).

    Raises:
        DataError: the file is missing, empty, binary, not UTF-8 or malformed; a row lacks a column or holds a
            value of the wrong type; nothing is left to read. The message names the line.

    Warns where something comes into no row: blank lines between rows, a column without a name.
    """
    file = Path(path)
    if limit is not None and limit < 1:
        raise DataError(
            f"{file}: no rows with limit {limit}", hint="limit is at least 1; leave it out to read all"
        )
    _check_mapping(file, columns)
    if format == "auto":
        format = detect_format(file, columns=columns)
    if format not in COLUMNS:
        raise DataError(
            f"{file}: unknown format {format!r}; formats: auto, {', '.join(FORMATS)}",
            hint=nearest(format, FORMATS) or None,
        )
    suffix = file_suffix(file)
    require_file(file)
    if suffix not in TABLE_SUFFIXES:
        if format != "text":
            raise DataError(
                f"{file}: format {format!r} needs rows, and a {suffix or 'suffixless'} file is one document of text",
                hint=f"rows are read from {', '.join(sorted(TABLE_SUFFIXES))}",
            )
        if columns:
            raise DataError(
                f"{file}: columns {dict(columns)} of a file that has none: it is one document of text"
            )
        return read_from(Dataset.from_dict({"text": [_document(file)]}), str(file), [])
    if format == "messages" and suffix in {".csv", ".tsv"}:
        raise DataError(
            f"{file}: format 'messages' is nested and does not fit a {suffix} file", hint="use .jsonl"
        )

    lines, unread = array("q"), Unread()

    def checked() -> Iterator[tuple[dict[str, object], str]]:
        del lines[:]
        unread.found.clear()
        shape: Shape | None = None
        records = islice(read_records(file, unread, label=(columns or {}).get("label", "label")), limit)
        for index, record in enumerate(records):
            try:
                row = _rename(record, columns)
                shape = _shape(row, format) if index == 0 else shape
                yield _fitting(row, record.place, shape, format, columns), record.place
                lines.append(record.line)
            except DataError as error:
                raise with_further(error, list(_refused(records, shape, format, columns))) from error

    try:
        found = _in_blocks((row for row, _ in checked()), first=COLUMNS[format])
    except _NOT_ARROW:  # blocks have types that do not join: all rows at once may, or tell where they do not
        rows, places = map(list, zip(*checked(), strict=True))
        found = _to_dataset(rows, places, first=COLUMNS[format])
    if found is None:
        raise DataError(f"{file} holds no rows")
    for said in unread.told(file):
        warnings.warn(said, stacklevel=2)
    return read_from(found, str(file), lines if all(lines) else [])


def dataset_of(
    rows: Sequence[Mapping[str, object]], *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> tuple[Dataset, str]:
    """Rows that a program made, through the same gate as rows of a file.

    Args:
        rows: mappings; the keys of the first one tell the format.

    Returns:
        (dataset, format); a row that lacks a further column has None there.

    Raises:
        DataError: as `read_dataset`; names the row.
    """
    places = [f"row {index} (counting from 0)" for index in range(len(rows))]
    renamed = []
    for place, row in zip(places, rows, strict=True):
        value: object = row  # whatever a program hands over
        value = dict(value) if isinstance(value, Mapping) else value
        renamed.append(_rename(Record(place, value), columns))
    if not renamed:
        raise DataError("there are no rows")
    if format == "auto":
        tokenized = {"input_ids", "labels"} <= renamed[0].keys()
        format = "tokenized" if tokenized else format_of_row(renamed[0], where=places[0])
    if format not in (*FORMATS, "tokenized"):
        raise DataError(f"unknown format {format!r}", hint=nearest(format, FORMATS) or None)
    if format != "tokenized":
        shape = _shape(renamed[0], format)
        renamed = [
            _fitting(row, place, shape, format, columns) for row, place in zip(renamed, places, strict=True)
        ]
    return _to_dataset(renamed, places, first=COLUMNS.get(format, ())), format


def checked_dataset(
    rows: Dataset, *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> tuple[Dataset, str]:
    """A `datasets.Dataset` that a program made, through the same gate; numbers as labels alone are copied."""
    for ours, theirs in (columns or {}).items():
        if theirs not in rows.column_names:
            raise DataError(
                f"no column {theirs!r}; found {names_of(set(rows.column_names))}",
                hint=nearest(theirs, rows.column_names) or None,
            )
        rows = row_for_row(rows.rename_column(theirs, ours), rows) if theirs != ours else rows
    names = set(rows.column_names)
    first = rows[0] if len(rows) else dict.fromkeys(names)
    if format == "auto":
        tokenized = {"input_ids", "labels"} <= names
        format = "tokenized" if tokenized else format_of_row(first, where="the rows")
    shape = shape_of(first, format) if format in COLUMNS else None
    if shape is not None:
        gone = sorted(names - set(_arranged(first, shape, str(Place(rows, 0)))))
        given = rows
        rows = given.map(
            lambda row, index: _arranged(row, shape, str(Place(given, index))),
            with_indices=True, remove_columns=gone,
        )  # fmt: skip
        row_for_row(rows, given)
    if format == "classification" and "label" in names and rows.features["label"].dtype.startswith("int"):
        rows = row_for_row(_labelled(rows), rows)
    check_rows(rows, format)
    return rows, format


def _labelled(rows: Dataset) -> Dataset:
    """The rows with their labels as text: names of a `ClassLabel`, else digits; -1 is no label, and stays."""
    feature, numbers = rows.features["label"], rows["label"][:]
    if any(number is None or number < 0 for number in numbers):
        return rows
    texts = feature.int2str(numbers) if isinstance(feature, ClassLabel) else list(map(str, numbers))
    return rows.remove_columns("label").add_column("label", texts)


def detect_format(path: str | os.PathLike[str], *, columns: Mapping[str, str] | None = None) -> str:
    """The format of a file, from its suffix and the keys of its first row.

    Raises:
        DataError: the suffix is unknown, or the keys fit no format or several; names what was found.
    """
    file = Path(path)
    require_file(file)
    suffix = file_suffix(file)
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix not in TABLE_SUFFIXES:
        raise DataError(
            f"{file}: the suffix {suffix!r} does not tell the format",
            hint=f"known: {', '.join(sorted(TEXT_SUFFIXES | TABLE_SUFFIXES))}, each also with .gz; or set `format:`",
        )
    record = next(read_records(file, label=(columns or {}).get("label", "label")), None)
    if record is None:
        raise DataError(f"{file} holds no rows")
    return format_of_row(_rename(record, columns), where=record.place)


def format_of_row(row: Mapping[str, object], *, where: str) -> str:
    """The one format that a row has the columns of; a DataError that names `where` if there are none or several."""
    shape, keys = shape_of(row), set(row)
    if shape is not None:
        return shape.format
    fitting = [name for name, needed in COLUMNS.items() if keys >= set(needed)]
    # {text, label} fits `text` and `classification`; the format that explains more of the row wins.
    best = [a for a in fitting if not any(set(COLUMNS[a]) < set(COLUMNS[b]) for b in fitting)]
    if len(best) == 1:
        return best[0]
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
    fault = f"fit {' and '.join(best)}" if best else "fit no format"
    raise DataError(
        f"{where}: the keys {names_of(keys)} {fault} ({known})",
        hint="set `format:`"
        if best
        else "set `columns:` to map our names to the file's, such as {prompt: question}",
    )


def _fitting(
    row: dict[str, object], place: str, shape: Shape | None, format: str, columns: Mapping[str, str] | None
) -> dict[str, object]:
    """The row in the format's columns. Raises DataError, which names `place`, where it does not hold what it should."""
    row = _arranged(row, shape, place)
    check_row(row, place, format, columns=columns)
    return row


def _refused(
    records: Iterable[Record], shape: Shape | None, format: str, columns: Mapping[str, str] | None
) -> Iterator[str]:
    """The places of the rows that are refused, up to one behind which the file cannot be read."""
    records = iter(records)
    with suppress(DataError):  # it is told once these rows are mended
        for record in records:
            try:
                row = _rename(record, columns)
                _fitting(row, record.place, shape or _shape(row, format), format, columns)
            except DataError:
                yield record.place


def _shape(row: Mapping[str, object], format: str) -> Shape | None:
    """How rows like this one are laid out, where that is not as the format has it."""
    return shape_of(row, format)


def _arranged(row: Mapping[str, object], shape: Shape | None, place: str) -> dict[str, object]:
    """The row in the format's columns."""
    if shape is None:
        return as_written(row)
    missing = sorted(shape.needs - row.keys())
    if missing:
        raise DataError(
            f"{place}: no key {missing[0]!r}, which the rows before have; found {names_of(set(row))}"
        )
    try:
        return as_written(shape.convert(row))
    except PeftxError as error:
        raise DataError(f"{place}: {error.message}", hint=error.hint) from error


def _document(file: Path) -> str:
    text = read_text(file)
    if not text.strip():
        raise DataError(f"{file} holds only white space")
    return text


def _check_mapping(file: Path, columns: Mapping[str, str] | None) -> None:
    sources = list((columns or {}).values())
    twice = sorted({name for name in sources if sources.count(name) > 1})
    if twice:
        raise DataError(f"{file}: columns read {', '.join(map(repr, twice))} into two names")


def _rename(record: Record, columns: Mapping[str, str] | None) -> dict[str, object]:
    """The record as an object under our names."""
    if not isinstance(record.value, dict):
        raise DataError(f"{record.place}: expected an object, got {json_type(record.value)}")
    row: dict[str, object] = dict(record.value)
    if not columns:
        return row
    missing = [source for source in columns.values() if source not in row]
    if missing:
        raise DataError(
            f"{record.place}: no column {missing[0]!r}; found {names_of(set(row))}",
            hint=nearest(missing[0], list(row)) or "columns maps our name to the file's: {prompt: question}",
        )
    renamed = {ours: row.pop(source) for ours, source in columns.items()}
    clash = sorted(set(renamed) & set(row))
    if clash:
        raise DataError(
            f"{record.place}: columns writes over the file's own {clash[0]!r}",
            hint=f"rename that one too: {{old_{clash[0]}: {clash[0]}}}",
        )
    return {**renamed, **row}


def _in_blocks(rows: Iterable[dict[str, object]], *, first: tuple[str, ...]) -> Dataset | None:
    """As `_to_dataset`, with few rows at a time in memory; None of no rows.

    Raises one of `_NOT_ARROW` where rows, or blocks of them, have types that do not join.
    """
    found = dataset_of_blocks(_tables(rows, first))
    if found is None:
        return None
    ordered = [*first, *(name for name in found.column_names if name not in first)]
    return found.select_columns(ordered)


def _tables(rows: Iterable[dict[str, object]], first: tuple[str, ...]) -> Iterator[pa.Table]:
    block, letters = list[dict[str, object]](), 0

    def table() -> pa.Table:
        names = dict.fromkeys([*first, *(key for row in block for key in row)])
        return pa.table({name: pa.array([row.get(name) for row in block]) for name in names})

    for row in rows:
        block.append(row)
        letters += _letters(row)
        if len(block) == BLOCK or letters >= LETTERS:
            yield table()
            block, letters = [], 0
    if block:
        yield table()


def _letters(value: object) -> int:
    """Of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_letters, inside))


def _to_dataset(rows: list[dict[str, object]], places: list[str], *, first: tuple[str, ...]) -> Dataset:
    """Columns, the format's own first; DataError at the first row whose value does not go with those before."""
    names = list(dict.fromkeys([*first, *(key for row in rows for key in row)]))
    table: dict[str, list[object]] = {}
    for name in names:
        column = [row.get(name) for row in rows]
        try:
            pa.array(column)
        except _NOT_ARROW as error:
            place = places[_first_misfit(column)]
            raise DataError(f"{place}: column {name!r} does not go with the rows before: {error}") from error
        table[name] = column
    return Dataset.from_dict(table)


def _first_misfit(column: list[object]) -> int:
    """Index of the first value that Arrow refuses. Prefixes of a good column are good, hence bisection."""
    good, bad = 0, len(column)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            pa.array(column[:middle])
            good = middle
        except _NOT_ARROW:
            bad = middle
    return bad - 1
