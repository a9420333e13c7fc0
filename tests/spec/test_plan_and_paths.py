"""Plans as JSON, and the paths of a spec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftx_spec import Pipeline, Plan, PlannedConflict, PlannedStage, Totals, TouchedModule, resolved


def test_plan_round_trip() -> None:
    plan = Plan(
        model="m",
        stages=(PlannedStage(name="inject", plugins=("lora",), writes=("out",)),),
        modules=(TouchedModule(path="a.b", role="mlp.up", shape=(2, 3), plugin="lora", params=5, bytes=20),),
        conflicts=(PlannedConflict(plugins=("a", "b"), reason="both replace attention"),),
        totals=Totals(base_params=6, added_params=5),
    )
    assert Plan.model_validate_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["modules"][0]["shape"] == [2, 3]
    assert plan.to_json().endswith("}\n")


def test_conflicts_stand_in_the_way() -> None:
    assert Plan(model="m").runnable
    assert not Plan(model="m", conflicts=(PlannedConflict(plugins=("a",), reason="x"),)).runnable


def test_paths_are_seen_from_the_spec(tmp_path: Path) -> None:
    base = tmp_path / "specs"
    pipeline = Pipeline.model_validate(
        {
            "peftx": 1,
            "model": "./model",
            "data": {"train": {"path": "t.jsonl", "limit": 3}, "eval": "../e.jsonl", "calibration": "/abs/c"},
            "evaluate": [{"perplexity": {"path": "a/./p.txt", "limit": 2}}, "accuracy"],
            "run": [{"save": "mid"}, {"save": None}, "evaluate"],
            "output": "out/",
        }
    )
    found = resolved(pipeline, base)
    assert found.model.id == str(base / "model")
    sources = (found.data.train, found.data.eval, found.data.calibration)
    paths = [source.path for source in sources if source is not None]
    assert paths == [str(base / "t.jsonl"), str(tmp_path / "e.jsonl"), "/abs/c"]
    assert found.data.train is not None
    assert found.data.train.limit == 3
    assert found.evaluate[0].options.path == str(base / "a" / "p.txt")
    assert found.evaluate[0].options.limit == 2
    assert found.evaluate[1] == pipeline.evaluate[1]
    assert found.run is not None
    assert found.run[0].save is not None
    assert found.run[0].save.path == str(base / "mid")
    assert pipeline.run is not None
    assert found.run[1:] == pipeline.run[1:]
    assert found.output == str(base / "out")
    assert resolved(found, "/elsewhere") == found


def test_a_relative_base_is_seen_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = Pipeline.model_validate({"peftx": 1, "model": "m", "output": "out"})
    assert resolved(pipeline, "specs").output == str(tmp_path / "specs" / "out")


def test_names_that_are_no_paths_stay(tmp_path: Path) -> None:
    data = {"train": "peftx:sample"}
    pipeline = Pipeline.model_validate({"peftx": 1, "model": "org/name", "data": data})
    assert resolved(pipeline, tmp_path) == pipeline


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pipeline = Pipeline.model_validate({"peftx": 1, "model": "~/m", "output": "~/out"})
    assert resolved(pipeline, "/x").output == str(tmp_path / "out")
    assert resolved(pipeline, "/x").model.id == str(tmp_path / "m")
