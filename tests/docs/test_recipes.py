"""The recipes in docs/recipes run from YAML to a bundle that loads and generates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import peftx
from peftx.errors import PeftxError
from peftx.pipeline import load_run
from peftx.planning import plan
from peftx.toolkits.evaluation.streams import AccuracyMatrix
from peftx.toolkits.serving import Engine, Request, Server
from peftx_cli.main import app

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))
SERVED = next(path for path in RECIPES if path.stem == "rows-to-served")
SHRINKS = next(path for path in RECIPES if path.stem == "shrink")


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} == {
        "dialogues",
        "mosaic-lora-deft-prefixquant",
        "prompt-lora-mezo",
        "rows-to-served",
        "stream",
        "shrink",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_from_end_to_end(path: Path, tmp_path: Path) -> None:
    shorter = ["train.steps=3", "train.batch_size=2", f"output={tmp_path / 'out'}"]
    if path == SERVED:
        shorter.append("signround.steps=1")
    if path == SHRINKS:
        shorter += ["apt.fade=1", "apt.tune=1", "apt.prune=1"]
    run = load_run(path, overrides=shorter)
    for metric in run.pipeline.evaluate:
        assert metric.metric in {"perplexity", "signround", "task-accuracy"}
    result = run.run()
    assert result.training[0].steps == 3
    assert all(loss == loss for _, loss in result.training[0].losses)
    again = peftx.load(tmp_path / "out")
    assert list(again.plugins) == [entry.id for entry in run.pipeline.stack]
    prompt = "Office to Grey Island. Who is on duty?"
    assert again.generate(prompt, max_new_tokens=5) == result.stack.generate(prompt, max_new_tokens=5)


@pytest.mark.slow
def test_a_model_shrinks_at_each_stage_and_the_plan_knows(tmp_path: Path) -> None:
    """Half of the numbers in heads and neurons go, and 4 bits are left of the rest; nothing else is in the bundle."""
    shorter = ["train.steps=4", "train.batch_size=1", "apt.fade=1", "apt.tune=1", "apt.prune=2"]
    run = load_run(SHRINKS, overrides=[*shorter, f"output={tmp_path / 'out'}"])
    planned = plan(run.pipeline)
    assert planned.runnable, planned.conflicts
    result = run.run()
    assert list(result.scores) == ["base", "pruned", "recovered", "packed"]
    held = {file.stem: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert set(held) == {"base", "prefixquant"}
    assert sum(held.values()) < 0.35 * result.bytes_before
    assert sum(held.values()) == pytest.approx(planned.totals.bundle_bytes, rel=0.05)


@pytest.mark.slow
def test_raw_rows_become_a_served_model(tmp_path: Path) -> None:
    """One command; what it prints has the figures of every stage, and what it leaves is served."""
    out = tmp_path / "out"
    shorter = (f"output={out}", "train.steps=3", "train.batch_size=2", "signround.steps=1")
    told = CliRunner().invoke(
        app, ["apply", str(SERVED), *(word for each in shorter for word in ("--set", each))]
    )
    assert told.exit_code == 0, told.output
    said = " ".join(told.output.split())
    for figures in (
        r"inject \S+ s 221,952 parameters train",
        r"prepare \S+ s 60 rows became 24; dropped 36: .* over the budget of its task, .* IFD",
        r"train \S+ s 3 steps, loss \S+ to \S+",
        r"compress \S+ s 2,349,696 bytes",
        r"evaluate \S+ s perplexity \S+, .* evaluate \S+ s perplexity \S+, .* error_left \S+",
        r"save \S+ s .*out \([\d,]+ bytes\)",
        r"bytes on disk after .* times smaller",
        r"perplexity, base \S+ .* perplexity, trained \S+ .* perplexity, packed \S+ ",
    ):
        assert re.search(figures, said), figures
    told = CliRunner().invoke(app, ["report", str(out), "-o", str(tmp_path / "page.html"), "--samples", "1"])
    assert told.exit_code == 0, told.output
    page = " ".join(re.sub(r"<[^>]*>", " ", (tmp_path / "page.html").read_text("utf-8")).split())
    for figures in (
        r"superfiltering 60 42 18 13 IFD below those kept 5 IFD of 1 or more",
        r"smart 42 24 18 18 over the budget of its task",
        r"measure base \(before training\) trained packed perplexity \S+ ",
        r"load [\d.]+ .*prepare superfiltering, smart [\d.]+ .*compress signround [\d.]+ 2,349,696 bytes",
        r"The stack wrote \d+ tokens in \d+ forward passes, [\d.]+ tokens each",
    ):
        assert re.search(figures, page), figures
    stack, prompt = peftx.load(out), "Office to Grey Island. Who is on duty?"
    with Engine(Server(stack, name="stations")) as engine:
        answer = engine.submit(Request(prompt, max_tokens=6, temperature=0)).result(60)
        assert answer.text == stack.generate(prompt, max_new_tokens=6, do_sample=False)
        assert "'aded' has a say in how a whole text is written" in engine.about()["batching"]


def test_a_stream_is_learned_task_by_task(tmp_path: Path) -> None:
    """In fewer steps than the recipe's: each task is better known after its round than before."""
    path = next(path for path in RECIPES if path.stem == "stream")
    result = load_run(path, overrides=["train.steps=12", "lae.frozen=0", f"output={tmp_path / 'out'}"]).run()
    matrix = AccuracyMatrix.of(result.stack.history)
    assert matrix is not None
    assert matrix.tasks == ("sea", "radio", "work")
    assert matrix.before is not None
    assert all(matrix.values[i][i] > matrix.before[i] for i in range(3))


def test_two_loops_of_decoding_are_refused(tmp_path: Path) -> None:
    """Why the recipe has `aded` and not `hydragen` beside it."""
    both = SERVED.read_text(encoding="utf-8").replace("\ntrain:", "\n  - use: hydragen\ntrain:")
    (tmp_path / "stations.jsonl").write_bytes((SERVED.parent / "stations.jsonl").read_bytes())
    (tmp_path / "both.yaml").write_text(both, encoding="utf-8")
    with pytest.raises(
        PeftxError, match=r"'aded' .* and 'hydragen' .* both replace the decoding loop"
    ) as refused:
        load_run(tmp_path / "both.yaml")
    assert re.search(
        r"'hydragen' .* shares .* texts of a batch, .* 'aded' .* one text at a time", refused.value.message
    )
