"""Plugins stay as short as they were written: `tools/code_lines.py` counts, and says which and how many lines."""

from __future__ import annotations

import statistics
from pathlib import Path

import code_lines
import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "cli", "spec", "plugins", "tools", "benchmarks")


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    return code_lines.plugins(None)


def test_code_is_counted_and_nothing_else() -> None:
    source = '''"""A docstring

of three lines."""

import torch
from typing import (
    Any,
)


class OneConfig:
    rank: int = 1


def f(x):
    """Another."""
    # a comment

    return g(
        x,
    )
'''
    assert code_lines.code_lines(source, bare=True) == 4
    assert code_lines.code_lines(source) == 4 + 4 + 2  # imports, and Config


def test_the_median_of_the_first_plugins(counts: dict[str, int]) -> None:
    assert len(set(code_lines.FIRST)) == 31
    first = {name: counts[name] for name in code_lines.FIRST}
    middle = sorted(first.items(), key=lambda item: item[1])[len(first) // 2]
    assert statistics.median(first.values()) <= code_lines.MEDIAN, f"the middle one is now {middle}"


def test_the_nine_short_ones_stay_short(counts: dict[str, int]) -> None:
    assert len(code_lines.SHORT) == 9
    long = {name: (counts[name], most) for name, most in code_lines.SHORT.items() if counts[name] > most}
    assert not long, f"lines, and the most: {long}; is there a mechanism for what came (docs/mechanisms)?"


def test_the_kernel_is_small() -> None:
    files = [*(ROOT / "core/peftx/kernel").rglob("*.py")]
    assert len(files) > 30
    assert sum(code_lines.code_lines(file.read_text("utf-8")) for file in files) <= code_lines.KERNEL


def test_no_file_beside_tests_is_two_things() -> None:
    files = [
        file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if "tests" not in file.parts
    ]
    assert len(files) > 500
    lines = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8").count("\n") for file in files}
    assert not {name: n for name, n in lines.items() if n > code_lines.LONGEST}
