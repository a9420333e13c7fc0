"""Mosaic-IT: the samples hold what their meta-instructions say."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from random import Random
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from peftx import Stack, TrainingData
from peftx.engines.data import FORMATS, tokenize_dataset
from peftx.errors import DataError, PeftxError, PluginError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.shapes import BOS
from peftx_mosaic_it import CHOICES, TAG_RULES, MosaicIt, MosaicItConfig, compose, draw_size
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("mosaic-it")

LIMIT = 400  # tokens, which are bytes here
TOKENIZER = tiny_tokenizer()
texts = st.text("ab #|*@[](){}<>.\nENDé", min_size=1, max_size=12).filter(str.strip)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=14)
STRATEGIES = ["format", "permute", "maskout"]


@cache
def model() -> Any:
    return tiny("llama", max_position_embeddings=512)


def prepared(
    rows: list[dict[str, Any]],
    *,
    format: str = "prompt-completion",
    seed: int = 0,
    length: int = LIMIT,
    tokenizer: Any = TOKENIZER,
    **options: Any,
):
    data = TrainingData(
        train=Dataset.from_list(rows),
        eval=None,
        tokenizer=tokenizer,
        seed=seed,
        format=format,
        max_length=length,
    )
    return Stack(model(), [MosaicIt(**options)], tokenizer=tokenizer).prepare(data)


def rows_of(items: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": x, "completion": y} for x, y in items]


def tags_of(prompt: str) -> tuple[str, str] | None:
    """Begin and end tag, read from the rule in the prompt as a model has to."""
    for rule in TAG_RULES:
        pattern = (
            re.escape(rule).replace(r"\{begin\}", r"(?P<begin>\S+)").replace(r"\{end\}", r"(?P<end>\S+?)")
        )
        if found := re.search(pattern, prompt):
            return found["begin"], found["end"]
    return None


def parsed(completion: str, begin: str, end: str) -> list[str]:
    answers, at = [], 0
    while (start := completion.find(begin, at)) >= 0:
        stop = completion.index(end, start + len(begin))
        answers.append(completion[start + len(begin) : stop])
        at = stop + len(end)
    return answers


@settings(max_examples=25)
@given(pairs, st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_every_pair_occurs_once_in_each_copy(items, k_max, copies, seed):
    train = prepared(rows_of(items), k_max=k_max, copies=copies, seed=seed).train
    assert Counter(i for sample in train for i in sample["rows"]) == dict.fromkeys(range(len(items)), copies)
    for sample in train:
        assert len(sample["rows"]) <= k_max
        for i in sample["rows"]:
            assert items[i][0] in sample["prompt"]
        if sample["strategy"] != "maskout":
            assert sorted(sample["answered"]) == sorted(sample["rows"])


@settings(max_examples=25)
@given(pairs, st.sampled_from(STRATEGIES), st.integers(0, 99))
def test_its_own_tags_give_the_responses_back_in_the_stated_order(items, strategy, seed):
    options = {"tags": 1.0, "strategies": [strategy], "numbering": ["{i}. ", "", "### {i}\n"], "k_max": 5}
    read = 0
    for sample in prepared(rows_of(items), seed=seed, copies=2, **options).train:
        if tags := tags_of(sample["prompt"]):
            read += 1
            assert parsed(sample["completion"], *tags) == [items[i][1] for i in sample["answered"]]
    # Only a response that holds the end tag, or a sample without room for tags, goes without.
    assert read or any("END" in y for _, y in items)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=12, unique=True), st.integers(0, 99))
def test_maskout_leaves_a_response_out_iff_it_is_listed(numbers, seed):
    items = [(f"say {n}!", f"answer {n}!") for n in numbers]  # no response is part of another
    for sample in prepared(rows_of(items), seed=seed, strategies=["maskout"], tags=0).train:
        present = [items[i][1] in sample["completion"] for i in sample["rows"]]
        assert present == [i in sample["answered"] for i in sample["rows"]]
        if len(sample["rows"]) == 1:
            assert all(present)
            continue
        assert 0 < sum(present) < len(present)
        if listed := re.search(r"Leave out these items: ([\d, ]+)\.", sample["prompt"]):
            out = {int(place) - 1 for place in listed[1].split(", ")}
            assert present == [place not in out for place in range(len(present))]
        elif counted := re.search(r"(\d+) in all", sample["prompt"]):
            assert present.count(False) == int(counted[1])
        else:
            first = 0 if "odd places" in sample["prompt"] else 1
            assert present == [place % 2 != first for place in range(len(present))]


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.5), (0.1, 0.2), (0.4, 0.6), (0.6, 0.9)])
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_maskout_omits_what_the_ratio_allows(low, high, k):
    config = MosaicItConfig(strategies=["maskout"], mask_ratio=[low, high], tags=0)
    counts, halves = set(), set()
    for seed in range(150):
        prompt, _, answered, _ = compose(Random(seed), config, [(f"x{i}", f"y{i}") for i in range(k)])
        counts.add(k - len(answered))
        halves |= {name for name in ("odd", "even") if f"at {name} places" in prompt}
    ends = [max(1, int(k * share)) for share in (low, high)]
    assert counts == set(range(ends[0], ends[1] + 1))
    expected = {"odd": k - k // 2, "even": k // 2}
    assert halves == {name for name, count in expected.items() if ends[0] <= count <= ends[1]}


@given(st.lists(texts, min_size=2, max_size=8), st.sampled_from(sorted(CHOICES["permute"])), st.randoms())
def test_every_order_is_a_permutation(prompts, name, rng):
    places = list(range(len(prompts)))
    drawn = rng.sample(places, len(places))
    assert sorted(CHOICES["permute"][name][0](prompts, drawn)) == places


def test_orders_by_hand():
    prompts = ["b b b", "cccccc c", "A"]
    got = {name: order(prompts, [1, 2, 0]) for name, (order, _) in CHOICES["permute"].items()}
    assert got == {
        "listed": [1, 2, 0],
        "reverse": [2, 1, 0],
        "a-z": [2, 0, 1],
        "z-a": [1, 0, 2],
        "few-words": [2, 1, 0],
        "many-words": [0, 1, 2],
        "few-characters": [2, 0, 1],
        "many-characters": [1, 0, 2],
        "odd-even": [0, 2, 1],
        "even-odd": [1, 0, 2],
    }
    masks = {name: order(prompts, [1, 2, 0]) for name, (order, _) in CHOICES["maskout"].items()}
    assert masks == {
        "listed": [1, 2, 0],
        "longest": [0, 1, 2],
        "shortest": [2, 1, 0],
        "odd": [0, 2],
        "even": [1],
    }


def test_the_stated_order_is_the_order_of_the_answers():
    items = [(f"item {n}", f"answer {n}") for n in "abcdefgh"]
    seen = 0
    for sample in prepared(
        rows_of(items), strategies=["permute"], copies=60, tags=0, numbering=["{i}. "]
    ).train:
        if stated := re.search(r"in the order ([\d, ]+)\.", sample["prompt"]):
            seen += 1
            places = [int(place) - 1 for place in stated[1].split(", ")]
            assert [sample["rows"][place] for place in places] == sample["answered"]
            assert sample["completion"] == "\n\n".join(
                f"{place + 1}. {items[sample['rows'][place]][1]}" for place in places
            )
    assert seen


@settings(max_examples=25)
@given(pairs, st.integers(0, 99))
def test_one_pair_a_sample_without_tags_is_the_original(items, seed):
    train = prepared(rows_of(items), k_max=1, copies=1, strategies=["format"], tags=0, seed=seed).train
    assert Counter((s["prompt"], s["completion"]) for s in train) == Counter(items)


def test_number_of_samples():
    rows = rows_of([(f"x{i}", f"y{i}") for i in range(600)])
    for k_max in (1, 4, 10):
        train = prepared(rows, k_max=k_max, copies=2, length=4000).train
        assert len(train) == pytest.approx(2 * 2 * 600 / (k_max + 1), rel=0.12)


@pytest.mark.parametrize(
    ("distribution", "mean"),
    # E k = k_max - E[int(d) | d < k_max] for k_max = 10, by summing the distribution functions.
    [
        ("uniform", 5.5),
        ("exponential", 9.418),
        ("pareto", 9.160),
        ("lognormal", 8.973),
        ("logistic", 7.832),
        ("fixed", 10),
    ],
)
def test_mean_group_size(distribution, mean):
    rng = Random(0)
    sizes = [draw_size(rng, 10, distribution, 99) for _ in range(20_000)]
    assert set(sizes) <= set(range(1, 11))
    assert sum(sizes) / len(sizes) == pytest.approx(mean, abs=0.07)


def test_fill_joins_as_many_as_fit():
    train = prepared(
        rows_of([("x" * 50, "y" * 50)] * 30), distribution="fill", strategies=["format"], tags=0, copies=1
    ).train
    assert [len(sample["rows"]) for sample in train][:-1] == [3] * (len(train) - 1)


@settings(max_examples=25)
@given(
    pairs,
    st.integers(60, 200),
    st.sampled_from(["prompt-completion", "messages", "classification"]),
    st.integers(0, 9),
)
def test_samples_fit_and_training_reads_them_whole(items, limit, format, seed):
    rows = rows_of(items)
    if format == "messages":
        rows = [
            {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": y}]}
            for x, y in items
        ]
    elif format == "classification":
        rows = [{"text": x, "label": y} for x, y in items]
    data = prepared(rows, format=format, max_len=limit, seed=seed, copies=1)
    assert data.format == ("messages" if format == "messages" else "prompt-completion")
    roomy = tokenize_dataset(data.train, TOKENIZER, format=data.format, max_length=10_000)
    assert max(map(len, roomy["input_ids"])) <= limit  # so nothing is cut at this length either


def test_messages_become_one_turn_each():
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(9)
    ]
    train = prepared(rows, format="messages", distribution="fixed", k_max=3, copies=1).train
    assert [[turn["role"] for turn in sample["messages"]] for sample in train] == [["user", "assistant"]] * 3


def test_the_same_seed_gives_the_same_data():
    rows = rows_of([(f"x{i}", f"y{i}") for i in range(40)])
    first, again, other = (prepared(rows, seed=seed).train.to_list() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_response_that_holds_the_end_tag_gets_no_tags():
    hostile = " ".join(
        f"{a}{word}{b}"
        for word in ("END", "CLOSE", "DONE", "LEAVE", "OVER")
        for a, b in [
            ("[", "]"),
            ("<", ">"),
            ("(", ")"),
            ("<<", ">>"),
            ("|", "|"),
            ("**", "**"),
            ("#", "#"),
            ("@@", "@@"),
        ]
    )
    config = MosaicItConfig(tags=1)
    for seed in range(30):
        assert tags_of(compose(Random(seed), config, [("x", hostile), ("z", "y")])[0]) is None


def test_too_long_a_pair():
    rows = [*rows_of([(f"x{i}", "y") for i in range(5)]), {"prompt": "x" * 500, "completion": "y"}]
    with pytest.raises(DataError, match=r"row 5 .* has 503 tokens .* max_len is 400") as error:
        prepared(rows)
    assert "too_long: drop" in str(error.value.hint)
    dropped = prepared(rows, too_long="drop", copies=1).train
    assert sorted(i for sample in dropped for i in sample["rows"]) == [0, 1, 2, 3, 4]
    kept = [sample for sample in prepared(rows, too_long="keep", copies=1).train if 5 in sample["rows"]]
    assert [(s["prompt"], s["completion"], s["rows"]) for s in kept] == [("x" * 500, "y", [5])]
    with pytest.raises(DataError, match="row 0"):
        prepared(rows[5:], too_long="drop")


def test_a_sample_has_room_for_the_special_tokens():
    """BOS, where a tokenizer puts one in front as Llama's does, and EOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    data = prepared(rows_of([("x" * 36, "y")]), tokenizer=tokenizer, length=40, copies=1)
    read = tokenize_dataset(data.train, tokenizer, format=data.format, max_length=10_000)
    assert [len(ids) for ids in read["input_ids"]] == [40]  # BOS, 36, " y", EOS
    with pytest.raises(DataError, match="has 41 tokens by itself, and max_len is 40"):
        prepared(rows_of([("x" * 37, "y")]), tokenizer=tokenizer, length=40)


