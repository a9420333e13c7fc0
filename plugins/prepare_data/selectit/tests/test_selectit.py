"""SelectIT: the three levels by hand, what raters read, what is kept and what becomes of the rest."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftx import Stack, TrainingData
from peftx.engines.data.gate import FORMATS
from peftx.engines.training.run import as_training_data
from peftx.errors import ArchitectureError, DataError, PeftxError, PluginError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_selectit import (
    END,
    RATINGS,
    Rater,
    SelectIt,
    model_level,
    rating,
    sentence_level,
    token_level,
)

test_conformance = conformance("selectit")

TINY = "peftx:tiny"
SHORT = ("1 to {k}:", "Rate, {k} is best:")
WORDS = ["river", "stone", "lamp", "winter", "bread", "garden", "ship", "music"]
ROWS = [{"prompt": f"Say {a}", "completion": b} for a, b in zip(WORDS * 2, WORDS + WORDS[::-1], strict=True)]


def stack_of(*plugins: Any) -> Stack:
    """A model that reads 128 tokens, a character each."""
    return Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())


def prepared(rows: Any = None, format: str = "prompt-completion", **options: Any) -> TrainingData:
    stack = stack_of(SelectIt(**{"prompts": SHORT, "share": 0.5} | options))
    data = as_training_data(stack, ROWS if rows is None else rows, seed=0, max_length=96, format=format)
    return stack.prepare(data)


@torch.no_grad()
def by_hand(stack: Stack, row: dict[str, Any], asks: Any = SHORT, K: int = 5, alpha: float = 0.2) -> float:
    """S_sent of a row, from the model's own probabilities."""
    found = []
    for ask in asks:
        text = f"{ask.replace('{k}', str(K))}\n\nInstruction: {row['prompt']}\n\nResponse: {row['completion']}{END}"
        probabilities = (
            stack.model(**stack.tokenizer(text, return_tensors="pt")).logits[0, -1].float().softmax(-1)
        )
        P = [float(probabilities[stack.tokenizer.convert_tokens_to_ids(str(k))]) for k in range(1, K + 1)]
        q = [p / sum(P) for p in P]
        S = q.index(max(q)) + 1
        found.append(S / (K - 1) * sum(abs(q[S - 1] - q_k) for q_k in q))
    mean = sum(found) / len(found)
    return mean / (1 + alpha * math.sqrt(sum((one - mean) ** 2 for one in found) / len(found)))


# ---------------------------------------------------------------------------------------------------------- levels
def test_token_level_by_hand() -> None:
    q = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.6], [0.5, 0.2, 0.1, 0.1, 0.1], [0.3, 0.3, 0.2, 0.1, 0.1]])
    assert token_level(q).tolist() == pytest.approx([5 / 4 * 2.0, 1 / 4 * 1.5, 1 / 4 * 0.5])
    assert token_level(torch.full((5,), 0.2)) == 0
    for k in range(5):
        assert token_level(torch.eye(5)[k]) == k + 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda values: sum(values) > 0))
def test_token_level_is_from_0_to_k(values: list[float]) -> None:
    q = torch.tensor(values, dtype=torch.float64)
    assert 0 <= token_level(q / q.sum()) <= len(values) + 1e-9


def test_sentence_level_by_hand() -> None:
    S = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 4.0]])
    assert sentence_level(S, 0.2).tolist() == pytest.approx([2 / 1.2, 2, 2 / 1.4])
    assert sentence_level(S, 0.0).tolist() == [2, 2, 2]
    assert sentence_level(S[:, :1], 0.2).tolist() == [1, 2, 0]  # one prompt has no spread


def test_the_first_two_levels_are_those_of_the_released_code() -> None:
    """Blue-Raincoat/SelectIT, commit 4813250, from q on."""
    q = torch.tensor(
        [[(r * k * k + r + k) % 7 + 1 for k in range(5)] for r in range(10)], dtype=torch.float64
    )
    S_tok = token_level(q / q.sum(-1, keepdim=True)).view(2, 5)
    assert sentence_level(S_tok, 0.2).tolist() == pytest.approx(
        [0.5982926792715786, 0.48395433308299607], abs=1e-12
    )


def test_model_level_by_hand() -> None:
    S = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert model_level(S, [7, 13]).tolist() == pytest.approx([(7 + 39) / 20, 14 / 20])
    assert model_level(S[:1], [7]).tolist() == [1, 2]
    assert model_level(S[[0, 0]], [7, 70]).tolist() == pytest.approx([1, 2])


