"""The models: shorthands, defaults, and what they promise about themselves."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from peftx_spec import DataSpec, Pipeline, StackEntry, TrainSpec, models, plan, stages
from peftx_spec.base import BestMetric, SpecModel
from peftx_spec.models import HIGHER_IS_BETTER, METRICS
from peftx_spec.stages import TrainStage

MODELS = [
    value
    for module in (models, plan, stages)
    for value in vars(module).values()
    if isinstance(value, type)
    and issubclass(value, BaseModel)
    and value.__module__ == module.__name__
    and value.__doc__
]


def pipeline(**rest: Any) -> Pipeline:
    return Pipeline.model_validate({"peftx": 1, "model": "m", **rest})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_frozen_strict_about_keys_and_described(model: type[BaseModel]) -> None:
    assert model.model_config["frozen"]
    assert all(info.description for info in model.model_fields.values())
    assert model.__doc__
    if issubclass(model, SpecModel):
        assert model.model_config["extra"] == "forbid"


def test_nothing_is_assigned_later() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        pipeline().output = "x"


def test_shorthands_are_their_long_forms() -> None:
    short = pipeline(
        data={"train": "t.jsonl"},
        stack=["lora", {"use": "x", "with": None}],
        evaluate=["accuracy", {"perplexity": "p.txt"}, {"exact-match": None}],
        run=["prepare", {"inject": "lora"}, {"train": None}, "evaluate", {"save": "out"}, {"save": None}],
    )
    long = Pipeline.model_validate(
        {
            "peftx": 1,
            "model": {"id": "m"},
            "data": {"train": {"path": "t.jsonl"}},
            "stack": [{"use": "lora", "id": "lora", "with": {}}, {"use": "x", "id": "x", "with": {}}],
            "evaluate": [{"accuracy": {}}, {"perplexity": {"path": "p.txt"}}, {"exact-match": {}}],
            "run": [
                {"prepare": ["all"]},
                {"inject": ["lora"]},
                {"train": {"plugins": ["all"]}},
                {"evaluate": {"name": None}},
                {"save": {"path": "out"}},
                {"save": {}},
            ],
        }
    )
    assert short == long
    assert [stage.kind for stage in short.run or ()] == [
        "prepare",
        "inject",
        "train",
        "evaluate",
        "save",
        "save",
    ]
    assert [stage.ids for stage in short.run or ()] == [("all",), ("lora",), ("all",), (), (), ()]


def test_defaults() -> None:
    assert pipeline().data == DataSpec()
    assert (pipeline().train, pipeline().run, pipeline().output, pipeline().stack) == (None, None, None, ())
    assert (pipeline().model.dtype, pipeline().model.device) == ("auto", "auto")
    assert (TrainSpec().weight_decay, TrainSpec().max_length, TrainSpec().checkpoint_every) == (
        0.0,
        256,
        None,
    )


def test_options_have_a_name_for_python_and_one_for_yaml() -> None:
    assert StackEntry(use="lora", options={"rank": 2}) == StackEntry.model_validate(
        {"use": "lora", "with": {"rank": 2}}
    )
    assert StackEntry(use="lora").id == "lora"


def test_entry_by_id() -> None:
    spec = pipeline(stack=["lora", {"use": "lora", "id": "lora-2"}])
    assert spec.entry("lora-2") is spec.stack[1]
    with pytest.raises(KeyError, match="lora-3"):
        spec.entry("lora-3")


def test_metric_and_options() -> None:
    metric = pipeline(evaluate=[{"perplexity": {"path": "p", "limit": 3}}]).evaluate[0]
    assert (metric.metric, metric.options.path, metric.options.limit) == ("perplexity", "p", 3)


def test_a_train_stage_can_change_all_of_train_and_nothing_else() -> None:
    own = {name: info for name, info in TrainStage.model_fields.items() if name != "plugins"}
    assert list(own) == list(TrainSpec.model_fields)
    for name, value in {
        "steps": 0,
        "learning_rate": 0,
        "seed": -1,
        "schedule": "x",
        "checkpoint_every": 0,
    }.items():
        for model in (TrainSpec, TrainStage):
            with pytest.raises(ValidationError, match=name):
                model.model_validate({name: value})


def test_a_train_stage_changes_what_it_names() -> None:
    spec = pipeline(
        train={"steps": 9, "batch_size": 2},
        run=[{"train": {"steps": 3, "max_grad_norm": 0}}, {"train": None}, "inject"],
    )
    first, second, third = spec.run or ()
    assert spec.train_settings(first) == TrainSpec(steps=3, batch_size=2, max_grad_norm=0)
    assert spec.train_settings(second) == spec.train
    with pytest.raises(ValueError, match="'inject' is no stage of training"):
        spec.train_settings(third)


def test_train_stage_without_train_starts_from_the_defaults() -> None:
    spec = pipeline(run=[{"train": {"steps": 3}}])
    assert spec.run is not None
    assert spec.train_settings(spec.run[0]) == TrainSpec(steps=3)


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"])
def test_devices(device: str) -> None:
    assert pipeline(model={"id": "m", "device": device}).model.device == device


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "CPU", "cpu\n"])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(ValidationError, match="device"):
        pipeline(model={"id": "m", "device": device})


def test_what_one_may_choose_by_is_one_list() -> None:
    assert get_args(BestMetric) == tuple(HIGHER_IS_BETTER)
    assert set(HIGHER_IS_BETTER) <= set(METRICS)
