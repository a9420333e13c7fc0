"""Whatever stands in a spec, what comes out is a pipeline or an error that says where: never a bug's traceback.

A few hundred seeded mutations of valid specs here; a run of a hundred thousand found the cases that are named below.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peftx_spec import PeftxError, Pipeline, SpecError, load_pipeline, load_spec
from peftx_spec.catalogue import Catalogue
from peftx_spec.dumper import dump
from peftx_spec.loader import MAX_BYTES, MAX_VALUES, read

MUTATIONS = 400
HEAD = "peftx: 1\nmodel: m\n"
FULL = {
    "peftx": 1,
    "model": {"id": "m", "dtype": "float32", "device": "cpu"},
    "data": {
        "train": {"path": "t.jsonl", "format": "text", "limit": 3, "columns": {"text": "body"}},
        "eval": "e.jsonl",
        "calibration": {"path": "c.txt"},
    },
    "stack": [
        {"use": "mosaic-it", "with": {"keep": 0.5}},
        {"use": "lora", "id": "one", "with": {"rank": 4, "layers": [1], "ranks": {"q": 2}, "schedule": {}}},
        "lora",
        {"use": "prefixquant", "phase": "after-training"},
        "language-ranker",
    ],
    "train": {"steps": 3, "learning_rate": 1e-3, "seed": 1},
    "evaluate": ["perplexity", {"accuracy": {"limit": 2}}, {"exact-match": "x.jsonl"}],
    "output": "out",
}
STAGED = {
    **{key: value for key, value in FULL.items() if key != "stack"},
    "stack": ["lora", {"use": "prefixquant", "with": {"bits": 4}}],
    "run": [
        "inject",
        {"train": {"steps": 2}},
        {"compress": ["prefixquant"]},
        {"evaluate": {"name": "a"}},
        "save",
    ],
}
ODD: list[Any] = [
    None, True, False, 0, -1, 3, 1.5, 1e300, -0.0, 10**30, 10**999, "", " ", "a", "lora", "all", "one", "0", "nan",
    "\0", "\x1b[31m", "\u202e", "é" * 300, "x" * 5000, "/" * 5000, "~nobody-here/x", "../" * 2000, "peftx:", "a:b",
    "${env:NOT_SET}", "${env:HOME}", "$${env:", "${env:", [], [[]], [None], ["lora"], [["lora"]], {}, {"": 1},
    {"a": {"b": []}}, {"use": {}}, {"use": ["lora"]}, {"use": "lora", "id": ["a"]}, {"use": "lora", "id": {}},
    {"path": []}, {"inject": {}}, {"train": []}, {"save": {"path": 3}}, {"evaluate": []}, {"perplexity": []},
    [{"use": "lora"}] * 2, list(range(50)), {"trust_remote_code": True},
]  # fmt: skip
PIECES = [
    ":", " :", ": ", "-", "- ", "\n", "\n  ", "\t", "#", "'", '"', "{", "}", "[", "]", ",", "&a ", "*a", "!!", "!x ",
    "|", ">", "%", "%YAML 9.9\n---\n", "---\n", "...\n", "? ", "<<: ", "~", "\\", '"\\U00110000"', '"\\xg"', "\0",
    "\x7f", "\u2028", "\ufeff", "\ud7ff", "\U0001f600", "9" * 5000, "0x" + "f" * 2000, "1e999", "@", "`", "=",
]  # fmt: skip
TARGETS = [
    "lora.rank", "one.layers", "train.steps", "model", "model.id", "data.train", "evaluate.accuracy.limit", "output",
    "stack", "run", "peftx", "lora", "", ".", "one..rank", "data", "evaluate", "lora." + "a." * 500 + "b", "\x1b.x",
]  # fmt: skip


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def changed(rng: random.Random, data: dict[str, Any]) -> Any:
    """A copy with one node replaced, removed or renamed."""
    data = json.loads(json.dumps(data))
    path = rng.choice([path for path in places(data) if path])
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    match rng.randrange(5):
        case 0:
            del inner[path[-1]]
        case 1 if isinstance(inner, dict):
            inner[rng.choice(["x", "", "0", "\x1b[2J", *map(str, inner)])] = inner.pop(path[-1])
        case 2 if isinstance(inner, list):
            inner.insert(rng.randrange(len(inner) + 1), rng.choice(ODD))
        case _:
            inner[path[-1]] = rng.choice(ODD)
    return data


def torn(rng: random.Random, text: str) -> str:
    """A text with something put in, cut out or doubled."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 2, 5, 40]))
        text = text[:start] + rng.choice([rng.choice(PIECES), "", text[start:end] * 2]) + text[end:]
    return text


