"""Rows as people have them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from peftx import Plugin, Stack
from peftx.engines.data import class_index, encode_pair, opening_of, pair_of, read_dataset, tokenize_dataset
from peftx.engines.data.collate import IGNORE
from peftx.engines.data.formats import checked_dataset, dataset_of, detect_format
from peftx.engines.training.run import as_training_data
from peftx.errors import DataError, UnsupportedError
from peftx.pages.samples import prompt_of
from peftx.testing.models import tiny_tokenizer
from peftx.toolkits.evaluation import perplexity
from peftx_aligndistil import AlignDistil
from peftx_cli.peek import MOST, Unfit, labels, look
from peftx_d2o import D2o
from peftx_dpo_prefix_sharing import DpoPrefixSharing
from peftx_lora import Lora

PAIR = {"prompt": "2 + 2", "completion": "4"}
ALPACA = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
TALK = [
    {"from": "system", "value": "Be short."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Hell no"}
NO = {"role": "assistant", "content": "No."}
TOLD = {"chosen": MESSAGES[1:], "rejected": [MESSAGES[1], NO]}
COMPARED = {"prompt": [MESSAGES[1]], "chosen": [MESSAGES[2]], "rejected": [NO]}
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"prompt": "2 + 2", "response": "4"}, "prompt-completion", PAIR),
    ({"question": "2 + 2", "answer": "4"}, "prompt-completion", PAIR),
    ({"input": "2 + 2", "output": "4"}, "prompt-completion", PAIR),
    (ALPACA, "prompt-completion", {"prompt": "Add.\n\n2 + 2", "completion": "4"}),
    ({**ALPACA, "input": ""}, "prompt-completion", {"prompt": "Add.", "completion": "4"}),
    ({"conversations": TALK, "id": "7"}, "messages", {"messages": MESSAGES, "id": "7"}),
    ({"conversations": MESSAGES}, "messages", {"messages": MESSAGES}),
    ({"conversations": [{"role": t["from"], "value": t["value"]} for t in TALK]}, "messages", {"messages": MESSAGES}),
    ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, "messages", {"messages": MESSAGES, "prompt_turns": 2}),
    (HH, "preference", {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Hell no"}),
    (TOLD, "preference", COMPARED),
    ({"prompt": "Hi", "score": 0.5, **TOLD}, "preference", {"score": 0.5, **COMPARED}),
    ({**COMPARED}, "preference", COMPARED),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": [NO]}, "preference", COMPARED),
    ({"chosen": MESSAGES, "rejected": [*MESSAGES[:2], NO]}, "preference", {**COMPARED, "prompt": MESSAGES[:2]}),
    (
        {"conversations": TALK[:2], "chosen": TALK[2], "rejected": {"from": "gpt", "value": "No."}},
        "preference",
        {**COMPARED, "prompt": MESSAGES[:2]},
    ),
]  # fmt: skip


def written(folder: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    file = folder / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows), "utf-8")
    else:
        file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return file


@pytest.mark.parametrize(("row", "format", "expected"), CASES)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_recognised_from_a_file(
    tmp_path: Path, row: dict[str, Any], format: str, expected: dict[str, Any], suffix: str
) -> None:
    file = written(tmp_path, [row, row], suffix)
    assert look(str(file)) == detect_format(file) == format
    found = read_dataset(file)
    assert len(found) == 2
    assert expected.items() <= found[1].items()


@pytest.mark.parametrize(("row", "format", "expected"), CASES)
def test_recognised_from_python(row: dict[str, Any], format: str, expected: dict[str, Any]) -> None:
    for rows, kind in (dataset_of([row, row]), checked_dataset(Dataset.from_list([row, row]))):
        assert kind == format
        assert expected.items() <= rows[1].items()


def test_a_formats_own_columns_are_never_read_in_another_way(tmp_path: Path) -> None:
    row = {
        "prompt": "a",
        "completion": "b",
        "question": "c",
        "answer": "d",
        "instruction": "e",
        "output": "f",
    }
    found = read_dataset(written(tmp_path, [row]))
    assert found[0] == row
    file = written(tmp_path, [{"text": "x", "question": "a", "answer": "b"}])
    assert detect_format(file) == look(str(file)) == "text"
    assert read_dataset(file, format="prompt-completion")[0]["prompt"] == "a", "unless it is asked for"
    assert look(str(file), format="prompt-completion") == "prompt-completion"
    mapped = read_dataset(
        written(tmp_path, [ALPACA]), columns={"prompt": "instruction", "completion": "output"}
    )
    assert mapped[0] == {"prompt": "Add.", "completion": "4", "input": "2 + 2"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^", ":", "~", "#", "\x01", "¦"])
def test_tables_with_any_delimiter(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / "rows.csv"
    lines = [("question", "answer"), ('"a; b, c: d^"', "d")]
    file.write_text("\n".join(delimiter.join(cells) for cells in lines), "utf-8")
    assert look(str(file)) == "prompt-completion"
    assert read_dataset(file)[0] == {"prompt": "a; b, c: d^", "completion": "d"}


@pytest.mark.parametrize("name", ["text", "a: text", "text (of all)", "text #1"])
def test_a_table_of_one_column_has_no_delimiter(tmp_path: Path, name: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"{name}\nIt is (so) said; then: that # and so on: yes\n", "utf-8")
    (row,) = read_dataset(file, format="text", columns={"text": name})
    assert row == {"text": "It is (so) said; then: that # and so on: yes"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_whole_numbers_as_labels_are_their_digits(tmp_path: Path, suffix: str) -> None:
    """As in a table of text."""
    rows: list[dict[str, Any]] = [{"text": "a", "label": 0}, {"text": "b", "label": 11}]
    file = written(tmp_path, rows, suffix)
    assert look(str(file)) == "classification"
    assert labels(str(file), columns={}) == {"0": 0, "11": 1}
    assert read_dataset(file)["label"][:] == ["0", "11"]
    assert dataset_of(rows)[0]["label"][:] == ["0", "11"]
    assert checked_dataset(Dataset.from_list(rows))[0]["label"][:] == ["0", "11"]


def test_numbers_of_classes_become_their_names(tmp_path: Path) -> None:
    """Of `ClassLabel`, which Parquet keeps beside the numbers."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    rows.to_parquet(file := tmp_path / "rows.parquet")
    assert checked_dataset(rows)[0]["label"][:] == read_dataset(file)["label"][:] == ["good", "bad"]
    assert labels(str(file), columns={}) == {"good": 0, "bad": 1}
    rows.rename_column("label", "mood").to_parquet(file)
    assert read_dataset(file, format="text")["mood"][:] == [1, 0], "which are another column's values"
    assert read_dataset(file, columns={"label": "mood"})["label"][:] == ["good", "bad"]
    assert labels(str(file), columns={"label": "mood"}) == {"good": 0, "bad": 1}
    none = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features)
    none.to_parquet(file)
    for read in (lambda: read_dataset(file), lambda: checked_dataset(none), lambda: look(str(file))):
        with pytest.raises((DataError, Unfit), match=r"'label' must be a string, got (a number|null)"):
            read()
    assert read_dataset(file, format="text")["text"][:] == ["a", "b"], "unless labels are not asked for"


