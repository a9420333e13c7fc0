"""Results on stdout: tables, numbers, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def print_json(value: object) -> None:
    """For scripts: one document on stdout, nothing else."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal; aligned columns without borders and without wrapping elsewhere."""
    if not sys.stdout.isatty():
        print(plain_table(title, columns, rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in rows if row[index])
        table.add_column(
            column, justify="right" if numeric and rows else "left", overflow="fold", no_wrap=index == 0
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as text."""
    shown = [index for index, column in enumerate(columns) if column or any(row[index] for row in rows)]
    columns, rows = [columns[i] for i in shown], [[row[i] for i in shown] for row in rows]
    body = [list(columns), *([" ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(len(line[index]) for line in body) for index in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in body
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, *lines] if title else lines)


def _is_number(text: str) -> bool:
    return text[:1].isdigit()


def size(count: int) -> str:
    """Bytes as people read them, 1 kB = 1000 B."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{count} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000
    raise AssertionError("unreachable")
