"""The Trainer's names for keys of `train`: the same pipeline, the same checks, and the place that the text has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx_spec import Catalogue, Pipeline, SpecError, TrainSpec, TrainStage, dump, load_pipeline
from peftx_spec.compare_load import load_compare
from peftx_spec.search_load import load_search
from peftx_spec.several import several
from peftx_spec.trainer_names import TRAINER_NAMES, with_our_names

HEAD = "peftx: 1\nmodel: m\nstack: [lora]\ndata: {train: t.jsonl, eval: e.jsonl}\n"
VALUES = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
    "save_steps": 5,
}


@pytest.fixture
def load(catalogue: Catalogue) -> Callable[..., Pipeline]:
    return lambda text, *overrides: load_pipeline(HEAD + text, catalogue=catalogue, overrides=overrides)


@pytest.mark.parametrize("name", TRAINER_NAMES)
def test_each_is_ours(load: Callable[..., Pipeline], name: str) -> None:
    """In a pipeline, in a stage, in a stage of rounds, and on the command line."""
    ours, value = TRAINER_NAMES[name], VALUES[name]
    wanted = TrainSpec(**{ours: value})
    assert load(f"train: {{{name}: {value}}}").train == wanted
    assert load(f"train: {{{ours}: {value}}}").train == wanted
    assert load("train: {}", f"train.{name}={value}").train == wanted
    assert load("train: {}", f"train={{{name}: {value}}}").train == wanted
    for run in (
        f"run: [inject, {{train: {{{name}: {value}}}}}]",
        f"run: [inject, {{repeat: {{times: 2, run: [{{train: {{{name}: {value}}}}}]}}}}]",
    ):
        pipeline = load(run)
        stages = [stage for outer in pipeline.run or () for stage in outer.rounds()]
        assert pipeline.train_settings(stages[1]) == wanted


def test_what_the_command_line_sets_takes_the_place_of_the_file(load: Callable[..., Pipeline]) -> None:
    by_both = [load("train: {max_steps: 3}", "train.steps=9"), load("train: {steps: 3}", "train.max_steps=9")]
    assert [pipeline.train for pipeline in by_both] == [TrainSpec(steps=9)] * 2


def test_mistakes_have_their_place_and_the_name_that_stands_there(load: Callable[..., Pipeline]) -> None:
    with pytest.raises(SpecError) as caught:
        load("train:\n  seed: 1\n  max_steps: 0\n  lr_scheduler_type: cosin\n")
    first, second = caught.value.problems
    assert (first.line, first.column, first.path) == (7, 14, "train.max_steps")
    assert first.message == "'max_steps' has a wrong value"
    assert (second.line, second.path, second.suggestion) == (
        8,
        "train.lr_scheduler_type",
        "did you mean 'cosine'?",
    )


@pytest.mark.parametrize("order", [("steps: 3", "max_steps: 4"), ("max_steps: 4", "steps: 3")])
def test_both_names_are_a_mistake_with_both_places(
    load: Callable[..., Pipeline], order: tuple[str, str]
) -> None:
    with pytest.raises(SpecError) as caught:
        load(f"train:\n  {order[0]}\n  {order[1]}\n")
    (problem,) = caught.value.problems
    first, second = (text.partition(":")[0] for text in order)
    assert (problem.line, problem.path) == (7, f"train.{second}")
    assert f"'{first}' stands at line 6, column 3, '{second}' at line 7, column 3" in problem.message
    with pytest.raises(SpecError, match="'steps' and 'max_steps' are names of one thing"):
        load("train: {}", "train={steps: 1, max_steps: 2}")


def test_nothing_else_is_renamed(load: Callable[..., Pipeline]) -> None:
    """A key of the same name in what is no section of training is as unknown as it was."""
    with pytest.raises(SpecError, match="unknown key: 'max_steps'"):
        load("train: {}\nmax_steps: 3")
    with pytest.raises(SpecError, match=r"unknown option of 'lora': 'max_steps'"):
        load("train: {}", "lora.max_steps=3")


COMPARE = """\
peftx: 1
compare:
  base: {{model: m, data: {{train: t, eval: e}}, train: {{{0}}}, evaluate: [accuracy]}}
  budget: {{steps: 3}}
  seeds: [0]
  learning_rate: [1e-3]
  methods: {{lora: {{stack: [lora], grid: {{{1}: [2, 4]}}}}}}
