"""`peftx search`, run: killed and gone on with, repeated, with what ends early and what nobody can keep."""

from __future__ import annotations

import json
import os
import shutil
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
search:
  base:
    model: peftx:tiny
    data: {train: train.jsonl, eval: eval.jsonl}
    train: {batch_size: 2, learning_rate: 1e-2}
    evaluate: [accuracy, perplexity]
  metric: perplexity
  stack: [[lora, ~]]
  space:
    lora.rank: {log: [1, 8]}
    train.steps: [1, 2]
  objectives: [quality, bundle_bytes]
  sampler: random
  seed: 1
  seeds: [0]
  trials: 3
"""


def rows(count: int) -> str:
    lines = [
        {"text": f"the film number {n} was {('good', 'bad')[n % 2]}", "label": ("good", "bad")[n % 2]}
        for n in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_files(folder: Path, *changes: tuple[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(rows(10), "utf-8")
    (folder / "eval.jsonl").write_text(rows(4).replace("film", "boat"), "utf-8")
    text = FILE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = folder / "search.yaml"
    file.write_text(text, "utf-8")
    return file


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["search", *map(str, words)])


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.name: json.loads(file.read_text()) for file in (folder / "jobs").iterdir()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A search that was killed after its first job, and gone on with: the folder, what jobs had left before the kill,
    and the results."""
    folder = tmp_path_factory.mktemp("search")
    file, out = write_files(folder), folder / "out"
    words = [sys.executable, "-m", "peftx_cli", "search", str(file), "-j", "1", "-o", str(out)]
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
    before = {name: (out / "jobs" / name).stat().st_mtime_ns for name in results(out)}
    result = invoke(file, "-j", "2", "-o", out)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return out, before, json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_no_finished_trial_is_lost_by_the_kill(done: Any) -> None:
    out, before, told = done
    assert before
    assert {name: (out / "jobs" / name).stat().st_mtime_ns for name in before} == before
    assert sum(len(row["trials"]) for row in told["rows"]) == 3
    assert sorted(path.name for path in out.iterdir() if path.name[:1] != ".") == [
        "index.html", "jobs", "repeat", "results.csv", "results.json", "study",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_front_is_measured_on_the_test_rows_and_repeats(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    out, _, told = done
    front = [row for row in told["rows"] if row["front"]]
    assert front
    assert all(row["test_value"] is None and not row["seeds"] for row in told["rows"] if not row["front"])
    assert {path.name for path in (out / "repeat").iterdir()} == {Path(row["repeat"]).name for row in front}
    row = front[0]
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(told["threads"])
    try:
        found = CliRunner().invoke(app, ["apply", str(out / row["repeat"]), "--json"])
    finally:
        torch.set_num_threads(before)
    assert found.exit_code == 0, found.output
    (scores,) = json.loads(found.stdout)["scores"].values()
    assert scores["perplexity"]["value"] == row["test_value"] == row["seeds"][0]["value"]


@pytest.mark.slow
def test_a_trial_has_its_costs_and_was_looked_at(done: Any) -> None:
    out, _, told = done
    found = results(out).values()
    trained = [one for one in found if one["kind"] == "trial" and one["losses"]]
    assert trained
    assert all(one["bundle_bytes"] > 0 < one["trained"] and one["token_seconds"] > 0 for one in trained)
    assert all(len(one["checks"]) == one["steps"] for one in trained)  # of one or two steps, each
    assert all(one["checks"][-1]["share"] == 1.0 for one in trained)
    assert not any(one["checks"] for one in found if one["kind"] == "seed")
    assert {row["method"] for row in told["rows"]} == {"lora", "base"}
    assert {row["status"] for row in told["rows"]} == {"done"}


@pytest.mark.slow
def test_the_same_command_runs_nothing_again_and_more_trials_go_on(done: Any) -> None:
    out, _, told = done
    before = results(out)
    file = out.parent / "search.yaml"
    again = invoke(file, "-j", "1", "-o", out, "--json")
    assert json.loads(again.stdout)["rows"] == told["rows"]
    assert results(out) == before
    file.write_text(file.read_text().replace("trials: 3", "trials: 4"), "utf-8")
    more = json.loads(invoke(file, "-j", "1", "-o", out, "--json").stdout)
    assert sum(len(row["trials"]) for row in more["rows"]) == 4
    assert [row["row"] for row in more["rows"]][: len(told["rows"])] == [row["row"] for row in told["rows"]]


@pytest.mark.slow
def test_no_point_keeps_the_limits(done: Any, tmp_path: Path) -> None:
    """The jobs are those of the search without limits, so none runs."""
    out = shutil.copytree(done[0], tmp_path / "out")
    before = results(out)
    file = done[0].parent / "limited.yaml"
    file.write_text(FILE + "  limits: {token_seconds: 0.000001}\n", "utf-8")
    result = invoke(file, "-j", "1", "-o", out)
    assert result.exit_code == 1
    assert "no point keeps the limits" in result.stderr
    assert "token_seconds: the least was" in result.stderr
    assert results(out) == before
    told = json.loads((out / "results.json").read_text())
    assert {row["status"] for row in told["rows"]} == {"over a limit"}
    assert list((out / "repeat").iterdir()) == []


def test_an_installation_without_optuna_is_told_what_to_install(
    installed: Any, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(installed.work)
    monkeypatch.setitem(sys.modules, "optuna", None)
    said = refused("search", "search.yaml")
    assert "searching needs optuna, which is not installed" in said
    assert "pip install 'peftx[search]'" in said


def test_a_folder_of_something_else_is_left_alone(installed: Any, refused: Callable[..., str]) -> None:
    write_files(installed.work)
    (installed.work / "out").mkdir()
    (installed.work / "out" / "thesis.tex").write_text("years of work")
    assert "exists and is no search: it holds thesis.tex" in refused("search", "search.yaml", "-o", "out")


def test_validate_reads_a_search_too(
    installed: Any, refused: Callable[..., str], ok: Callable[..., str]
) -> None:
    write_files(installed.work)
    assert ok("validate", "search.yaml").startswith("ok: a search of 2: lora, ")
    write_files(installed.work, ("sampler: random", "sampler: guess"))
    assert "search.yaml:14:12" in refused("validate", "search.yaml")


def test_a_space_that_nothing_can_be_built_of(installed: Any, refused: Callable[..., str]) -> None:
    write_files(installed.work, ("[[lora, ~]]", "[lora, mezo, {use: mezo, id: again}]"))
    said = refused("search", "search.yaml")
    assert "no stack of the search can be built" in said
    assert "lora + mezo + again: " in said
