"""`--set target=value`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftx_spec import Pipeline, Problem, resolved

SPEC = """
peftx: 1
model: m
data: {train: t.jsonl, eval: {path: e.jsonl}}
stack:
  - mosaic-it
  - lora
  - {use: lora, id: second, with: {rank: 2, ranks: {q: 1}}}
  - prefixquant
train: {steps: 9}
evaluate: [accuracy, {perplexity: p.txt}, {exact-match: {limit: 3}}]
"""
GIVEN = "mosaic-it.keep=.5"  # what the spec lacks
HERE = Path.cwd()


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("lora.rank=16", lambda p: p.stack[1].options, {"rank": 16}),
        ("second.rank=16", lambda p: p.stack[2].options, {"rank": 16, "ranks": {"q": 1}}),
        ("second.ranks.k=3", lambda p: p.stack[2].options["ranks"], {"q": 1, "k": 3}),
        ("second.ranks={}", lambda p: p.stack[2].options["ranks"], {}),
        ("lora.layers=[1, 2]", lambda p: p.stack[1].options["layers"], [1, 2]),
        ("lora.schedule.start=.5", lambda p: p.stack[1].options["schedule"], {"start": 0.5}),
        ("lora.targets=yes", lambda p: p.stack[1].options["targets"], "yes"),
        ("lora.targets='8'", lambda p: p.stack[1].options["targets"], "8"),
        ("lora.targets=a=b", lambda p: p.stack[1].options["targets"], "a=b"),
        ("lora.dropout=", lambda p: p.stack[1].options["dropout"], None),
        ("lora.alpha=1e-4", lambda p: p.stack[1].options["alpha"], 1e-4),
        (" lora . rank = 16 ", lambda p: p.stack[1].options, {"rank": 16}),
        ("train.steps=50", lambda p: p.train.steps, 50),
        ("train={steps: 50, seed: 3}", lambda p: (p.train.steps, p.train.seed), (50, 3)),
        ("model.id=other", lambda p: p.model.id, "other"),
        ("model.dtype=bfloat16", lambda p: (p.model.id, p.model.dtype), ("m", "bfloat16")),
        ("model=other", lambda p: p.model.id, "other"),
        ("data.train.path=x", lambda p: p.data.train.path, HERE / "x"),
        ("data.train.limit=3", lambda p: (p.data.train.path, p.data.train.limit), ("t.jsonl", 3)),
        ("data.train=x", lambda p: p.data.train.path, HERE / "x"),
        (
            "data.holdout=.2",
            lambda p: (p.data.holdout.share, p.data.holdout.seed, p.data.eval),
            (0.2, 0, None),
        ),
        ("data.holdout={most: 9}", lambda p: (p.data.holdout.share, p.data.holdout.most), (0.1, 9)),
        ("data.holdout.seed=3", lambda p: (p.data.holdout.seed, p.data.eval), (3, None)),
        ("data.calibration.path=x", lambda p: p.data.calibration.path, HERE / "x"),
        ("output=out", lambda p: p.output, HERE / "out"),
        ("evaluate.accuracy.limit=2", lambda p: p.evaluate[0].options.limit, 2),
        (
            "evaluate.perplexity.limit=2",
            lambda p: (p.evaluate[1].options.path, p.evaluate[1].options.limit),
            ("p.txt", 2),
        ),
        ("evaluate.exact-match.limit=2", lambda p: p.evaluate[2].options.limit, 2),
    ],
)
def test_takes_effect(
    load: Callable[..., Pipeline], override: str, get: Callable[[Pipeline], object], value: object
) -> None:
    assert get(load(SPEC, GIVEN, override)) == (str(value) if isinstance(value, Path) else value)


@pytest.mark.parametrize(
    ("override", "get"),
    [
        ("data.train=mine/x", lambda p: p.data.train.path),
        ("data.train={path: mine/x, limit: 2}", lambda p: p.data.train.path),
        ("data={train: mine/x, eval: /e}", lambda p: p.data.train.path),
        ("data.sources.more=mine/x", lambda p: p.data.sources["more"].path),
        ("data.sources.more.path=./mine/../mine/x", lambda p: p.data.sources["more"].path),
        ("model=./mine/x", lambda p: p.model.id),
        ("model.id=../shell/mine/x", lambda p: p.model.id),
        ("output=mine/x", lambda p: p.output),
        ("evaluate=[{perplexity: mine/x}]", lambda p: p.evaluate[0].options.path),
        ("evaluate.perplexity.path=mine/x", lambda p: p.evaluate[1].options.path),
        ("evaluate=[{lm-eval: {tasks: [t], include: mine/x}}]", lambda p: p.evaluate[0].options.include),
    ],
)
def test_places_are_those_of_the_shell(
    load: Callable[..., Pipeline],
    override: str,
    get: Callable[[Pipeline], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "shell").mkdir()
    monkeypatch.chdir(tmp_path / "shell")
    found = resolved(load(SPEC, GIVEN, override), tmp_path / "specs")
    assert get(found) == str(tmp_path / "shell" / "mine" / "x")
    assert found.data.eval.path in ("/e", str(tmp_path / "specs" / "e.jsonl"))


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("model.id=mine/x", lambda p: p.model.id, "mine/x"),
        ("data.train=peftx:sample/train.jsonl", lambda p: p.data.train.path, "peftx:sample/train.jsonl"),
        ("data.train=/x", lambda p: p.data.train.path, "/x"),
        ("lora.targets=./x", lambda p: p.stack[1].options["targets"], "./x"),
    ],
)
def test_what_is_no_path_of_the_shell_stays(
    load: Callable[..., Pipeline], override: str, get: Callable[[Pipeline], object], value: str
) -> None:
    assert get(load(SPEC, GIVEN, override)) == value


def test_nothing_else_changes(load: Callable[..., Pipeline]) -> None:
    before, after = load(SPEC, GIVEN), load(SPEC, GIVEN, "train.steps=50")
    assert after.train is not None
    assert after == before.model_copy(update={"train": after.train})


def test_the_last_one_wins(load: Callable[..., Pipeline]) -> None:
    assert load(SPEC, GIVEN, "lora.rank=1", "lora.rank=2").stack[1].options == {"rank": 2}


def test_a_section_that_is_not_there_is_made(load: Callable[..., Pipeline]) -> None:
    pipeline = load("peftx: 1\nmodel: m\nstack: [lora]\n", "data.train.path=t", "train.steps=3", "output=o")
    assert pipeline.train is not None
    assert pipeline.data.train is not None
    places = (pipeline.data.train.path, pipeline.output)
    assert (pipeline.train.steps, *places) == (3, str(HERE / "t"), str(HERE / "o"))


def test_environment(load: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTX_TEST_N", "4")
    assert load(SPEC, GIVEN, "lora.rank=${env:PEFTX_TEST_N}").stack[1].options == {"rank": 4}


def test_what_is_overridden_may_be_wrong_in_the_file(load: Callable[..., Pipeline]) -> None:
    text = "peftx: 1\nmodel: ${env:PEFTX_NOT_SET}\ndata: {train: t}\nstack: [lora]\ntrain: {steps: 0}\n"
    pipeline = load(text, "model=m", "train.steps=2")
    assert pipeline.train is not None
    assert (pipeline.model.id, pipeline.train.steps) == ("m", 2)


@pytest.mark.parametrize(
    ("override", "column", "path", "words"),
    [
        ("lora.rank=x", 11, "stack[1].with.rank", ["expected: a whole number", "got: the text 'x'"]),
        ("lora.rnk=8", 10, "stack[1].with.rnk", ["did you mean 'rank'"]),
        ("second.ranks.k=x", 16, "stack[2].with.ranks.k", ["a whole number"]),
        ("train.stps=8", 12, "train.stps", ["did you mean 'steps'"]),
        ("model.dtype=fp8", 13, "model.dtype", ["'bfloat16'"]),
        ("evaluate.accuracy.limit=0", 25, "evaluate[0].accuracy.limit", ["at least 1"]),
        ("data.calibration.limit=2", 24, "data.calibration.path", ["missing key: 'path'"]),
        ("lroa.rank=8", 1, "", ["no 'lroa' to set", "mosaic-it, lora, second", "did you mean 'lora'?"]),
        ("lora=8", 1, "", ["name the option too: lora.<option>=value"]),
        ("stack.lora.rank=8", 1, "", ["by its id instead: mosaic-it, lora, second"]),
        ("run=x", 1, "", ["change it in the file"]),
        ("peftx=1", 1, "", ["change it in the file"]),
        ("evaluate.accuracy=x", 1, "", ["evaluate.<metric>.<option>"]),
        ("evaluate.accurcy.limit=1", 1, "", ["accuracy, perplexity", "did you mean 'accuracy'?"]),
        ("lora", 1, "", ["'target=value'"]),
        ("=8", 1, "", ["'target=value'"]),
        ("lora..rank=8", 1, "", ["'target=value'"]),
        ("", 1, "", ["'target=value'"]),
        ("train.steps.x=8", 1, "", ["'train.steps' is the number 9; nothing below it"]),
        ("lora.rank=1e999", 11, "", ["too large"]),
        ("lora.layers=[1", 13, "", ["expected ',' or ']'"]),
        ("lora.rank=${env:PEFTX_NOT_SET}", 11, "", ["PEFTX_NOT_SET is not set"]),
    ],
)  # fmt: skip
def test_mistakes(
    problem: Callable[..., Problem], override: str, column: int, path: str, words: list[str]
) -> None:
    found = problem(SPEC, GIVEN, override)
    assert (found.file, found.line, found.column, found.path) == ("--set #2", 1, column, path)
    assert found.snippet == override
    for word in words:
        assert word in str(found)


def test_order_of_many(problems: Callable[..., list[Problem]]) -> None:
    found = problems(SPEC, GIVEN, *[f"none{n}.x=1" for n in range(12)])
    assert [problem.file for problem in found] == [f"--set #{n}" for n in range(2, 14)]
