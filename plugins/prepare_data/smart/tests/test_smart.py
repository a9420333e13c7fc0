"""SMART: gains, shares and budgets by hand, what is kept, and what becomes of the rest."""

from __future__ import annotations

import gc
import itertools
import math
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peftx_smart
from peftx import Stack, TrainingData, Worker
from peftx.engines.data import facility_location
from peftx.engines.training.run import as_training_data
from peftx.errors import DataError, PeftxError, PluginError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_smart import (
    Smart,
    Vectors,
    graph_cut,
    split,
    taylor_softmax,
    unit,
    vector_of,
)

test_conformance = conformance("smart")

TINY = "peftx:tiny"
WORDS = ["river", "stone", "lamp", "winter", "bread", "garden", "ship", "music", "door", "cloud"]
SIZES = {"spell": 10, "say": 8, "rhyme": 6}
ROWS = [
    {"prompt": f"Please {task} the word {word}", "completion": word, "task": task, "kind": "even" if n % 2 else "odd"}
    for task, size in SIZES.items()
    for n, word in enumerate(WORDS[:size])
]  # fmt: skip


def prepared(
    rows: Any = None, format: str = "prompt-completion", seed: int = 0, **options: Any
) -> TrainingData:
    stack = Stack(tiny("llama"), [Smart(encoder=TINY, **options)], tokenizer=tiny_tokenizer())
    data = as_training_data(stack, ROWS if rows is None else rows, seed=seed, max_length=96, format=format)
    return stack.prepare(data)


def vectors(count: int, width: int = 4, seed: int = 0) -> torch.Tensor:
    return unit([*torch.randn(count, width, generator=torch.Generator().manual_seed(seed))])


# ------------------------------------------------------------------------------------------------------- functions
def cut_value(s: torch.Tensor, A: tuple[int, ...], cut: float) -> float:
    inside = list(A)
    return float(s[:, inside].sum() - cut * s[inside][:, inside].sum())


def location_value(s: torch.Tensor, A: tuple[int, ...]) -> float:
    return float(s.clamp(min=0)[:, list(A)].amax(1).sum()) if A else 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cut", [0.0, 0.4, 1.0])
def test_gains_of_the_graph_cut_are_differences_of_f_and_the_largest(seed: int, cut: float) -> None:
    v = vectors(9, seed=seed)
    s, A = v @ v.T, ()
    for place, gain in graph_cut(v, 9, cut):
        differences = {j: cut_value(s, (*A, j), cut) - cut_value(s, A, cut) for j in range(9) if j not in A}
        assert gain == pytest.approx(differences[place], abs=1e-9)
        assert gain == pytest.approx(max(differences.values()), abs=1e-9)
        A = (*A, place)
    assert sorted(A) == list(range(9))


@pytest.mark.parametrize("seed", range(5))
def test_gains_of_facility_location_are_differences_of_f_and_the_largest_and_fall(seed: int) -> None:
    v = vectors(400, width=6, seed=seed)  # more than a block
    s, A, gains = v @ v.T, (), []
    for place, gain in facility_location(v, 12):
        before = location_value(s, A)
        most = (
            max(location_value(s, (*A, j)) for j in range(400) if j not in A) - before if len(A) < 3 else gain
        )
        assert gain == pytest.approx(location_value(s, (*A, place)) - before, abs=1e-7)
        assert gain == pytest.approx(most, abs=1e-7)
        A = (*A, place)
        gains.append(gain)
    assert gains == sorted(gains, reverse=True)
    assert min(gains) >= 0


def plain_greedy(s: torch.Tensor, count: int) -> list[int]:
    A: tuple[int, ...] = ()
    while len(A) < count:
        values = [location_value(s, (*A, j)) if j not in A else -math.inf for j in range(len(s))]
        A = (*A, values.index(max(values)))
    return list(A)


