"""The stages that a run carries out."""

from __future__ import annotations

from typing import Any

import pytest

from peftx_spec import Catalogue, Pipeline, RunStage, dump, load_pipeline, stages_of
from peftx_spec.dumper import plain
from peftx_spec.models import SourceSpec
from peftx_spec.stages import stream_of


def stages(catalogue: Catalogue, **rest: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Kind and ids of each stage of a valid pipeline."""
    trains = rest.get("train") is not None or "train" in str(rest.get("run"))
    data = {"eval": "e.jsonl"} | ({"train": "t.jsonl"} if trains else {})
    draft = Pipeline.model_validate({"peftx": 1, "model": "m", "data": data, **rest})
    found = stages_of(load_pipeline(dump(draft), catalogue=catalogue), catalogue)
    assert all(isinstance(stage, RunStage) for stage in found)
    return [(stage.kind, stage.ids) for stage in found]


MOSAIC = {"use": "mosaic-it", "with": {"keep": 0.5}}


def test_the_whole_order(catalogue: Catalogue) -> None:
    stack = [MOSAIC, "qlora", "lora", "prefixquant", "language-ranker"]
    ids = ("mosaic-it", "qlora", "lora", "prefixquant", "language-ranker")
    assert stages(catalogue, stack=stack, train={}, evaluate=["accuracy"], output="out") == [
        ("compress", ("qlora",)),
        ("inject", ("qlora", "lora")),
        ("prepare", ("mosaic-it",)),
        ("train", ids),
        ("compress", ("prefixquant",)),
        ("evaluate", ()),
        ("save", ()),
    ]


def test_stages_that_nobody_takes_part_in_are_left_out(catalogue: Catalogue) -> None:
    assert stages(catalogue) == []
    assert stages(catalogue, stack=["lora"]) == [("inject", ("lora",))]
    assert stages(catalogue, evaluate=["accuracy"]) == [("evaluate", ())]
    assert stages(catalogue, stack=["language-ranker"]) == [("evaluate", ())]
    assert stages(catalogue, output="out") == [("save", ())]
    draft = Pipeline.model_validate({"peftx": 1, "model": "m", "train": {}})  # valid with a stack alone
    assert [(stage.kind, stage.ids) for stage in stages_of(draft, catalogue)] == [("train", ("all",))]


def test_a_plugin_that_nobody_named_evaluates_where_there_are_rows(catalogue: Catalogue) -> None:
    """It would fail only after training was paid for."""
    for data, kinds in (
        ({"calibration": "c.txt"}, ["inject", "compress"]),
        ({"calibration": "c.txt", "eval": "e.jsonl"}, ["inject", "compress", "evaluate"]),
        ({"train": "t.jsonl", "holdout": 0.1}, ["inject", "compress", "evaluate"]),
    ):
        spec = {"peftx": 1, "model": "m", "data": data, "stack": ["lora", "prefixquant", "language-ranker"]}
        found = stages_of(Pipeline.model_validate(spec), catalogue)
        assert [stage.kind for stage in found] == kinds


def test_compression_follows_the_order_of_the_stack(catalogue: Catalogue) -> None:
    assert stages(catalogue, stack=["prefixquant", "lora"]) == [
        ("compress", ("prefixquant",)),
        ("inject", ("lora",)),
    ]
    assert stages(catalogue, stack=["lora", "prefixquant"]) == [
        ("inject", ("lora",)),
        ("compress", ("prefixquant",)),
    ]


def test_phase_overrules_the_order(catalogue: Catalogue) -> None:
    late = {"use": "prefixquant", "phase": "after-training"}
    early = {"use": "prefixquant", "phase": "before-training"}
    assert [kind for kind, _ in stages(catalogue, stack=[late, "lora"])] == ["inject", "compress"]
    assert [kind for kind, _ in stages(catalogue, stack=["lora", early])] == ["compress", "inject"]


def test_who_compresses_what_it_injected_does_so_behind_the_training(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(catalogue), "compresses_own", lambda self, name: name == "qlora")
    late = [
        ("inject", ("qlora",)),
        ("prepare", ("mosaic-it",)),
        ("train", ("qlora", "mosaic-it")),
        ("compress", ("qlora",)),
    ]
    assert stages(catalogue, stack=["qlora", MOSAIC], train={})[:4] == late
    early = {"use": "qlora", "phase": "before-training"}
    assert [kind for kind, _ in stages(catalogue, stack=[early, "lora"])] == ["compress", "inject"]


def test_all_stands_for_the_plugins_with_the_hook(catalogue: Catalogue) -> None:
    run = [
        "prepare",
        "compress",
        "inject",
        "train",
        "freeze",
        {"train": {"plugins": "lora"}},
        {"merge": "lora"},
    ]
    ids = ("mosaic-it", "lora", "prefixquant")
    assert stages(catalogue, stack=[MOSAIC, "lora", "prefixquant"], run=run) == [
        ("prepare", ("mosaic-it",)),
        ("compress", ("prefixquant",)),
        ("inject", ("lora",)),
        ("train", ids),
        ("freeze", ids),
        ("train", ("lora",)),
        ("merge", ("lora",)),
    ]


def test_own_values_of_a_stage_survive(catalogue: Catalogue) -> None:
    run = ["inject", {"train": {"steps": 3}}]
    data = {"peftx": 1, "model": "m", "data": {"train": "t"}, "stack": ["lora"], "run": run}
    stage = stages_of(Pipeline.model_validate(data), catalogue)[1]
    assert plain(stage) == {"train": {"plugins": ["lora"], "steps": 3}}


def test_rounds_over_sources_are_named_by_them_and_know_their_rows(catalogue: Catalogue) -> None:
    inner = {"repeat": {"times": 2, "run": [{"train": {"plugins": "lora"}}]}}
    measured = [{"evaluate": {}}, {"evaluate": {"name": "seen"}}]
    run = ["inject", {"repeat": {"over": ["b", "a"], "run": [inner, *measured]}}]
    data = {"sources": {"a": "a", "b": "b", "c": "c"}, "eval": "e"}
    spec = {"peftx": 1, "model": "m", "data": data, "stack": ["lora"], "train": {}, "evaluate": ["accuracy"]}
    draft = Pipeline.model_validate(spec | {"run": run})
    pipeline = load_pipeline(dump(draft), catalogue=catalogue)
    assert plain(pipeline) == plain(draft)
    _, *found = stages_of(pipeline, catalogue)
    assert [(stage.source, stage.place) for stage in found] == [("b", 0)] * 4 + [("a", 1)] * 4
    assert [stage.round for stage in found[2:5]] == ["b, 1 of 2", "b, 1 of 2", "a, 2 of 2, round 1 of 2"]
    names = [stage.evaluate.name for stage in found if stage.evaluate is not None]
    assert names == ["b", "seen-b", "a", "seen-a"]
    assert stream_of(found) == ["b", "a"]
    assert [pipeline.data.trained_in(stage) for stage in found[3:5]] == [
        SourceSpec(path="b"),
        SourceSpec(path="a"),
    ]


def test_rounds_are_stages_one_after_the_other(catalogue: Catalogue) -> None:
    inner = {"repeat": {"times": 2, "run": [{"train": {"plugins": "lora"}}]}}
    run = ["inject", {"repeat": {"times": 2, "run": [inner, {"evaluate": {"name": "seen"}}]}}, "save"]
    spec = {"peftx": 1, "model": "m", "data": {"train": "t", "eval": "e"}, "stack": ["lora"]}
    draft = Pipeline.model_validate(spec | {"train": {}, "evaluate": ["accuracy"], "run": run, "output": "o"})
    pipeline = load_pipeline(dump(draft), catalogue=catalogue)
    assert plain(pipeline) == plain(draft), "a dump holds the rounds as they were written"
    found = stages_of(pipeline, catalogue)
    assert [(stage.kind, stage.round) for stage in found] == [
        ("inject", ""),
        *(
            entry
            for outer in (1, 2)
            for entry in (
                ("train", f"round {outer} of 2, round 1 of 2"),
                ("train", f"round {outer} of 2, round 2 of 2"),
                ("evaluate", f"round {outer} of 2"),
            )
        ),
        ("save", ""),
    ]
    assert [stage.evaluate.name for stage in found if stage.evaluate is not None] == ["seen-1", "seen-2"]
