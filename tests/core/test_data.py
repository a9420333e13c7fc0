"""Files become rows, rows become token ids, token ids become batches; and every fault says where it is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftx.engines.data import (
    IGNORE,
    Collator,
    TrainingData,
    continuation,
    detect_format,
    encode_pair,
    formats,
    read_dataset,
    render_messages,
    special_frame,
    text_ids,
    tokenize_dataset,
)
from peftx.engines.data.files import read_records
from peftx.errors import DataError, UnsupportedError
from peftx.toolkits.compression.batches import calibration_texts

PAD, BOS, EOS = 0, 1, 2


def byte_tokenizer(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """One id for each byte: 3 + byte in the alphabet's order; no merges, so nothing crosses a boundary."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def fault(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(path, **options)
    return str(caught.value)


# --- formats ------------------------------------------------------------------------------------------------

ROWS = {
    "text": [{"text": "one"}, {"text": "two\u2028still two"}],
    "prompt-completion": [{"prompt": "2 + 2 =", "completion": "4"}, {"prompt": "", "completion": "ä"}],
    "messages": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}],
    "classification": [{"text": "fine", "label": "good"}, {"text": "awful", "label": "bad"}],
    "preference": [{"prompt": "p", "chosen": "c", "rejected": "r"}],
}


@pytest.mark.parametrize("format", ROWS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_every_format_survives_the_trip_through_every_file_type(
    tmp_path: Path, format: str, suffix: str, packed: bool
) -> None:
    rows = ROWS[format]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    elif suffix == ".json":
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    elif format == "messages":
        path.write_text("messages\nx\n")
        assert "'messages' is nested" in fault(path, format="messages")
        return
    else:
        join = "," if suffix == ".csv" else "\t"
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        text = "".join(join.join(f'"{cell}"' for cell in line) + "\r\n" for line in cells)
    data = text.encode()
    if packed:
        path = path.with_name(path.name + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)
    assert detect_format(path) == format
    assert read_dataset(path).to_list() == rows
    assert read_dataset(path, format=format).to_list() == rows


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "A.TXT"])
def test_a_text_file_is_one_document_exactly_as_it_stands(tmp_path: Path, name: str) -> None:
    text = "\n one\r\n\r\ntwo \u2028 ä\n\n"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_dataset(tmp_path / name).to_list() == [{"text": text}]


def test_gzip_is_seen_by_content_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "x"}\n'))
    assert read_dataset(path).to_list() == [{"text": "x"}]


def test_columns_rename_and_others_stay(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "level": 3}, {"question": "r", "answer": "b"}]
    )
    columns = {"prompt": "question", "completion": "answer"}
    read = read_dataset(path, columns=columns)
    assert detect_format(path, columns=columns) == "prompt-completion"
    assert read.column_names == ["prompt", "completion", "level"]
    assert read.to_list() == [
        {"prompt": "q", "completion": "a", "level": 3},
        {"prompt": "r", "completion": "b", "level": None},
    ]


def test_columns_that_cannot_be_renamed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "prompt": "p", "completion": "c"}])
    assert "did you mean 'question'" in fault(path, columns={"prompt": "questoin"})
    assert "writes over the file's own 'prompt'" in fault(path, columns={"prompt": "question"})
    assert "'question' into two names" in fault(path, columns={"prompt": "question", "text": "question"})
    swapped = read_dataset(path, columns={"prompt": "question", "old_prompt": "prompt"})
    assert swapped[0] == {"prompt": "q", "completion": "c", "old_prompt": "p"}


