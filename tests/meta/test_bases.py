"""Every table of real data says which of its rows the base has read in its pre-training, and says it rightly."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from peftx import Registry, Stack
from peftx.engines.bundle.exporting import blank
from peftx.engines.models import load_model
from peftx.kernel.plugin import hooks_of

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
from bases import READ_BEFORE, TABLES, Source, read_by, seen  # noqa: E402
from pages.leaderboards import MADE  # noqa: E402

DATA = re.compile(r"AG News|SNIPS|polarity|Schema-Guided|HH-RLHF|_train\.json|_instruct\.json|math_data|udhr")
PROSE = "unseen"
PAGE = ROOT / "docs" / "choose" / "leaderboards.md"


def measured(readme: Path) -> str:
    """The section, as one line."""
    section = readme.read_text("utf-8").partition("\n## What we measured\n")[2].partition("\n## ")[0]
    return " ".join(section.split())


def readme_of(plugin: str) -> Path:
    (found,) = ROOT.glob(f"plugins/*/{plugin}/README.md")
    return found


@pytest.mark.parametrize("plugin", TABLES)
def test_a_readme_has_the_sentence_of_its_table(plugin: str) -> None:
    assert seen("peftx:tiny", **TABLES[plugin]) in measured(readme_of(plugin))


def test_no_table_of_a_data_set_is_without_one() -> None:
    silent = [
        readme.parent.name
        for readme in ROOT.glob("plugins/*/*/README.md")
        if DATA.search(text := measured(readme)) and "|" in text and "The base, " not in text
    ]
    assert not silent


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/results/*.json")), ids=lambda file: file.name)
def test_a_page_of_results_says_what_its_json_says(file: Path) -> None:
    """And a README that shows it does."""
    base = json.loads(file.read_text("utf-8")).get("base")
    if not isinstance(base, str):
        return
    assert base in file.with_suffix(".md").read_text("utf-8")
    if f"leaderboard-{file.stem}" in MADE:
        assert base in MADE[f"leaderboard-{file.stem}"]()
        assert f"<!-- made: leaderboard-{file.stem} -->" in PAGE.read_text("utf-8")
        return
    shown = [r for r in ROOT.glob("plugins/*/*/README.md") if f"results/{file.stem}." in r.read_text("utf-8")]
    assert shown
    assert all(base in measured(readme) for readme in shown)


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("benchmarks/leaderboards/*.yaml")), ids=lambda file: file.name
)
def test_results_are_those_of_the_committed_file(file: Path) -> None:
    """Its methods, grid, steps and seeds; a file that `publish.py` has published nothing of has nothing to say."""
    results = ROOT / "benchmarks" / "results" / f"{file.stem}.json"
    found = json.loads(results.read_text("utf-8")) if results.is_file() else {}
    if "rows" not in found:
        return
    spec = yaml.safe_load(file.read_text("utf-8"))["compare"]
    assert [row["row"] for row in found["rows"]] == list(spec["methods"])
    assert found["seeds"] == spec["seeds"]
    for row in found["rows"]:
        if row["learning_rate"] is not None:
            assert row["steps"] == spec["budget"]["steps"]
            grid = spec["methods"][row["row"]].get("learning_rate", spec["learning_rate"])
            assert [tried["rate"] for tried in row["rates"]] == sorted(map(float, grid))


def test_what_the_bundled_model_has_read() -> None:
    news, polarity = READ_BEFORE
    read = [Source("classify/snips_train.jsonl.gz"), Source(news), Source(news, 5999), Source(polarity, 8999)]
    unread = [Source("classify/snips_validate.jsonl.gz"), Source(news, 6000), Source(polarity, 9000)]
    unread.append(Source("preference/hh_harmless_base_test.jsonl.gz"))
    assert [read_by("peftx:tiny", source) for source in (*read, *unread)] == [True] * 4 + [False] * 4
    prose = Source("text/abc.txt.gz")
    assert [read_by(PROSE, source) for source in (prose, *read)] == [True] + [False] * 4
    said = seen("peftx:tiny", training=read[0], test=unread[0])
    assert said == (
        "The base, peftx:tiny, was pre-trained on the training rows (classify/snips_train.jsonl.gz), and was not "
        "pre-trained on the test rows (classify/snips_validate.jsonl.gz)."
    )


def test_it_stopped_where_its_training_says() -> None:
    tool = (ROOT / "tools/tiny/sources.py").read_text("utf-8")
    names = ("AG_NEWS_TRAIN_ROWS", "POLARITY_TRAIN_ROWS")
    assert list(READ_BEFORE.values()) == [
        int(re.findall(rf"^{name} = (\d+)$", tool, re.M)[0]) for name in names
    ]


def rows_of(heading: str) -> list[list[str]]:
    """Cells of the page's table with this first line, without marks of code."""
    table = PAGE.read_text("utf-8").partition(f"{heading}\n")[2].partition("\n\n")[0]
    return [
        [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in table.splitlines()[1:]
    ]


@pytest.mark.parametrize(
    "cells", rows_of("| method | trained here | with | would train |"), ids=lambda c: c[0]
)
def test_options_that_would_match_train_as_many_numbers_as_the_page_says(cells: list[str]) -> None:
    name, here, options, there = cells
    spec = yaml.safe_load((ROOT / "benchmarks/leaderboards/weights.snips.yaml").read_text("utf-8"))
    (entry,) = spec["compare"]["methods"][name]["stack"]
    given = {} if isinstance(entry, str) else entry.get("with", {})
    changed = {**given, **yaml.safe_load(f"{{{options}}}")}
    base, kind, found = load_model("peftx:tiny")[0], Registry().load(name), []
    for each in (given, changed):
        with torch.device("meta"):
            found.append(f"{Stack(blank(base), [kind(**each)]).trainable_parameters():,}")
    assert found == [here, there]


def test_every_method_that_changes_weights_is_ranked_or_has_a_reason() -> None:
    """Of the families that the table has; those that only compress train nothing."""
    spec = yaml.safe_load((ROOT / "benchmarks/leaderboards/weights.snips.yaml").read_text("utf-8"))
    stacks = [entry for method in spec["compare"]["methods"].values() for entry in method["stack"]]
    ranked = {entry if isinstance(entry, str) else entry["use"] for entry in stacks}
    registry = Registry()
    family = {name: registry.describe(name).family for name in registry.names()}
    ours = {name for name in family if family[name] in {family[each] for each in ranked}}
    trains = {name for name in ours if {"inject", "train_step"} & hooks_of(registry.load(name))}
    reasons = {name for name, _ in rows_of("| method | why |")}
    assert not trains - ranked - reasons
    assert not reasons & ranked
