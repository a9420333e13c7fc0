"""The history of a stack: what its trainings logged, and what was measured; in its bundle, and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import peftx
from peftx import Claim, Delta, Plugin, Stack, hookimpl
from peftx import history as module
from peftx.engines.bundle.manifest import own_digest
from peftx.engines.files import sha256
from peftx.errors import BundleError
from peftx.history import History, TrainingHistory
from peftx.kernel.phases import Phase
from peftx.pipeline import load_run
from peftx.toolkits.evaluation import Score

ROWS = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(12)]
OPTIONS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 2,
    "warmup_steps": 2,
    "learning_rate": 0.02,
    "checkpoint_every": 2,
}


class HistoryGain(Delta):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.z = torch.nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * self.z


class HistoryGains(Plugin):
    """Gains on one layer, trained in two phases, with a term of the loss in the second."""

    claims = {Claim.IDENTITY_AT_START}

    @hookimpl
    def inject(self, model: Any) -> None:
        for site in list(model.linears("mlp"))[:1]:
            site.attach(HistoryGain(site.out_features))

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("first", share=0.5), Phase("second"))

    @hookimpl(wrapper=True)
    def train_step(self, step: Any) -> Any:
        if step.phase(self).name == "second":
            step.add_loss("size", lambda outputs: step.parameters()[0].pow(2).mean(), 0.1)
        return (yield)


def stack_of() -> Stack:
    return Stack("peftx:tiny", [HistoryGains()])


def test_history_is_what_the_trainer_logged(tmp_path: Path) -> None:
    stack = stack_of()
    report = stack.train(ROWS, **OPTIONS)
    (training,) = stack.history.trainings
    assert training.losses == report.losses, "to the last bit"
    assert training.step == [1, 2, 3, 4, 5, 6]
    assert training.learning_rate == pytest.approx([0.0, 0.01, 0.02, 0.015, 0.01, 0.005])
    assert training.seconds == sorted(training.seconds)
    assert 0 < training.seconds[-1] <= report.seconds
    assert training.phases == {"history-gains": ["first"] * 3 + ["second"] * 3}
    assert training.terms["size"][:3] == [None] * 3
    assert None not in training.terms["task"]
    assert training.terms["size"][-1] == report.terms["size"]


def test_a_bundle_keeps_it_and_so_does_one_saved_after_loading(tmp_path: Path) -> None:
    stack = stack_of()
    stack.train(ROWS, **OPTIONS)
    stack.save(tmp_path / "one")
    again = peftx.load(tmp_path / "one")
    assert again.history == stack.history
    again.save(tmp_path / "two")
    assert (tmp_path / "two/history.json").read_bytes() == (tmp_path / "one/history.json").read_bytes()
    again.train(ROWS, **OPTIONS | {"steps": 2})
    assert [len(training.step) for training in again.history.trainings] == [6, 2], (
        "goes on, does not begin anew"
    )
    again.save(tmp_path / "two")
    assert peftx.load(tmp_path / "two").history == again.history


@pytest.mark.parametrize("kill_at", [2, 4])
def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(tmp_path: Path, kill_at: int) -> None:
    whole = stack_of()
    whole.train(ROWS, output=tmp_path / "whole", **OPTIONS)

    class Killed(Exception):
        pass

    def kill(done: int, total: int, terms: object) -> None:
        if done == kill_at + 1:
            raise Killed

    cut = stack_of()
    with pytest.raises(Killed):
        cut.train(ROWS, output=tmp_path / "cut", progress=kill, **OPTIONS)
    assert not cut.history
    resumed = stack_of()
    resumed.train(ROWS, output=tmp_path / "cut", resume=True, **OPTIONS)
    (first,), (second,) = whole.history.trainings, resumed.history.trainings
    assert first.model_dump(exclude={"seconds"}) == second.model_dump(exclude={"seconds"})
    assert second.seconds == sorted(second.seconds), "time goes on from where it stopped"
    again = stack_of()  # from a checkpoint of the finished run
    again.train(ROWS, output=tmp_path / "cut", resume=True, **OPTIONS)
    assert again.history == resumed.history


def test_a_run_keeps_what_was_measured_and_when(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    text = f"""
peftx: 1
model: peftx:tiny
data: {{train: {rows}, holdout: 0.2}}
stack: [lora]
train: {{steps: 2}}
evaluate: [perplexity]
run: [{{evaluate: {{name: base}}}}, inject, train, evaluate, save]
output: {tmp_path / "out"}
"""
    result = load_run(text).run()
    history = peftx.load(tmp_path / "out").history
    assert [(e.name, e.trainings) for e in history.evaluations] == [("base", 0), ("after train", 1)]
    for evaluation in history.evaluations:
        scores = result.scores[evaluation.name]
        assert {n: s.value for n, s in evaluation.scores.items()} == {n: s.value for n, s in scores.items()}
    assert history.trainings[0].losses == result.training[0].losses


class HistoryPicks(Plugin):
    """Drops every row below a number, with a reason of its own for each; doubles those that are left."""

    @hookimpl
    def prepare_data(self, data: Any, stack: Stack) -> None:
        rows = len(data.train)
        data.keep([f"row {n}" if n < rows // 2 else None for n in range(rows)], by="history-picks")
        data.train = data.train.select([*range(len(data.train))] * 2)


def test_what_a_plugin_made_of_the_rows_is_kept(tmp_path: Path) -> None:
    """Of each of two plugins, in order, with reasons; more reasons than a file names are counted together."""
    stack = Stack("peftx:tiny", [("one", HistoryPicks()), ("two", HistoryPicks()), HistoryGains()])
    stack.train(ROWS, steps=2)
    stack.train([{"prompt": f"Say {n}.", "completion": "So."} for n in range(60)], steps=2)
    stack.save(tmp_path / "out")
    history = peftx.load(tmp_path / "out").history
    told = [(p.plugin, p.trainings, p.rows, p.left) for p in history.preparations]
    assert told == [("one", 0, 12, 12), ("two", 0, 12, 12), ("one", 1, 60, 60), ("two", 1, 60, 60)]
    assert history.preparations[1].dropped == {f"row {n}": 1 for n in range(6)}
    many = history.preparations[2].dropped
    assert len(many) == module.MOST_REASONS + 1
    assert (sum(many.values()), many["other reasons"]) == (30, 10)


def test_a_run_keeps_its_stages(tmp_path: Path) -> None:
    """By the names of their rounds, with seconds; but for where rows and bundles went, which is nobody else's."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    text = f"""