def test_limit_stops_before_a_later_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1"}\n{"text": "2"}\n{broken\n')
    assert len(read_dataset(path, limit=2)) == 2
    assert f"{path}:3:2: not JSON" in fault(path, limit=3)
    assert "no rows with limit 0" in fault(path, limit=0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["prompt", "completion", "chosen", "rejected"], "fit prompt-completion and preference"),
        (["text", "messages"], "fit text and messages"),
        (["ask", "reply"], "fit no format"),
    ],
)
def test_auto_refuses_what_is_ambiguous(tmp_path: Path, keys: list[str], said: str) -> None:
    path = write(tmp_path / "a.jsonl", [dict.fromkeys(keys, "x")])
    message = fault(path)
    assert said in message
    assert all(repr(key) in message for key in keys)
    assert "classification: text, label" in message


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "x"}])
    assert "did you mean 'train.jsonl'" in fault(tmp_path / "trian.jsonl")
    assert "there is no folder" in fault(tmp_path / "nowhere" / "train.jsonl")
    assert "is a folder" in fault(tmp_path)
    assert "train.jsonl" in fault(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "only white space"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.txt", b"ab\ncd\0ef", "binary: byte 5 (line 2)"),
        ("a.txt", "abc".encode("utf-16"), "is UTF-16"),
        ("a.txt", b"line one\nab\xe4c\n", "byte 11 (line 2): byte 0xe4"),
        ("a.txt", b"\xef\xbb\xbfab\xff", "byte 5 (line 1): byte 0xff"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-9], "broken gzip"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text" "y"}\n',
            "a.jsonl:2:9: not JSON: Expecting ':' delimiter: '{\"text\" \"y\"}'",
        ),
        ("a.json", b'[{"text": "x"},\n {"text": }]', "a.json:2:11: not JSON"),
        (
            "a.json",
            b'{"text": "x"}',
            "expected an array of objects, or an object that holds one, got an object",
        ),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl:2: expected an object, got an array"),
        ("a.jsonl", b'{"text": "x"}\n\n{"txt": "y"}\n', "a.jsonl:3: no key 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "found 'txt'"),
        ("a.jsonl", b'{"text": "x", "text": "y"}\n', "a.jsonl:1: key 'text' stands twice"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 7}\n', "a.jsonl:2: 'text' must be a string, got a number"),
        ("a.jsonl", b'{"text": "x", "label": -1}\n', "labels are texts, or whole numbers from 0 on"),
        ("a.jsonl", b'{"text": "x", "label": true}\n', "'label' must be a string, got a boolean"),
        (
            "a.json",
            b'[{"text": "x"}, {"text": null}]',
            "row 1 (counting from 0): 'text' must be a string, got null",
        ),
        ("a.jsonl", b'{"text": "x", "n": 1}\n{"text": "y", "n": "2"}\n', "a.jsonl:2: column 'n' does not go"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\\ud800"}\n',
            "a.jsonl:2: 'text' holds half a surrogate pair at character 0",
        ),
        ("a.csv", b"text,label\nx,y\nz\n", "a.csv:3: 1 fields, but the header has 2"),
        ("a.csv", b'text,label\n"x\ny",l\nz\n', "a.csv:4: 1 fields"),
        ("a.csv", b'text,label\n"x"y,l\n', "a.csv:2: not CSV"),
        ("a.csv", b"text,text\nx,y\n", "names 'text' twice"),
        ("a.xlsx", b"x", "suffix '.xlsx' does not tell"),
    ],
)
def test_faults_name_their_place(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert said in fault(tmp_path / name)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "an empty array"),
        ("hi", "got a string"),
        (["hi"], "messages[0] must be an object"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1] must have the keys"),
        ([{"role": "user", "content": "x", "tool": 1}], "found 'content', 'role', 'tool'"),
        ([{"role": "asistant", "content": "x"}], "did you mean 'assistant'"),
        ([{"role": "user", "content": None}], "'content' must be a string, got null"),
    ],
)
def test_malformed_messages(tmp_path: Path, messages: object, said: str) -> None:
    assert said in fault(write(tmp_path / "a.jsonl", [{"messages": messages}]))


def test_formats_that_do_not_go_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert "needs rows" in fault(tmp_path / "a.txt", format="classification")
    assert "did you mean 'classification'" in fault(tmp_path / "a.txt", format="clasification")
    assert "columns" in fault(tmp_path / "a.txt", columns={"text": "body"})


def test_a_csv_field_longer_than_the_standard_limit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_dataset(tmp_path / "a.csv")[0]["text"]) == 200_000


# --- training data ------------------------------------------------------------------------------------------


def test_random_streams_are_by_name_and_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    def data(seed: int) -> TrainingData:
        return TrainingData(
            train=None, eval=None, tokenizer=tokenizer, seed=seed, format="text", max_length=8
        )

    def draw(seed: int, name: str) -> float:
        return data(seed).rng(name).random()

    assert draw(0, "a") == draw(0, "a")
    assert len({draw(0, "a"), draw(0, "b"), draw(1, "a")}) == 3
    assert data(0).count_tokens("abc" * 100) == 300
    with pytest.raises(DataError, match="at least 2 tokens"):
        TrainingData(train=None, eval=None, tokenizer=tokenizer, seed=0, format="text", max_length=1)