def mutation(seed: int) -> tuple[str, list[str]]:
    """A text that is nearly a spec, and overrides."""
    rng = random.Random(seed)
    data: Any = rng.choice([FULL, STAGED])
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        data = changed(rng, data)
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.4:
        text = torn(rng, text)
    elif rng.random() < 0.3:
        text = torn(rng, "".join(f"{key}: {json.dumps(value)}\n" for key, value in data.items()))
    overrides = [
        rng.choice(TARGETS)
        + rng.choice(["=", "", "=="])
        + rng.choice([json.dumps(rng.choice(ODD)), rng.choice(PIECES)])
        for _ in range(rng.choice([0, 0, 1, 3]))
    ]
    return text, overrides


def outcome(text: str, overrides: list[str], catalogue: Catalogue) -> Pipeline | PeftxError:
    try:
        return load_pipeline(text if text.strip() else "\n", catalogue=catalogue, overrides=overrides)
    except PeftxError as error:
        return error


@pytest.mark.parametrize("part", range(4))
def test_mutations_of_valid_specs(catalogue: Catalogue, part: int) -> None:
    valid = 0
    for seed in range(part, MUTATIONS, 4):
        text, overrides = mutation(seed)
        found = outcome(text, overrides, catalogue)
        if isinstance(found, SpecError):
            lines = len(re.split("\r\n|[\n\r\x85\u2028\u2029]", text))
            assert all(1 <= one.line <= lines and one.column >= 1 for one in found.problems), seed
        if isinstance(found, PeftxError):
            assert not set(str(found)) & {"\x1b", "\0", "\u202e", "\x7f"}, seed
            assert str(found).encode("utf-8"), "no lone surrogate is left"
        else:
            valid += 1
            assert load_pipeline(dump(found), catalogue=catalogue) == found, seed
    assert 0 < valid < MUTATIONS / 8


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (HEAD + "stack: [{use: lora, id: [a]}]\n", [], ["<text>:3:25", "expected: text", "a list of 1"]),
        (HEAD + "stack: [{use: lora, id: {a: 1}}]\n", [], ["<text>:3:25", "expected: text"]),
        (HEAD + "stack: [{use: {}}]\n", [], ["<text>:3:15", "expected: text", "an empty mapping"]),
        (HEAD + "stack: [lora]\n", ["lora." + "a." * 5000 + "b=1"], ["--set #1", "5002 names"]),
        (HEAD + "stack: [lora]\n", ["lora.ranks=" + "[" * 100], ["--set #1", "nested more than"]),
        (HEAD + f"output: {'9' * 5000}\n", [], ["<text>:3:9", "5000 digits"]),
        (HEAD + f"stack: [{{use: lora, with: {{rank: {'9' * 40}}}}}]\n", [], ["<text>:3:34", "64 bits"]),
        (HEAD + f"stack: [{{use: lora, with: {{alpha: {'9' * 900}}}}}]\n", [], ["<text>:3:35", "64 bits"]),
        ('peftx: 1\nmodel: "\\U00110000"\n', [], ["<text>:2:", "too large for YAML"]),
        ('peftx: 1\nmodel: "\\UFFFFFFFF"\n', [], ["<text>:2:", "too large for YAML"]),
        (f"%YAML {'9' * 5000}.1\n---\n{HEAD}", [], ["<text>:1:", "too large for YAML"]),
        ('peftx: 1\nmodel: "a\\0b"\n', [], ["<text>:2:8", "U+0000"]),
        (HEAD + "output: " + "x" * 256 + "\n", [], ["<text>:3:9", "256 bytes", "at most 255"]),
        (HEAD + "output: " + "é" * 128 + "\n", [], ["<text>:3:9", "256 bytes"]),
        (HEAD + "output: " + "x/" * 2100 + "\n", [], ["<text>:3:9", "4200 bytes", "at most 4095"]),
        (f"peftx: 1\nmodel: {{id: {'x' * 300}}}\n", [], ["<text>:2:13", "at most 255"]),
        (HEAD + f"data: {{eval: {{path: {'x' * 300}}}}}\n", [], ["<text>:3:21", "at most 255"]),
        (HEAD + f"evaluate: [{{perplexity: {'x' * 300}}}]\n", [], ["<text>:3:25", "at most 255"]),
        (HEAD + f"run: [{{save: {{path: {'x' * 300}}}}}]\n", [], ["<text>:3:21", "at most 255"]),
        (HEAD + "stack: [lora]\n", ["output=" + "x" * 300], ["--set #1", "at most 255"]),
    ],
)  # fmt: skip
def test_what_once_came_out_as_a_bug(
    catalogue: Catalogue, text: str, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        load_pipeline(text, catalogue=catalogue, overrides=overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "".join(f"k{n}: ${{env:NOT_SET}}\nj{n}: 1\n" for n in range(6500)),
        HEAD + "stack: [" + "3," * 15_000 + "]\n",
        HEAD + "x: [" + "1," * 500_000 + "]\n",
        HEAD + "".join(f"k{n}: 1\n" for n in range(90_000)),
        "a: &a [x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a}]\n" for a, b in pairwise("abcdefghijk")),
    ],
    ids=["faults and findings", "many problems", "a long list", "many keys", "aliases of aliases"],
)  # fmt: skip
def test_no_spec_takes_long(catalogue: Catalogue, text: str) -> None:
    """Processor time; each took ten seconds or half a minute before, and aliases are followed to a limit."""
    started = time.process_time()
    with pytest.raises(SpecError) as caught:
        load_pipeline(text, catalogue=catalogue)
    assert time.process_time() - started < 8
    assert len(caught.value.problems) <= MAX_VALUES


