"""The files of a comparison, all from one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftx.comparing.table import COLUMNS, Table
from peftx.engines.files import write_text


def to_json(table: Table) -> str:
    return json.dumps(table.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(table: Table, columns: Sequence[str] = COLUMNS) -> str:
    """A line a row; numbers as in the JSON, nothing for null."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in table.to_dict()["rows"]:
        writer.writerow([_cell(row[name]) for name in columns])
    return file.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def write(table: Table, page: str, folder: Path, columns: Sequence[str] = COLUMNS) -> None:
    """`results.json`, `results.csv`, `index.html` and `repeat/*.yaml`, each whole or not at all; YAML of rows that are
    no more is removed."""
    repeat = folder / "repeat"
    repeat.mkdir(exist_ok=True)
    written = set()
    for row in table.rows:
        if row.repeat and row.row in table.yaml:
            write_text(folder / row.repeat, table.yaml[row.row])
            written.add(Path(row.repeat).name)
    for old in repeat.glob("*.yaml"):
        if old.name not in written:
            old.unlink()
    write_text(folder / "results.json", to_json(table))
    write_text(folder / "results.csv", to_csv(table, columns))
    write_text(folder / "index.html", page)
