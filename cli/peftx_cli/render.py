"""Results on stdout: tables, numbers, JSON.

Everything that the commands print goes through here, through `failures` or through `progress`: what they show of files,
of models and of other authors' metadata cannot steer the terminal.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

from peftx_spec.errors import visible


def out(text: str = "") -> None:
    """Lines for people."""
    print(visible(text, lines=True))


def out_markdown(text: str) -> None:
    """Laid out on a terminal, as it is written elsewhere."""
    if not sys.stdout.isatty():
        out(text)
        return
    from rich.markdown import Markdown

    from peftx_cli.terminal import console

    console().print(Markdown(visible(text, lines=True)))


def out_exactly(text: str, *, end: str = "\n") -> None:
    """Text that a program may read as it is: a model's own; on a terminal as `out`."""
    print(visible(text, lines=True) if sys.stdout.isatty() else text, end=end, flush=True)


def out_yaml(text: str) -> None:
    """YAML of ours, in which every character that is not seen is escaped already."""
    sys.stdout.write(text)


def print_json(value: object) -> None:
    """For scripts: one document on stdout, nothing else."""
    out_json(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def out_json(text: str) -> None:
    """JSON that is text already; what is not seen can stand in its strings alone, and is written as JSON's escapes."""
    print(json_text(text))


def json_text(text: str) -> str:
    """The same JSON without characters that steer a terminal, and without lone surrogates, which no file can hold."""
    return re.sub(
        "[^\n\t -~]",
        lambda found: json.dumps(found[0])[1:-1] if visible(found[0]) != found[0] else found[0],
        text.rstrip("\n"),
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal; aligned columns without borders and without wrapping elsewhere."""
    if not sys.stdout.isatty():
        print(plain_table(title, columns, rows))
        return
    from rich.table import Table
    from rich.text import Text

    from peftx_cli.terminal import console

    columns, rows = (
        [visible(name) for name in columns],
        [[visible(cell, lines=True) for cell in row] for row in rows],
    )
    table = Table(title=visible(title) or None, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        numeric = all(_is_number(row[index]) for row in rows if row[index])
        table.add_column(
            column, justify="right" if numeric and rows else "left", overflow="fold", no_wrap=index == 0
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as text."""
    shown = [index for index, column in enumerate(columns) if column or any(row[index] for row in rows)]
    columns, rows = [columns[i] for i in shown], [[row[i] for i in shown] for row in rows]
    body = [[visible(" ".join(cell.split())) for cell in row] for row in (columns, *rows)]
    widths = [max(len(line[index]) for line in body) for index in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in body
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([visible(title), *lines] if title else lines)


def _is_number(text: str) -> bool:
    return text[:1].isdigit()
