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


def rated() -> dict[str, dict[str, Any]]:
    """Results that `benchmarks/rated.py` has left: of a method its mean over the seeds and its spread."""
    found = {
        file.stem: json.loads(file.read_text("utf-8")) for file in ROOT.glob("benchmarks/results/*.json")
    }
    tables = {name: each.get("results") for name, each in found.items() if isinstance(each, dict)}
    return {
        name: rows
        for name, rows in tables.items()
        if isinstance(rows, dict) and all(isinstance(row, dict) and "mean" in row for row in rows.values())
    }


RATED = rated()
LINKED = {
    page.relative_to(ROOT).as_posix(): names
    for page in (*sorted(ROOT.glob("plugins/*/*/README.md")), ROOT / "benchmarks/README.md")
    if (names := set(re.findall(r"results/([\w.-]+?)\.(?:json|md)\)", page.read_text("utf-8"))) & set(RATED))
}


@pytest.mark.parametrize("page", sorted(LINKED))
def test_what_has_a_spread_is_that_of_a_linked_result(page: str) -> None:
    """Every `0.127 ± 0.016`, to its own digits."""
    text = (ROOT / page).read_text("utf-8")
    if page.startswith("plugins/"):
        text = text.partition("\n## What we measured\n")[2].partition("\n## ")[0]
    rows = [row for name in LINKED[page] for row in RATED[name].values() if "spread" in row]
    known = [(row["mean"][key], row["spread"][key]) for row in rows for key in row["mean"]]
    for mean, spread in re.findall(r"(-?[\d,]*\.?\d+)\s±\s([\d,]*\.?\d+)", text):
        digits = [len(number.partition(".")[2]) for number in (mean, spread)]
        told = {f"{a:,.{digits[0]}f} ± {b:,.{digits[1]}f}" for a, b in known}
        assert f"{mean} ± {spread}" in told


def test_each_plugin_of_a_table_leads_to_it() -> None:
    """Those of texts as vectors, of preferences, and the others that `rated.py` has measured."""
    missing = [
        (name, plugin)
        for name, table in RATED.items()
        for plugin in {found for row in table for found in re.findall(r"^`([\w-]+)`", row)}
        if name
        not in LINKED.get(next(ROOT.glob(f"plugins/*/{plugin}/README.md")).relative_to(ROOT).as_posix(), ())
    ]
    assert not missing


def test_the_page_of_benchmarks_has_the_table_of_vectors_as_it_was_left() -> None:
    own, left = (
        (ROOT / "benchmarks" / page).read_text("utf-8").partition("| | recall at 1 ")[2].partition("\n\n")[0]
        for page in ("README.md", "results/embeddings.md")
    )
    assert own
    assert own == left


def test_what_a_shared_prompt_saves() -> None:
    page = "plugins/train_step/prefix-grouper/README.md"
    text = (ROOT / page).read_text("utf-8")
    assert "results/prefix_grouper.json)" in text
    found = json.loads((ROOT / "benchmarks/results/prefix_grouper.json").read_text("utf-8"))["groups"]
    names = ("answers", "prompt", "seconds_repeated", "seconds_grouped", "time_ratio",
             "megabytes_repeated", "megabytes_grouped", "memory_ratio")  # fmt: skip
    told = rows(page, "G | prompt | seconds, G rows | grouped | ratio | MiB, G rows | grouped | ratio")
    assert told == [[f"{group[name]:g}" for name in names] for group in found]
    bound = float(re.findall(r"gradients differ by less than (\S+) of", " ".join(text.split()))[0])
    assert max(group["gradient_difference"] for group in found) < bound
