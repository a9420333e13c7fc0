"""Plugins stay as short as they were written: `tools/code_lines.py` counts, and says which and how many lines."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "code_lines.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("code_lines", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def counts(tool: Any) -> dict[str, int]:
    found: dict[str, int] = tool.plugins(None)
    return found


def test_code_is_counted_and_nothing_else(tool: Any) -> None:
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
    assert tool.code_lines(source, bare=True) == 4
    assert tool.code_lines(source) == 4 + 4 + 2  # imports, and Config


def test_the_median_of_the_first_plugins(tool: Any, counts: dict[str, int]) -> None:
    assert len(set(tool.FIRST)) == 31
    first = {name: counts[name] for name in tool.FIRST}
    middle = sorted(first.items(), key=lambda item: item[1])[len(first) // 2]
    assert statistics.median(first.values()) <= tool.MEDIAN, f"the middle one is now {middle}"


def test_the_nine_short_ones_stay_short(tool: Any, counts: dict[str, int]) -> None:
    assert len(tool.SHORT) == 9
    long = {name: (counts[name], most) for name, most in tool.SHORT.items() if counts[name] > most}
    assert not long, f"lines, and the most: {long}; is there a mechanism for what came (docs/mechanisms)?"