# --------------------------------------------------------------------------------------------------------- ratings
def test_scores_by_hand() -> None:
    data, stack = prepared(ROWS[:4], share=1.0), stack_of()
    assert data.train["selectit"][:] == pytest.approx([by_hand(stack, row) for row in ROWS[:4]], rel=1e-4)
    assert len(set(data.train["selectit"][:])) == 4
    data, stack = prepared(ROWS[:2], share=1.0, raters=(TINY,)), Stack(TINY)
    assert data.train["selectit"][:] == pytest.approx([by_hand(stack, row) for row in ROWS[:2]], rel=1e-4)


def test_options_are_those_of_the_equations() -> None:
    stack = stack_of()
    other = prepared(ROWS[:2], share=1.0, scale=3, alpha=1.5, prompts=("Best is {k}.", *SHORT))
    expected = [by_hand(stack, row, ("Best is {k}.", *SHORT), 3, 1.5) for row in ROWS[:2]]
    assert other.train["selectit"][:] == pytest.approx(expected, rel=1e-4)
    own = prepared(ROWS[:1], share=1.0, prompts=(), raters=(TINY,))
    assert own.train["selectit"][:] == pytest.approx([by_hand(Stack(TINY), ROWS[0], RATINGS)], rel=1e-4)


def test_the_papers_five_prompts_name_the_scale_and_differ() -> None:
    assert len(set(RATINGS)) == 5
    assert all("1" in text and "{k}" in text for text in RATINGS)
    assert rating("ask", "x", "y") == "ask\n\nInstruction: x\n\nResponse: y\n\nThe answer is:\n"


def test_several_raters_count_by_their_parameters(tmp_path: Path) -> None:
    small = tiny("gpt2")
    small.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    names = (TINY, str(tmp_path / "small"))
    one, other, both = (
        prepared(ROWS[:3], share=1.0, raters=raters, prompts=("{k}:", "Out of {k}:")).train["selectit"][:]
        for raters in (names[:1], names[1:], names)
    )
    sizes = [Stack(TINY).model.num_parameters(), small.num_parameters()]
    assert both == pytest.approx(
        [(sizes[0] * a + sizes[1] * b) / sum(sizes) for a, b in zip(one, other, strict=True)]
    )
    assert one != pytest.approx(other, rel=1e-3)


def test_the_model_rates_itself_as_it_was() -> None:
    """Whatever stands on it, and however far that is trained."""
    plain = prepared()
    stack = stack_of(SelectIt(prompts=SHORT, share=0.5), Lora(rank=2))
    for _ in range(2):
        data = stack.prepare(as_training_data(stack, ROWS, seed=0, max_length=96))
        assert data.train.to_list() == plain.train.to_list()
        stack.train(ROWS, steps=2, batch_size=2, learning_rate=0.5)


def test_a_response_that_is_too_long_loses_its_end() -> None:
    stack = stack_of()
    rater = Rater(stack, 5, 8, "here")
    fits = rating("1 to 5", "x", "y" * 60)
    long = [rating("1 to 5", "x", "y" * n + "z" * m) for n, m in ((100, 0), (100, 50), (200, 1))]
    room = rater.room - len(stack.tokenizer(rating("1 to 5", "x", ""))["input_ids"])
    full = rating("1 to 5", "x", "y" * room)
    scores = rater.score([(prompt, "") for prompt in (fits, *long, full)])
    for score in scores[1:4]:
        assert score == pytest.approx(scores[4], abs=1e-5)
    assert scores[0] != pytest.approx(scores[4], abs=1e-3)


# ------------------------------------------------------------------------------------------------- what is kept
def test_the_best_are_kept_in_their_order() -> None:
    scores = prepared(share=1.0).train["selectit"][:]
    best = sorted(sorted(range(16), key=lambda i: -scores[i])[:4])
    data = prepared(share=0.27)
    assert data.train["prompt"][:] == [ROWS[i]["prompt"] for i in best]
    assert data.train["selectit"][:] == pytest.approx([scores[i] for i in best], rel=1e-5)


def test_no_row_is_lost_and_each_has_its_reason() -> None:
    rows = [*ROWS, {"prompt": "x", "completion": " "}, ROWS[0]]
    data = prepared(rows, share=0.4)
    assert len(data.train) == math.floor(0.4 * 18)
    both = [*data.train.to_list(), *(one.row for one in data.dropped)]
    texts = sorted((row["prompt"], row["completion"]) for row in both)
    assert texts == sorted((row["prompt"], row["completion"]) for row in rows)
    assert {one.place: one.reason for one in data.dropped}[16] == "no answer"
    assert {one.reason for one in data.dropped if one.place != 16} == {"rated below those kept"}
    assert {one.by for one in data.dropped} == {"selectit"}
    assert [one.row["selectit"] for one in data.dropped if one.place == 16] == [None]