@pytest.mark.parametrize("seed", range(4))
def test_lazy_is_as_plain(seed: int) -> None:
    v = vectors(25, width=3, seed=seed)
    assert [place for place, _ in facility_location(v, 8)] == plain_greedy(v @ v.T, 8)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_near_the_best(seed: int) -> None:
    v = vectors(9, width=3, seed=seed)
    s = v @ v.T
    best = max(location_value(s, A) for A in itertools.combinations(range(9), 3))
    found = tuple(place for place, _ in facility_location(v, 3))
    assert location_value(s, found) >= (1 - 1 / math.e) * best


def test_fewer_are_the_first_of_more() -> None:
    v = vectors(40)
    assert facility_location(v, 10) == facility_location(v, 20)[:10]
    assert graph_cut(v, 10, 0.4) == graph_cut(v, 20, 0.4)[:10]


def test_a_second_copy_gains_less() -> None:
    v = torch.cat([vectors(5), vectors(5)[:1]])
    for picks in (graph_cut(v, 6, 0.4), facility_location(v, 6)):
        places = [place for place, _ in picks]
        gains = dict(picks)
        assert places.index(0) < places.index(5)
        assert gains[5] < gains[0]
    assert dict(facility_location(v, 6))[5] == 0


def test_graph_cut_by_hand() -> None:
    v = unit([torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]), torch.tensor([0.0, 1.0])])
    # sums of cosines 1.6, 2.4, 1.8, each less 0.4; after the second, less 0.8 times 0.6 and 0.8
    assert graph_cut(v, 3, 0.4) == [
        (1, pytest.approx(2.0)), (2, pytest.approx(1.4 - 0.64)), (0, pytest.approx(1.2 - 0.48))
    ]  # fmt: skip


def test_gains_are_those_of_submodlib_and_budgets_those_of_the_released_code() -> None:
    """SubModLib 0.0.3, on a kernel in float32; and kowndinya-renduchintala/SMART, commit e6fe808."""
    points = [[3, 1, 0], [2, 2, 1], [0, 1, 4], [1, 5, 1], [4, 0, 2], [1, 1, 1], [0, 3, 2]]
    v = unit([torch.tensor(point, dtype=torch.float64) for point in points])
    cut = [5.34570250, 4.43970198, 3.06656795, 2.49419236, 2.06241249, 1.31111263]
    location = [5.74570251, 0.36877429, 0.34363472, 0.26005995, 0.15147185, 0.09260714]
    picks = graph_cut(v, 6, 0.4)
    assert [place for place, _ in picks] == [5, 1, 6, 4, 3, 0]
    assert [gain for _, gain in picks] == pytest.approx(cut, abs=3e-7)
    found = facility_location(v, 6)
    assert [place for place, _ in found[:2]] == [
        5,
        6,
    ]  # then two gain the same: there the first, here the last
    assert [gain for _, gain in found] == pytest.approx(location, abs=3e-7)
    assert split(30, taylor_softmax([gain for _, gain in picks]), [99] * 6) == [11, 8, 5, 3, 2, 1]
    assert split(30, taylor_softmax([gain for _, gain in picks]), [5, 2, 9, 9, 9, 9]) == [5, 2, 8, 6, 5, 4]


def test_vectors_of_opposite_sides_cover_nothing_of_each_other() -> None:
    v = unit([torch.tensor([1.0]), torch.tensor([-1.0])])
    assert facility_location(v, 2) == [(0, 1.0), (1, 1.0)]


# --------------------------------------------------------------------------------------------------------- budgets
def test_taylor_softmax_by_hand() -> None:
    assert taylor_softmax([0.0, 1.0, 2.0]) == pytest.approx([1 / 8.5, 2.5 / 8.5, 5 / 8.5])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_every_share_is_positive(gains: list[float]) -> None:
    shares = taylor_softmax(gains)
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1)


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 50)), min_size=1, max_size=20), st.data())
def test_budgets_are_all_of_n_and_none_over_its_size(parts: list[tuple[float, int]], draw: Any) -> None:
    weights, sizes = zip(*parts, strict=True)
    total = draw.draw(st.integers(0, sum(sizes)))
    found = split(total, weights, sizes)
    assert sum(found) == total
    assert all(0 <= part <= size for part, size in zip(found, sizes, strict=True))