def test_a_long_name_is_clipped_where_it_is_shown(catalogue: Catalogue) -> None:
    with pytest.raises(SpecError) as caught:
        load_pipeline(HEAD + f"stack: [{{use: {'l' * 500_000}}}]\n", catalogue=catalogue)
    assert len(str(caught.value)) < 5000


def test_further_lines_of_a_message_cannot_pass_for_ours(catalogue: Catalogue) -> None:
    with pytest.raises(SpecError) as caught:
        load_pipeline(HEAD + '"x\\nok: 2 plugins\\e[2K": 1\n', catalogue=catalogue)
    shown = str(caught.value)
    assert "\nok" not in shown
    assert "\\x1b[2K" in shown
    assert "\x1b" not in shown


# --------------------------------------------------------------------------------------------- what is no plain file
def test_a_pipe_that_nobody_writes_to_is_empty_and_one_that_is_written_to_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    with pytest.raises(SpecError, match="the spec is empty"):
        read(pipe)

    def write() -> None:
        with pipe.open("w", encoding="utf-8") as file:
            file.write(HEAD)
            file.flush()
            started.set()
            time.sleep(0.3)  # whoever reads waits for the rest
            file.write("output: out\n")

    started = threading.Event()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # so that the writer waits for nobody
    thread = threading.Thread(target=write)
    thread.start()
    assert started.wait(10)
    assert read(pipe).data == {"peftx": 1, "model": "m", "output": "out"}
    thread.join(10)
    os.close(reader)


def test_a_device_without_end_is_too_large() -> None:
    with pytest.raises(PeftxError, match="a spec has at most"):
        read("/dev/zero")


def test_a_file_that_grows_while_it_is_read_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    with file.open("wb") as handle:
        handle.truncate(50 * MAX_BYTES)
    with pytest.raises(PeftxError, match="a spec has at most"):
        read(file)


def test_a_folder_names_the_specs_in_it(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(HEAD, "utf-8")
    with pytest.raises(PeftxError, match=r"is a folder(.|\n)*pipeline\.yaml"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "file/below"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PeftxError) as caught:
        read(tmp_path / name)
    assert "cannot" in caught.value.message or "no file" in caught.value.message


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe\x00p", b"peftx: 1\nmodel: \xe9\n", b"\x80", b"\x00" * 50, b"PK\x03\x04" + b"\xff" * 9]
)
def test_what_is_no_utf8(spec_file: Callable[[bytes], Path], catalogue: Catalogue, raw: bytes) -> None:
    with pytest.raises(SpecError):
        load_spec(spec_file(raw), catalogue=catalogue)
