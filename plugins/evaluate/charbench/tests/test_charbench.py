"""CharBench: answers by hand, what items there are, what the tokens of a word are, and what explains errors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftx import Stack
from peftx.errors import ArchitectureError, DataError, PeftxError, PluginError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_charbench import GOLD, CharBench, Item, correlation, features, generate, read_answer, words_of

test_conformance = conformance("charbench")

TASKS = tuple(GOLD)
RNG = Random(0)
WORDS = sorted({"".join(RNG.choice("abcdeABC") for _ in range(n)) for n in (4, 5, 6) for _ in range(200)})


def items(count: int = 20, seed: int = 0, words: list[str] = WORDS, **options: Any) -> list[Item]:
    return generate(words, **{"tasks": TASKS, "lengths": (4, 6), "count": count, "seed": seed} | options)


def scores(
    rows: Any = None, oracle: Any = None, output: Path | None = None, **options: Any
) -> dict[str, Any]:
    options = {"count": 10, "lengths": (4, 6), "max_new_tokens": 2} | options
    stack = Stack(tiny("llama"), [CharBench(**options)], tokenizer=tiny_tokenizer())
    rows = [" ".join(WORDS)] if rows is None else rows
    with pytest.MonkeyPatch.context() as patch:
        if oracle is not None:
            patch.setattr(
                "peftx_charbench.write",
                lambda stack, prompts, *_: ([oracle(prompt) for prompt in prompts], {}),
            )
        return dict(stack.evaluate(rows, metrics=["charbench"], output_dir=output))


def byte_oracle(prompt: str) -> str:
    """Answers from the bytes of a question, without str's own search."""
    asked = prompt[prompt.index("Question:") :]
    quoted = re.findall(r"'([^']*)'", asked)
    word = quoted[-1].encode()
    if "different characters does" in asked:
        return str(len([i for i in range(len(word)) if word[i] not in word[:i]]))
    places = [i for i, byte in enumerate(word) if byte == quoted[0].encode()[0]]
    return str(len(places) if "often" in asked else places[0] if "first" in asked else places[-1])


# ----------------------------------------------------------------------------------------------------------- items
def test_answers_by_hand() -> None:
    gold = {task: GOLD[task][0] for task in TASKS}
    assert [gold[task]("Banana", "a") for task in TASKS] == [3, 3, 1, 5]
    assert [gold[task]("Banana", "n") for task in TASKS] == [3, 2, 2, 4]
    assert [gold[task]("bB", "B") for task in TASKS] == [2, 1, 1, 1]


def test_gold_is_what_python_says() -> None:
    for item in items():
        w, c = item.word, item.character
        right = {"unique-characters": len(set(w)), "frequency": w.count(c), "first-index": w.find(c)}
        right["last-index"] = w.rfind(c)
        assert item.answer == right[item.task]
        assert (c == "") == (item.task == "unique-characters")
        assert c in w
        assert f"'{w}'" in item.question
        assert (f"'{c}'" in item.question) == bool(c)
        assert "{" not in item.question


def test_as_many_of_every_length_and_task_and_no_word_twice() -> None:
    found = items(count=13)
    counts = Counter((item.task, len(item.word)) for item in found)
    assert counts == dict.fromkeys(((task, n) for task in TASKS for n in (4, 5, 6)), 13)
    assert len({item.word for item in found}) == len(found)
    assert [item.task for item in found] == sorted((item.task for item in found), key=TASKS.index)


def test_a_seed_gives_the_same_items_whatever_the_order_of_words() -> None:
    mixed = Random(3).sample(WORDS, len(WORDS))
    assert items(words=[*mixed, *mixed]) == items()
    assert items(seed=1) != items()
    assert {item.word for item in items(seed=1)} != {item.word for item in items()}


def test_a_character_is_drawn_by_its_place() -> None:
    words = [f"{'a' * 9}{chr(1000 + n)}" for n in range(400)]  # nine of ten places
    found = generate(words, tasks=("frequency",), lengths=(10, 10), count=400, seed=0)
    assert 330 < sum(item.character == "a" for item in found) < 390