def test_budgets_by_hand() -> None:
    assert split(10, [0.5, 0.3, 0.2], [99, 99, 99]) == [5, 3, 2]
    assert split(11, [1, 1, 1], [99, 99, 99]) == [4, 4, 3]  # 3 each, and two over
    assert split(10, [8, 1, 1], [2, 9, 9]) == [2, 4, 4]  # 6 over, in turn
    assert split(10, [8, 1, 1], [2, 2, 9]) == [2, 2, 6]
    assert split(9, [8, 1, 1], [2, 9, 9]) == [2, 4, 3]  # floors 7, 0, 0; the last two go to the first two
    assert split(0, [1, 2], [3, 3]) == [0, 0]


# ------------------------------------------------------------------------------------------------- what is kept
def by_hand(rows: list[dict[str, Any]], budget: int, tasks: int) -> list[int]:
    encoder = Stack(TINY)
    e = [vector_of(answer) for answer in Vectors(encoder).write([row["prompt"] for row in rows])]
    names = list(dict.fromkeys(row["task"] for row in rows))
    members = {name: [i for i, row in enumerate(rows) if row["task"] == name] for name in names}
    picks = graph_cut(
        unit([torch.stack([e[i] for i in members[name]]).mean(0) for name in names]), tasks, 0.4
    )
    chosen = [names[place] for place, _ in picks]
    budgets = split(
        budget, taylor_softmax([gain for _, gain in picks]), [len(members[name]) for name in chosen]
    )
    return sorted(
        members[name][place]
        for name, count in zip(chosen, budgets, strict=True)
        for place, _ in facility_location(unit([e[i] for i in members[name]]), count)
    )


@pytest.mark.parametrize(("budget", "tasks"), [(9, 3), (7, 2), (5, 1), (24, 3)])
def test_rows_kept_are_those_by_hand_in_their_order(budget: int, tasks: int) -> None:
    data = prepared(budget=budget, tasks=tasks)
    assert data.train.to_list() == [ROWS[i] for i in by_hand(ROWS, budget, tasks)]
    assert len(data.train) == budget


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 24))
def test_no_row_is_lost_or_stands_twice_and_each_has_its_reason(budget: int) -> None:
    rows = [*ROWS, {"prompt": " ", "completion": "x", "task": "say", "kind": "odd"}]
    data = prepared(rows, budget=budget)
    assert len(data.train) == budget
    assert len(data.train) + len(data.dropped) == len(rows)
    both = [*data.train.to_list(), *(one.row for one in data.dropped)]
    assert sorted(map(str, both)) == sorted(map(str, rows))
    assert {one.reason for one in data.dropped} <= {"no prompt", "over the budget of its task"}
    assert [one.place for one in data.dropped if one.reason == "no prompt"] == [24]
    assert {one.by for one in data.dropped} == {"smart"}


def test_fewer_tasks_leave_whole_tasks_out() -> None:
    data = prepared(budget=6, tasks=1)
    kept = set(data.train["task"])
    assert len(kept) == 1
    gone = Counter(one.reason for one in data.dropped)
    assert gone["task not chosen"] == 24 - SIZES[kept.pop()]
    assert all(one.row["task"] not in kept for one in data.dropped if one.reason == "task not chosen")


def test_templates_share_a_task_as_they_share_its_rows() -> None:
    rows = [row for row in ROWS if row["task"] == "spell"]
    rows = [{**row, "kind": "a" if n < 6 else "b"} for n, row in enumerate(rows)]
    for budget, shares in ((5, {"a": 3, "b": 2}), (6, {"a": 4, "b": 2}), (1, {"a": 1})):
        assert Counter(prepared(rows, budget=budget, template="kind").train["kind"]) == shares