"""
SEARCH = """\
peftx: 1
search:
  base: {{model: m, data: {{train: t, eval: e}}, train: {{{0}}}, evaluate: [accuracy]}}
  stack: [lora]
  space: {{{1}: {{range: [1, 9]}}}}
  trials: 2
"""


def test_comparisons_and_searches(tmp_path: Path, catalogue: Catalogue) -> None:
    file, per_device = tmp_path / "x.yaml", "per_device_train_batch_size"
    file.write_text(COMPARE.format("lr_scheduler_type: cosine", f"train.{per_device}"), "utf-8")
    rows = load_compare(file, catalogue=catalogue).rows
    trains = [row.pipeline.train for row in rows if row.pipeline is not None]
    assert [(train.batch_size, train.schedule) for train in trains if train] == [(2, "cosine"), (4, "cosine")]
    for base, varied in (("max_steps: 3", "lora.rank"), ("seed: 3", "train.max_steps")):
        file.write_text(COMPARE.format(base, varied), "utf-8")
        with pytest.raises(
            SpecError, match=r"'(train\.)?max_steps' is not .*to (say|vary)(.|\n)*'compare.budget'"
        ):
            load_compare(file, catalogue=catalogue)
    file.write_text(SEARCH.format(f"{per_device}: 2", "train.max_steps"), "utf-8")
    (stack,) = load_search(file, catalogue=catalogue, samplers=_NoSamplers()).candidates
    assert stack.pipeline({"train.max_steps": 7}).train == TrainSpec(batch_size=2, steps=7)


class _NoSamplers:
    def names(self) -> list[str]:
        return ["tpe"]

    def config(self, name: str) -> Any:
        raise AssertionError(name)


def test_several_numbers_point_to_a_comparison() -> None:
    assert several("train.max_steps=2,4") == ("train.steps", [2, 4])


def test_settings_of_a_call() -> None:
    assert with_our_names({"max_steps": 3, "seed": 1}) == ({"steps": 3, "seed": 1}, [])
    assert with_our_names({"max_steps": 3, "steps": 1}) == ({"steps": 1}, [("steps", "max_steps")])


# ------------------------------------------------------------------------------------------- a share, and a list
def test_a_share_of_the_steps_as_warmup(load: Callable[..., Pipeline], catalogue: Catalogue) -> None:
    pipeline = load("train: {steps: 7, warmup_ratio: 0.3}")
    assert pipeline.train is not None
    assert pipeline.train.warmup == 3  # 2.1, and the Trainer rounds up
    assert load_pipeline(dump(pipeline), catalogue=catalogue) == pipeline
    assert TrainSpec(warmup_steps=4).warmup == 4
    stage = TrainStage(warmup_steps=2).settings(pipeline.train)
    assert (stage.warmup, stage.warmup_ratio) == (2, 0.0)
    assert TrainStage(warmup_ratio=0.5).settings(TrainSpec(steps=10, warmup_steps=3)).warmup == 5
    with pytest.raises(SpecError, match="warmup_steps and warmup_ratio both say how long the warmup is"):
        load("train: {warmup_steps: 2, warmup_ratio: 0.3}")
    with pytest.raises(SpecError, match="both say how long the warmup is"):
        load("run: [inject, {train: {warmup_steps: 2, warmup_ratio: 0.3}}]")
    with pytest.raises(SpecError, match="a number of at most 1"):
        load("train: {warmup_ratio: 10}")


@pytest.mark.parametrize(
    ("given", "trackers"),
    [("none", ()), ("wandb", ("wandb",)), ("[tensorboard, wandb]", ("tensorboard", "wandb")), ("[]", ())],
)
def test_reports_to_one_or_several(
    load: Callable[..., Pipeline], catalogue: Catalogue, given: str, trackers: tuple[str, ...]
) -> None:
    pipeline = load(f"train: {{report_to: {given}}}")
    assert pipeline.train is not None
    assert pipeline.train.trackers == trackers
    assert load_pipeline(dump(pipeline), catalogue=catalogue) == pipeline


def test_a_tracker_that_is_none(load: Callable[..., Pipeline]) -> None:
    with pytest.raises(SpecError) as caught:
        load("train: {report_to: [wandb, tensorbord]}")
    (problem,) = caught.value.problems
    assert problem.path == "train.report_to[1]"
    assert problem.suggestion == "did you mean 'tensorboard'?"
