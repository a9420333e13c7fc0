"""Superfiltering: scores by hand, what is kept and what becomes of the rest."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peftx import Stack, TrainingData, Worker
from peftx.engines.data import encode_pair, facility_location
from peftx.engines.data.gate import FORMATS
from peftx.engines.models import asset_path
from peftx.engines.training.run import as_training_data
from peftx.errors import DataError, PeftxError
from peftx.pipeline import load_run
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.working import OfStack
from peftx_lora import Lora
from peftx_superfiltering import Superfiltering, ifd

test_conformance = conformance("superfiltering")

TINY = "peftx:tiny"
SAMPLE = [json.loads(line) for line in Path(asset_path("peftx:sample/train.jsonl")).read_text().splitlines()]
ROWS = [
    {"prompt": row["prompt"], "completion": "\n".join(row["completion"].splitlines()[:2])}
    for row in SAMPLE[:20]
]


def worker(**options: Any) -> Worker:
    return Worker(OfStack(Stack(TINY), **options))


def prepared(rows: list[dict[str, Any]], format: str = "prompt-completion", **options: Any) -> TrainingData:
    stack = Stack(tiny("llama"), [Superfiltering(scorer=TINY, **options)], tokenizer=tiny_tokenizer())
    return stack.prepare(as_training_data(stack, rows, seed=0, max_length=96, format=format))


def pairs(rows: list[dict[str, Any]] = ROWS) -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for row in rows]


# --------------------------------------------------------------------------------------------------------- scores
@torch.no_grad()
def test_scores_by_hand() -> None:
    stack = Stack(TINY)

    def ppl(x: str, y: str) -> float:
        found = encode_pair(stack.tokenizer, x, y, max_length=256, where="here")
        ids, labels = (torch.tensor([values]) for values in (found.input_ids, found.labels))
        return math.exp(stack.model(ids, labels=labels).loss)

    for place, score in ifd(worker(), pairs()[:4]).items():
        x, y = pairs()[place]
        assert score == pytest.approx(ppl(x, y) / ppl("", y), rel=1e-4)


def test_scores_do_not_depend_on_what_stands_beside() -> None:
    together, alone = ifd(worker(batch_size=8), pairs()), ifd(worker(batch_size=1), pairs()[::-1])
    for place in range(20):
        assert together[place] == pytest.approx(alone[19 - place], rel=1e-4)


def test_without_an_instruction_it_is_one() -> None:
    assert ifd(worker(), [("", y) for _, y in pairs()[:4]]) == dict.fromkeys(range(4), pytest.approx(1.0))


def test_an_answer_that_the_prompt_holds_is_easy_and_one_of_another_prompt_is_hard() -> None:
    right = ifd(worker(), pairs())
    wrong = ifd(worker(), [(x, pairs()[(i + 7) % 20][1]) for i, (x, _) in enumerate(pairs())])
    assert sum(wrong.values()) > sum(right.values())
    copied = ifd(worker(), [(f"Repeat: {y}\n{y}", y) for _, y in pairs()[:6]])
    assert max(copied.values()) < 1


# ------------------------------------------------------------------------------------------------- what is kept
def test_the_hardest_that_fit_are_kept_in_their_order() -> None:
    rows = [*ROWS, {"prompt": "x", "completion": " "}]
    scores = ifd(worker(), pairs(rows))
    data = prepared(rows, share=0.25)
    best = sorted((i for i in scores if scores[i] < 1), key=lambda i: -scores[i])[:5]
    assert [row["prompt"] for row in data.train] == [rows[i]["prompt"] for i in sorted(best)]
    assert data.train["ifd"][:] == [pytest.approx(scores[i]) for i in sorted(best)]
    assert max(data.train["ifd"]) < 1
    assert len(data.train) == math.floor(0.25 * 21)


def test_no_row_is_lost_and_each_has_its_reason() -> None:
    strange = {"prompt": "The sky is blue, and the sea is", "completion": " qqqq zzzz xxxx"}
    rows = [*ROWS, strange, {"prompt": "x", "completion": " "}]
    assert ifd(worker(), pairs([strange]))[0] != 1
    data = prepared(rows, share=0.2)
    gone = {one.place: one.reason for one in data.dropped}
    assert len(gone) + len(data.train) == len(rows)
    assert gone[21] == "no answer"
    scores = ifd(worker(), pairs(rows))
    assert all(scores[i] >= 1 for i, why in gone.items() if why == "IFD of 1 or more")
    assert all(scores[i] < 1 for i, why in gone.items() if why == "IFD below those kept")
    assert {one.by for one in data.dropped} == {"superfiltering"}


def test_pairs_that_do_not_fit_go(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = {"a": -1.0, "b": -2.0, "c": -3.0}  # behind the prompt; alone each has -2
    monkeypatch.setattr(OfStack, "score", lambda self, asked: [logs[y] if x else -2.0 for x, y in asked])
    data = prepared([{"prompt": "p", "completion": y} for y in "abc"], share=1.0)
    assert data.train["completion"][:] == ["a"]
    assert data.train["ifd"][:] == [pytest.approx(math.exp(-1))]
    assert [(one.row["completion"], one.reason) for one in data.dropped] == [
        ("b", "IFD of 1 or more"), ("c", "IFD of 1 or more")
    ]  # fmt: skip


@pytest.mark.parametrize("named", [True, False])
def test_scores_are_kept(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path))
    file = tmp_path / "scores.jsonl" if named else None
    first = prepared(ROWS, share=0.5, scores=file)
    asked: list[Any] = []
    scoring = OfStack.score
    monkeypatch.setattr(OfStack, "score", lambda self, more: asked.extend(more) or scoring(self, more))
    again = prepared(ROWS, share=0.5, scores=file)
    assert again.train.to_list() == first.train.to_list()
    assert asked == []
    new = {"prompt": "One more", "completion": " row"}
    prepared([*ROWS, new], share=0.5, scores=file)
    assert asked == [("One more", " row"), ("", " row")]
    assert named == (not (tmp_path / "answers").exists())


def test_messages_are_scored_by_their_last_answer() -> None:
    chats = [
        {"messages": [{"role": role, "content": row[key]} for role, key in
                      (("user", "prompt"), ("assistant", "completion"))]} for row in ROWS
    ]  # fmt: skip
    data, plain = prepared(chats, format="messages", share=0.3), prepared(ROWS, share=0.3)
    assert data.format == "messages"
    assert data.train["ifd"][:] == plain.train["ifd"][:]


# ------------------------------------------------------------------------------------------------------ diversity
def value(sim: torch.Tensor, chosen: tuple[int, ...]) -> float:
    return float(sim.clamp(min=0)[:, list(chosen)].amax(1).sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_greedy_choice_is_near_the_best(seed: int, count: int) -> None:
    vectors = torch.nn.functional.normalize(
        torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    sim = vectors @ vectors.T
    best = max(value(sim, chosen) for chosen in itertools.combinations(range(8), count))
    found = [place for place, _ in facility_location(vectors, count)]
    assert len(set(found)) == count
    assert value(sim, tuple(found)) >= (1 - 1 / math.e) * best
    for n in range(count):  # each adds the most to those before it
        most = max(value(sim, (*found[:n], place)) for place in range(8))
        assert value(sim, tuple(found[: n + 1])) == pytest.approx(most)


def test_of_rows_that_are_alike_one_is_chosen() -> None:
    groups = torch.eye(3).repeat_interleave(torch.tensor([4, 2, 1]), 0)
    assert {place for place, _ in facility_location(groups, 3)} == {0, 4, 6}
    assert sorted(place for place, _ in facility_location(groups, 99)) == list(range(7))


def test_a_pool_without_a_row_below_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "peftx_superfiltering.ifd", lambda worker, pairs: dict.fromkeys(range(len(pairs)), 1.5)
    )
    with pytest.raises(DataError, match="no rows are left") as told:
        prepared(ROWS, share=0.4, pool=0.8)
    assert "20 IFD of 1 or more" in str(told.value.hint)


def test_of_a_pool_the_diverse_are_kept() -> None:
    rows = [*ROWS[:6], {**ROWS[6], "prompt": f"{ROWS[6]['prompt']} "}, ROWS[6], ROWS[6], ROWS[6]]
    data = prepared(rows, share=0.3, pool=1.0)
    assert len(data.train) == 3
    reasons = [one.reason for one in data.dropped]
    assert set(reasons) <= {"less diverse than those kept", "IFD of 1 or more"}
    assert len({row["prompt"] for row in data.train}) == 3


# --------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"prompt-completion", "messages"}))
def test_rows_of_other_formats(format: str) -> None:
    rows = {
        "text": [{"text": "a"}],
        "classification": [{"text": "a", "label": "b"}],
        "preference": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
    }[format]
    with pytest.raises(PeftxError, match=f"format '{format}'"):
        prepared(rows, format=format)


def test_a_share_of_no_row() -> None:
    with pytest.raises(PeftxError, match=r"share 0.1 of 6 rows is less than one") as caught:
        prepared(ROWS[:6])
    assert "share at least 0.167" in str(caught.value.hint)
    assert len(prepared(ROWS[:6], share=0.167).train) == 1


def test_rows_that_are_all_the_same() -> None:
    with pytest.raises(DataError, match="superfiltering: all 4 pairs are the same text"):
        prepared(ROWS[:1] * 4, share=0.5)
    assert len(prepared([*ROWS[:1] * 3, ROWS[1]], share=0.5).train) == 2


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.5}, {"pool": 1.5}])
def test_more_than_there_is_or_nothing(options: dict[str, float]) -> None:
    with pytest.raises(PeftxError, match=f"Superfiltering: {next(iter(options))}"):
        Superfiltering(**options)


def test_no_row_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OfStack, "score", lambda self, asked: [-3.0 if x else -2.0 for x, _ in asked])
    with pytest.raises(DataError, match="no rows are left"):
        prepared(ROWS, share=0.5)


def test_twice_in_a_stack_the_later_scores_stay() -> None:
    twice = [("a", Superfiltering(scorer=TINY, share=0.5)), ("b", Superfiltering(scorer=TINY, share=0.5))]
    stack = Stack(tiny("llama"), twice, tokenizer=tiny_tokenizer())
    data = stack.prepare(as_training_data(stack, ROWS, seed=0, max_length=96))
    assert len(data.train) == 5
    assert list(data.train["ifd"]) == pytest.approx(list(prepared(ROWS, share=0.25).train["ifd"]))


def test_a_pool_that_is_no_larger() -> None:
    with pytest.raises(PeftxError, match=r"pool 0.1 leaves nothing to choose the share 0.2 from"):
        Superfiltering(share=0.2, pool=0.1)


# ---------------------------------------------------------------------------------------------------------- in use
def test_in_a_pipeline_what_was_dropped_stands_beside_the_bundle(tmp_path: Path) -> None:
    class Recorder:
        seen: list[tuple[int, int]] = []
        details: dict[str, str] = {}

        def stage(self, name: str, ids: Any) -> None: ...

        def progress(self, done: int, total: int, values: dict[str, float]) -> None:
            if not values:
                self.seen.append((done, total))

        def finished(self, name: str, seconds: float, detail: str) -> None:
            self.details[name] = detail

    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    load_run(
        f"peftx: 1\nmodel: peftx:tiny\ndata: {{train: '{train}'}}\n"
        "stack:\n  - {use: superfiltering, with: {scorer: 'peftx:tiny', share: 0.5}}\n  - lora\n"
        f"train: {{steps: 1, batch_size: 2}}\noutput: '{tmp_path / 'out'}'\n",
        reporter=Recorder(),
    ).run()
    lines = (tmp_path / "out.dropped.jsonl").read_text().splitlines()
    kept = int(Recorder.details["prepare"].split("became ")[1].split(";")[0])
    assert kept + len(lines) == 20
    assert kept <= 10
    assert (40, 40) in Recorder.seen, "a score of each answer behind its prompt, and alone"


def test_a_run_tells_of_the_rows_that_it_dropped() -> None:
    """In Python too, where no file beside the output has them."""
    plugins = [Superfiltering(scorer=TINY, share=0.5), Lora(rank=2)]
    stack = Stack(TINY, plugins)
    report = stack.train(ROWS, steps=1, batch_size=2, learning_rate=1e-3)
    assert len(report.dropped) == len(ROWS) - len(ROWS) // 2
    assert all(one.by == "superfiltering" and one.reason for one in report.dropped)
    assert all({name: one.row[name] for name in ROWS[0]} in ROWS for one in report.dropped)