def test_others_are_of_the_same_kind_and_not_the_row_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    def data(rows: list[dict[str, str]]) -> TrainingData:
        return TrainingData(
            train=Dataset.from_list(rows), eval=None, tokenizer=tokenizer, seed=0, format="text", max_length=8
        )

    rows = [{"text": "a", "kind": kind} for kind in "xyxxyxxzxx"]
    found = data(rows).others(3, name="one", by="kind")
    assert found == data(rows).others(3, name="one", by="kind")
    assert found != data(rows).others(3, name="two", by="kind")
    for place, others in enumerate(found):
        assert place not in others
        assert len(set(others)) == len(others) == {"x": 3, "y": 1, "z": 0}[rows[place]["kind"]]
        assert {rows[other]["kind"] for other in others} <= {rows[place]["kind"]}
    counts = [0] * 10
    for name in map(str, range(200)):
        for other in data(rows).others(3, name=name, by="kind")[0]:
            counts[other] += 1
    assert min(counts[place] for place in (2, 3, 5, 6, 8, 9)) > 70, "each of six as often, about 100 times"
    everyone = data([{"text": "a"}] * 4).others(9, name="one", by="kind")
    assert [sorted(others) for others in everyone] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_a_plugin_rewrites_both_splits_of_a_format_that_it_takes(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list([{"text": "one"}, {"text": "two"}])
    data = TrainingData(train=rows, eval=None, tokenizer=tokenizer, seed=0, format="text", max_length=8)
    data.require(("preference", "text"), by="mine")
    with pytest.raises(
        UnsupportedError, match="mine: the rows are of format 'text', and it trains on pref"
    ) as caught:
        data.require(("preference", "messages", "tokenized"), by="mine")
    assert caught.value.hint == "rows with prompt and chosen and rejected, or messages"
    with pytest.raises(UnsupportedError) as caught:
        data.require(("preference",), by="mine", hint="a good one and a bad one")
    assert caught.value.hint == "a good one and a bad one"
    data.rewrite(lambda rows: rows.map(lambda row: {"seen": f"{data.format} {row['text']}"}))
    assert data.train is not None
    assert data.train["seen"][:] == ["text one", "text two"]
    assert data.eval is None
    assert data.format == "tokenized"
    data = TrainingData(train=None, eval=rows, tokenizer=tokenizer, seed=0, format="text", max_length=8)
    data.rewrite(lambda rows: rows.select([1]))
    assert (data.train, data.eval["text"][:]) == (None, ["two"])  # type: ignore[index]


def test_what_is_not_kept_is_not_lost(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": text, "n": n} for n, text in enumerate("abcdef")]
    data = TrainingData(
        train=Dataset.from_list(rows), eval=None, tokenizer=tokenizer, seed=0, format="text", max_length=8
    )
    file = tmp_path / "out.dropped.jsonl"
    file.write_text("of an earlier run")
    assert data.write_dropped(file) == ""
    assert not file.exists()
    data.keep([None, "too short", None, "odd", "odd", None], by="one")
    assert data.train.to_list() == [rows[0], rows[2], rows[5]]
    data.keep(["odd", None, None], by="two")
    assert [row["n"] for row in data.train] == [2, 5]
    said = data.write_dropped(file)
    assert said == f"; dropped 4: 3 odd, 1 too short ({file})"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["by"], one["place"], one["row"]["n"]) for one in found] == [
        ("one", 1, 1), ("one", 3, 3), ("one", 4, 4), ("two", 0, 0)
    ]  # fmt: skip
    assert [*sorted(one["row"]["n"] for one in found), 2, 5] == [0, 1, 3, 4, 2, 5]
    with pytest.raises(DataError, match="three: 1 reasons for 2 rows"):
        data.keep([None], by="three")


# --- token ids ----------------------------------------------------------------------------------------------


def test_special_frame_of_three_kinds_of_tokenizer() -> None:
    assert special_frame(byte_tokenizer("<s> $A")) == ([BOS], [])
    assert special_frame(byte_tokenizer("$A </s>")) == ([], [EOS])
    assert special_frame(byte_tokenizer("$A")) == ([], [])


