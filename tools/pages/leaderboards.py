"""Tables of `benchmarks/leaderboards/`, as `publish.py` left them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BOARDS = ("soft-prompts", "weights")
"""Those that have a page of their own: methods beside each other, on several sets of rows."""


def names() -> list[str]:
    """Of the comparisons that were published, with their sets."""
    return sorted(file.stem for board in BOARDS for file in RESULTS.glob(f"{board}.*.json"))


def table(name: str) -> str:
    """What was run, which of its rows the base has read, and a row a method, the best first."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    head = ("method", found["metric"], "rate", "numbers trained", "bundle", "peak memory", "training")
    setting = f"{found['budget']}, {len(found['seeds'])} seeds, ± the standard deviation."
    page = f"[Page with plots](../../benchmarks/results/{name}.html)."
    lines = [
        f"{setting} {found['base']} {page}",
        "",
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
    ]
    rows = sorted(found["rows"], key=lambda row: row["value"], reverse=found["higher_is_better"])
    for row in rows:
        spread = "" if row["std"] is None else f"\u00a0±\u00a0{row['std']:.3f}"
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}" + ", edge" * row["edge"]
        cells = (
            row["row"],
            f"{row['value']:.3f}{spread}",
            rate,
            f"{row['trained']:,}",
            f"{row['bundle_bytes'] / 1e3:,.1f}\u00a0kB",
            f"{row['memory_bytes'] / 1e6:,.0f} MB",
            f"{row['train_seconds']:.1f} s",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"![{found['metric']}, and against numbers trained](../../benchmarks/results/{name}.png)"]
    return "\n".join(lines)


MADE = {f"leaderboard-{name}": partial(table, name) for name in names()}
"""`<!-- made: leaderboard-soft-prompts.snips -->` -> its table."""
