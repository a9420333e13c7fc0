"""The code blocks of a page, with their lines; and what a page shows beside what came out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class BlockError(AssertionError):
    """A block that does not do what its page says; begins with `file:line:`."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: as errors name it. line: of the first line inside the fence, from 1.
        fence: what stands behind the language: `title="stack.yaml"`, a file that the block is; `norun="why"`.
    """

    page: str
    line: int
    language: str
    fence: str
    body: str

    @property
    def runs(self) -> bool:
        return "norun=" not in self.fence

    @property
    def title(self) -> str:
        found = re.search(r'title="([^"]+)"', self.fence)
        return found[1] if found else ""

    def execute(self, names: dict[str, object]) -> None:
        """Run Python in `names`.

        Raises:
            BlockError: whatever it raised, at the line of the page that did.
        """
        try:
            code = compile("\n" * (self.line - 1) + self.body, self.page, "exec", dont_inherit=True)
            exec(code, names)
        except Exception as error:
            raise BlockError(
                f"{self.page}:{self._raised_at(error)}: {type(error).__name__}: {error}"
            ) from error

    def _raised_at(self, error: BaseException) -> int:
        if isinstance(error, SyntaxError) and error.filename == self.page and error.lineno is not None:
            return error.lineno
        line, trace = self.line, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == self.page:
                line = trace.tb_lineno
            trace = trace.tb_next
        return line


def blocks(file: Path, root: Path) -> list[Block]:
    """All of a page, in order."""
    text = file.read_text("utf-8")
    return [
        Block(file.relative_to(root).as_posix(), text.count("\n", 0, found.start(3)) + 1, *found.groups())
        for found in FENCE.finditer(text)
    ]


def same(line: str) -> str:
    """A line without what differs from run to run: numbers, how wide a table is, and the code of an error."""
    line = re.sub(r"^error\[[\w-]+\]:", "error:", line)
    return " ".join(re.sub(r"\d[\d,]*(\.\d+)*(e[+-]?\d+)?|-{3,}", "0", line).split())


def missing(expected: Sequence[str], output: str) -> tuple[int, str] | None:
    """The first line that a page shows and the output does not have, in this order, and its place among the expected;
    `...` stands for anything."""
    lines = iter([same(line) for line in output.splitlines()])
    for place, text in enumerate(expected):
        wanted = re.escape(same(text)).replace(re.escape("..."), ".*")
        if text.strip() not in ("...", "") and not any(re.fullmatch(wanted, line) for line in lines):
            return place, text
    return None


def commands(block: Block) -> list[tuple[int, str, list[str]]]:
    """Of a console block: the page's line, the command without `$ `, and the output that is shown."""
    found: list[tuple[int, str, list[str]]] = []
    for offset, line in enumerate(block.body.splitlines()):
        if line.startswith("$ "):
            found.append((block.line + offset, line[2:], []))
        elif found and found[-1][1].endswith("\\"):
            at, command, output = found[-1]
            found[-1] = (at, f"{command[:-1]} {line.strip()}", output)
        elif found:
            found[-1][2].append(line)
    return found
