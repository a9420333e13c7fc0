"""The page "Write a plugin in fifteen minutes", from top to bottom, where no source tree is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def same(line: str) -> str:
    """A line without what differs from run to run: numbers, and how wide a table is."""
    return " ".join(re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", line).split())


def shown(expected: list[str], output: str) -> str:
    """The first line that a page shows and the output does not have, in this order; `...` stands for anything."""
    lines = iter([same(line) for line in output.splitlines()])
    for text in expected:
        wanted = re.escape(same(text)).replace(re.escape("..."), ".*")
        if text != "..." and not any(re.fullmatch(wanted, line) for line in lines):
            return text
    return ""


@pytest.mark.slow
def test_every_block_does_what_the_page_says(dist: Path, bare: Any) -> None:
    """About 45 s of CPU: each command loads torch."""
    bare.install("peftx", index=dist)
    code = bare.work / "peftx-gentle-gain/src/peftx_gentle_gain.py"
    blocks = BLOCK.findall((ROOT / "docs/write-a-plugin.md").read_text("utf-8"))
    assert [kind for kind, _ in blocks] == [
        "console", "diff", "console", "diff", "console", "console", "yaml", "console"
    ]  # fmt: skip
    for kind, body in blocks:
        if kind == "yaml":
            (bare.work / "gentle.yaml").write_text(body, "utf-8")
        elif kind == "diff":
            old, new = (re.search(rf"^\{sign}(.*)$", body, re.MULTILINE)[1] for sign in "-+")  # type: ignore[index]
            assert code.read_text("utf-8").count(old) == 1
            code.write_text(code.read_text("utf-8").replace(old, new), "utf-8")
        else:
            for command, *expected in (
                part.splitlines() for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]
            ):
                result = bare.shell(command)
                missing = shown(expected, result.stdout)
                assert not missing, (
                    f"$ {command}\nshows no line {missing!r}\n{result.stdout}\n{result.stderr}"
                )
                failing = any(" failed " in line for line in expected)
                assert result.returncode == failing, f"$ {command}\n{result.stdout}\n{result.stderr}"


def test_a_line_that_is_not_there_is_seen() -> None:
    output = "gain\nllama  merges  passed  0.21\n3 of 3 checks hold\n"
    assert shown(["...", "llama merges passed 0.3", "1 of 1 checks hold"], output) == ""
    assert shown(["llama  merges  failed  0.21"], output) == "llama  merges  failed  0.21"
    assert shown(["3 of 3 checks hold", "gain"], output) == "gain", "in another order"
    assert shown(["llama ..."], output) == ""