def test_a_model_without_names_of_its_own_is_trained_on_numbers() -> None:
    names = ["LABEL_0", "LABEL_1"]
    assert [class_index(label, names, "here") for label in ("1", "LABEL_0")] == [1, 0]
    with pytest.raises(DataError, match="label '2' is not among"):
        class_index("2", names, "here")
    with pytest.raises(DataError, match="label '1' is not among"):
        class_index("1", ["bad", "good"], "here")


@pytest.mark.parametrize("before", ["", '"version": 2, "of": {"rows": [1]}, '])
def test_an_array_in_an_object_is_read(tmp_path: Path, before: str) -> None:
    file, rows = tmp_path / "rows.json", [{"question": str(n), "answer": "b"} for n in range(3)]
    file.write_text(f'\n {{{before}"data": {json.dumps(rows)}, "end": []}}')
    assert look(str(file)) == detect_format(file) == "prompt-completion"
    assert read_dataset(file)["prompt"][:] == ["0", "1", "2"]
    rows[1]["answer"] = None
    file.write_text(f'{{{before}"data": {json.dumps(rows)}}}')
    for read in (read_dataset, look):
        with pytest.raises(
            (DataError, Unfit), match=r"rows.json: data, row 1 \(counting from 0\): 'completion' must"
        ):
            read(str(file))
    rows[1]["answer"] = "x" * MOST
    file.write_text(f'{{{before}"data": {json.dumps(rows)}}}')
    assert look(str(file)) == "prompt-completion", "of a file that is read in part"
    for text in (
        '{"a": [{"text": "x"}], "b": [{"text": "y"}]}',
        '{"messages": [{"role": "user", "content": "x"}]}',
    ):
        file.write_text(text)
        assert look(str(file)) is None, "the run says it"
        with pytest.raises(DataError, match="or an object that holds one, got an object"):
            read_dataset(file)