@pytest.mark.parametrize(
    ("prompt", "completion", "joined"),
    [
        ("a", "b", " b"),
        ("a ", "b", "b"),
        ("a\n", "b", "b"),
        ("a", "\nb", "\nb"),
        ("", "b", "b"),
        ("a", "", ""),
    ],
)
def test_one_white_space_between_prompt_and_completion(prompt: str, completion: str, joined: str) -> None:
    assert continuation(prompt, completion) == joined


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_pair_trains_on_the_completion_and_has_bos_and_eos_once(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    for prompt in ("2+2=", "<s>2+2="):  # a prompt that spells BOS out gets no second one
        example = encode_pair(tokenizer, prompt, "4", max_length=64)
        assert example.input_ids == [BOS, *ids(tokenizer, "2+2="), *ids(tokenizer, " 4"), EOS]
        assert example.labels == [IGNORE] * 5 + [*ids(tokenizer, " 4"), EOS]


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(max_size=30), completion=st.text(min_size=1, max_size=10), room=st.integers(2, 40))
def test_a_pair_that_is_too_long_loses_the_prompts_left(prompt: str, completion: str, room: int) -> None:
    tokenizer = byte_tokenizer()
    tail = [*ids(tokenizer, continuation(prompt, completion)), EOS]
    if 1 + len(tail) > room:
        with pytest.raises(DataError, match=r"row 7: the completion has \d+ tokens"):
            encode_pair(tokenizer, prompt, completion, max_length=room, where="row 7")
        return
    example = encode_pair(tokenizer, prompt, completion, max_length=room)
    head = ids(tokenizer, prompt)
    kept = min(len(head), room - 1 - len(tail))
    assert example.input_ids == [BOS, *head[len(head) - kept :], *tail]
    assert example.labels == [IGNORE] * (1 + kept) + tail


def test_pairs_without_anything_to_learn_name_their_row(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", ""]})
    with pytest.raises(DataError, match=r"row 1 .*no tokens"):
        tokenize_dataset(rows, tokenizer, format="prompt-completion", max_length=8)


def test_classification_is_a_pair_from_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"text": ["{x}"], "label": ["good"]})
    made = tokenize_dataset(
        rows, tokenizer, format="classification", max_length=64, classification_prompt="{a} {text} ->"
    )
    assert made[0] == encode_pair(tokenizer, "{a} {x} ->", "good", max_length=64)._asdict()
    with pytest.raises(DataError, match="exactly once"):
        tokenize_dataset(rows, tokenizer, format="classification", max_length=64, classification_prompt="->")


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.text("ab é", min_size=1, max_size=20), min_size=1, max_size=6),
    size=st.integers(2, 9),
)
def test_packing_loses_and_repeats_no_token(documents: list[str], size: int) -> None:
    tokenizer = byte_tokenizer()
    blocks = tokenize_dataset(
        Dataset.from_dict({"text": documents}), tokenizer, format="text", max_length=size
    )
    stream = [token for text in documents for token in [BOS, *ids(tokenizer, text), EOS]]
    if len(stream) % size == 1:
        stream.pop()  # one token alone predicts nothing
    assert [token for block in blocks["input_ids"] for token in block] == stream
    assert all(len(block) == size for block in blocks["input_ids"][:-1])
    assert blocks["labels"][:] == blocks["input_ids"][:]


TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "left out"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def learned(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORE])


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "template"])
def test_conversations_calibrate_as_they_train(template: str | None) -> None:
    """What a quantizer measures is what the model reads, chat template included."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    rows = Dataset.from_dict({"messages": [TURNS]})
    trained = tokenize_dataset(rows, tokenizer, format="messages", max_length=200)[0]["input_ids"]
    (text,) = calibration_texts(rows, tokenizer)
    assert [tokenizer.bos_token_id, *text_ids(tokenizer, text.removeprefix("<s>"))] == trained


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "template"])
def test_messages_train_on_the_assistants_turns(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    rows = Dataset.from_dict({"messages": [TURNS]})
    row = tokenize_dataset(rows, tokenizer, format="messages", max_length=200)[0]
    text = tokenizer.decode(row["input_ids"])
    if template is None:
        assert text == ("<s>System: be kind\nUser: hi\nAssistant: hello</s>\nUser: more\nAssistant: no</s>")
        assert learned(tokenizer, row) == " hello</s> no</s>"
    else:
        assert text == "<s>[system]be kind</s>[user]hi</s>[assistant]hello</s>[user]more</s>[assistant]no</s>"
        assert learned(tokenizer, row) == "hello</s>no</s>"
    # What the model is asked at inference is what it was trained to answer.
    asked = ids(tokenizer, render_messages(tokenizer, TURNS[:4]))
    if template is None:
        asked = [BOS, *asked]
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"][len(asked) - 1] == IGNORE
    assert row["labels"][len(asked)] != IGNORE


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "template"])
def test_long_conversations_lose_their_left_and_keep_the_last_answer(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    rows = Dataset.from_dict({"messages": [TURNS]})
    whole = tokenize_dataset(rows, tokenizer, format="messages", max_length=200)[0]
    cut = tokenize_dataset(rows, tokenizer, format="messages", max_length=10)[0]
    assert cut["input_ids"] == [BOS, *whole["input_ids"][-9:]]
    assert cut["labels"] == [IGNORE, *whole["labels"][-9:]]
    with pytest.raises(DataError, match="does not fit in max_length 3"):
        tokenize_dataset(rows, tokenizer, format="messages", max_length=3)


def test_conversations_that_cannot_be_learned() -> None:
    tokenizer = byte_tokenizer()
    rows = Dataset.from_dict({"messages": [TURNS[:2]]})
    with pytest.raises(DataError, match="no turn of the assistant"):
        tokenize_dataset(rows, tokenizer, format="messages", max_length=64)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(UnsupportedError, match="rewrites earlier turns"):
        tokenize_dataset(
            Dataset.from_dict({"messages": [TURNS]}), tokenizer, format="messages", max_length=64
        )


def test_encoder_and_decoder_sides_are_apart() -> None:
    tokenizer = byte_tokenizer("$A </s>")
    rows = Dataset.from_dict({"prompt": ["abcdef"], "completion": ["xy"]})
    made = tokenize_dataset(rows, tokenizer, format="prompt-completion", max_length=4, encoder_decoder=True)
    assert made[0] == {"input_ids": [*ids(tokenizer, "def"), EOS], "labels": [*ids(tokenizer, "xy"), EOS]}
    batch = Collator(PAD, encoder_decoder=True)(made.to_list())
    assert batch["input_ids"].shape == (1, 4)
    assert batch["labels"].shape == (1, 3)
    with pytest.raises(UnsupportedError, match="no prompt and completion"):
        tokenize_dataset(
            Dataset.from_dict({"text": ["a"]}), tokenizer, format="text", max_length=4, encoder_decoder=True
        )


def test_tokenized_rows_pass_with_their_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[1, 5], [1, 6, 7]], "labels": [[1, 5], [1, 6, 7]], "speaker_ids": [[0, 1], [0, 0, 1]]}
    )
    assert tokenize_dataset(rows, tokenizer, format="tokenized", max_length=3).to_list() == rows.to_list()
    with pytest.raises(DataError, match=r"row 1 .* has 3 tokens"):
        tokenize_dataset(rows, tokenizer, format="tokenized", max_length=2)
    with pytest.raises(DataError, match="sets the format to 'tokenized'"):
        tokenize_dataset(rows, tokenizer, format="text", max_length=3)
    uneven = Dataset.from_dict({"input_ids": [[1, 5]], "labels": [[1]]})
    with pytest.raises(DataError, match="2 input_ids and 1 labels"):
        tokenize_dataset(uneven, tokenizer, format="tokenized", max_length=3)
    with pytest.raises(DataError, match="need 'labels'"):
        tokenize_dataset(rows.remove_columns("labels"), tokenizer, format="tokenized", max_length=3)


def test_kept_columns_and_refused_formats(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"], "weight": [0.5, 2.0]})
    made = tokenize_dataset(rows, tokenizer, format="prompt-completion", max_length=9, keep=["weight"])
    assert made.column_names == ["input_ids", "labels", "weight"]
    assert torch.equal(Collator(PAD)(made.to_list())["weight"], torch.tensor([0.5, 2.0]))
    with pytest.raises(DataError, match="no column 'wieght'"):
        tokenize_dataset(rows, tokenizer, format="prompt-completion", max_length=9, keep=["wieght"])
    with pytest.raises(DataError, match="did you mean 'preference'"):
        tokenize_dataset(rows, tokenizer, format="prefrence", max_length=9)
    with pytest.raises(UnsupportedError, match="two completions"):
        tokenize_dataset(rows, tokenizer, format="preference", max_length=9)
    with pytest.raises(DataError, match="no rows"):
        tokenize_dataset(rows.select([]), tokenizer, format="prompt-completion", max_length=9)


def test_made_datasets_join_those_that_plugins_make(tokenizer: PreTrainedTokenizerFast) -> None:
    made = tokenize_dataset(Dataset.from_dict({"text": ["abc"]}), tokenizer, format="text", max_length=9)
    assert made.features == Dataset.from_dict({"input_ids": [[1]], "labels": [[1]]}).features
    assert made.cache_files == []


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(side: str) -> None:
    rows = [
        {
            "input_ids": [5, 0, 7],
            "labels": [-100, 0, 7],
            "token_type_ids": [0, 1, 1],
            "speaker_ids": [2, 2, 1],
        },
        {"input_ids": [9], "labels": [9], "token_type_ids": [1], "speaker_ids": [1]},
    ]
    batch = Collator(PAD, padding_side=side, pad_values={"speaker_ids": 9})(rows)
    short = {"input_ids": (9, PAD), "labels": (9, IGNORE), "token_type_ids": (1, 0), "speaker_ids": (1, 9)}
    short["attention_mask"] = (1, 0)
    assert set(batch) == set(short)
    for name, (own, fill) in short.items():
        expected = [own, fill, fill] if side == "right" else [fill, fill, own]
        assert batch[name].dtype == torch.int64
        assert batch[name][1].tolist() == expected
        if name != "attention_mask":
            assert batch[name][0].tolist() == rows[0][name]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1]  # the row's own id 0 is no padding


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    multiple=st.integers(1, 9),
    limit=st.none() | st.integers(20, 25),
)
def test_width_is_the_least_multiple_within_the_limit(
    lengths: list[int], multiple: int, limit: int | None
) -> None:
    batch = Collator(PAD, pad_to_multiple_of=multiple, max_length=limit)(
        [{"input_ids": [4] * n} for n in lengths]
    )
    width = batch["input_ids"].shape[1]
    assert width >= max(lengths)
    assert width % multiple == 0 or width == limit
    assert width - max(lengths) < multiple
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "at least one row"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "row 1 of the batch has columns"),
        ([{"labels": [1]}], "no 'input_ids'"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids and 1 labels"),
        ([{"input_ids": [1], "speaker_ids": [1]}], "'speaker_ids' has no padding value"),
        ([{"input_ids": [1, 2, 3, 4, 5]}], "more than max_length 4"),
        ([{"input_ids": ["a"]}], "must be a list of integers"),
        ([{"input_ids": [1], "w": 1.0}, {"input_ids": [1], "w": "x"}], "mixes single numbers"),
    ],
)
def test_batches_that_are_refused(rows: list[dict[str, object]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Collator(PAD, max_length=4)(rows)


def test_collators_that_are_refused() -> None:
    with pytest.raises(DataError, match="no padding token"):
        Collator(None)
    with pytest.raises(DataError, match="'right' or 'left'"):
        Collator(0, padding_side="top")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least 1"):
        Collator(0, pad_to_multiple_of=0)


def test_padding_changes_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    """The sum of the losses of single rows is the loss of the padded batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    rows = Dataset.from_dict({"prompt": ["ab", "a longer one"], "completion": ["x", "yes"]})
    examples = tokenize_dataset(rows, tokenizer, format="prompt-completion", max_length=32).to_list()
    collate = Collator(tokenizer.pad_token_id, pad_to_multiple_of=8)
    with torch.inference_mode():
        counts = [sum(label != IGNORE for label in example["labels"]) for example in examples]
        single = sum(
            model(**collate([example])).loss * count for example, count in zip(examples, counts, strict=True)
        )
        both = model(**collate(examples)).loss * sum(counts)
    torch.testing.assert_close(both, single)


