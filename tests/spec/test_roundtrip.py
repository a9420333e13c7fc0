"""A pipeline that is dumped reads back as the same pipeline, whatever stands in it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftx_spec import Catalogue, Pipeline, dump, load_pipeline, parse
from peftx_spec.dumper import dump_plain

TRICKY = [
    "yes",
    "null",
    "~",
    "1e4",
    "0x1F",
    "true",
    "a: b",
    "- x",
    "# c",
    "${env:X}",
    "$${env:X",
    " ",
    "'",
    '"',
    "\\",
]
TEXT = st.text(min_size=1, max_size=12) | st.sampled_from(
    [*TRICKY, "\n", "\t x", "\u2028", "\x85", "\ufeff", "é😀"]
)
SLUG = st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True)
COUNT = st.integers(1, 10**6)
FLOAT = st.floats(0, allow_nan=False, allow_infinity=False, exclude_min=True)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.just("")
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("") | TEXT, inner, max_size=3),
    max_leaves=8,
)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping with any part of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


FORMAT = st.sampled_from(["auto", "text", "messages"])
SOURCE = st.tuples(
    st.fixed_dictionaries({"path": TEXT}),
    some(format=FORMAT, limit=COUNT, max_length=COUNT, columns=st.dictionaries(TEXT, TEXT, max_size=2)),
).map(lambda parts: parts[0] | parts[1])
SHARE = st.floats(0, 1, exclude_min=True, exclude_max=True)
HOLDOUT = SHARE | some(share=SHARE, most=COUNT, seed=st.integers(0, 2**32 - 1))
TRAIN: dict[str, st.SearchStrategy[Any]] = {
    "steps": COUNT,
    "learning_rate": FLOAT,
    "warmup_steps": st.integers(0, 9),
    "schedule": st.sampled_from(["linear", "cosine", "constant"]),
    "max_grad_norm": st.just(0.0) | FLOAT,
    "seed": st.integers(0, 2**32 - 1),
    "checkpoint_every": COUNT,
    "gradient_checkpointing": st.booleans(),
}
IDS = st.just("all") | st.lists(SLUG, min_size=1, max_size=3)
STAGE = st.one_of(
    *(
        st.fixed_dictionaries({name: IDS})
        for name in ("prepare", "inject", "freeze", "merge", "drop", "compress")
    ),
    st.fixed_dictionaries({"train": some(plugins=IDS, **TRAIN)}),
    st.fixed_dictionaries({"evaluate": some(name=SLUG)}),
    st.fixed_dictionaries({"save": st.none() | TEXT}),
)
ENTRY = st.tuples(
    st.fixed_dictionaries({"use": SLUG}),
    some(id=SLUG, **{"with": st.dictionaries(TEXT, JSON, max_size=3)}, phase=st.just("before-training")),
).map(lambda parts: parts[0] | parts[1])
METRIC = st.dictionaries(TEXT, some(path=TEXT, format=FORMAT, limit=COUNT), min_size=1, max_size=1)
PIPELINE = st.tuples(
    st.fixed_dictionaries({"peftx": st.just(1), "model": TEXT | st.fixed_dictionaries({"id": TEXT})}),
    some(
        data=some(train=SOURCE, eval=SOURCE, calibration=SOURCE, holdout=HOLDOUT),
        stack=st.lists(ENTRY, max_size=3),
        train=some(**TRAIN),
        evaluate=st.lists(METRIC, max_size=2),
        run=st.lists(STAGE, min_size=1, max_size=4),
        output=TEXT,
    ),
).map(lambda parts: Pipeline.model_validate(parts[0] | parts[1]))


@settings(deadline=None, max_examples=60)
@given(PIPELINE)
def test_any_pipeline(pipeline: Pipeline) -> None:
    data = parse(dump(pipeline), environment={}).data
    again = Pipeline.model_validate(data, by_alias=True, by_name=False)
    assert again == pipeline
    assert dump(again) == dump(pipeline)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(TEXT, JSON))
def test_any_plain_data(data: dict[str, Any]) -> None:
    def typed(value: object) -> object:  # 1 == 1.0 == True, but not here
        if isinstance(value, dict):
            return {key: typed(item) for key, item in value.items()}
        return [typed(item) for item in value] if isinstance(value, list) else (type(value), repr(value))

    assert typed(parse(dump_plain(data), environment={}).data) == typed(data)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.sampled_from(
            [{"use": "lora", "with": {"rank": 4}}, {"use": "prefixquant"}, {"use": "language-ranker"}]
        ),
        max_size=4,
    ),
    some(train=some(**TRAIN), output=TEXT.filter(lambda text: "\0" not in text)),
    st.booleans(),
)
def test_valid_pipelines_through_the_whole_loader(
    catalogue: Catalogue, stack: list[dict[str, Any]], rest: dict[str, Any], held_out: bool
) -> None:
    entries = [{"use": "lora"}, *({**entry, "id": f"p{index}"} for index, entry in enumerate(stack))]
    sources = {"train": "t.jsonl"} if "train" in rest else {}  # data that nothing reads is a mistake
    sources |= {"holdout": 0.5} if sources and held_out else {"eval": "e.jsonl"}
    data = {"peftx": 1, "model": "peftx:tiny", "data": sources, "stack": entries}
    pipeline = Pipeline.model_validate({**data, "evaluate": ["accuracy"], **rest})
    assert load_pipeline(dump(pipeline), catalogue=catalogue) == pipeline


def test_defaults_are_written_out() -> None:
    text = dump(Pipeline.model_validate({"peftx": 1, "model": "m", "train": {}, "stack": ["lora"]}))
    assert "learning_rate: 0.001\n" in text
    assert "dtype: auto\n" in text
    assert "null" not in text


def test_passes_in_place_of_steps(catalogue: Catalogue) -> None:
    """Both were written, and a spec that has both is refused."""
    data = {"peftx": 1, "model": "m", "stack": ["lora"], "data": {"train": "t.jsonl"}}
    pipeline = Pipeline.model_validate({**data, "train": {"num_train_epochs": 2.0}})
    assert load_pipeline(dump(pipeline), catalogue=catalogue) == pipeline


def test_reads_well() -> None:
    stack = [{"use": "lora", "with": {"layers": [0, 1], "deep": {"a": [{"b": None}]}}}]
    text = dump(Pipeline.model_validate({"peftx": 1, "model": "m", "stack": stack}))
    assert "stack:\n  - use: lora\n    id: lora\n    with:\n      layers: [0, 1]\n" in text
    assert "      deep:\n        a:\n          - b: null\n" in text


def test_what_no_spec_can_hold_is_an_error() -> None:
    with pytest.raises(TypeError, match="object cannot stand in a spec"):
        dump_plain({"a": object()})


def test_not_a_number_stays_none() -> None:
    assert dump_plain({"a": [float("nan")]}) == "a: [.nan]\n"
