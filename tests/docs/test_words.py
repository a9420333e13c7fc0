"""One word for one thing: what docs/glossary.md says a thing is not called, it is called nowhere here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pages.links import CODE, prose

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs/glossary.md"
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE_OF = ("core", "spec", "cli")


@cache
def glossary() -> dict[str, list[str]]:
    """Word -> what it is not called."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ?([^|]*) ?\|$", GLOSSARY.read_text("utf-8"), re.MULTILINE)[
        2:
    ]
    return {
        word.strip(): [name.strip() for name in others.split(",") if name.strip()] for word, _, others in rows
    }


def banned() -> re.Pattern[str]:
    names = sorted((name for others in glossary().values() for name in others), key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(re.sub(r'[ -]', '[ -]', name) for name in names)})s?\b", re.IGNORECASE)


def sentences(file: Path) -> Iterator[tuple[int, str]]:
    """Lines of prose of a page; strings of a module, which are docstrings, help and messages."""
    text = file.read_text("utf-8")
    if file.suffix == ".md":
        yield from ((number, CODE.sub("", line)) for number, line in prose(text))
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, " ".join(node.value.split())


def test_the_glossary_is_in_order_and_names_each_thing_once() -> None:
    words = list(glossary())
    assert len(words) >= 40
    assert words == sorted(words)
    others = [name for names in glossary().values() for name in names]
    assert len(others) == len(set(others))
    assert not set(others) & set(words)


@pytest.mark.parametrize("part", ["pages", *CODE_OF])
def test_no_other_word_is_used(part: str) -> None:
    files = PROSE if part == "pages" else sorted((ROOT / part).rglob("*.py"))
    found = [
        f"{file.relative_to(ROOT).as_posix()}:{line}: {word[0]!r}"
        for file in files
        if file != GLOSSARY
        for line, text in sentences(file)
        if (word := banned().search(text))
    ]
    assert not found, f"docs/glossary.md has another word for these: {found}"


def test_a_banned_word_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nPut it in a config-file.\n\n`config file`\n\n```\nconfig file\n```\n", "utf-8")
    assert [line for line, text in sentences(page) if banned().search(text)] == [3]
    code = tmp_path / "code.py"
    code.write_text('config_file = "x"\n\n\ndef f():\n    """Reads the config files."""\n', "utf-8")
    assert [line for line, text in sentences(code) if banned().search(text)] == [5]