# ------------------------------------------------------------------------------------------------------ in blocks
def test_all_rows_that_are_refused_are_told_at_once(tmp_path: Path) -> None:
    good, bad = {"ask": "a", "reply": "b"}, {"ask": "a", "reply": None}
    columns = {"prompt": "ask", "completion": "reply"}
    file = write(tmp_path / "a.jsonl", [good, bad, good, {"ask": "a"}, *[bad] * 5, good])
    with pytest.raises(DataError) as refused:
        read_dataset(file, columns=columns)
    assert refused.value.message == (
        f"{file}:2: 'reply' (our 'completion') must be a string, got null; "
        "6 further rows are refused too: 4, 5, 6, 7, 8 and 1 more"
    )
    assert len(read_dataset(file, columns=columns, limit=1)) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"t{i}", "n": i if i < 5 else i + 0.5} for i in range(9)],
        [{"text": f"t{i}"} | ({"late": i} if i > 5 else {}) for i in range(9)],
        [{"text": f"t{i}", "none": None if i < 4 else f"{i}"} for i in range(9)],
        [{"messages": [{"role": "user", "content": f"{i}"}] + [{"role": "assistant", "content": "a"}] * (i % 3)}
         for i in range(7)],
        [{"text": "a", "tags": []}] * 3 + [{"text": "b", "tags": ["x"]}] * 3,
        [{"text": "a", "more": {"k": 1}}] * 3 + [{"text": "b", "more": {"k": 2, "l": "x"}}] * 3,
    ],
)  # fmt: skip
def test_blocks_of_rows_join_as_all_rows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, some = read_dataset(path), read_dataset(path, limit=3)
    monkeypatch.setattr(formats, "BLOCK", 2)
    found = read_dataset(path)
    assert found.to_list() == whole.to_list()
    assert found.features == whole.features
    assert read_dataset(path, limit=3).to_list() == some.to_list()


