"""Searches: what a file's stacks and space are, and what is wrong with it, by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from peftx_spec import PeftxError, Problem, SpecError, load_pipeline
from peftx_spec.search_load import LoadedSearch, load_search, reason_of

GOOD = """\
peftx: 1
search:
  base:
    model: peftx:tiny
    data: {train: train.jsonl, eval: eval.jsonl}
    train: {batch_size: 2}
    evaluate: [accuracy]
  stack:
    - [lora, ~]
    - prefixquant
  space:
    lora.rank: {log: [2, 64]}
    lora.dropout: {range: [0, 0.5]}
    prefixquant.bits: [2, 4]
    train.steps: {range: [1, 9]}
  limits: {bundle_bytes: 200k, token_seconds: 0.5}
  trials: 5
"""


class Samplers:
    """One sampler with an option, and one that does not import."""

    def names(self) -> list[str]:
        return ["tpe", "mine", "broken"]

    def config(self, name: str) -> type[BaseModel]:
        if name == "broken":
            raise PeftxError("the sampler 'broken' does not import", hint="mend it")

        class Config(BaseModel):
            model_config = ConfigDict(extra="forbid")
            radius: float = 1.0

        return Config


@pytest.fixture
def read(tmp_path: Path, catalogue: Any) -> Callable[..., LoadedSearch]:
    """`read(("old", "new"), ...)`: the good file with replacements."""

    def load(*changes: tuple[str, str]) -> LoadedSearch:
        text = GOOD
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "search.yaml"
        file.write_text(text, "utf-8")
        return load_search(file, catalogue=catalogue, samplers=Samplers())

    return load


@pytest.fixture
def wrong(read: Callable[..., LoadedSearch]) -> Callable[..., list[Problem]]:
    def load(*changes: tuple[str, str]) -> list[Problem]:
        with pytest.raises(SpecError) as caught:
            read(*changes)
        return caught.value.problems

    return load


def test_choices_make_stacks_and_each_has_the_keys_that_are_its_own(
    read: Callable[..., LoadedSearch],
) -> None:
    loaded = read()
    both, quantized = loaded.candidates
    assert (both.name, both.trains) == ("lora + prefixquant", True)
    assert both.keys == ("lora.rank", "lora.dropout", "prefixquant.bits", "train.steps")
    assert (quantized.name, quantized.trains, quantized.keys) == ("prefixquant", False, ("prefixquant.bits",))
    assert both.place.endswith("search.yaml:9:8")
    assert loaded.metric == "accuracy"
    assert loaded.spec.limits == {"bundle_bytes": 200_000, "token_seconds": 0.5}


def test_whole_ends_make_whole_numbers(read: Callable[..., LoadedSearch]) -> None:
    space: dict[str, Any] = dict(read().spec.space)
    assert space["lora.rank"].whole
    assert not space["lora.dropout"].whole
    assert space["prefixquant.bits"] == (2, 4)


def test_a_point_is_a_pipeline_with_absolute_paths(read: Callable[..., LoadedSearch], tmp_path: Path) -> None:
    stack = read().candidates[0]
    pipeline = stack.pipeline({"lora.rank": 8, "lora.dropout": 0.25, "prefixquant.bits": 2, "train.steps": 7})
    assert pipeline.stack[0].options == {"rank": 8, "dropout": 0.25}
    assert pipeline.stack[1].options == {"bits": 2}
    assert pipeline.train is not None
    assert (pipeline.train.steps, pipeline.train.batch_size) == (7, 2)
    assert pipeline.data.train is not None
    assert pipeline.data.train.path == str(tmp_path / "train.jsonl")


def test_values_that_do_not_fit_each_other_are_a_reason(read: Callable[..., LoadedSearch]) -> None:
    stack = read().candidates[0]
    with pytest.raises(SpecError) as caught:
        stack.pipeline({"train.steps": 7, "train.num_train_epochs": 2})
    assert "steps and num_train_epochs both say how long" in reason_of(caught.value)


def test_a_search_may_have_one_stack_alone(read: Callable[..., LoadedSearch]) -> None:
    (stack,) = read(("[lora, ~]", "lora")).candidates
    assert stack.name == "lora + prefixquant"


def test_an_empty_stack_is_the_base(read: Callable[..., LoadedSearch]) -> None:
    loaded = read(("    - prefixquant\n", ""), ("    prefixquant.bits: [2, 4]\n", ""))
    assert [stack.name for stack in loaded.candidates] == ["lora", "base"]


@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        ("[2, 64]", "[0, 64]", (12, 16), "a span of log starts above 0"),
        ("[2, 64]", "[64, 2]", (12, 16), "64 is not below 2"),
        ("{log: [2, 64]}", "{log: [2, 64], range: [1, 2]}", (12, 16), "a span is either log: [low, high] or range"),
        ("{log: [2, 64]}", "{lg: [2, 64]}", (12, 17), "unknown key: 'lg'"),
        ("{log: [2, 64]}", "{log: [2]}", (12, 22), "at least 2 entries"),
        ("{log: [2, 64]}", "8", (12, 16), "'lora.rank' has one value, and nothing to choose"),
        ("{log: [2, 64]}", "[]", (12, 16), "at least 1 entry"),
        ("{log: [2, 64]}", "[4, 4]", (12, 20), "'lora.rank': 4 stands twice"),
        ("[0, 0.5]", "[0, 1.5]", (13, 31), "a number less than 1"),
        ("prefixquant.bits: [2, 4]", "prefixquant.bits: [2, 5]", (14, 27), "2, 3, 4 or 8"),
        ("lora.rank", "lora.rnk", (12, 5), "unknown option of 'lora': 'rnk'"),
        ("lora.rank", "dora.rank", (12, 5), "there is no 'dora' to vary in these stacks"),
        ("lora.rank", "lora", (12, 5), "'lora' names no option"),
        ("train.steps", "train.seed", (15, 5), "'search.seed' is that of each trial"),
        ("train.steps: {range: [1, 9]}", "train.steps: {range: [0, 9]}", (15, 27), "a number of at least 1"),
        ("batch_size: 2", "eval_steps: 2", (6, 13), "'search.checks' says how often"),
        ("batch_size: 2", "num_train_epochs: 2", (6, 13), "count steps"),
        ("[lora, ~]", "[lora, prefixquant]", (10, 7), "the plugin 'prefixquant' stands twice"),
        ("[lora, ~]", "[lora, {use: lora, with: {rank: 3}}]", (9, 14), "two stacks are named 'lora + prefixquant'"),
        ("[lora, ~]", "[lora, lra]", (9, 14), "no plugin 'lra' is installed"),
        ("[lora, ~]", "[{use: lora, with: {alpha: 0}}, ~]", (9, 34), "a number greater than 0"),
        ("[lora, ~]", "[]", (9, 7), "at least 1 entry"),
        ("200k", "200q", (16, 26), "'bundle_bytes' has a wrong value"),
        ("bundle_bytes", "bundel_bytes", (16, 12), "did you mean 'bundle_bytes'"),
        ("trials: 5", "objectives: [bundle_bytes]", (17, 15), "'quality' is not among the objectives"),
        ("trials: 5", "objectives: [quality, speed]", (17, 25), "'train_seconds' or 'token_seconds'"),
        ("trials: 5", "sampler: tp", (17, 12), "did you mean 'tpe'?"),
        ("trials: 5", "sampler: {use: mine, with: {radios: 2}}", (17, 31), "unknown option of 'mine': 'radios'"),
        ("trials: 5", "sampler: broken", (17, 12), "does not import"),
        ("trials: 5", "trials: 0", (17, 11), "a number of at least 1"),
        ("trials: 5", "seeds: [0, 0]", (17, 14), "the seed 0 stands twice"),
        ("trials: 5", "metric: speed", (17, 11), "'evaluate' does not list"),
        ("data: {train: train.jsonl, eval: eval.jsonl}", "data: {train: train.jsonl}", (5, 5), "no rows to measure on"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(
    wrong: Callable[..., list[Problem]], old: str, new: str, place: tuple[int, int], said: str
) -> None:
    found = wrong((old, new))
    assert said in "\n".join(map(str, found))
    assert place in [(problem.line, problem.column) for problem in found]
    assert {Path(problem.file).name for problem in found} == {"search.yaml"}


def test_nothing_to_choose(wrong: Callable[..., list[Problem]]) -> None:
    space = GOOD[GOOD.index("  space:") : GOOD.index("  limits")]
    (found,) = wrong(("[lora, ~]", "lora"), (space, ""))
    assert "there is nothing to choose" in str(found)


def test_too_many_stacks(wrong: Callable[..., list[Problem]]) -> None:
    slots = "".join("    - [lora, ~, ~]\n" for _ in range(5))
    assert "the choices make 486 stacks" in str(wrong(("    - prefixquant\n", slots))[0])


def test_a_search_is_no_pipeline(catalogue: Any) -> None:
    with pytest.raises(SpecError, match="peftx search FILE"):
        load_pipeline(GOOD, catalogue=catalogue)


def test_no_plugin_is_loaded_before_the_file_is_right(tmp_path: Path) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} was asked for")

    file = tmp_path / "search.yaml"
    file.write_text(GOOD.replace("trials: 5", "trials: 0"), "utf-8")
    with pytest.raises(SpecError):
        load_search(file, catalogue=Nothing(), samplers=Samplers())  # type: ignore[arg-type]
