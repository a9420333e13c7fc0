"""Comparisons: what a file expands to, and what is wrong with it, by line."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx_spec import Problem, SpecError, load_pipeline
from peftx_spec.compare_load import LoadedCompare, load_compare
from peftx_spec.several import several

GOOD = """\
peftx: 1
compare:
  base:
    model: peftx:tiny
    data: {train: train.jsonl, eval: eval.jsonl}
    train: {batch_size: 2}
    evaluate: [accuracy]
  budget: {steps: 3}
  seeds: [0, 1]
  learning_rate: [1e-3, 3e-3]
  methods:
    lora: {stack: [{use: lora}], grid: {lora.rank: [4, 16], train.batch_size: [2, 4]}}
    quantized: {stack: [lora, prefixquant], learning_rate: [1e-2]}
    base: {stack: []}
"""


@pytest.fixture
def read(tmp_path: Path, catalogue: Any) -> Callable[..., LoadedCompare]:
    """`read(("old", "new"), ...)`: the good file with replacements."""

    def load(*changes: tuple[str, str]) -> LoadedCompare:
        text = GOOD
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "compare.yaml"
        file.write_text(text, "utf-8")
        return load_compare(file, catalogue=catalogue)

    return load


@pytest.fixture
def wrong(read: Callable[..., LoadedCompare]) -> Callable[..., list[Problem]]:
    def load(*changes: tuple[str, str]) -> list[Problem]:
        with pytest.raises(SpecError) as caught:
            read(*changes)
        return caught.value.problems

    return load


def test_a_grid_is_a_row_a_point(read: Callable[..., LoadedCompare], tmp_path: Path) -> None:
    loaded = read()
    names = [f"lora rank={rank} batch_size={size}" for rank in (4, 16) for size in (2, 4)]
    assert [row.name for row in loaded.rows] == [*names, "quantized", "base"]
    second = loaded.rows[1].pipeline
    assert second is not None
    assert second.stack[0].options == {"rank": 4}
    assert second.train is not None
    assert second.train.batch_size == 4
    assert second.data.eval is not None
    assert second.data.eval.path == str(tmp_path / "eval.jsonl")
    assert loaded.rows[0].learning_rates == (1e-3, 3e-3)
    assert loaded.rows[4].learning_rates == (1e-2,)
    assert loaded.metric == "accuracy"


def test_what_does_not_train_reads_no_training_rows(read: Callable[..., LoadedCompare]) -> None:
    base = read().rows[-1]
    assert base.pipeline is not None
    assert (base.learning_rates, base.pipeline.train, base.pipeline.data.train) == ((), None, None)


def test_a_base_may_stand_in_a_file_of_its_own(read: Callable[..., LoadedCompare], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    base = textwrap.dedent("""
        peftx: 1
        model: peftx:tiny
        data: {train: rows.jsonl, eval: eval.jsonl}
        evaluate: [accuracy]
    """)
    inline = GOOD[GOOD.index("  base:\n") : GOOD.index("  budget")]
    file = tmp_path / "there" / "base.yaml"
    file.write_text(base, "utf-8")
    row = read((inline, "  base: there/base.yaml\n")).rows[0]
    assert row.pipeline is not None
    assert row.pipeline.data.train is not None
    assert row.pipeline.data.train.path == str(tmp_path / "there" / "rows.jsonl")
    file.write_text(base.replace("accuracy", "acuracy"), "utf-8")
    with pytest.raises(SpecError) as caught:
        read((inline, "  base: there/base.yaml\n"))
    assert (caught.value.problems[0].file, caught.value.problems[0].line) == (str(file), 5)


def test_a_value_that_does_not_fit_is_a_row(read: Callable[..., LoadedCompare]) -> None:
    rows = read(("[4, 16]", "[0, 16]")).rows
    assert [row.pipeline is None for row in rows] == [True, True, False, False, False, False]
    assert "compare.yaml:12:53: 'rank' has a wrong value, expected a number of at least 1" in rows[0].reason


def test_all_rows_invalid_is_an_error(wrong: Callable[..., list[Problem]]) -> None:
    rest = GOOD[GOOD.index("    quantized") :]
    found = wrong(("[4, 16]", "[0, -1]"), (rest, ""))
    assert [(p.line, p.column) for p in found] == [(12, 53), (12, 56)]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("grid: {lora.rank: [4, 16], train.batch_size: [2, 4]}", "grid: {}", 12, "at least 1 entry"),
        ("[4, 16]", "[]", 12, "at least 1 entry"),
        ("[4, 16]", "[4, 4]", 12, "'lora.rank': 4 stands twice"),
        ("{steps: 3}", "{steps: 3, rows: 8}", 8, "this one has steps and rows"),
        ("{steps: 3}", "{}", 8, "this one has none"),
        ("{steps: 3}", "{steps: 0}", 8, "a number of at least 1"),
        ("{steps: 3}", "{seconds: 0}", 8, "a number greater than 0"),
        ("seeds: [0, 1]", "seeds: [0, 1, 0]", 9, "the seed 0 stands twice"),
        ("seeds: [0, 1]", "seeds: []", 9, "at least 1 entry"),
        ("[1e-3, 3e-3]", "[1e-3, 0.001]", 10, "the learning rate 0.001 stands twice"),
        ("grid:", "gird:", 12, "did you mean 'grid'?"),
        ("lora.rank", "lora.rnk", 12, "did you mean 'rank'"),
        ("lora.rank", "lorra.rank", 12, "did you mean 'lora'?"),
        ("train.batch_size: [2, 4]", "train.steps: [2, 4]", 12, "'compare.budget' says how long"),
        ("[lora, prefixquant]", "[lora, prefixquantt]", 13, "did you mean 'prefixquant'?"),
        ("base: {stack: []}", "base: {stack: [], learning_rate: [1e-3]}", 14, "has no effect"),
        ("{batch_size: 2}", "{batch_size: 2, steps: 5}", 6, "'compare.budget' says how long"),
        ("evaluate: [accuracy]", "evaluate: [{accuracy: test.jsonl}]", 7, "a rate would be chosen on them"),
        (", eval: eval.jsonl", "", 5, "no rows to measure on"),
        ("eval: eval.jsonl", "eval: train.jsonl", 5, "measured on what it was trained on"),
        ("  seeds", "  metric: perplexity\n  seeds", 9, "which 'evaluate' does not list"),
        ("  seeds", "  validation: 1.5\n  seeds", 9, "a number less than 1"),
        ("    evaluate", "    stack: []\n    evaluate", 7, "a base has no 'stack'"),
    ],
)
def test_mistakes_are_told_with_their_line(
    old: str, new: str, line: int, said: str, wrong: Callable[..., list[Problem]]
) -> None:
    found = wrong((old, new))
    assert found[0].line == line
    assert found[0].file.endswith("compare.yaml")
    assert said in "\n".join(map(str, found))


def test_no_plugin_is_loaded_before_the_file_is_right(tmp_path: Path) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} was asked for")

    file = tmp_path / "compare.yaml"
    file.write_text(GOOD.replace("steps: 3", "steps: 0"), "utf-8")
    with pytest.raises(SpecError):
        load_compare(file, catalogue=Nothing())  # type: ignore[arg-type]


def test_a_grid_that_nobody_runs(wrong: Callable[..., list[Problem]]) -> None:
    values = str(list(range(1, 1003)))
    assert "at most 1,000 are compared" in str(wrong(("[4, 16]", values))[0])


def test_a_comparison_is_no_pipeline(catalogue: Any) -> None:
    with pytest.raises(SpecError, match="peftx compare FILE"):
        load_pipeline(GOOD, catalogue=catalogue)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("lora.rank=4,8", ("lora.rank", [4, 8])),
        ("train.learning_rate=1e-3, 3e-3", ("train.learning_rate", [1e-3, 3e-3])),
        ("lora.rank=4", None),
        ("lora.targets=q,v", None),
        ("lora.layers=[1, 2]", None),
    ],
)
def test_several_values(text: str, found: object) -> None:
    assert several(text) == found


def test_several_values_point_to_a_comparison_that_is_right(tmp_path: Path, catalogue: Any) -> None:
    pipeline = textwrap.dedent("""
        peftx: 1
        model: peftx:tiny
        data: {train: train.jsonl, eval: eval.jsonl}
        stack: [{use: lora, with: {rank: 2, alpha: 4}}]
        train: {steps: 7, learning_rate: 2e-3}
        evaluate: [accuracy]
        output: out
    """)
    with pytest.raises(SpecError) as caught:
        load_pipeline(pipeline, catalogue=catalogue, overrides=["lora.rank=4,8"])
    (problem,) = caught.value.problems
    head, _, shown = problem.suggestion.partition("\n")
    assert "peftx compare" in head
    file = tmp_path / "compare.yaml"
    file.write_text(shown, "utf-8")
    loaded = load_compare(file, catalogue=catalogue)
    assert [row.name for row in loaded.rows] == ["lora rank=4", "lora rank=8"]
    assert loaded.spec.budget.steps == 7
    assert loaded.rows[0].pipeline is not None
    assert loaded.rows[0].pipeline.stack[0].options == {"alpha": 4, "rank": 4}


def test_a_name_that_none_can_be_is_at_fault_and_not_its_value(wrong: Callable[..., list[Problem]]) -> None:
    (problem,) = wrong(("    quantized: {", "    lora+quant: {"))
    assert problem.message == "'lora+quant' cannot be a name here"
    assert "A-Za-z0-9" in problem.expected
    assert problem.column == 5