def test_a_value_that_does_not_go_with_another_blocks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "t", "n": 1}] * 4 + [{"text": "t", "n": "one"}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(formats, "BLOCK", 2)
    with pytest.raises(DataError, match=r"rows.jsonl:5: column 'n' does not go with the rows before"):
        read_dataset(path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n\n \n{"text": "b"}\n\n{"text": "c"}\n',
            "blank lines .*: 3, the first is line 2$",
        ),
        ("a.csv", "text,label\n\na,b\nc,d\n", "blank lines .*: 1, the first is line 2$"),
        ("a.csv", "text\na\n\nb\n", "blank lines .*: 1, the first is line 3$"),
        ("a.csv", ",text,label\n,a,b\n0,c,d\n1,e,f\n", "values .* does not name .*: 2, the first is line 3$"),
    ],
)
def test_what_comes_into_no_row_is_told(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.warns(UserWarning, match=f"{name}: {told}"):
        read_dataset(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n\n \n'),
        ("a.jsonl", '{"text": "a"}'),
        ("a.csv", "text,label\na,b\n\n"),
        ("a.csv", "text,label,\na,b,\nc,d,\n"),  # a delimiter at each line's end
    ],
)
def test_blank_ends_are_nothing_to_tell(tmp_path: Path, name: str, text: str) -> None:
    """Warnings are errors in tests."""
    (tmp_path / name).write_text(text, "utf-8")
    assert read_dataset(tmp_path / name)["text"][0] == "a"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_is_read_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What Python holds meanwhile is a small part of the file; the rows themselves are Arrow's."""
    monkeypatch.setattr(formats, "BLOCK", 500)
    texts = [f"{number} " + "x" * 1000 for number in range(10_000)]
    lines = [json.dumps({"text": text}) for text in texts] if name == "rows.jsonl" else ["text", *texts]
    (tmp_path / name).write_text("\n".join(lines))
    tracemalloc.start()
    try:
        rows = read_dataset(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()
    assert rows["text"][:] == texts


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.text('a,;"\n\r é', max_size=6), min_size=2, max_size=2), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_tables_are_read_as_the_csv_module_reads_them_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], end: str
) -> None:
    def written(part: list[list[str]]) -> str:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *part])
        return text.getvalue()

    file = tmp_path_factory.mktemp("tables") / "rows.csv"
    file.write_text(written(rows), "utf-8", newline="")
    records = list(read_records(file))
    assert [list(record.value.values()) for record in records] == rows
    starts = [len(list(io.StringIO(written(rows[:index]), newline=""))) + 1 for index in range(len(rows))]
    assert [record.line for record in records] == starts
