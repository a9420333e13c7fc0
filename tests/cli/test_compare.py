"""`peftx compare`, run: killed and gone on with, repeated, with other test rows."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from peftx_cli.main import app

FILE = """\
peftx: 1
compare:
  base:
    model: peftx:tiny
    data: {train: train.jsonl, eval: eval.jsonl}
    train: {batch_size: 2}
    evaluate: [accuracy, perplexity]
  metric: perplexity
  budget: {steps: 2}
  seeds: [0, 1]
  learning_rate: [1e-4, 1e-2]
  validation: 0.25
  methods:
    lora: {stack: [{use: lora}], grid: {lora.rank: [0, 2]}}
    base: {stack: []}
"""


def rows(count: int, labels: tuple[str, str] = ("good", "bad")) -> str:
    lines = [
        {"text": f"the film number {n} was {labels[n % 2]}", "label": labels[n % 2]} for n in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_files(folder: Path, text: str = FILE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(rows(16), "utf-8")
    (folder / "eval.jsonl").write_text(rows(4), "utf-8")
    file = folder / "compare.yaml"
    file.write_text(text, "utf-8")
    return file


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def states(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (folder / "jobs").iterdir()}


def kinds(folder: Path) -> dict[str, str]:
    return {file.name: json.loads(file.read_text())["kind"] for file in (folder / "jobs").iterdir()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int], dict[str, Any]]:
    """A comparison that was killed after its first job, and gone on with: the folder, what there was after the kill,
    and the results."""
    folder = tmp_path_factory.mktemp("compare")
    file, out = write_files(folder), folder / "out"
    words = [sys.executable, "-m", "peftx_cli", "compare", str(file), "-j", "1", "-o", str(out)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        until = time.monotonic() + 240
        while not list(out.glob("jobs/*.json")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    before = states(out)
    result = invoke(file, "-j", "1", "-o", out)
    assert result.exit_code == 1, f"{result.output}\n{result.exception!r}"  # a row failed
    return out, before, json.loads((out / "results.json").read_text())


def test_what_was_done_before_the_kill_is_not_done_again(done: Any) -> None:
    out, before, _ = done
    assert before
    assert {name: states(out)[name] for name in before} == before
    assert sorted(kinds(out).values()) == ["rate", "rate", "seed", "seed", "seed"]
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == [
        "index.html", "jobs", "repeat", "results.csv", "results.json",
    ]  # fmt: skip


def test_a_stack_that_cannot_be_built_is_a_row(done: Any) -> None:
    _, _, results = done
    status = {row["row"]: row["status"] for row in results["rows"]}
    assert status == {"lora rank=0": "failed", "lora rank=2": "done", "base": "done"}
    assert "compare.yaml:14:53" in results["rows"][0]["reason"]


def test_a_row_has_an_interval_and_its_costs(done: Any) -> None:
    row, base = done[2]["rows"][1:]
    values = [seed["value"] for seed in row["seeds"]]
    assert row["value"] == pytest.approx(sum(values) / 2)
    assert row["low"] < min(values) < max(values) < row["high"]
    assert row["learning_rate"] in (1e-4, 1e-2)
    assert row["edge"]
    assert row["trained"] > 0 == base["trained"]
    assert row["bundle_bytes"] > 0 == base["bundle_bytes"]
    assert row["shipped_bytes"] - row["bundle_bytes"] == base["shipped_bytes"] > 10**7
    assert row["memory_bytes"] > 10**8
    assert row["train_seconds"] > 0
    assert row["token_seconds"] > 0
    assert [len(seed["losses"]) for seed in row["seeds"]] == [2, 2]
    assert {"accuracy", "perplexity"} <= row["seeds"][0]["scores"].keys()
    assert len(base["seeds"]) == 1  # nothing is drawn where nothing trains
    assert base["low"] is None


def test_csv_equals_json(done: Any) -> None:
    out, _, results = done
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results["rows"])
    for line, row in zip(lines, results["rows"], strict=True):
        for name, text in line.items():
            value = row[name]
            told = "" if value is None else json.dumps(value) if not isinstance(value, str) else value
            assert text == told, name


def test_a_row_repeats_bit_for_bit(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    out, _, results = done
    row = results["rows"][1]
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(results["threads"])
    try:
        found = CliRunner().invoke(app, ["apply", str(out / row["repeat"]), "--json"])
    finally:
        torch.set_num_threads(before)
    assert found.exit_code == 0, found.output
    (scores,) = json.loads(found.stdout)["scores"].values()
    assert scores["perplexity"]["value"] == row["seeds"][0]["value"]
    assert scores["accuracy"]["value"] == row["seeds"][0]["scores"]["accuracy"]["value"]


def test_only_the_job_whose_file_is_gone_runs_again(done: Any) -> None:
    out, _, results = done
    before = states(out)
    gone = next(name for name, kind in kinds(out).items() if kind == "seed")
    (out / "jobs" / gone).unlink()
    result = invoke(out.parent / "compare.yaml", "-j", "1", "-o", out, "--json")
    after = states(out)
    assert {name for name in after if after[name] != before[name]} == {gone}
    again = json.loads(result.stdout)
    assert [row["value"] for row in again["rows"]] == [row["value"] for row in results["rows"]]


def test_rates_are_chosen_without_the_test_rows(done: Any) -> None:
    out, _, results = done
    before = states(out)
    evaluated = out.parent / "eval.jsonl"
    kept = evaluated.read_text()
    evaluated.write_text(rows(4, ("bad", "good")).replace("film", "boat"), "utf-8")
    try:
        result = invoke(out.parent / "compare.yaml", "-j", "1", "-o", out, "--json")
    finally:
        evaluated.write_text(kept, "utf-8")
    row = json.loads(result.stdout)["rows"][1]
    then = results["rows"][1]
    assert (row["learning_rate"], row["rates"]) == (then["learning_rate"], then["rates"])
    assert row["value"] != then["value"]
    new = states(out).keys() - before.keys()
    assert {kinds(out)[name] for name in new} == {"seed"}


def test_a_failed_job_is_tried_again_only_when_asked_and_seconds_become_steps(tmp_path: Path) -> None:
    text = (
        FILE.replace("{steps: 2}", "{seconds: 0.4}")
        .replace("[0, 1]", "[0]")
        .replace("[1e-4, 1e-2]", "[1e-2]")
    )
    file, out = write_files(tmp_path / "in", text.replace("[0, 2]", "[2]")), tmp_path / "out"
    assert invoke(file, "-j", "2", "-o", out).exit_code == 0
    found = {json.loads(path.read_text())["kind"]: path for path in out.glob("jobs/*.json") if _trains(path)}
    paced = json.loads(found["pace"].read_text())["steps"]
    assert paced >= 1
    results = json.loads((out / "results.json").read_text())
    assert results["rows"][0]["steps"] == paced == len(results["rows"][0]["seeds"][0]["losses"])
    failed = json.loads(found["seed"].read_text()) | {"reason": "the lights went out", "scores": {}}
    found["seed"].write_text(json.dumps(failed), "utf-8")
    again = invoke(file, "-j", "1", "-o", out)
    assert again.exit_code == 1
    assert "lora rank=2 failed: the lights went out" in again.output
    assert invoke(file, "-j", "1", "-o", out, "--retry").exit_code == 0


def _trains(path: Path) -> bool:
    result = json.loads(path.read_text())
    return result["kind"] == "pace" or bool(result["losses"])


def test_a_folder_of_something_else_is_left_alone(installed: Any, refused: Callable[..., str]) -> None:
    write_files(installed.work)
    (installed.work / "out").mkdir()
    (installed.work / "out" / "thesis.tex").write_text("years of work")
    assert "it holds thesis.tex" in refused("compare", "compare.yaml", "-o", "out")


def test_no_row_that_can_be_built(installed: Any, refused: Callable[..., str]) -> None:
    write_files(installed.work, FILE.replace("    base: {stack: []}\n", "").replace("[0, 2]", "[0, -2]"))
    said = refused("compare", "compare.yaml")
    assert said.count("a number of at least 1") == 2
    assert "compare.yaml:14:56" in said


def test_validate_reads_a_comparison_too(
    installed: Any, refused: Callable[..., str], ok: Callable[..., str]
) -> None:
    """Rows, those that cannot be, and what is wrong with the file: without running anything."""
    write_files(installed.work, FILE + "    both: {stack: [prefixquant, ia3]}\n")
    out = ok("validate", "compare.yaml")
    assert out.startswith("ok: a comparison of 4: lora rank=0, lora rank=2, base, both\n")
    assert "lora rank=0 will fail: " in out
    assert re.search(
        r"^both will fail: 'prefixquant' .*\(this order works: ia3, prefixquant\)$", out, re.MULTILINE
    )
    assert "rank=2 will fail" not in out
    told = json.loads(ok("validate", "compare.yaml", "--json"))["comparison"]
    assert [bool(reason) for reason in told.values()] == [True, False, False, True]
    assert "this file has several" in refused("validate", "compare.yaml", "--set", "lora.rank=2")
    write_files(installed.work, FILE.replace("seeds:", "seed:"))
    assert "compare.yaml:10:3" in refused("validate", "compare.yaml")
    assert not (installed.work / "compare-compare").exists()


def test_several_values_point_here(
    installed: Any, refused: Callable[..., str], ok: Callable[..., str]
) -> None:
    write_files(installed.work)
    (installed.work / "train.jsonl").write_text(rows(60), "utf-8")
    words = ("apply", "--plugin", "lora", "--data", "train.jsonl", "--steps", "1")
    said = refused(*words, "--set", "train.batch_size=2,3")
    lines = said.partition("'peftx compare compare.yaml':\n")[2].splitlines()
    shown = [line for line in lines if line.startswith("    ")]
    text = "\n".join(shown).replace("[0, 1, 2]", "[0]").replace("[2, 3]", "[2]")
    (installed.work / "compare.yaml").write_text(text, "utf-8")
    out = ok("compare", "compare.yaml", "-j", "1")
    assert "lora batch_size=2" in out
    assert Path("compare-compare/index.html").exists()
