"""Figures that a page repeats by hand are those of the committed result that it links to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {"nothing: the base": "base", "`apt`": "pruned", "`lora`": "recovered", "`prefixquant`": "packed"}


def result(page: str, name: str) -> Any:
    """The results of a file, to which the page leads."""
    file = f"benchmarks/results/{name}.json"
    assert re.search(rf"results/{name}\.(json|md)\)", (ROOT / page).read_text("utf-8"))
    return json.loads((ROOT / file).read_text("utf-8"))["results"]


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the table whose first line begins so."""
    lines = (ROOT / page).read_text("utf-8").split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_cookbook_shows_what_shrinking_gave() -> None:
    found = result("docs/recipes/index.md", "shrink")
    told = {STAGES[stage]: cells for stage, *cells in rows("docs/recipes/index.md", "after")}
    assert told == {
        stage: [
            f"{of['bytes']:,}",
            "{:.1f} ({:.1f} to {:.1f})".format(*of["perplexity"]),
            f"{1 / min(of['token_seconds']):.0f}",
        ]
        for stage, of in found.items()
    }
    text = (ROOT / "docs/recipes/index.md").read_text("utf-8")
    assert f"{found['base']['bytes'] / found['packed']['bytes']:.1f} times smaller" in text
    assert found["packed"]["perplexity"][0] / found["base"]["perplexity"][0] == pytest.approx(1.2, abs=0.05)
    lost = found["pruned"]["perplexity"][0] - found["base"]["perplexity"][0]
    assert (found["pruned"]["perplexity"][0] - found["recovered"]["perplexity"][0]) / lost == pytest.approx(
        1 / 3, abs=0.05
    )


def test_what_packed_layers_cost_in_time() -> None:
    found = result("docs/how-to/compress.md", "compression")
    token = {name: of["tiny"]["token"] for name, of in found.items() if "tiny" in of}
    told = " ".join((ROOT / "docs/how-to/compress.md").read_text("utf-8").split())
    assert f"a token takes {token['nf4']:.0f} times as long" in told
    assert f"at {token['signround, 4 bits']:.1f} and {token['prefixquant, W4A16']:.1f} times" in told