def test_words_of_any_script() -> None:
    assert words_of(["Tea, or tea-time? x2", "tea"], "[a-zA-Z]+") == ["Tea", "or", "tea", "time"]
    assert words_of(["Straße über çay"], r"\w+") == ["Straße", "çay", "über"]
    assert words_of(["ab1 cd"], "[a-z]+") == ["cd"]
    found = generate(["über"], tasks=("last-index",), lengths=(4, 4), count=1, seed=0)
    assert found[0].answer == "über".rindex(found[0].character)


def test_words_of_one_character() -> None:
    assert CharBench(lengths=(1, 1)).config.lengths == (1, 1)
    found = generate(["a"], tasks=("frequency",), lengths=(1, 1), count=1, seed=0)
    assert found == [Item("frequency", "a", "a", 1)]


def test_a_word_with_braces() -> None:
    item = Item("frequency", "{c}{w}", "{", 2)
    assert "'{' stand in '{c}{w}'" in item.question


# -------------------------------------------------------------------------------------------------------- features
class Cut:
    """A tokenizer that cuts at given places."""

    is_fast = True

    def __init__(self, *ends: int) -> None:
        self.ends = ends

    def __call__(self, word: str, **_: Any) -> dict[str, Any]:
        ends = [*self.ends, len(word)]
        return {
            "offset_mapping": [(0, 0), *zip([0, *self.ends], ends, strict=True)]
        }  # a mark without characters


def test_features_by_hand() -> None:
    known = features(Item("last-index", "banana", "n", 4), Cut(1, 3))  # b an ana
    assert known == {
        "length": 6, "answer": 4, "answer-of-length": 4 / 6, "tokens": 3, "compression": 2.0, "target": 3
    }  # fmt: skip
    targets = [features(Item("first-index", "banana", "?", n), Cut(1, 3))["target"] for n in range(6)]
    assert targets == [1, 2, 2, 3, 3, 3]
    assert features(Item("frequency", "banana", "n", 2), Cut())["compression"] == 6
    assert "target" not in features(Item("frequency", "banana", "n", 2), Cut(1, 3))


class Nothing(Cut):
    """A tokenizer that knows none of the characters."""

    def __call__(self, word: str, **_: Any) -> dict[str, Any]:
        return {"offset_mapping": []}


def test_a_word_that_leaves_no_tokens() -> None:
    known = features(Item("first-index", "banana", "n", 2), Nothing())
    assert (known["tokens"], known["compression"], known["target"]) == (0, 6, 0)


