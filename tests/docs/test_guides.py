"""Pages that are read from top to bottom do what they say: their files, commands and Python, in one folder, in order.

What a page shows below a command, and in a block of text below Python, came out, but for numbers; `...` stands for
anything.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
from pages.blocks import BlockError, missing, same
from pages.figures import FOLLOWED
from pages.follow import follow

ROOT = Path(__file__).parents[2]
GUIDES = sorted(path for folder in FOLLOWED for path in (ROOT / "docs" / folder).glob("*.md"))
LONG = {"combine", "compare", "first-stack", "serve", "ship"}
"""Those that train for half a minute, or start processes of their own: `make test-all` runs them."""


def drawn(page: Path) -> bool:
    """A sixth of the guides a run, by what they say, as architectures are drawn; all in `make test-all`."""
    return os.environ.get("PEFTX_ARCHITECTURES") != "draw" or zlib.crc32(page.read_bytes()) % 6 == 0


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
        (
            "```console\n$ peftx serve nothing-there --port 8000\n```\n",
            "page.md:4: $ peftx serve nothing-there --port 8000: no answer\nerror[bundle]",
        ),
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
