"""Pages that are read from top to bottom do what they say: their files, commands and Python, in one folder, in order.

What a page shows below a command, and in a block of text below Python, came out, but for numbers; `...` stands for
anything.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from pages.blocks import Block, BlockError, blocks, commands, missing, same
from pages.figures import FOLLOWED
from typer.testing import CliRunner

from peftx_cli.main import app

ROOT = Path(__file__).parents[2]
GUIDES = sorted(path for folder in FOLLOWED for path in (ROOT / "docs" / folder).glob("*.md"))
LONG = {"first-stack"}
"""Those that train for half a minute: `make test-all` runs them."""


def drawn(page: Path) -> bool:
    """A sixth of the guides a run, by what they say, as architectures are drawn; all in `make test-all`."""
    return os.environ.get("PEFTX_ARCHITECTURES") != "draw" or zlib.crc32(page.read_bytes()) % 6 == 0


def follow(page: Path, root: Path) -> int:
    """Do all that a page says in the working directory; how many blocks ran.

    Raises:
        BlockError: with the page's line.
    """
    names: dict[str, object] = {"__name__": "guide"}
    done = [block for block in blocks(page, root) if block.runs]
    shown_by = {
        one: two for one, two in pairwise(done) if one.language == "python" and two.language == "text"
    }
    for block in done:
        if block.title:
            Path(block.title).write_text(block.body, "utf-8")
        elif block.language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                block.execute(names)
            if text := shown_by.get(block):
                _compare(text.page, text.line, text.body.splitlines(), output.getvalue())
        elif block.language == "console":
            _run(block)
    return len(done)


def _run(block: Block) -> None:
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


def _compare(page: str, line: int, expected: list[str], output: str) -> None:
    if found := missing(expected, output):
        place, text = found
        raise BlockError(
            f"{page}:{line + place}: the page shows {text!r}, and what came out does not\n{output}"
        )


@pytest.mark.parametrize(
    "page",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in GUIDES if drawn(path)],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_a_guide_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(page, ROOT)


def test_every_how_to_ends_in_what_one_sees() -> None:
    for page in (ROOT / "docs" / "how-to").glob("*.md"):
        assert "\n## What you should see\n" in page.read_text("utf-8"), page.name


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("```python\nx = 1\n\nundefined\n```\n", "page.md:6: NameError: name 'undefined' is not defined"),
        ("```python\nx = (\n```\n", "page.md:4: SyntaxError"),
        ("```python\nprint(2)\n```\n\n```text\ntwo\n```\n", "page.md:8: the page shows 'two'"),
        (
            "```console\n$ peftx info nothing-of-the-kind\n```\n",
            "page.md:4: $ peftx info nothing-of-the-kind: exit code 2",
        ),
        ("```console\n$ peftx --version\npeftx 0.1\nand more\n```\n", "page.md:6: the page shows 'and more'"),
    ],
)
def test_a_failing_block_is_named_by_file_and_line(
    body: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{body}", "utf-8")
    with pytest.raises(BlockError) as caught:
        follow(page, tmp_path)
    assert str(caught.value).startswith(says)


def test_what_counts_as_the_same_line() -> None:
    assert same("perplexity  68.56 per token   95 %: 66.52 to 70.73") == same(
        "perplexity 1.5 per token 95 %: 1 to 2e-05"
    )
    assert same("name  ------  ---") == same("name  ---  --------")
    assert same("error[conflict]: no") == same("error: no") != same("warning: no")
    assert missing(["a", "...", "c ..."], "a\nb\nc d\n") is None
    assert missing(["c", "a"], "a\nb\nc\n") == (1, "a")