def test_rows_of_a_task_that_say_the_same_are_kept_once() -> None:
    rows = [*ROWS[:4], *[ROWS[0]] * 6]
    assert len(set(prepared(rows, budget=4).train["prompt"])) == 4


def test_a_high_temperature_gives_all_tasks_the_same() -> None:
    def counts(**options: Any) -> list[int]:
        return sorted(Counter(prepared(budget=10, **options).train["task"]).values())

    assert counts(temperature=1e9) == [3, 3, 4]
    assert counts(function="facility-location")[-1] > 4  # the first covers nearly all


def test_order_of_rows_does_not_matter() -> None:
    mixed = Random(0).sample(ROWS, len(ROWS))
    one, other = (prepared(rows, budget=9).train["prompt"] for rows in (ROWS, mixed))
    assert set(one) == set(other)


def test_prompts_of_all_formats() -> None:
    chats = [
        {"task": row["task"], "messages": [
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}
        ]} for row in ROWS
    ]  # fmt: skip
    texts = [{"text": row["prompt"], "label": "x", "task": row["task"]} for row in ROWS]
    plain = prepared(budget=9)
    kept = [row["prompt"] for row in plain.train]
    assert [row["messages"][0]["content"] for row in prepared(chats, "messages", budget=9).train] == kept
    assert prepared(texts, "classification", budget=9).train["text"][:] == kept


# ---------------------------------------------------------------------------------------------------------- vectors
class Killed(Exception):
    pass


