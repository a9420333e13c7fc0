"""Loading a spec as a whole: all problems at once, how they look, and where specs come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftx_spec import Catalogue, PeftxError, Pipeline, Problem, SpecError, load_pipeline, load_spec

GOOD = """\
peftx: 1
model: {id: "peftx:tiny", dtype: float32}
data:
  train: {path: train.jsonl, format: prompt-completion}
  eval: {path: eval.jsonl}
stack:
  - use: mosaic-it
    with: {keep: .5}
  - use: lora
    with: {rank: 8, targets: "attention.q,v"}
  - use: prefixquant
    with: {bits: 4}
    phase: after-training          # only where both phases make sense
train: {steps: 200, batch_size: 8, learning_rate: 1e-3, seed: 0}
evaluate: [{perplexity: {path: held_out.txt}}]
output: out/
"""

HEAD = "peftx: 1\nmodel: m\n"  # two lines, so that what a case adds starts on line 3


def test_a_good_spec(catalogue: Catalogue) -> None:
    pipeline = load_pipeline(GOOD, catalogue=catalogue)
    assert [entry.id for entry in pipeline.stack] == ["mosaic-it", "lora", "prefixquant"]
    assert pipeline.stack[1].options == {"rank": 8, "targets": "attention.q,v"}
    assert pipeline.train is not None
    assert pipeline.train.learning_rate == 1e-3
    assert pipeline.output == "out/"


# text, line, column, path, and words that the whole rendering holds


def test_all_at_once_in_the_order_of_the_text(problems: Callable[..., list[Problem]]) -> None:
    text = """
    peftx: 2
    model: {id: m, dtyp: x}
    data: {train: "${env:PEFTX_NOT_SET}"}
    stack:
      - lroa
      - use: lora
        with: {rnk: 8, alpha: no, targets: "a?", layers: [x]}
      - use: lora
    train: {steps: 0, seed: 1, seed: 2}
    evaluate: [perplexty]
    run: [inject, train, {compress: lora}, {freeze: x}]
    """
    found = problems(text, "train.stps=3", "nothing.x=1")
    assert [(problem.file, problem.line, problem.path) for problem in found] == [
        ("<text>", 1, "peftx"),
        ("<text>", 2, "model.dtyp"),
        ("<text>", 3, "data.train"),
        ("<text>", 5, "stack[0].use"),
        ("<text>", 7, "stack[1].with.rnk"),
        ("<text>", 7, "stack[1].with.alpha"),
        ("<text>", 7, "stack[1].with.targets"),
        ("<text>", 7, "stack[1].with.layers[0]"),
        ("<text>", 8, "stack[2].use"),
        ("<text>", 9, "train.steps"),
        ("<text>", 9, "train.seed"),
        ("<text>", 10, "evaluate"),
        ("<text>", 10, "evaluate[0]"),
        ("<text>", 11, "run[2].compress"),
        ("<text>", 11, "run[3].freeze"),
        ("--set #1", 1, "train.stps"),
        ("--set #2", 1, ""),
    ]


def test_rendering(problem: Callable[[str], Problem], catalogue: Catalogue) -> None:
    text = HEAD + "stack:\n  - use: lora\n    with: {rnk: 8}\n"
    shown = (
        "<text>:5:12: unknown option of 'lora': 'rnk'\n"
        "  5 |     with: {rnk: 8}\n"
        "    |            ^\n"
        "  at: stack[0].with.rnk\n"
        "  expected: one of rank, alpha, dropout, targets, use_bias, layers, ranks, start, window, schedule\n"
        "  did you mean 'rank' or 'ranks'?"
    )
    assert str(problem(text)) == shown
    with pytest.raises(SpecError) as caught:
        load_pipeline(text + "train: {steps: 0}\n", catalogue=catalogue)
    assert str(caught.value).split("\n\n")[0] == shown
    assert len(str(caught.value).split("\n\n")) == len(caught.value.problems) == 3
    assert isinstance(caught.value, PeftxError)


@pytest.mark.parametrize(("before", "shift"), [("ä", 1), ("漢", 2), ("e\u0301", 1), ("\\t", 2)])
def test_caret_under_wide_and_odd_characters(
    problem: Callable[[str], Problem], before: str, shift: int
) -> None:
    shown = str(problem(HEAD + f'data: {{eval: {{path: "{before}", limit: 0}}}}\n')).split("\n")
    assert shown[2].index("^") - shown[2].index("|") == len('data: {eval: {path: "", limit: ') + shift + 2


def test_long_lines_are_cut_around_the_caret(problem: Callable[[str], Problem]) -> None:
    shown = str(
        problem(HEAD + f"data: {{eval: {{path: {'xx/' * 170}, limit: 0, format: text, columns: {{}}}}}}\n")
    ).split("\n")
    assert len(shown[1]) < 140
    assert shown[1][shown[2].index("^")] == "0"


def test_problem_without_a_line_shows_none() -> None:
    assert str(Problem("bad", "f", 1, 1)) == "f:1:1: bad"
    with pytest.raises(ValueError, match="at least one problem"):
        SpecError([])


@pytest.mark.parametrize(
    "option", ["rank: 1e1", "alpha: 3", "layers: [1.0]", "start: kaiming", "window: 3", "dropout: null"]
)
def test_lax_where_nothing_is_lost(load: Callable[[str], Pipeline], option: str) -> None:
    assert load(HEAD + f"stack: [{{use: lora, with: {{{option}}}}}]\n").stack[0].options


def test_a_combination_of_options_that_a_plugin_refuses(catalogue: Catalogue) -> None:
    from pydantic import BaseModel, model_validator

    class Pair(BaseModel):
        a: int = 0
        b: int

        @model_validator(mode="after")
        def check(self) -> Pair:
            if self.a > self.b:
                raise PeftxError("a is above b", hint="swap them")
            return self

    class Own:
        names = staticmethod(lambda: ["pair"])
        hooks = staticmethod(lambda name: frozenset({"inject"}))
        config = staticmethod(lambda name: Pair)
        install_hint = staticmethod(lambda name: "")

    with pytest.raises(SpecError) as caught:
        load_pipeline(HEAD + "stack:\n  - {use: pair, with: {a: 3, b: 2}}\n", catalogue=Own())
    (problem,) = caught.value.problems
    assert (problem.line, problem.column, problem.path) == (4, 23, "stack[0].with")
    assert (problem.message, problem.suggestion) == ("a is above b", "swap them")


def test_entry_that_is_a_mapping_of_its_name(problems: Callable[[str], list[Problem]]) -> None:
    found = problems(HEAD + "stack:\n  - lora: {rank: 8}\n")
    assert [problem.path for problem in found] == ["stack[0].lora", "stack[0].use"]
    assert found[0].suggestion == "write 'use: lora', and its options under 'with:'"


def test_text_or_path(catalogue: Catalogue, spec_file: Callable[[bytes], Path]) -> None:
    path = spec_file(GOOD.encode())
    expected = load_pipeline(GOOD, catalogue=catalogue)
    assert load_pipeline(path, catalogue=catalogue) == expected
    assert load_pipeline(str(path), catalogue=catalogue) == expected
    assert load_pipeline("{peftx: 1, model: m}", catalogue=catalogue).model.id == "m"
    with pytest.raises(PeftxError, match=r"no file peftx: 1"):
        load_pipeline("peftx: 1", catalogue=catalogue)
    with pytest.raises(SpecError, match="the spec is empty"):
        load_pipeline("", catalogue=catalogue)


def test_file_name_in_the_error(catalogue: Catalogue, spec_file: Callable[[bytes], Path]) -> None:
    path = spec_file(b"peftx: 1\nmodle: m\n")
    with pytest.raises(SpecError) as caught:
        load_pipeline(path, catalogue=catalogue)
    assert str(caught.value).startswith(f"{path}:1:1: missing key: 'model'")
    assert f"{path}:2:1: unknown key: 'modle'" in str(caught.value)


def test_places_for_later_errors(catalogue: Catalogue, spec_file: Callable[[bytes], Path]) -> None:
    path = spec_file(GOOD.encode())
    loaded = load_spec(path, catalogue=catalogue, overrides=["lora.rank=4"])
    assert loaded.place_of("lora") == f"{path}:9:5"
    assert loaded.place(("train", "steps")) == f"{path}:14:16"
    assert loaded.place(("stack", 1, "with", "rank")) == "--set #1"
    with pytest.raises(KeyError):
        loaded.place_of("none")