def test_bad_rows():
    with pytest.raises(DataError, match=r"row 1 .* must have two texts, prompt and completion") as error:
        prepared([{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": None}])
    assert "it has 'x' and None" in str(error.value.hint)
    with pytest.raises(DataError, match="row 0"):
        prepared([{"question": "x", "completion": "y"}])
    with pytest.raises(DataError, match="row 0"):
        prepared([{"prompt": "x", "completion": " "}])
    turn = {"role": "user", "content": "x"}
    with pytest.raises(DataError, match="user and assistant"):
        prepared([{"messages": [turn, turn]}], format="messages")
    with pytest.raises(DataError, match="no rows"):
        prepared([])


@pytest.mark.parametrize(
    "format", sorted({*FORMATS, "tokenized"} - {"prompt-completion", "messages", "classification"})
)
def test_other_formats_are_refused(format):
    with pytest.raises(UnsupportedError, match=f"'{format}'"):
        prepared([{"text": "x"}], format=format)


def test_a_limit_over_the_runs_length_is_refused():
    small = Stack(tiny("llama"), [PromptTuning(length=8), MosaicIt(tags=0)], tokenizer=TOKENIZER)
    rows = rows_of([("x" * 20, "y" * 20)] * 12)
    data = TrainingData(
        train=Dataset.from_list(rows),
        eval=None,
        tokenizer=TOKENIZER,
        seed=0,
        format="prompt-completion",
        max_length=LIMIT,
    )
    made = tokenize_dataset(small.prepare(data).train, TOKENIZER, format=data.format, max_length=LIMIT)
    assert 60 < max(map(len, made["input_ids"])) <= 120, "the model reads 128, and soft tokens take 8"
    with pytest.raises(PeftxError, match=r"max_len 401 exceeds the run's max_length 400"):
        prepared(rows_of([("x", "y")]), max_len=401)


def test_nothing_to_do_without_training_rows():
    data = TrainingData(train=None, eval=None, tokenizer=TOKENIZER, seed=0, format="text", max_length=9)
    assert Stack(model(), [MosaicIt()], tokenizer=TOKENIZER).prepare(data).train is None


@pytest.mark.parametrize(
    "options",
    [
        {"k_max": 0},
        {"copies": 0},
        {"max_len": 1},
        {"distribution": "normal"},
        {"strategies": []},
        {"strategies": ["mask"]},
        {"tags": 1.5},
        {"numbering": ["{n}. "]},
        {"numbering": []},
        {"mask_ratio": [0.0, 0.5]},
        {"mask_ratio": [0.5, 1.0]},
        {"mask_ratio": [0.5, 0.1]},
        {"strategies": ["permute", "format", "permute"]},
        {"too_long": "cut"},
    ],
)
def test_bad_options(options):
    with pytest.raises(PluginError, match=f"MosaicIt: {next(iter(options))}") as error:
        MosaicIt(**options)
    assert "its options are: k_max" in str(error.value.hint)


@pytest.mark.parametrize(
    ("options", "idle", "match"),
    [
        ({"distribution": "fill"}, {"k_max": 4}, "k_max does nothing under distribution 'fill'"),
        (
            {"strategies": ["permute"]},
            {"mask_ratio": [0.2, 0.3]},
            "mask_ratio does nothing without 'maskout'",
        ),
    ],
)
def test_options_that_would_do_nothing(options, idle, match):
    with pytest.raises(PluginError, match=f"MosaicIt: .*{match}"):
        MosaicIt(**options, **idle)
    whole = MosaicItConfig(**options).model_dump()  # as a bundle gives them back: all, as they are by default
    assert MosaicIt(**whole).config.model_dump() == whole