def test_memory_does_not_grow_with_the_text_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 MB of prompts less than a quarter is held, vectors of eight numbers among it."""
    monkeypatch.setenv("PEFTX_CACHE", "")
    monkeypatch.setattr("peftx.toolkits.working.worker.BLOCK", 64)
    monkeypatch.setattr(Stack, "embed", lambda self, texts, **_: torch.randn(len(texts), 8))
    rows = [
        {"prompt": f"{n} " + "tea and rain " * 400, "completion": "y", "task": n % 31} for n in range(3100)
    ]
    stack = Stack(tiny("llama"), [Smart(encoder=TINY, budget=40)], tokenizer=tiny_tokenizer())
    data = as_training_data(stack, rows, seed=0, max_length=96)
    text = sum(len(row["prompt"]) for row in rows)
    prepared(budget=9)  # what is imported on the way
    tracemalloc.start()
    try:
        stack.prepare(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert text > 16e6
    assert peak < text / 4
    assert len(data.train) == 40
    assert len(data.train) + len(data.dropped) == len(rows)


def test_vectors_as_text_are_gone_when_rows_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    def watched(*options: Any) -> Any:
        alive.append(sum(isinstance(one, Worker) for one in gc.get_objects()))
        return facility_location(*options)

    monkeypatch.setattr(peftx_smart, "facility_location", watched)
    gc.collect()
    before = sum(isinstance(one, Worker) for one in gc.get_objects())
    prepared(budget=9)
    assert alive
    assert max(alive) == before


@pytest.mark.parametrize("named", [True, False])
def test_vectors_are_kept_and_a_killed_run_goes_on(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "prompt": f"{row['prompt']} {n}"} for n in range(3) for row in ROWS]
    whole = prepared(rows, budget=20).train.to_list()
    asked: list[str] = []
    write = Vectors.write

    def dying(self: Vectors, prompts: Any, **options: Any) -> Any:
        if asked:
            raise Killed
        asked.extend(prompts)
        return write(self, prompts, **options)

    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path))
    file = tmp_path / "vectors.jsonl" if named else None
    monkeypatch.setattr(Vectors, "write", dying)
    with pytest.raises(PluginError):
        prepared(rows, budget=20, vectors=file)
    with (file or next((tmp_path / "answers").glob("*"))).open("a") as half:
        half.write('{"key": "ab')  # what a kill leaves
    more: list[str] = []
    monkeypatch.setattr(Vectors, "write", lambda self, p, **o: more.extend(p) or write(self, p, **o))
    assert prepared(rows, budget=20, vectors=file).train.to_list() == whole
    assert set(more).isdisjoint(asked)
    assert len(more) + len(asked) == len(rows)
    more.clear()
    assert len(prepared(rows, budget=31, vectors=file).train) == 31
    assert more == []


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    stack = Stack(tiny("llama"), [Smart(encoder=TINY, budget=8)], tokenizer=tiny_tokenizer())
    data = as_training_data(stack, ROWS, seed=0, max_length=96)
    data.progress = lambda done, of: seen.append((done, of))
    stack.prepare(data)
    assert seen[0] == (24, 24)  # vectors
    assert sum(of for done, of in seen[1:] if done == of) == 8  # then rows, task by task


# --------------------------------------------------------------------------------------------------------- refused
def test_what_leaves_nothing_to_choose() -> None:
    with pytest.raises(DataError, match="smart: the budget is 25 rows, and there are 24 with a prompt"):
        prepared(budget=25)
    assert len(prepared(budget=24).dropped) == 0
    with pytest.raises(DataError, match="smart: tasks 4, and the rows are of 3"):
        prepared(budget=5, tasks=4)
    with pytest.raises(DataError, match=r"the 1 tasks that were chosen have .* and the budget is 20"):
        prepared(budget=20, tasks=1)
    same = [{"prompt": "a", "completion": str(n), "task": "t"} for n in range(4)]
    with pytest.raises(DataError, match="all 4 prompts are the same text"):
        prepared(same, budget=2)
    assert len(prepared(same, budget=4).train) == 4


def test_rows_that_name_no_task() -> None:
    with pytest.raises(DataError, match="no column 'tsk' in the rows; columns: prompt, completion") as caught:
        prepared(budget=3, task="tsk")
    assert "task" in str(caught.value.hint)
    with pytest.raises(DataError, match="no column 'style'"):
        prepared(budget=3, template="style")
    for bad in (None, ""):
        with pytest.raises(DataError, match=r"row 24 \(counting from 0\) names no task"):
            prepared([*ROWS, {**ROWS[0], "task": bad}], budget=3)
        with pytest.raises(DataError, match=r"row 24 \(counting from 0\) names no kind"):
            prepared([*ROWS, {**ROWS[0], "kind": bad}], budget=3, template="kind")
    numbered = [{**row, "task": list(SIZES).index(row["task"])} for row in ROWS]
    assert prepared(numbered, budget=9).train["prompt"][:] == prepared(budget=9).train["prompt"][:]


def test_tokenized_rows() -> None:
    stack = Stack(tiny("llama"), [Smart(encoder=TINY, budget=2)], tokenizer=tiny_tokenizer())
    data = as_training_data(stack, ROWS, seed=0, max_length=96)
    data.format = "tokenized"
    with pytest.raises(UnsupportedError, match="format 'tokenized'"):
        stack.prepare(data)


def test_bad_options() -> None:
    for options in ({"budget": 0}, {"tasks": 0}, {"temperature": 0}, {"cut": -1}, {"task": ""}):
        with pytest.raises(PeftxError, match=next(iter(options))):
            Smart(**options)


def test_a_sentence_encoder_gives_the_vectors() -> None:
    encoder = Stack(tiny("bert"), tokenizer=tiny_tokenizer())
    found = [vector_of(answer) for answer in Vectors(encoder).write(["a word", "two longer words"])]
    assert torch.allclose(torch.stack(found).norm(dim=1), torch.ones(2), atol=1e-5)
    assert peftx_smart.Vectors(encoder).name != peftx_smart.Vectors(Stack(TINY)).name