def test_what_is_not_laid_out_so_after_all_is_named(tmp_path: Path) -> None:
    for rows, message in [
        ([{"conversations": [{"speaker": "x"}]}], r"rows.jsonl:1: conversations\[0\] must have the keys 'from'"),
        ([{"question": "a", "answer": "b"}, {"question": "a"}], "rows.jsonl:2: no key 'answer', which the rows"),
        ([{"chosen": "abc", "rejected": "xyz"}], "begin with nothing in common"),
        ([{"chosen": MESSAGES, "rejected": TOLD["rejected"]}], "must answer the same turns"),
        ([{"chosen": MESSAGES[:2], "rejected": MESSAGES[:2]}], "with one of the assistant each"),
        ([{"chosen": MESSAGES[2:], "rejected": [NO]}], "must answer the same turns"),
        ([{"prompt": "Ho", **TOLD}], "'chosen' has turns of its own before the answer, and 'prompt' says others"),
        ([{"tools": [{"type": "function"}], **TOLD}], "'tools' are for conversations"),
        ([TOLD, HH], "rows.jsonl:2: 'chosen' and 'rejected' must be arrays"),
        ([{**COMPARED, "chosen": [{"role": "assistant", "content": 1}]}], r"chosen\[0\]: 'content' must be a string"),
        ([{"messages": MESSAGES, **TOLD, "prompt": "Hi"}], "fit messages and preference"),
        ([{"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, PAIR], "rows.jsonl:2: 'prompt' and 'completion' must"),
        ([PAIR, {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}], "rows.jsonl:2: 'prompt' must be a string"),
        ([{"question": "a", "answer": None}], "'completion' must be a string, got null"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            read_dataset(written(tmp_path, rows))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1xxxx")
    with pytest.raises(DataError, match="not Parquet that can be read"):
        read_dataset(tmp_path / "broken.parquet")
    with pytest.raises(Unfit, match="not Parquet that can be read"):
        look(str(tmp_path / "broken.parquet"))


TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{{ m.content or '' }}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def learned(row: dict[str, Any], template: str | None) -> tuple[str, str]:
    """The text of a conversation, and of the tokens with a label."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    rows, format = dataset_of([row])
    found = tokenize_dataset(rows, tokenizer, format=format, max_length=4096)
    ids, labels = found[0]["input_ids"], found[0]["labels"]
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != IGNORE])


def test_calls_of_tools_reach_the_template_as_they_are() -> None:
    def call(**arguments: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}  # fmt: skip

    tools = [{"type": "function", "function": {"name": "f"}}]
    ask = {"role": "user", "content": "Hi"}
    rows = [
        {"messages": [ask, call(city="Rome"), {"role": "tool", "content": "sunny", "name": "f"},
                      {"role": "assistant", "content": "Sunny."}], "tools": tools},
        {"messages": [ask, call(number=3)], "tools": tools},
    ]  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found, format = dataset_of(rows)
    tokenized = tokenize_dataset(found, tokenizer, format=format, max_length=4096)
    texts = [tokenizer.decode(tokenized[i]["input_ids"], skip_special_tokens=True) for i in range(2)]
    assert '<tools>[{"type": "function", "function": {"name": "f"}}]<user>Hi</s>' in texts[0]
    assert '{"city": "Rome"}</s><tool>sunny</s><assistant>Sunny.</s>' in texts[0]
    assert texts[1].endswith('<assistant>{"number": 3}</s>')
    rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"number": 3}'  # as OpenAI has it
    assert learned(rows[1], TEMPLATE)[1].startswith('{"number": 3}</s>')
    rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] = "3,"
    with pytest.raises(DataError, match=r"row 0.*the arguments are no JSON"):
        learned(rows[1], TEMPLATE)


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}


@pytest.mark.parametrize(
    "template", [TEMPLATE, MARKED + "{{ messages[1].tool_calls[0].function.arguments | tojson }}"]
)
def test_a_template_that_wants_more_of_a_call_refuses_it(template: str) -> None:
    call = CALL | {"tool_calls": [{"type": "function", "function": {"name": "f"}}], "content": "Wait."}
    with pytest.raises(DataError, match=r"row 0.*refuses the conversation: Object of type Undefined"):
        learned({"messages": [MESSAGES[1], call]}, template)


def test_without_a_template_there_are_no_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for row in (
        {"messages": [MESSAGES[1], CALL]},
        {"messages": [MESSAGES[1], CALL | {"content": "Wait."}]},
        {"messages": MESSAGES, "tools": tools},
    ):
        with pytest.raises(UnsupportedError, match=r"row 0.*tools go through the tokenizer's chat template"):
            learned(row, None)
    assert learned({"messages": MESSAGES, "tools": []}, None)[1] == " Hello<|eos|>"


def test_a_turn_that_only_calls_a_tool_is_measured() -> None:
    """Its bytes are those of the call as JSON."""
    stack = Stack("peftx:tiny", [])
    stack.tokenizer.chat_template = TEMPLATE
    rows, _ = dataset_of([{"messages": [MESSAGES[1], CALL]}])
    found = perplexity(stack.model, stack.tokenizer, rows)
    size = len(json.dumps(CALL["tool_calls"]).encode())
    nats = found["nll"].value * found["nll"].count
    assert found["bits_per_byte"].value == pytest.approx(nats / (math.log(2) * size))


def test_a_page_shows_what_a_turn_says() -> None:
    assert prompt_of({"messages": [MESSAGES[1], CALL]}) == ("Hi", json.dumps(CALL["tool_calls"]))


def test_a_templates_own_marks_say_what_is_learned() -> None:
    row = {"messages": [*MESSAGES, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long"},
                        {"role": "user", "content": "?"}]}  # fmt: skip
    text, own = learned(row, MARKED)
    assert own == "Hello</s>So long</s>"
    assert text.endswith("So long</s>"), "what follows the last answer is nobody's"
    with pytest.raises(DataError, match="no turn of the assistant"):
        learned({"messages": MESSAGES[:2]}, MARKED)


@pytest.mark.parametrize("template", [None, TEMPLATE, MARKED])
def test_of_a_prompt_of_turns_the_completion_alone_is_learned(template: str | None) -> None:
    more = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long"}]
    text, own = learned({"messages": [*MESSAGES, *more]}, template)
    assert "Hello" in own
    told, last = learned({"prompt": [*MESSAGES, more[0]], "completion": more[1:]}, template)
    assert told == text
    assert "So long" in last
    assert own.endswith(last)
    assert "Hello" not in last
    with pytest.raises(DataError, match="no turn of the assistant"):
        learned({"prompt": MESSAGES, "completion": more[:1]}, template)


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ bos_token }}" + TEMPLATE, MARKED])
def test_an_answer_of_turns_is_read_as_in_a_conversation(template: str | None) -> None:
    """By what reads rows of preferences: the ids, and what is learned, are those of the same turns as `messages`."""
    tokenizer = Stack("peftx:tiny", []).tokenizer  # which puts BOS before texts
    tokenizer.chat_template = template
    talk = [*MESSAGES, {"role": "user", "content": "Bye"}]
    rows, format = dataset_of([{"prompt": talk, "chosen": "So long", "rejected": [NO]}])
    for name in ("chosen", "rejected"):
        row, turns = rows[0], {"prompt": talk, "completion": rows[0][name]}
        found = encode_pair(tokenizer, row["prompt"], row[name], max_length=4096)
        (same,) = tokenize_dataset(dataset_of([turns])[0], tokenizer, format="messages", max_length=4096)
        end = [] if template is not MARKED else [tokenizer.eos_token_id]  # whose marks end without it
        assert found._asdict() == {key: [*ids, *end] for key, ids in same.items()}
        frame, prompt = opening_of(tokenizer, row["prompt"])
        assert len(frame) == (template not in (TEMPLATE, MARKED)), "a template that writes no BOS wants none"
        assert [*frame, *prompt] == [i for i, of in zip(*found, strict=True) if of == IGNORE]
        cut = encode_pair(tokenizer, row["prompt"], row[name], max_length=len(found.input_ids) - 3)
        assert cut.input_ids == [*frame, *found.input_ids[len(frame) + 3 :]]
    assert format == "preference"
    with pytest.raises(DataError, match=r"here: the completion has .* does not fit in max_length 3"):
        encode_pair(tokenizer, talk, [NO], max_length=3, where="here")
    with pytest.raises(DataError, match="must both be texts, or both arrays"):
        encode_pair(tokenizer, talk, "No.", max_length=64)
    with pytest.raises(DataError, match="one turn of the assistant"):
        encode_pair(tokenizer, talk, talk, max_length=64)


@pytest.mark.parametrize("plugin", [DpoPrefixSharing, AlignDistil, partial(D2o, samples=1, max_new_tokens=2)])
def test_preferences_of_turns_train_as_what_they_say(plugin: Callable[[], Plugin]) -> None:
    """Without a chat template a prompt is the text that its turns are written as."""
    words = ("tea", "cake", "milk")
    texts = [
        {"prompt": f"User: {word}?\nAssistant:", "chosen": "yes", "rejected": f"no {word}"} for word in words
    ]
    asked = [[{"role": "user", "content": f"{word}?"}] for word in words]
    turns = [{**row, "prompt": prompt} for row, prompt in zip(texts, asked, strict=True)]
    found = []
    for rows in (texts, turns):
        stack = Stack("peftx:tiny", [Lora(rank=2), plugin()])
        data = stack.prepare(as_training_data(stack, rows, seed=0, max_length=64))
        found.append(tokenize_dataset(data.train, stack.tokenizer, format=data.format, max_length=64)[:])
    assert found[0] == found[1]
    assert stack.train(turns, steps=3, batch_size=2, max_length=64).losses


def test_a_format_that_is_asked_for_decides_between_two(tmp_path: Path) -> None:
    """UltraFeedback has the conversation of the better answer a second time."""
    row = {"prompt": "Hi", "messages": TOLD["chosen"], **TOLD}
    file = written(tmp_path, [row])
    assert COMPARED.items() <= read_dataset(file, format="preference")[0].items()
    assert read_dataset(file, format="messages")[0]["messages"] == TOLD["chosen"]
    assert look(str(file), format="preference") == "preference"


def test_rows_that_differ_in_their_tools_are_tokenized_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        "peftx.engines.data.tokenize.kept", lambda rows, about, make: seen.append(rows.column_names) or make()
    )
    learned({"messages": MESSAGES, "tools": [{"type": "function"}], "other": 1}, TEMPLATE)
    learned({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, None)
    assert [set(names) for names in seen] == [{"messages", "tools"}, {"messages", "prompt_turns"}]


def test_what_a_row_asks_and_answers() -> None:
    more = [("user", "Bye"), ("assistant", None), ("user", "?")]
    turns = [*MESSAGES, *({"role": role, "content": content} for role, content in more)]
    assert pair_of({"messages": turns[:3]}) == ("Be short.\nHi", "Hello")
    assert pair_of({"messages": turns}) == ("Be short.\nHi\nHello\nBye", "")
    assert pair_of({"messages": turns[:2]}) == ("Be short.\nHi", "")
    assert pair_of(PAIR) == ("2 + 2", "4")
    assert pair_of({"prompt": "a", "chosen": "b", "rejected": "c"}) == ("a", "b")
    assert pair_of({**COMPARED, "prompt": MESSAGES[:2]}) == ("Be short.\nHi", "Hello")
    assert pair_of({"text": "a", "label": "b"}) == ("a", "")