def test_the_order_of_rows_does_not_change_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = Random(0).sample(ROWS, 16)
    one, other = (prepared(rows, share=0.3).train["prompt"][:] for rows in (ROWS, mixed))
    assert set(one) == set(other)
    monkeypatch.setattr(Rater, "score", lambda self, pairs: [1.0] * len(pairs))
    one, other = (prepared(rows, share=0.3).train["prompt"][:] for rows in (ROWS, mixed))  # all alike
    assert set(one) == set(other)


def test_sure_high_ratings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = {"sure 5": (-9, -9, -9, -9, 0), "unsure 5": (0, 0, 0, 0, 0.1), "sure 1": (0, -9, -9, -9, -9)}

    def rated(model: Any, requests: Any, **_: Any) -> Any:
        texts = [tokenizer.decode(request.inputs) for request in requests]
        return [[(log,) for log in next(v for k, v in logs.items() if f": {k}\n" in text)] for text in texts]

    tokenizer = tiny_tokenizer()
    monkeypatch.setattr("peftx_selectit.score_requests", rated)
    rows = [{"prompt": "p", "completion": name} for name in ("sure 1", "unsure 5", "sure 5")]
    assert prepared(rows, share=0.4).train["completion"][:] == ["sure 5"]
    assert prepared(rows, share=0.7).train["completion"][:] == ["sure 1", "sure 5"]


def test_messages_are_rated_by_their_last_answer() -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in ROWS
    ]
    data, plain = prepared(chats, "messages", share=0.3), prepared(share=0.3)
    assert data.train["selectit"][:] == plain.train["selectit"][:]


# ------------------------------------------------------------------------------------------------------ keeping
class Killed(Exception):
    pass


@pytest.mark.parametrize("named", [True, False])
def test_ratings_are_kept_and_a_killed_run_goes_on(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "prompt": f"{n}. {row['prompt']}"} for n in range(2) for row in ROWS]
    whole = prepared(rows).train.to_list()
    asked: list[str] = []
    score = Rater.score

    def dying(self: Rater, pairs: Any) -> Any:
        if asked:
            raise Killed
        asked.extend(prompt for prompt, _ in pairs)
        return score(self, pairs)

    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path))
    file = tmp_path / "scores.jsonl" if named else None
    monkeypatch.setattr(Rater, "score", dying)
    with pytest.raises(PluginError):
        prepared(rows, scores=file)
    with (file or next((tmp_path / "answers").glob("*"))).open("a") as half:
        half.write('{"key": "ab')  # what a kill leaves
    more: list[str] = []
    monkeypatch.setattr(Rater, "score", lambda self, p: more.extend(x for x, _ in p) or score(self, p))
    again = prepared(rows, scores=file).train
    assert again["prompt"][:] == [row["prompt"] for row in whole]
    assert again["selectit"][:] == pytest.approx([row["selectit"] for row in whole], rel=1e-5)
    assert set(more).isdisjoint(asked)
    assert len(more) + len(asked) == len(rows) * len(SHORT)
    more.clear()
    assert len(prepared(rows, scores=file, share=0.1, alpha=0.5).train) == 3
    assert more == []
    prepared(rows[:1], scores=file, share=1.0, scale=4, prompts=("no scale in it",))
    prepared(rows[:1], scores=file, share=1.0, scale=5, prompts=("no scale in it",))
    assert len(more) == 2  # ratings of another scale are others


def test_ratings_by_weights_of_another_name_are_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack is called by the base that it began with: packed, it rates otherwise."""
    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path))

    def files(*plugins: Any, change: Any = lambda stack: None) -> int:
        stack = stack_of(SelectIt(prompts=SHORT, share=0.5), *plugins)
        change(stack)
        stack.prepare(as_training_data(stack, ROWS, seed=0, max_length=96))
        return len([*tmp_path.rglob("*.jsonl")])

    assert files(NF4Storage(), change=lambda stack: stack.compress()) == 0
    assert files(Lora()) == 1, "the base rates, without it"


def test_memory_grows_neither_with_the_text_of_rows_nor_with_what_raters_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rows rated alike, so that all are compared by their text: of 10 MB of it less than a quarter is held, ratings
    with their keys among it."""
    monkeypatch.setenv("PEFTX_CACHE", "")
    monkeypatch.setattr("peftx.toolkits.working.worker.BLOCK", 64)
    monkeypatch.setattr(Rater, "score", lambda self, pairs: [1.0] * len(pairs))
    rows = [{"prompt": f"Say {n}", "completion": f"{n} " + "tea and rain " * 250} for n in range(3300)]
    stack = stack_of(SelectIt(prompts=SHORT, share=0.5))
    data = as_training_data(stack, rows, seed=0, max_length=96)
    text = sum(len(row["completion"]) for row in rows)
    prepared()  # what is imported on the way
    tracemalloc.start()
    try:
        stack.prepare(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert text > 10e6
    assert peak < text / 4
    assert len(data.train) == len(rows) // 2
    assert len(data.train) + len(data.dropped) == len(rows)


def test_a_rating_is_kept_as_a_number(tmp_path: Path) -> None:
    """Its five probabilities as text would be four times as large, for every prompt of every row."""
    prepared(scores=tmp_path / "scores.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == len({(row["prompt"], row["completion"]) for row in ROWS}) * len(SHORT)
    assert {type(line["score"]) for line in lines} == {float}
    assert not any("text" in line for line in lines)


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    stack = stack_of(SelectIt(prompts=SHORT))
    data = as_training_data(stack, ROWS, seed=0, max_length=96)
    data.progress = lambda done, of: seen.append((done, of))
    stack.prepare(data)
    assert seen == [(32, 32)]


def test_twice_in_a_stack_the_later_scores_stay() -> None:
    stack = stack_of(("a", SelectIt(prompts=SHORT[:1], share=0.5)), ("b", SelectIt(prompts=SHORT, share=0.5)))
    data = stack.prepare(as_training_data(stack, ROWS, seed=0, max_length=96))
    assert len(data.train) == 4
    known = {str(row | {"selectit": 0}): row["selectit"] for row in prepared(share=1.0).train}
    for row in data.train:
        assert row["selectit"] == pytest.approx(known[str(row | {"selectit": 0})], rel=1e-4)


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


def test_what_leaves_nothing_to_choose() -> None:
    with pytest.raises(DataError, match=r"selectit: share 0.1 of 6 rows is less than one") as caught:
        prepared(ROWS[:6], share=0.1)
    assert "share at least 0.167" in str(caught.value.hint)
    assert len(prepared(ROWS[:6], share=0.167).train) == 1
    with pytest.raises(DataError, match="all 4 pairs are the same text"):
        prepared([ROWS[0]] * 4)
    assert len(prepared([ROWS[0]] * 4, share=1.0).train) == 4
    with pytest.raises(DataError, match="no rows are left") as caught:
        prepared([{"prompt": "a", "completion": " "}] * 4)
    assert str(caught.value.hint).startswith("it dropped 4 ")


def test_raters_that_cannot_rate(tmp_path: Path) -> None:
    for name in ("t5", "bert"):
        with pytest.raises(ArchitectureError, match=r"selectit: .* does not continue a text") as caught:
            Stack(tiny(name), [SelectIt()], tokenizer=tiny_tokenizer())
        assert "raters" in str(caught.value.hint)
        Stack(tiny(name), [SelectIt(raters=(TINY,))], tokenizer=tiny_tokenizer())
    tiny("t5").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match=r"rater '.*' ?: T5\w+ does not continue"):
        prepared(raters=(str(tmp_path),))


def test_a_rating_prompt_that_fills_the_model() -> None:
    stack = stack_of(SelectIt(share=0.5))
    with pytest.raises(DataError, match=r"a rating prompt has .* tokens by itself, and the model reads 128"):
        stack.prepare(as_training_data(stack, ROWS, seed=0, max_length=96))


def test_digits_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "peftx_selectit.following_ids", lambda tokenizer, text: [7] * (2 if text == "3" else 1)
    )
    stack = stack_of()
    with pytest.raises(UnsupportedError, match="here: its tokenizer makes 2 tokens of '3'"):
        Rater(stack, 5, 8, "here")
    Rater(stack, 2, 8, "here")


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0}, {"share": 1.1}, {"raters": ()}, {"raters": ("a", "a")}, {"scale": 1}, {"scale": 10},
        {"prompts": ("a", "a")}, {"alpha": -0.1}, {"batch_size": 0},
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=f"SelectIt: {next(iter(options))}"):
        SelectIt(**options)