def test_tokens_are_those_of_the_tokenizer_and_lie_end_to_end() -> None:
    tokenizer = Stack("peftx:tiny").tokenizer
    for item in items(count=4, words=[*WORDS, "stone", "river"]):
        known = features(item, tokenizer)
        ids = tokenizer(item.word, add_special_tokens=False)["input_ids"]
        assert known["tokens"] == len(ids)
        if item.task.endswith("index"):
            ends = [len(tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]
            n = next(n for n, end in enumerate(ends) if item.answer < end)
            assert known["target"] == ends[n] - (ends[n - 1] if n else 0)


def test_features_do_not_depend_on_order() -> None:
    tokenizer, found = tiny_tokenizer(), items(count=5)
    forward = [features(item, tokenizer) for item in found]
    assert [features(item, tokenizer) for item in found[::-1]] == forward[::-1]


# --------------------------------------------------------------------------------------------------------- answers
def test_answers_are_numbers_and_nothing_else() -> None:
    for text, whole, first in (
        ("3", 3, 3), (" 3\n", 3, 3), ("+3", 3, 3), ("-1", -1, -1), ("3.", None, 3), ("It is 3", None, 3),
        ("3 or 4", None, 3), ("three", None, None), ("", None, None),
    ):  # fmt: skip
        assert read_answer(text) == whole
        assert read_answer(text, "first-number") == first


def test_an_oracle_of_bytes_is_always_right_and_one_that_is_off_by_one_never() -> None:
    found = scores(oracle=byte_oracle)
    shares = {name: score.value for name, score in found.items() if "/r/" not in name}
    assert set(shares.values()) == {1.0}
    assert found["charbench"].count == 120
    assert found["charbench/frequency"].count == 30
    off = scores(oracle=lambda prompt: str(int(byte_oracle(prompt)) + 1))
    assert {score.value for name, score in off.items() if "/r/" not in name} == {0.0}
    assert not [name for name in found | off if "/r/" in name]  # nothing varies


def test_further_text_is_wrong_unless_the_first_number_is_read() -> None:
    def talks(prompt: str) -> str:
        return f" {byte_oracle(prompt)}\nQuestion: 7"

    assert scores(oracle=talks)["charbench"].value == 0
    assert scores(oracle=talks, answer="first-number")["charbench"].value == 1


def test_accuracy_by_stratum_is_that_of_its_items(tmp_path: Path) -> None:
    def short(prompt: str) -> str:
        """Right on words of four characters."""
        return byte_oracle(prompt) if re.search(r"'\w{4}'", prompt) else "no"

    found = scores(oracle=short, output=tmp_path)
    for task in TASKS:
        by_length = [found[f"charbench/{task}/length/{n}"] for n in (4, 5, 6)]
        assert [score.value for score in by_length] == [1, 0, 0]
        assert [score.count for score in by_length] == [10, 10, 10]
        assert found[f"charbench/{task}"].value == pytest.approx(1 / 3)
        assert found[f"charbench/{task}/r/length"].value < -0.7
    rows = [json.loads(line) for line in (tmp_path / "charbench.jsonl").read_text().splitlines()]
    assert len(rows) == 120
    for row in rows:
        assert row["right"] == (row["text"] == str(row["answer"])) == (len(row["word"]) == 4)
        assert row["features"]["length"] == len(row["word"])
    for name, score in found.items():
        if m := re.fullmatch(r"charbench/([\w-]+)/(length|answer|tokens|target)/(\d+)", name):
            part = [
                row["right"] for row in rows if row["task"] == m[1] and row["features"][m[2]] == int(m[3])
            ]
            assert score.value == pytest.approx(sum(part) / len(part))
            assert score.count == len(part)
    assert not [name for name in scores(oracle=short, strata=False) if "/length/" in name]


# ---------------------------------------------------------------------------------------------------- correlations
def test_correlation_by_hand() -> None:
    found = correlation([1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
    assert found is not None
    assert found[0] == pytest.approx(3 / math.sqrt(10 * 1.2))
    z = math.atanh(found[0])
    assert found[1:] == pytest.approx([math.tanh(z - 1.959964 / 2**0.5), math.tanh(z + 1.959964 / 2**0.5)])
    assert correlation([1, 1, 1, 1], [0, 1, 0, 1]) is None
    assert correlation([1, 2, 3, 4], [1, 1, 1, 1]) is None
    assert correlation([1, 2, 3], [0, 1, 1]) is None
    assert correlation([0, 0, 1, 1], [0, 0, 1, 1]) == pytest.approx((1, 1, 1), abs=1e-5)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=4, max_size=40))
def test_correlations_are_the_same_with_signs_turned(pairs: list[tuple[int, bool]]) -> None:
    x, y = zip(*pairs, strict=True)
    one, other = correlation(x, y), correlation([-value for value in x], y)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one[0] == pytest.approx(-other[0])
        assert -1 <= one[1] <= one[0] <= one[2] <= 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_correlation_is_found(sign: int) -> None:
    rng, tokenizer = Random(1), Stack("peftx:tiny").tokenizer
    found = items(count=45, tasks=("first-index", "last-index"))
    known = [features(item, tokenizer) for item in found]
    targets = [one["target"] for one in known]
    middle = sum(targets) / len(targets)
    right = [rng.random() < (0.8 if sign * (target - middle) > 0 else 0.3) for target in targets]
    r, low, high = correlation(targets, right)  # type: ignore[misc]
    assert sign * r > 0
    assert abs(math.atanh(r)) * math.sqrt(len(right) - 3) > 2.576  # p < 0.01
    assert low * high > 0


# ------------------------------------------------------------------------------------------------------ the model
def test_the_model_is_asked_and_batches_do_not_matter(tmp_path: Path) -> None:
    for size in (1, 7):
        scores(output=tmp_path / str(size), batch_size=size, count=2, lengths=(4, 4), prompt="{question}")
    one, other = (json.loads(f"[{','.join((tmp_path / n / 'charbench.jsonl').read_text().splitlines())}]")
                  for n in ("1", "7"))  # fmt: skip
    assert one == other
    assert len(one) == 8
    assert [row["text"] for row in one] != [""] * 8


def test_what_is_asked() -> None:
    asked: list[str] = []

    def listen(prompt: str) -> str:
        asked.append(prompt)
        return "1"

    scores(oracle=listen, prompt="Q {question} A", tasks=["frequency"], count=2, lengths=(4, 4))
    assert [prompt[:2] + prompt[-2:] for prompt in asked] == ["Q  A"] * 2
    asked.clear()
    scores(oracle=listen, chat=True, count=1, lengths=(4, 4))
    assert all(prompt.startswith("User: Give the number only.") for prompt in asked)
    assert all(prompt.endswith("Assistant:") for prompt in asked)
    assert len(asked) == 4


def test_where_words_come_from(tmp_path: Path) -> None:
    words = [word for word in WORDS if len(word) == 4]
    file = tmp_path / "words.txt"
    file.write_text("\n".join(words))
    plain = scores([" ".join(words)], byte_oracle, lengths=(4, 4))
    assert scores([], byte_oracle, lengths=(4, 4), words=str(file)) == plain
    turns = {"messages": [{"role": "user", "content": " ".join(words)}]}
    assert scores([turns], byte_oracle, lengths=(4, 4)) == plain
    assert "user" not in words
    with pytest.raises(DataError, match=r"0 words of 4 characters"):
        scores(
            [{"messages": [{"role": "user", "content": "a b"}]}], lengths=(4, 4), tasks=["frequency"], count=1
        )


# --------------------------------------------------------------------------------------------------------- refused
def test_too_few_words() -> None:
    with pytest.raises(
        DataError, match="charbench: 3 words of 5 characters, and 1 tasks of 4 words each need 4"
    ) as caught:
        scores(["stone river bread"], tasks=["frequency"], count=4, lengths=(5, 5))
    assert "count: 3" in str(caught.value.hint)
    with pytest.raises(DataError, match="1 words of 4 characters"):
        scores(["same same same"], lengths=(4, 4))
    for rows in ([], [{"text": "7 8"}]):
        with pytest.raises(DataError, match="0 words of 4 characters") as caught:
            scores(rows, lengths=(4, 4))
        assert "more text" in str(caught.value.hint)


def test_no_text_at_all() -> None:
    stack = Stack(tiny("llama"), [CharBench()], tokenizer=tiny_tokenizer())
    with pytest.raises(DataError, match="no text to take words from"):
        stack.evaluate(metrics=["charbench"])


def test_a_tokenizer_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    stack = Stack(tiny("llama"), [CharBench()], tokenizer=tokenizer)
    with pytest.raises(UnsupportedError, match="where its tokens stand"):
        stack.evaluate(["a"], metrics=["charbench"])


def test_models_that_write_nothing() -> None:
    with pytest.raises(ArchitectureError, match=r"charbench: .* writes no text"):
        Stack(tiny("bert"), [CharBench()], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": []}, {"tasks": ["frequency", "frequency"]}, {"tasks": ["reverse"]}, {"lengths": (5, 4)},
        {"lengths": (0, 4)}, {"count": 0}, {"pattern": "("}, {"prompt": "Answer me"}, {"batch_size": 0},
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=f"CharBench: {next(iter(options))}"):
        CharBench(**options)
    assert issubclass(PluginError, PeftxError)
