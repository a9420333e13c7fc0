"""User profiles: what is written can be read, what is counted is right, and what is believed is the model's."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from peftx import Stack, TrainingData
from peftx.engines.data import IGNORE, prompt_ids, tokenize_dataset
from peftx.engines.models import load_model
from peftx.errors import ArchitectureError, DataError, PluginError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.shapes import EOS
from peftx.toolkits.evaluation import Evaluation
from peftx_user_profile import (
    UserProfile,
    difference,
    edits,
    field_probabilities,
    matched,
    merge,
    normalise,
    parse,
    perturb,
    read_profile,
    read_task,
    serialise,
)

ROWS: list[dict[str, Any]] = [
    {"text": "I am Ann, from Rome.", "profile": {"name": "Ann", "city": "Rome"}},
    {"text": "Bob here, a baker.", "profile": {"name": "Bob", "job": "baker"}},
    {"text": "Moved to Oslo.", "old_profile": {"city": "Rome"}, "profile": {"city": "Oslo"}},
    {"text": "Hello!", "old_profile": {"job": "cook"}, "profile": {"job": "cook"}},
]
COLUMNS = ("text", "old_profile", "profile")
TOKENIZER = tiny_tokenizer()
texts = st.text(st.sampled_from('ab:" \\\n\r\t\u2028né-_') | st.characters(), max_size=8)
profiles = st.dictionaries(texts, texts, max_size=5)

test_conformance = conformance("user-profile")


def prepared(rows: list[dict[str, Any]], max_length: int = 96, seed: int = 0, **options: Any) -> TrainingData:
    data = TrainingData(
        train=Dataset.from_list([{**dict.fromkeys(COLUMNS), **row} for row in rows]),
        eval=None,
        tokenizer=TOKENIZER,
        seed=seed,
        format="text",
        max_length=max_length,
    )
    return Stack(tiny("llama"), [UserProfile(**options)], tokenizer=TOKENIZER).prepare(data)


class Oracle:
    """A stack that answers from a list."""

    def __init__(self, answers: list[str]) -> None:
        self.model, self.tokenizer, self.answers = (
            tiny("llama", max_position_embeddings=512),
            TOKENIZER,
            list(answers),
        )
        self.prompts: list[str] = []

    def generate(self, prompts: list[str], **options: Any) -> list[str]:
        self.prompts += prompts
        return [self.answers.pop(0) for _ in prompts]


def scores(rows: list[dict[str, Any]], answers: list[str], **options: Any) -> dict[str, float]:
    evaluation = Evaluation(stack=Oracle(answers), data={"eval": rows})  # type: ignore[arg-type]
    UserProfile(**{"probabilities": False, **options}).evaluate(evaluation)
    return {name: score.value for name, score in evaluation.scores.items()}


# ------------------------------------------------------------------------------------------------------ as lines
@given(profiles)
def test_parse_reverses_serialise(profile: dict[str, str]) -> None:
    found = parse(serialise(profile))
    assert found == profile
    assert list(found) == list(profile)
    assert serialise(profile).count("\n") == max(0, len(profile) - 1)


def test_a_plain_profile_looks_plain() -> None:
    assert (
        serialise({"name": "Ann", "meets at": "half past 11: noon"})
        == "name: Ann\nmeets at: half past 11: noon"
    )
    assert serialise({}) == "none"


@pytest.mark.parametrize(
    "key", ["a: b", ":", '"quoted"', "two\nlines", " padded ", "", "none", "back\\slash", "\u2028"]
)
def test_keys_that_clash_with_the_lines(key: str) -> None:
    profile = {key: "x", "after": 'say "hi": now'}
    assert parse(serialise(profile)) == profile
    assert parse(serialise({"k": key})) == {"k": key}


def test_generated_text_is_read_leniently() -> None:
    text = (
        ' name:Ann \n\nno field here\ncity : Rome\nname: Bob\n: nothing\n"open: x\njob:\nsaid: "hi" he said'
    )
    assert parse(text) == {"name": "Ann", "city": "Rome", "job": "", "said": '"hi" he said'}


# ----------------------------------------------------------------------------------------------------- training
def test_prompts_and_completions() -> None:
    rows = prepared(ROWS).train.to_list()
    first, third = "Text: I am Ann, from Rome.\n\nProfile:\n", "Text: Moved to Oslo.\n\nNew profile:\n"
    assert rows[0] == {"prompt": first, "completion": "name: Ann\ncity: Rome", "task": "construction"}
    third = f"Old profile:\ncity: Rome\n\n{third}"
    assert rows[2] == {"prompt": third, "completion": "city: Oslo", "task": "updating"}
    assert rows[3]["completion"] == "job: cook"


full = st.dictionaries(texts, texts.filter(str.strip), max_size=5)  # as `read_profile` lets them in


@given(full, full)
def test_what_changes_is_written_and_merged(old: dict[str, str], new: dict[str, str]) -> None:
    changes = difference(old, new)
    assert merge(old, parse(serialise(changes))) == new
    assert not {key for key in changes if old.get(key) == new.get(key)}
    assert merge(old, {}) == old


def test_edits_are_asked_for_and_learned_in_updating_alone() -> None:
    moved = {"text": "No job.", "old_profile": {"city": "Rome", "job": "cook"}, "profile": {"city": "Rome"}}
    rows = prepared([*ROWS, moved], edits=True).train.to_list()
    assert rows[0]["completion"] == "name: Ann\ncity: Rome"
    assert rows[2]["prompt"] == "Old profile:\ncity: Rome\n\nText: Moved to Oslo.\n\nChanges:\n"
    assert [row["completion"] for row in rows[2:]] == ["city: Oslo", "none", 'job: ""']
    made = prepared(ROWS[:2], edits=True, updates=1.0).train.to_list()[2:]
    assert [row["prompt"].endswith("Changes:\n") for row in made] == [True, True]


def test_edits_are_scored_as_the_profile_that_they_make() -> None:
    row = {
        "text": "Moved.",
        "old_profile": {"name": "Ann", "city": "Rome"},
        "profile": {"name": "Ann", "city": "Oslo"},
    }
    found = scores([row, row, row], ["city: Oslo", "none", 'city: Oslo\nname: ""'], edits=True)
    assert found["updating/recall"] == pytest.approx((2 + 1 + 1) / 6)
    assert found["updating/precision"] == pytest.approx((2 + 1 + 1) / 5)
    assert found["updating/changed"] == pytest.approx(2 / 3)


def test_with_edits_a_probability_is_of_what_changes() -> None:
    stack = Stack(tiny("llama"), [UserProfile(edits=True, max_new_tokens=4)], tokenizer=TOKENIZER)
    row = {"text": "Moved.", "old_profile": {"n": "Ann", "c": "Rome"}, "profile": {"n": "Ann", "c": "Oslo"}}
    prompt = "Old profile:\nn: Ann\nc: Rome\n\nText: Moved.\n\nChanges:\n"
    (expected,) = field_probabilities(stack.model, TOKENIZER, [(prompt, {"c": "Oslo"})])
    found = stack.evaluate([row], metrics=["user-profile"])["updating/probability"]
    assert (found.count, found.value) == (1, pytest.approx(expected["c"], rel=1e-4))


def test_the_loss_is_on_the_target_alone() -> None:
    data = prepared(ROWS)
    rows = tokenize_dataset(data.train, TOKENIZER, format=data.format, max_length=96)
    for text, row in zip(data.train, rows, strict=True):
        start = len(prompt_ids(TOKENIZER, text["prompt"]))
        target = [*TOKENIZER(text["completion"])["input_ids"], EOS]
        assert row["labels"] == [IGNORE] * start + target
        assert row["input_ids"][start:] == target


def test_an_empty_new_text_keeps_the_profile() -> None:
    same = {"text": "", "old_profile": {"city": "Rome"}, "profile": {"city": "Rome"}}
    assert read_task(same, "row 0").gold == read_task(same, "row 0").old
    with pytest.raises(DataError, match="row 0 has an empty text, and yet the profile changes"):
        read_task({**same, "profile": {"city": "Oslo"}}, "row 0")


def test_columns_of_tables_and_json_text() -> None:
    found = Dataset.from_list(ROWS)[0]  # Arrow gives each row every key that some row has
    assert found["profile"] == {"name": "Ann", "city": "Rome", "job": None}
    assert read_profile(found["profile"], "row 0") == {"name": "Ann", "city": "Rome"}
    assert read_profile('{"name": "Ann", "city": null}', "row 0") == {"name": "Ann"}
    assert read_profile("{}", "row 0") == {}


def test_training_raises_what_evaluation_measures() -> None:
    from peftx_lora import Lora

    rows = [{"text": f"Line {i}.", "profile": {"name": "Ann"}} for i in range(4)]
    stack = Stack(tiny("llama"), [UserProfile(max_new_tokens=12), Lora(rank=8)], tokenizer=TOKENIZER)
    before, after = {}, {}
    for found in (before, after):
        found |= {name: score.value for name, score in stack.evaluate(rows, metrics=["user-profile"]).items()}
        if not after:
            stack.train(rows, steps=40, batch_size=4, learning_rate=2e-2, max_length=48)
    assert before["construction/f1"] == 0
    assert after["construction/f1"] == after["construction/fuzzy-f1"] == 1
    assert after["construction/probability"] == after["construction/probability-right"]
    assert after["construction/probability"] > 1000 * before["construction/probability"] > 0


# ------------------------------------------------------------------------------------------- made-up updates
@given(st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"), min_size=1), st.integers(0, 99))
def test_a_made_update_has_a_known_edit(gold: dict[str, str], seed: int) -> None:
    others = {key: ["x", "y", "z"] for key in "abcd"}
    old = perturb(gold, others, Random(seed))
    assert old != gold
    assert set(old) <= set(gold)
    assert all(value in others[key] for key, value in old.items())
    assert perturb(gold, others, Random(seed)) == old


def test_a_made_update_changes_values_as_often_as_it_leaves_fields_out() -> None:
    """A field is edited for certain or with chance 1/3, and of two ways each has half."""
    gold, others = {"a": "x", "b": "x"}, {"a": ["x", "y", "z"], "b": ["x", "x"]}
    made = [perturb(gold, others, Random(seed)) for seed in range(900)]
    changed, gone = (sum("a" in old and old["a"] != "x" for old in made), sum("a" not in old for old in made))
    assert 240 < changed < 360  # 900 * (1/2 + 1/2 * 1/3) / 2 = 300
    assert 240 < gone < 360
    assert {old["a"] for old in made if "a" in old} == {"x", "y", "z"}
    assert {old["b"] for old in made if "b" in old} == {"x"}  # no other row has another value


def test_updates_come_on_top() -> None:
    rows = [
        {"text": f"I am {i}.", "profile": {"name": str(i), "city": "Rome" if i % 2 else "Oslo"}}
        for i in range(40)
    ]
    none, half, all_ = (prepared(rows, updates=share).train["task"][:] for share in (0, 0.5, 1))
    assert none == ["construction"] * 40
    assert half[:40] == all_[:40] == none
    assert all_[40:] == ["updating"] * 40
    assert 10 < len(half) - 40 < 30
    again = [prepared(rows, updates=1, seed=seed).train["prompt"][:] for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    with pytest.raises(DataError, match=r"updates is 0.5, and no row is a construction"):
        prepared(ROWS[2:], updates=0.5)


def test_made_updates_hold_values_of_all_other_rows() -> None:
    """Of those that are updates already too; with one other value each field is that, or gone."""
    rows = [{"text": f"I am {i}.", "profile": {"city": "Rome"}} for i in range(20)]
    moved = {"text": "Moved.", "old_profile": {"city": "Rome"}, "profile": {"city": "Oslo"}}
    made = prepared([*rows, moved], updates=1).train["prompt"][len(rows) + 1 :]
    assert {prompt.split("\n")[1] for prompt in made} == {"city: Oslo", serialise({})}


# --------------------------------------------------------------------------------------------------------- scores
GOLD = {"name": "Ann", "city": "Rome", "job": "baker"}
ROW = {"text": "I am Ann.", "profile": GOLD}


def of(found: dict[str, float]) -> tuple[float, ...]:
    return tuple(round(found[f"construction/{name}"], 4) for name in ("precision", "recall", "f1"))


def test_a_perfect_answer_has_one_everywhere() -> None:
    assert of(scores([ROW, ROW], [serialise(GOLD)] * 2)) == (1, 1, 1)


def test_a_spurious_field_lowers_precision_alone() -> None:
    assert of(scores([ROW], [serialise(GOLD | {"age": "30"})])) == (0.75, 1, 0.8571)


def test_a_missing_field_lowers_recall_alone() -> None:
    assert of(scores([ROW], ["name: Ann\ncity: Rome"])) == (1, 0.6667, 0.8)


def test_a_wrong_value_lowers_both() -> None:
    assert of(scores([ROW], ["name: Ann\ncity: Rome\njob: cook"])) == (0.6667, 0.6667, 0.6667)


def test_all_fields_count_alike() -> None:
    """Sums over the rows, not means of their ratios."""
    short = {"text": "I am Bob.", "profile": {"name": "Bob"}}
    assert of(scores([ROW, short], [serialise(GOLD), "name: Tim\nage: 3"])) == (0.6, 0.75, 0.6667)


def test_nothing_generated() -> None:
    assert of(scores([ROW], ["no idea"])) == (0, 0, 0)
    empty = {"text": "Hello!", "profile": {}}
    assert of(scores([empty], ["none"])) == (1, 1, 1)
    assert of(scores([empty], ["name: Ann"])) == (0, 0, 0)


@given(profiles, profiles)
def test_exact_matches_are_common_pairs(predicted: dict[str, str], gold: dict[str, str]) -> None:
    assert len(matched(predicted, gold)) == len(predicted.items() & gold.items())


@pytest.mark.parametrize(
    ("predicted", "threshold", "hit"),
    [
        ({"Home_City": "rome"}, 1.0, True),
        ({"home city": "New Rome"}, 1.0, False),
        ({"home city": "Romes"}, 0.85, True),  # 2 * 4 / 9 = 0.89
        ({"home city": "Romes"}, 0.95, False),
        ({"home city": "Roma"}, 0.75, True),  # 2 * 3 / 8: the least similarity is enough
        ({"city": "Rome"}, 0.1, False),  # keys are not similar, but alike
    ],
)
def test_fuzzy_matches(predicted: dict[str, str], threshold: float, hit: bool) -> None:
    assert bool(matched(predicted, {"home-city": "Rome"}, threshold)) == hit
    assert not matched(predicted, {"home-city": "Rome"})


def test_normalise() -> None:
    assert normalise("  Home_City, (No. 2)") == "home city no 2"
    assert normalise("$") == "$"


def test_updates_are_told_apart() -> None:
    old = {"name": "Ann", "city": "Rome", "job": "baker", "phone": "1"}
    gold = {"name": "Ann", "city": "Oslo", "job": "baker", "age": "30"}
    row = {"text": "Moved to Oslo at 30, lost the phone.", "old_profile": old, "profile": gold}
    assert dict(edits(old, gold, gold)) == {
        "kept": 2, "kept right": 2, "changed": 1, "changed right": 1, "added": 1, "added right": 1,
        "removed": 1, "removed right": 1, "edits": 2, "spurious": 0,
    }  # fmt: skip
    copied = scores([row], [serialise(old)])
    assert [copied[f"updating/{kind}"] for kind in ("kept", "changed", "added", "removed")] == [1, 0, 0, 0]
    assert "updating/spurious" not in copied  # no edit was made
    answer = {"name": "Ann", "city": "Oslo", "job": "cook", "pet": "cat"}  # one edit of three is gold
    found = scores([row], [serialise(answer)])
    assert [found[f"updating/{kind}"] for kind in ("kept", "changed", "added", "removed")] == [0.5, 1, 0, 1]
    assert found["updating/spurious"] == pytest.approx(2 / 3)
    assert found["updating/f1"] == 0.5


def test_each_task_has_scores_of_its_own() -> None:
    found = scores(ROWS, ["name: Ann\ncity: Rome", "name: Tim", "city: Oslo", "job: cook"], batch_size=3)
    assert (found["construction/recall"], found["updating/recall"]) == (0.5, 1)


# -------------------------------------------------------------------------------------------------- probabilities
def test_probabilities_are_those_of_the_tokens() -> None:
    model, profile = tiny("llama"), {"name": "Ann", "big: city": "R"}
    prompt = "Text: x\n\nProfile:\n"
    (found,) = field_probabilities(model, TOKENIZER, [(prompt, profile)])
    text = 'name: Ann\n"big: city": R'
    ids = [*TOKENIZER(prompt + text)["input_ids"], EOS]
    logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach()
    for key, start in (("name", len(prompt) + 6), ("big: city", len(prompt) + len(text) - 1)):
        places = range(start, start + len(profile[key]) + 1)  # a byte is a token; and what ends the value
        expected = math.exp(sum(float(logs[i - 1, ids[i]]) for i in places))
        assert found[key] == pytest.approx(expected, rel=1e-4)


def test_values_of_a_real_tokenizer() -> None:
    """The probabilities of all values of a key sum to no more than 1, and the prompt matters."""
    model, tokenizer = load_model("peftx:tiny")
    prompt = "Text: Play jazz from 1959\n\nProfile:\n"
    words = ("jazz", "rock", "1959", "jazz from", "j")
    found = field_probabilities(model, tokenizer, [(prompt, {"genre": word}) for word in words], batch_size=3)
    values = [fields["genre"] for fields in found]
    assert all(0 < p < 1 for p in values)
    assert sum(values) < 1
    (alone,) = field_probabilities(model, tokenizer, [(prompt, {"genre": "jazz", "year": "1959"})])
    assert alone["genre"] != pytest.approx(values[0])  # a line break ends the value here, EOS there
    assert field_probabilities(model, tokenizer, [(prompt, {})]) == [{}]


def test_right_and_wrong_fields_have_their_own_means() -> None:
    found = scores([ROW], ["name: Ann\ncity: Oslo"], probabilities=True)
    answer = [
        ("Text: I am Ann.\n\nProfile:\n", profile) for profile in (GOLD, {"name": "Ann", "city": "Oslo"})
    ]
    gold, own = field_probabilities(tiny("llama"), TOKENIZER, answer)
    assert found["construction/probability"] == pytest.approx(sum(gold.values()) / 3)
    assert found["construction/probability-right"] == pytest.approx(own["name"])
    assert found["construction/probability-wrong"] == pytest.approx(own["city"])


@pytest.mark.parametrize(
    ("arch", "match", "hint"),
    [
        ("t5", "T5ForConditionalGeneration has two towers", "set probabilities: false"),
        ("bert", "BertForMaskedLM writes no text", "take a language model"),
    ],
)
def test_models_without_profiles_are_refused_before_anything_runs(arch: str, match: str, hint: str) -> None:
    with pytest.raises(ArchitectureError, match=f"user-profile: {match}") as caught:
        Stack(tiny(arch), [UserProfile()], tokenizer=TOKENIZER)
    assert caught.value.hint == hint


def test_two_towers_without_probabilities() -> None:
    stack = Stack(tiny("t5"), [UserProfile(probabilities=False, max_new_tokens=8)], tokenizer=TOKENIZER)
    assert "construction/f1" in stack.evaluate(ROWS, metrics=["user-profile"])


def test_probabilities_need_a_decoder() -> None:
    with pytest.raises(UnsupportedError, match="need a decoder") as caught:
        field_probabilities(tiny("t5"), TOKENIZER, [("x", {"a": "b"})])
    assert caught.value.hint == "set probabilities: false"


# ----------------------------------------------------------------------------------------------------- bad inputs
@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"text": " \n", "profile": {"a": "b"}}, "row 1 .* has an empty text, and a profile is made of one"),
        ({"text": "x", "profile": {"a": " "}}, "'a' is ' '; keys and values are texts, not empty"),
        ({"text": "x", "profile": {" ": "b"}}, "' ' is 'b'; keys and values"),
        ({"text": "x", "profile": {"Home City": "b", "home_city": "c"}}, "'Home City' and 'home_city' clash"),
        ({"text": "x", "profile": '{"a": "b", "a": "c"}'}, "'a' and 'a' clash"),
        ({"text": "x", "profile": '{"a": 3}'}, "'a' is 3"),
        ({"text": "x", "profile": '["a"]'}, "must be an object of strings"),
        ({"text": "x", "profile": "a: b"}, "is no JSON"),
        ({"text": "x", "profile": None}, "needs 'text' and 'profile'"),
        ({"text": "x", "old_profile": {"a": "b", "A": "c"}, "profile": {}}, "row 1 .*old_profile: the keys"),
        ({"text": "x " * 60, "profile": {"a": "b"}}, "a row of construction has 141 tokens, max_length is 96"),
    ],
    ids=[
        "no text", "no value", "no key", "alike", "twice", "number", "list", "lines", "no profile", "old", "long",
    ],
)  # fmt: skip
def test_bad_rows(row: dict[str, Any], match: str) -> None:
    good: dict[str, Any] = {"text": "y", "old_profile": None, "profile": {"k": "v"}}
    if isinstance(row["profile"], str):
        good["profile"] = json.dumps(good["profile"])
    with pytest.raises(DataError, match=match):
        prepared([good, row])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_new_tokens": 100}, "100 for max_new_tokens"),
        ({"max_new_tokens": 24, "probabilities": True}, "51 for what is to be written and EOS"),
    ],
)
def test_prompts_that_leave_no_room_are_refused(options: dict[str, Any], what: str) -> None:
    rows = [{"text": "I am Ann.", "profile": {"a": "b"}}, {"text": "x" * 64, "profile": {"a": "b" * 47}}]
    stack = Stack(tiny("llama"), [UserProfile(**{"probabilities": False, **options})], tokenizer=TOKENIZER)
    match = rf"user-profile: row 1 .* has a prompt of 81 tokens, and with {what} that is more than the 128"
    with pytest.raises(DataError, match=match):
        stack.evaluate(rows, metrics=["user-profile"])
    if "probabilities" in options:  # without them the gold profile is not read
        fits = Stack(
            tiny("llama"), [UserProfile(max_new_tokens=40, probabilities=False)], tokenizer=TOKENIZER
        )
        assert "construction/f1" in fits.evaluate(rows, metrics=["user-profile"])


def test_a_row_may_fill_the_length() -> None:
    row = {"text": "I am Ann.", "profile": {"name": "Ann"}}
    (text,) = prepared([row]).train
    length = len(prompt_ids(TOKENIZER, text["prompt"])) + len(TOKENIZER(text["completion"])["input_ids"]) + 1
    assert list(prepared([row], max_length=length).train) == [text]
    with pytest.raises(DataError, match=f"has {length} tokens, max_length is {length - 1}"):
        prepared([row], max_length=length - 1)


def test_rows_without_profiles() -> None:
    with pytest.raises(DataError, match=r"row 0 .* needs 'text' and 'profile'; it has text"):
        prepared([{"text": "x"}])
    with pytest.raises(DataError, match="there are no rows"):
        scores([], [])


@pytest.mark.parametrize(
    "options",
    [{"updates": -0.1}, {"updates": 1.1}, {"fuzzy": 0}, {"fuzzy": 1.1}, {"max_new_tokens": 0}, {"batch_size": 0},
     {"probabilities": 2}],
)  # fmt: skip
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(PluginError, match=f"UserProfile: {next(iter(options))}") as caught:
        UserProfile(**options)
    assert "updates, edits, fuzzy, max_new_tokens" in str(caught.value.hint)


def test_the_bounds_of_options_belong_to_them() -> None:
    UserProfile(updates=0, max_new_tokens=1, batch_size=1)
    UserProfile(updates=1, fuzzy=1)
