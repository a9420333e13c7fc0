"""What is wrong and where: positions, problems, and the error that carries all of them at once."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from peftx_spec.errors import PeftxError, visible

Path = tuple[str | int, ...]
"""The place of a value in the spec's data: `("stack", 1, "with", "rank")`."""

_WIDEST_SNIPPET = 120  # characters of a source line that are shown around the caret
_LONGEST_PART = 1000  # characters of a message, a path or a suggestion that are shown


@dataclass(frozen=True, order=True)
class Position:
    """A place in a text: line and column in characters, both counted from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a spec.

    `file` is the file's name, `<text>`, or `--set #1` for the first override; `snippet` the source line,
    whole; `path` the place in the data as text, `stack[1].with.rank`; the rest may be empty. `code` is that of the
    error that a run would end in, and empty where the spec alone is wrong.
    """

    message: str
    file: str
    line: int
    column: int
    snippet: str = ""
    path: str = ""
    expected: str = ""
    got: str = ""
    suggestion: str = ""
    code: str = ""

    def __str__(self) -> str:
        lines = [f"{_said(self.file)}:{self.line}:{self.column}: {_said(self.message)}"]
        if self.snippet:
            shown, before = _clip(self.snippet, self.column)
            number = str(self.line)
            lines.append(f"  {number} | {shown}")
            lines.append(f"  {' ' * len(number)} | {' ' * _width(shown[:before])}^")
        if self.path:
            lines.append(f"  at: {_said(self.path)}")
        if self.expected:
            lines.append(f"  expected: {_said(self.expected)}")
        if self.got:
            lines.append(f"  got: {_said(self.got)}")
        if self.suggestion:
            lines.append(f"  {_said(self.suggestion)}")
        return "\n".join(lines)


class SpecError(PeftxError):
    """Everything that is wrong with a spec, in the order of the text.

    `problems` is never empty.
    """

    code = "spec"

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("a SpecError needs at least one problem")
        self.problems = list(problems)
        super().__init__("\n\n".join(str(problem) for problem in self.problems))


def path_text(path: Path) -> str:
    """`("stack", 1, "with", "rank")` as `stack[1].with.rank`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def describe(value: object) -> str:
    """A value as the user wrote it, in words and on one line: `the text 'abc'`, `a list of 3`, `nothing`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {_short(repr(value))}"
    if isinstance(value, str):
        return f"the text {_short(repr(value))}"
    if isinstance(value, dict):
        return (
            f"a mapping with the keys {_short(', '.join(map(str, value)))}" if value else "an empty mapping"
        )
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {_short(repr(value))}"


def _said(text: str) -> str:
    """A part of a problem as it may be shown: clipped, and its further lines cannot pass for ours."""
    text = text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]}..."
    return "\n    ".join(visible(line) for line in text.split("\n"))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _clip(line: str, column: int) -> tuple[str, int]:
    """The part of a long line around `column` (from 1), and how many of its characters precede the caret."""
    start = max(0, column - 1 - _WIDEST_SNIPPET // 2) if len(line) > _WIDEST_SNIPPET else 0
    head = "..." if start else ""
    tail = "..." if start + _WIDEST_SNIPPET < len(line) else ""
    part = line[start : start + _WIDEST_SNIPPET]
    shown = "".join(char if char.isprintable() else " " for char in part)  # a tab would shift the caret
    return f"{head}{shown}{tail}", len(head) + column - 1 - start


def _width(text: str) -> int:
    """Columns that `text` takes on a terminal: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )
