"""Does what a page says: its files, commands and Python, in the working directory, in order.

What a page shows below a command, and in a block of text below Python, came out, but for numbers; `...` stands for
anything.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from itertools import pairwise
from pathlib import Path

from typer.testing import CliRunner

from pages.blocks import Block, BlockError, blocks, commands, missing
from pages.served import Served, starts_a_server
from peftx.errors import PeftxError, SpecError
from peftx.pipeline import Run, load_run
from peftx_cli.main import app


def follow(page: Path, root: Path) -> int:
    """Do all that a page says; how many blocks ran.

    Raises:
        BlockError: with the page's line.
    """
    names: dict[str, object] = {"__name__": "guide"}
    done = [block for block in blocks(page, root) if block.runs]
    shown_by = {
        one: two for one, two in pairwise(done) if one.language == "python" and two.language == "text"
    }
    server: Served | None = None
    ports: dict[str, str] = {}
    try:
        for block in done:
            if block.title:
                write(block)
            elif block.language == "python":
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    (server.on_its_port(block) if server else block).execute(names)
                if text := shown_by.get(block):
                    _compare(text.page, text.line, text.body.splitlines(), output.getvalue())
            elif starts_a_server(block):
                _end(server)
                server = None  # it is no more, should the next one not begin
                server = Served(block, ports)
            elif block.language == "console":
                type_in(block)
    finally:
        _end(server)
    return len(done)


def _end(server: Served | None) -> None:
    """As a reader does by Ctrl-C; its log is what the page shows."""
    if server is not None:
        log = server.stop()
        _compare(server.page, *server.shown, log)


def write(block: Block) -> None:
    """The file that a block is."""
    Path(block.title).parent.mkdir(parents=True, exist_ok=True)
    Path(block.title).write_text(block.body, "utf-8")


def type_in(block: Block) -> None:
    """The commands of `peftx` in a console block, in this process, which has loaded torch; others are passed over.

    Raises:
        BlockError: a command that fails where the page shows no error, or does not say what the page shows.
    """
    for line, command, expected in commands(block):
        program, *words = shlex.split(command, comments=True)
        if program != "peftx":
            continue
        result = CliRunner().invoke(app, words)
        if not isinstance(result.exception, SystemExit | None):
            raise BlockError(f"{block.page}:{line}: $ {command}: {result.exception!r}") from result.exception
        refused = any(text.startswith("error") for text in expected)
        if result.exit_code != (2 if refused else 0):
            raise BlockError(
                f"{block.page}:{line}: $ {command}: exit code {result.exit_code}\n{result.output}"
            )
        _compare(block.page, line + 1, expected, result.output)


def loaded(block: Block, *, around: str = "") -> Run:
    """The pipeline that a block of YAML is, ready to run.

    Args:
        around: what a section needs to be a pipeline.

    Raises:
        BlockError: it is none; of what is wrong with a spec at the line of the page that is.
    """
    try:
        return load_run(around + block.body)
    except SpecError as error:
        inside = error.problems[0].line - 1 - around.count("\n")
        raise BlockError(f"{block.page}:{block.line + max(0, inside)}: {error}") from error
    except PeftxError as error:
        raise BlockError(f"{block.page}:{block.line}: {error}") from error


def carried_out(block: Block, run: Run) -> None:
    """Raises BlockError where `run`, of this block, does not come to its end."""
    try:
        run.run()
    except Exception as error:
        raise BlockError(f"{block.page}:{block.line}: {type(error).__name__}: {error}") from error


def _compare(page: str, line: int, expected: list[str], output: str) -> None:
    if found := missing(expected, output):
        place, text = found
        raise BlockError(
            f"{page}:{line + place}: the page shows {text!r}, and what came out does not\n{output}"
        )
