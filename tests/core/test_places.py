"""An error about a row says where the row stands, in the words of whoever wrote it: its file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from peftx import Plugin, Stack, TrainingData, hookimpl
from peftx.engines.data import Place, inside, orders, read_dataset
from peftx.engines.data.places import row_for_row, select
from peftx.engines.data.sources import training_rows
from peftx.engines.training.run import as_training_data
from peftx.errors import DataError
from peftx.pipeline import Run
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_spec import DataSpec, Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.* blank lines between the rows:UserWarning")
LONG = {"prompt": "Tell a long story.", "completion": "and then " * 200}


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"Say {number}.", "completion": f"It is {number}."}


def written(file: Path, rows: list[dict[str, Any]], blanks: list[int] | None = None) -> tuple[str, list[int]]:
    """The file, with so many blank lines before each row, and the line of each row."""
    text, lines = "", []
    for row, blank in zip(rows, blanks or [0] * len(rows), strict=True):
        text += "\n" * blank + json.dumps(row) + "\n"
        lines.append(text.count("\n"))
    file.write_text(text, "utf-8")
    return str(file), lines


# -------------------------------------------------------------------------------------------------------- where it is
@settings(max_examples=30, deadline=None)
@given(blanks=st.lists(st.integers(0, 3), min_size=2, max_size=12), draw=st.data())
def test_a_row_is_found_on_its_line_whatever_was_chosen(
    tmp_path_factory: pytest.TempPathFactory, blanks: list[int], draw: st.DataObject
) -> None:
    content = [pair(number) for number in range(len(blanks))]
    file, lines = written(tmp_path_factory.mktemp("rows") / "a.jsonl", content, blanks)
    rows, numbers = read_dataset(file), list(range(len(content)))
    for _ in range(3):
        chosen = draw.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=12))
        rows, numbers = select(rows, chosen), [numbers[index] for index in chosen]
    rows = row_for_row(rows.add_column("more", [0] * len(rows)), rows)
    for index, number in enumerate(numbers):
        assert rows[index]["prompt"] == content[number]["prompt"]
        assert str(Place(rows, index)) == f"{file}:{lines[number]}"


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.csv", 'prompt,completion\n"a\nb",c\n\nd,e\n', [":2", ":5"]),
        ("a.tsv", "prompt\tcompletion\na\tb\n", [":2"]),
        ("a.json", json.dumps([pair(0), pair(1)]), [f": row {i} (counting from 0)" for i in (0, 1)]),
        ("a.txt", "one document", [": row 0 (counting from 0)"]),
    ],
)
def test_rows_of_each_kind_of_file(tmp_path: Path, name: str, data: str, expected: list[str]) -> None:
    file = tmp_path / name
    file.write_text(data, "utf-8")
    rows = read_dataset(file)
    assert [str(Place(rows, index)) for index in range(len(rows))] == [f"{file}{end}" for end in expected]


def test_rows_of_a_program_have_a_number_and_parts_a_name() -> None:
    rows = Dataset.from_list([pair(0), pair(1)])
    assert str(Place(rows, 1)) == "row 1 (counting from 0)"
    assert str(inside(Place(rows, 1), "chosen")) == "row 1 (counting from 0), chosen"
    assert inside("the row", "chosen") == "the row, chosen"


# ------------------------------------------------------------------------------------------------------- through a run
def stack_of(*plugins: Plugin) -> Stack:
    return Stack(tiny("llama"), [Lora(rank=2), *plugins], tokenizer=tiny_tokenizer())


def refused(stack: Stack, data: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        stack.train(data, steps=200, batch_size=2, **{"max_length": 64} | options)
    return caught.value.message


@pytest.mark.parametrize("bad", [3, 30, 59])
def test_what_is_left_of_held_out_rows_keeps_its_lines(tmp_path: Path, bad: int) -> None:
    content = [LONG if number == bad else pair(number) for number in range(60)]
    file, lines = written(tmp_path / "a.jsonl", content, [number % 3 for number in range(60)])
    train, held = training_rows(DataSpec.model_validate({"train": file, "holdout": {}}))
    assert train is not None
    assert held is not None
    rows = train if LONG in train.to_list() else held.rows
    assert refused(stack_of(), rows).startswith(f"{file}:{lines[bad]}: the completion has")


def test_a_row_that_is_measured_is_named_by_its_line(tmp_path: Path) -> None:
    content = [{"text": f"number {n}" * (n != 7)} for n in range(40)]
    file, lines = written(tmp_path / "a.jsonl", content, [1] * 40)
    with pytest.raises(DataError, match=rf"^{file}:{lines[7]}"):
        stack_of().evaluate(select(read_dataset(file), [5, 7]), metrics=["perplexity"])


def test_ids_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    stack = stack_of()
    beyond = stack.model.get_input_embeddings().num_embeddings - len(stack.tokenizer)
    stack.tokenizer.add_tokens([f"<filler-{number}>" for number in range(beyond)] + ["<new>"])
    texts = [{"text": f"number {number}" + " <new>" * (number == 5)} for number in range(8)]
    for content in ([pair(0), pair(1), {"prompt": "<new>", "completion": "x"}], texts):
        file, lines = written(tmp_path / "a.jsonl", content, [2] * len(content))
        bad = next(index for index, row in enumerate(content) if "<new>" in str(row))
        assert refused(stack, file).startswith(f"{file}:{lines[bad]}: '<new>' has id")


# --------------------------------------------------------------------------------------------------- what plugins leave
class Changes(Plugin):
    """Does to the rows what a test says."""

    def __init__(self, change: Callable[[TrainingData], None]) -> None:
        super().__init__()
        self.change = change

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        self.change(data)


def drops(data: TrainingData) -> None:
    data.keep(["short" if index < 4 else None for index in range(len(data.train))], by="changes")


def filters(data: TrainingData) -> None:
    data.train = data.train.filter(lambda row: row["prompt"] not in ("Say 0.", "Say 2."))


def turns_round(data: TrainingData) -> None:
    data.train = data.train.select(range(len(data.train))[::-1])


def marks(data: TrainingData) -> None:
    drops(data)
    data.train = data.train.add_column("weight", [1.0] * len(data.train))


def rewrites(data: TrainingData) -> None:
    data.train = data.train.map(
        lambda row: {"prompt": row["prompt"].upper(), "completion": row["completion"]}
    )


@pytest.mark.parametrize("change", [drops, filters, turns_round, marks])
def test_a_row_that_a_plugin_left_as_it_was_keeps_its_line(
    tmp_path: Path, change: Callable[[TrainingData], None]
) -> None:
    content = [LONG if number == 9 else pair(number) for number in range(12)]
    file, lines = written(tmp_path / "a.jsonl", content, [2] * 12)
    assert refused(stack_of(Changes(change)), file).startswith(f"{file}:{lines[9]}: the completion has")


def test_a_row_that_a_plugin_made_is_its_own(tmp_path: Path) -> None:
    file, _ = written(tmp_path / "a.jsonl", [*map(pair, range(5)), LONG])
    said = refused(stack_of(Changes(rewrites)), file)
    assert said.startswith("row 5 (counting from 0) of what 'changes' left: the completion has")


def test_rows_know_nothing_of_it(tmp_path: Path) -> None:
    file, _ = written(tmp_path / "a.jsonl", [pair(0), pair(1)], [1, 1])
    data = as_training_data(stack_of(), file, seed=0, max_length=64)
    assert data.train is not None
    assert data.train.to_list() == [pair(0), pair(1)]


# ------------------------------------------------------------------------------------------- what there is nothing in
@pytest.mark.parametrize(
    ("key", "row"),
    [("completion", pair(0)), ("text", {"text": "a"}), ("label", {"text": "a", "label": "b"})],
)
def test_rows_that_a_short_run_does_not_come_to_have_something_to_learn(
    key: str, row: dict[str, str]
) -> None:
    rows = [dict(row) for _ in range(60)]
    rows[39][key] = ""
    assert refused(stack_of(), rows).startswith(f"row 39 (counting from 0): the {key} '' has no tokens")
    with pytest.raises(DataError, match=rf"^row 39 \(counting from 0\): the {key} '' has no tokens"):
        stack_of().train(rows, steps=1, batch_size=1)


def test_a_plugin_may_mend_rows_that_have_nothing_in_them(tmp_path: Path) -> None:
    file, _ = written(tmp_path / "a.jsonl", [*map(pair, range(5)), {"prompt": "Say 5.", "completion": ""}])

    def mends(data: TrainingData) -> None:
        data.keep([None if row["completion"] else "empty" for row in data.train], by="changes")

    report = stack_of(Changes(mends)).train(file, steps=1)
    assert [one.reason for one in report.dropped] == ["empty"]


def test_a_run_of_a_spec_says_so_before_it_loads_anything(tmp_path: Path) -> None:
    content = [pair(number) for number in range(40)]
    content[30]["completion"] = ""
    file, lines = written(tmp_path / "a.jsonl", content, [1] * 40)
    spec = {
        "peftx": 1,
        "model": "peftx:tiny",
        "data": {"train": file},
        "stack": [{"use": "lora"}],
        "train": {"steps": 1},
    }
    with pytest.raises(DataError, match=rf"^{file}:{lines[30]}: the completion '' has no tokens"):
        Run(Pipeline.model_validate(spec))


# ------------------------------------------------------------------------- conversations that a run does not come to
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' or m.tool_calls %}{{ raise_exception('no ' ~ m.role) }}{% endif %}"
    "<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def said_by(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


CALLS = said_by("user", "assistant", "assistant")
CALLS["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("bad", "template", "said"),
    [
        (
            said_by("system", "user", "assistant"),
            NO_SYSTEM,
            "the chat template refuses the conversation: no system",
        ),
        (CALLS, NO_SYSTEM, "the chat template refuses the conversation: no assistant"),
        (said_by("user", "user"), NO_SYSTEM, "the conversation has no turn of the assistant"),
        (said_by("user", "user"), None, "the conversation has no turn of the assistant"),
    ],
)
@pytest.mark.parametrize("place", [1, 40, 59])
def test_an_order_of_speakers_that_is_refused_is_found_before_the_first_step(
    bad: dict[str, Any], template: str | None, said: str, place: int
) -> None:
    rows = [said_by(*("user", "assistant") * (1 + number % 3)) for number in range(60)]
    rows[place] = bad
    stack = stack_of()
    stack.tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"^row {place} \(counting from 0\): {said}"):
        stack.train(rows, steps=1, batch_size=1)
    assert stack.trained_steps == 0


def test_one_conversation_of_each_order_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([said_by(*("user", "assistant") * (1 + n % 3), "user") for n in range(500)])
    tried: list[int] = []
    monkeypatch.setattr(orders, "check_rendered", lambda _, row, where: tried.append(where.index))
    orders.check_orders(rows, tiny_tokenizer())
    assert tried == [0, 1, 2]
    orders.check_orders(select(rows, [7, 4, 1, 0, 3]), tiny_tokenizer())
    assert tried[3:] == [0, 3]
