"""Tables of `benchmarks/leaderboards/`, as `publish.py` left them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BOARDS = ("soft-prompts", "weights")
"""Those that have a page of their own: methods beside each other, on several sets of rows."""


def names() -> list[str]:
    """Of the comparisons that were published, with their sets."""
    return sorted(file.stem for board in BOARDS for file in RESULTS.glob(f"{board}.*.json"))


def table(name: str) -> str:
    """What was run, which of its rows the base has read, a row a method, and the plot: the page without its title."""
    _, _, text = (RESULTS / f"{name}.md").read_text("utf-8").partition("\n\n")
    return f"{text.replace(f']({name}.', f'](../../benchmarks/results/{name}.').rstrip()}"


MADE = {f"leaderboard-{name}": partial(table, name) for name in names()}
"""`<!-- made: leaderboard-soft-prompts.snips -->` -> its table."""
