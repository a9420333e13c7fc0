"""Local files become `datasets.Dataset`s. Five formats:

    text               {text}                        one document a file (.txt, .md), or one a row
    prompt-completion  {prompt, completion}
    messages           {messages: [{role, content}]}  roles: system, user, assistant
    classification     {text, label}                 labels are strings
    preference         {prompt, chosen, rejected}

All but `messages` may stand in .jsonl/.ndjson, .json (an array), .csv or .tsv; `messages` not in .csv or .tsv.
Every file may be gzipped (seen by its first bytes, not its name). Columns beyond a format's own stay as they
are. Everything is held in memory; nothing is written to a cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pyarrow as pa
from datasets import Dataset

from peftx.data.files import (
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Record,
    file_suffix,
    json_type,
    read_records,
    read_text,
    require_file,
)
from peftx.errors import DataError, nearest

_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "classification": ("text", "label"),
    "preference": ("prompt", "chosen", "rejected"),
}
FORMATS: Final = tuple(_COLUMNS)
# What Arrow raises for mixed types, for integers over 64 bits, and for lone surrogates.
_NOT_ARROW: Final = (pa.ArrowException, OverflowError, UnicodeEncodeError)
ROLES: Final = ("system", "user", "assistant")


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
        A dataset in memory with the format's columns first, then the file's other columns (None where a row
        lacks one).

    Raises:
        DataError: the file is missing, empty, binary, not UTF-8 or malformed; a row lacks a column or holds a
            value of the wrong type; nothing is left to read. The message names the line.
    """
    file = Path(path)
    if limit is not None and limit < 1:
        raise DataError(
            f"{file}: no rows with limit {limit}", hint="limit is at least 1; leave it out to read all"
        )
    _check_mapping(file, columns)
    if format == "auto":
        format = detect_format(file, columns=columns)
    if format not in _COLUMNS:
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
        return Dataset.from_dict({"text": [_document(file)]})
    if format == "messages" and suffix in {".csv", ".tsv"}:
        raise DataError(
            f"{file}: format 'messages' is nested and does not fit a {suffix} file", hint="use .jsonl"
        )

    rows: list[dict[str, object]] = []
    places: list[str] = []
    for record in read_records(file):
        row = _rename(record, columns)
        _check_row(row, record.place, format)
        rows.append(row)
        places.append(record.place)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{file} holds no rows")
    return _to_dataset(rows, places, first=_COLUMNS[format])


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
    record = next(read_records(file), None)
    if record is None:
        raise DataError(f"{file} holds no rows")
    return format_of_keys(set(_rename(record, columns)), where=record.place)


def format_of_keys(keys: set[str], *, where: str) -> str:
    """The one format whose columns are among `keys`; a DataError that names `where` if there are none or several."""
    fitting = [name for name, needed in _COLUMNS.items() if keys >= set(needed)]
    # {text, label} fits `text` and `classification`; the format that explains more of the row wins.
    best = [a for a in fitting if not any(set(_COLUMNS[a]) < set(_COLUMNS[b]) for b in fitting)]
    if len(best) == 1:
        return best[0]
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in _COLUMNS.items())
    fault = f"fit {' and '.join(best)}" if best else "fit no format"
    raise DataError(
        f"{where}: the keys {_names(keys)} {fault} ({known})",
        hint="set `format:`"
        if best
        else "set `columns:` to map our names to the file's, such as {prompt: question}",
    )


def _document(file: Path) -> str:
    text = read_text(file)
    if not text.strip():
        raise DataError(f"{file} holds only white space")
    return text


def _names(keys: set[str]) -> str:
    return ", ".join(repr(key) for key in sorted(keys)) or "(none)"


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
            f"{record.place}: no column {missing[0]!r}; found {_names(set(row))}",
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


def _check_row(row: Mapping[str, object], place: str, format: str) -> None:
    for key in _COLUMNS[format]:
        if key not in row:
            needed = ", ".join(_COLUMNS[format])
            raise DataError(
                f"{place}: no key {key!r}, which format {format!r} needs ({needed}); found {_names(set(row))}",
                hint=nearest(key, list(row)) or None,
            )
        value = row[key]
        if key == "messages":
            _check_messages(value, place)
        elif not isinstance(value, str):
            hint = (
                f'labels are strings: write "{value}"' if key == "label" and isinstance(value, int) else None
            )
            raise DataError(f"{place}: {key!r} must be a string, got {json_type(value)}", hint=hint)


def _check_messages(messages: object, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        got = "an empty array" if messages == [] else json_type(messages)
        raise DataError(f"{place}: 'messages' must be an array of {{role, content}}, got {got}")
    for index, message in enumerate(messages):
        at = f"{place}: messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{at} must be an object {{role, content}}, got {json_type(message)}")
        if set(message) != {"role", "content"}:
            raise DataError(
                f"{at} must have the keys 'role' and 'content' only; found {_names(set(message))}"
            )
        if not isinstance(message["content"], str):
            raise DataError(f"{at}: 'content' must be a string, got {json_type(message['content'])}")
        if message["role"] not in ROLES:
            raise DataError(
                f"{at}: role {message['role']!r}; roles are {', '.join(ROLES)}",
                hint=nearest(str(message["role"]), ROLES) or None,
            )


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
