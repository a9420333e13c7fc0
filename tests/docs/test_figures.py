"""Figures that a page repeats by hand are those of the committed result that it links to."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages.links import CODE, prose

from peftx import Stack
from peftx.comparing.statistics import t95
from peftx.composition.registry import Registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\([^)]*\)")
MEASURED = re.compile(
    r"(?<![\w.-])\d[\d,.]*\s*(?:ms|us|[kMG]i?B|tokens/s|seconds\b|s\b|%|±|times\b)"
    r"|\b(?:twice|half) as (?:fast|long|large|small)"
)
LIMITS = {"95 %", "10 GB", "1 MB", "64 MiB"}
"""Of intervals, caches and uploads: what is set, and not measured."""
HELD = {
    "README.md": "test_front_page.py",
    "CONTRIBUTING.md": "test_the_marks_that_are_shown_are_those_of_the_plugin",
    "docs/how-to/compress.md": "test_what_packed_layers_cost_in_time",
    "docs/recipes/index.md": "test_the_cookbook_shows_what_shrinking_gave",
    "docs/start/first-stack.md": "test_the_first_stack_is_the_committed_run",
}
"""Pages whose prose has figures that were measured -> what fails where they are not those of a committed result."""
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


def told_in(page: str) -> str:
    """All of it as one line."""
    return " ".join((ROOT / page).read_text("utf-8").split())


def figures_of(page: Path) -> Iterator[tuple[int, str]]:
    """What looks measured in the prose of a page: line, figure."""
    for number, line in prose(page.read_text("utf-8")):
        for found in MEASURED.finditer(LINK.sub("", CODE.sub("", line))):
            if found[0] not in LIMITS:
                yield number, found[0]


def test_no_figure_is_told_that_nothing_holds() -> None:
    free = [
        f"{name}:{line}: {figure}"
        for page in PAGES
        if (name := page.relative_to(ROOT).as_posix()) not in HELD and not name.startswith("docs/jobs/")
        for line, figure in figures_of(page)
        if line != 1  # a title
    ]
    assert not free, "a figure is read from a committed result, or is no figure: see HELD"


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
    rounds = [sorted(of["token_seconds"]) for of in found.values()]
    apart = sorted(100 * (second / least - 1) for least, second, *_ in rounds)
    assert f"second lies {apart[0]:.0f} to {apart[-1]:.0f} % above" in told_in("docs/recipes/index.md")


def test_what_packed_layers_cost_in_time() -> None:
    found = result("docs/how-to/compress.md", "compression")
    token = {name: of["tiny"]["token"] for name, of in found.items() if "tiny" in of}
    told = told_in("docs/how-to/compress.md")
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


def test_the_first_stack_is_the_committed_run() -> None:
    """But for the seconds, and for a few bytes of the bundle, whose history says how long it took."""
    page = (ROOT / "docs/start/first-stack.md").read_text("utf-8")
    command = "$ peftx apply --plugin lora --plugin nf4 --output out\n"
    shown = page.split(command)[1].split("```")[0].splitlines()
    run = (ROOT / "benchmarks/results/demo.txt").read_text("utf-8").splitlines()
    for one, two in zip(shown, run, strict=False):
        if one.strip() == "...":
            break
        if one.startswith("bytes on disk after"):
            assert numbers(one) == pytest.approx(numbers(two), abs=100)
        elif one.startswith("training steps"):
            assert one.rpartition(", ")[0] == two.rpartition(", ")[0]
        else:
            assert two.strip().startswith(one.strip().removesuffix("...").strip())
    value = {line.split("  ")[0]: numbers(line)[0] for line in run if line.startswith("perplexity")}
    base, adapted, compressed = (value[f"perplexity, {of}"] for of in ("base", "adapted", "compressed"))
    told = told_in("docs/start/first-stack.md")
    assert (
        f"falls from about {base:.0f} to {adapted:.1f}, and 4-bit weights cost {compressed - adapted:.2f} of that"
        in told
    )
    (steps,) = [numbers(line)[0] for line in run if line.startswith("training steps")]
    assert f"these are {steps:.0f} steps on" in told_in("docs/index.md")


def numbers(line: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*\.?\d*", line)]


def test_the_marks_that_are_shown_are_those_of_the_plugin() -> None:
    told, there = told_in("CONTRIBUTING.md"), told_in("plugins/inject/propulsion/README.md")
    said = told.split("#what-we-measured): ")[1].split(" with a link")[0]
    parts = [
        number
        for quote in re.findall(r'"([^"]+)"', said)
        for number in re.findall(r"[\d.e±-]*\d[\d.e± -]*\d", quote)
    ]
    assert len(parts) == 3
    assert all(part in there for part in parts)


def boards() -> tuple[dict[str, Any], dict[str, Any]]:
    """What changes weights, on SNIPS and on AG News: method -> what it gave, the best first."""
    found = []
    for of in ("snips", "news"):
        file = ROOT / "benchmarks/results" / f"weights.{of}.json"
        best = sorted(json.loads(file.read_text("utf-8"))["rows"], key=lambda row: -row["value"])
        found.append({row["row"]: row for row in best})
    return found[0], found[1]


def place(board: dict[str, Any], name: str) -> float:
    """In the order of what they gave; those that gave the same share the mean of their places."""
    values = [row["value"] for row in board.values()]
    own = board[name]["value"]
    return sum(value > own for value in values) + (values.count(own) - 1) / 2


def test_what_is_said_of_the_methods_that_change_weights() -> None:
    snips, news = boards()
    told = told_in("docs/choose/leaderboards.md")
    same = sum(row["note"] == "inside the noise of the best" for row in list(snips.values())[:20])
    assert same == 17
    assert "of the first twenty, seventeen cannot be told from the best" in told
    full = snips["full-finetuning"]
    fewer = {name: full["trained"] / row["trained"] for name, row in snips.items()}
    assert (round(fewer["oft"], -1), round(fewer["qgoft"], -2)) == (40, 100)
    assert "with a fortieth and a hundredth of its numbers" in told
    assert all(full["value"] - snips[name]["value"] < 0.2 for name in ("ia3", "vera", "layernorm-tuning"))
    assert min(fewer[name] for name in ("ia3", "vera", "layernorm-tuning")) > 950
    places = [[place(board, name) for name in snips] for board in (snips, news)]
    assert f"(Spearman {statistics.correlation(*places):.2f} over the {len(snips)} methods)" in told
    assert [list(board).index("spp") + 1 for board in (snips, news)] == [8, 30]
    assert "`spp` is the eighth on SNIPS and the thirtieth here" in told
    assert f"the standard deviation of its seeds is {news['spp']['std']:.2f}" in told


def test_how_many_numbers_the_methods_train() -> None:
    snips, _ = boards()
    told = told_in("docs/choose/leaderboards.md")
    lora = snips["lora"]["trained"]
    assert f"`lora` trains {lora:,}" in told
    near = {name for name, row in snips.items() if abs(row["trained"] / lora - 1) < 1 / 15} - {"lora"}
    assert (
        set(
            re.findall(
                r"`([^`]+)`", told.split("within a fifteenth of that are ")[1].split(", and `pesc`")[0]
            )
        )
        == near
    )
    assert {name for name, row in snips.items() if 0.9 < row["trained"] / lora < 14 / 15} == {
        "pesc",
        "bottleneck-adapter",
    }
    assert f"`lora.sparse-adapter` trains {snips['lora.sparse-adapter']['trained']:,}" in told
    for method, trained, *_ in rows(
        "docs/choose/leaderboards.md", "method | trained here | with | would train"
    ):
        assert trained == f"{snips[method.strip('`')]['trained']:,}"


@pytest.mark.slow
def test_what_they_would_train() -> None:
    spec = yaml.safe_load((ROOT / "benchmarks/leaderboards/weights.snips.yaml").read_text("utf-8"))
    counted, registry = {}, Registry()
    table = rows("docs/choose/leaderboards.md", "method | trained here | with | would train")
    for method, _, options, _ in table:
        (entry,) = spec["compare"]["methods"][method.strip("`")]["stack"]
        use, given = (entry, {}) if isinstance(entry, str) else (entry["use"], entry["with"])
        for option in re.findall(r"`([^`]+)`", options):
            given |= yaml.safe_load(option)
        stack = Stack("peftx:tiny", [registry.load(use)(**given)])
        counted[method] = f"{stack.trainable_parameters():,}"
    assert {method: would for method, _, _, would in table} == counted


def test_how_far_the_interval_of_few_seeds_reaches() -> None:
    reach = {n: t95(n - 1) / n**0.5 for n in (2, 3, 5)}
    two, three, five = f"{reach[2]:.0f}", f"{reach[3]:.1f}", f"{reach[5]:.1f}"
    told = told_in("docs/compare.md")
    assert (
        f"two reach {two} standard deviations to each side of the mean, that of three {three}, of five {five}"
        in told
    )


def test_the_table_of_texts_as_vectors() -> None:
    found = result("benchmarks/README.md", "embeddings")
    of = ("recall at 1", "recall at 5", "recall at 10", "Spearman")
    heading = "| recall at 1 | recall at 5 | recall at 10 | Spearman | learning rate | CPU seconds"
    told = {name: cells[:4] for name, *cells in rows("benchmarks/README.md", heading)}
    assert told == {
        name: [
            f"{way['mean'][each]:.3f}" + (f" ± {way['spread'][each]:.3f}" if "spread" in way else "")
            for each in of
        ]
        for name, way in found.items()
    }


def test_the_table_of_tenants() -> None:
    found = result("benchmarks/README.md", "tenants")
    one, all_ = found["matrices"], found["whole"]
    ways = ("one batch of tenants", "one batch of the base")
    told = {name: cells for name, *cells in rows("benchmarks/README.md", "| matrices | whole")}
    assert list(told.values()) == [
        [f"{each['bytes_a_tenant']:,.0f}" for each in (one, all_)],
        [f"{each['of_it_signs_and_scales']:,.0f}" for each in (one, all_)],
        [f"{each['bundle_bytes_on_disk']:,}" for each in (one, all_)],
        [f"{one['all_over_all_merged']:.2g} (50)", f"{all_['all_over_all_merged']:.2g} (16)"],
        [f"{1000 * each['read_cpu_s']:.0f}" for each in (one, all_)],
        [f"{1000 * each['read_and_join_cpu_s']:.0f}" for each in (one, all_)],
        *([f"{each['over_merged_in_turn'][way]:.2f}" for each in (one, all_)] for way in ways),
    ]


def test_the_tables_of_prompts_that_begin_alike() -> None:
    """Each row's figures are those of a cache of this model, in the order of the results."""
    found = json.loads((ROOT / "benchmarks/results/prefixes.json").read_text("utf-8"))
    one = rows(
        "benchmarks/README.md", "model | cache | hit rate | megabytes | first token | throughput | same texts"
    )
    both = rows("benchmarks/README.md", "model | cache | hit rate | half answered | throughput | same texts")
    for table, suffix in ((one, ""), (both, ", at once")):
        for model in ("peftx:tiny", "qwen3_next"):
            of_it = [way for name, way in found[f"{model}{suffix}"].items() if name != "none"]
            there = [
                [
                    f"{way['token_hit_rate']:.3f}",
                    *([] if suffix else [f"{way['bytes'] / 1e6:.2f}"]),
                    f"{way['answer_ratio' if suffix else 'first_token_ratio']:.2f}",
                    f"{way['throughput_ratio']:.2f}",
                    f"{way['same_texts']}/{way['texts']}",
                ]
                for way in of_it
            ]
            assert [cells[2:] for cells in table if cells[0] == model] == there


