"""The page "Write a plugin in fifteen minutes", from top to bottom, where no source tree is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pages.blocks import blocks, commands, missing

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_block_does_what_the_page_says(dist: Path, bare: Any) -> None:
    """About 45 s of CPU: each command loads torch."""
    bare.install("peftx", index=dist)
    code = bare.work / "peftx-gentle-gain/src/peftx_gentle_gain.py"
    found = [block for block in blocks(ROOT / "docs/write-a-plugin.md", ROOT) if block.runs]
    assert [block.language for block in found] == [
        "console", "diff", "console", "diff", "console", "console", "yaml", "console"
    ]  # fmt: skip
    for block in found:
        if block.language == "yaml":
            (bare.work / "gentle.yaml").write_text(block.body, "utf-8")
        elif block.language == "diff":
            old, new = (re.search(rf"^\{sign}(.*)$", block.body, re.MULTILINE)[1] for sign in "-+")  # type: ignore[index]
            assert code.read_text("utf-8").count(old) == 1
            code.write_text(code.read_text("utf-8").replace(old, new), "utf-8")
        else:
            for line, command, expected in commands(block):
                result = bare.shell(command)
                told = f"{block.page}:{line}: $ {command}\n{result.stdout}\n{result.stderr}"
                assert not missing(expected, result.stdout), told
                failing = any(" failed " in text for text in expected)
                assert result.returncode == failing, told