peftx: 1
model: peftx:tiny
data: {{train: {rows}, holdout: 0.2}}
stack: [{{use: mosaic-it, with: {{copies: 1}}}}, lora]
train: {{steps: 1}}
evaluate: [perplexity]
run: [inject, {{repeat: {{times: 2, run: [prepare, train]}}}}, evaluate, save]
output: {tmp_path / "out"}
"""
    result = load_run(text).run()
    stages = peftx.load(tmp_path / "out").history.stages
    names = ["load", "inject", "prepare (round 1 of 2)", "train (round 1 of 2)", "prepare (round 2 of 2)",
             "train (round 2 of 2)", "evaluate"]  # fmt: skip
    assert [stage.name for stage in stages] == names
    assert [stage.seconds for stage in stages[1:]] == list(result.seconds.values())[:-1]
    assert stages[1].plugins == ["lora"]
    assert "parameters train" in stages[1].detail
    assert str(tmp_path) not in "".join(stage.detail for stage in result.stack.history.stages)
    assert [p.trainings for p in result.stack.history.preparations] == [0, 1]
    assert [stage.name for stage in result.stack.history.stages] == [*names, "save"]


def test_a_stack_without_one_has_no_file(tmp_path: Path) -> None:
    stack_of().save(tmp_path / "out")
    assert not (tmp_path / "out/history.json").exists()
    assert not peftx.load(tmp_path / "out").history


def signed(folder: Path) -> None:
    """The manifest made anew for the files as they are."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text("utf-8"))
    manifest["files"] = {name: sha256(folder / name) for name in manifest["files"]}
    manifest["own"] = own_digest(manifest)
    file.write_text(json.dumps(manifest), "utf-8")


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"trainings": 3}', '{"trainings": [{"steps": 1, "step": [1]}]}',
     '{"trainings": [{"steps": 1, "step": [1], "loss": ["<b>"]}]}',
     '{"evaluations": [{"name": "x", "trainings": 0, "scores": {"p": {"value": Infinity}}}]}'],
)  # fmt: skip
def test_one_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    stack = stack_of()
    stack.train(ROWS, steps=2, batch_size=2)
    stack.save(tmp_path / "out")
    file = tmp_path / "out/history.json"
    file.write_text(text, "utf-8")
    with pytest.raises(BundleError, match=r"history.json is corrupted \(sha256 differs\)"):
        peftx.load(tmp_path / "out")
    signed(tmp_path / "out")
    with pytest.raises(BundleError, match=r"history.json' is corrupted"):
        peftx.load(tmp_path / "out")
    file.unlink()
    with pytest.raises(BundleError, match=r"history\.json is missing"):
        peftx.load(tmp_path / "out")


def test_numbers_that_json_lacks_are_left_out() -> None:
    history = History()
    history.trained([{"step": 1, "loss": math.inf, "grad_norm": math.nan}], steps=1)
    history.evaluated("base", {"perplexity": Score(name="perplexity", value=math.inf)})
    again = History.model_validate_json(history.text())
    assert again == history
    assert again.trainings[0].loss == [None]
    assert again.trainings[0].losses == []
    assert again.evaluations[0].scores["perplexity"].value is None


def test_a_long_one_is_thinned_and_its_end_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_STEPS", 10)
    history = History()
    history.trained(
        [{"step": n, "loss": float(n), "terms": {"task": float(n)}} for n in range(1, 36)], steps=35
    )
    kept = History.model_validate_json(history.text()).trainings[0]
    assert kept.step == [1, 5, 9, 13, 17, 21, 25, 29, 33, 35]
    assert kept.terms["task"] == kept.loss
    assert len(history.trainings[0].step) == 35
    assert TrainingHistory(steps=1).every(3).step == []