def cell(row: dict[str, Any], measure: str, digits: int) -> str:
    """Of a result of several seeds, or of one run."""
    spread = f" ± {row['spread'][measure]:.{digits}f}" if "spread" in row else ""
    return f"{row['mean'][measure]:.{digits}f}{spread}"


def test_the_table_of_longer_texts() -> None:
    page = "plugins/inject/longrope/README.md"
    found = result(page, "longrope")
    lengths = ("s = 2, 1,024 tokens", "s = 2, 2,048 tokens", "s = 4, 2,048 tokens", "s = 4, 4,096 tokens")
    told = {name: cells for name, *cells in rows(page, f"| {' | '.join(lengths)}")}
    assert told == {name: [cell(row, of, 1) for of in lengths] for name, row in found.items()}


def test_the_tables_of_tokens_left_out() -> None:
    page = "plugins/train_step/lemo/README.md"
    losses = {name: cells[0] for name, *cells in rows(page, "| loss | learning rate")}
    assert losses == {name: cell(row, "loss", 3) for name, row in result(page, "lemo").items()}
    held = json.loads((ROOT / "benchmarks/results/lemo.json").read_text("utf-8"))["memory"]
    told = {name: cells for name, *cells in rows(page, "| 256 tokens | 512 tokens | 1,024 tokens")}
    dense = {name: held[name.partition(",")[0]] for name in held}
    assert told == {
        name: [
            f"{mib:.0f}" + ("" if of is dense[name] else f" ({1 - mib / dense[name][length]:.0%} less)")
            for length, mib in of.items()
        ]
        for name, of in held.items()
    }
