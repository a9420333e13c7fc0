"""Rows lie on the disk from the moment they are read until they are trained on."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from peftx import TrainingData
from peftx.engines.data import (
    Example,
    Lazy,
    Place,
    dataset_of_examples,
    formats,
    mapped,
    pairs_of,
    read_dataset,
    tokenize,
    with_column,
)
from peftx.engines.data.places import select
from peftx.errors import DataError
from peftx.testing.models import tiny_tokenizer

COUNT = 25_000


def row(i: int) -> dict[str, Any]:
    return {"prompt": f"Row {i}: " + "tea and rain " * 20, "completion": f"{i}."}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(COUNT)))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def data_of(rows: Dataset) -> TrainingData:
    return TrainingData(
        train=rows, eval=None, tokenizer=tiny_tokenizer(), seed=0, format="prompt-completion", max_length=32
    )


def test_rows_take_no_memory_on_their_way_to_training(file: Path, folder: Path) -> None:
    """Read, given a score, a half dropped, and looked at: of 7 MB in the file less than one is allocated."""
    before = pa.total_allocated_bytes()
    rows = read_dataset(file)
    assert file.stat().st_size > 7e6
    assert pa.total_allocated_bytes() - before < 1e6
    assert not list(folder.iterdir()), "a file without a name is left to nobody"
    data = data_of(with_column(rows, "score", [i % 7 for i in range(COUNT)]))
    data.keep([None if i % 2 else "even" for i in range(COUNT)], by="a")
    data.train = with_column(data.train, "more", [1] * len(data.train))
    data.keep([None if i else "first" for i in range(len(data.train))], by="b")
    assert pa.total_allocated_bytes() - before < 2e6, "scores alone"
    assert data.train[0] == row(3) | {"score": 3, "more": 1}
    assert data.train[-1] == row(COUNT - 1) | {"score": (COUNT - 1) % 7, "more": 1}
    assert [len(data.train), len(data.dropped)] == [COUNT // 2 - 1, COUNT // 2 + 1]
    assert data.dropped[1].row == row(2) | {"score": 2}
    assert data.dropped[-1].row == row(1) | {"score": 1, "more": 1}
    data.write_dropped(folder / "dropped.jsonl")
    lines = [json.loads(line) for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert [line["row"] for line in lines] == [one.row for one in data.dropped]
    assert str(Place(data.train, 0)) == f"{file}:4", "and where each stands is known still"


def test_blocks_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a block lacks, or has as numbers of another kind."""
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d", "weight": 1, "tags": ["x"]},
        {"prompt": "e", "completion": "f", "weight": 0.5, "tags": []},
        {"completion": "h", "prompt": "g", "who": {"name": "y"}},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    whole = read_dataset(path)
    monkeypatch.setattr(mapped, "WORTH_BYTES", 0)
    for name, value in (("BLOCK", 1), ("BLOCK", 3), ("LETTERS", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(formats, name, value)
            found = read_dataset(path)
        assert found.to_list() == whole.to_list()
        assert found.features == whole.features
        assert found.column_names == ["prompt", "completion", "weight", "tags", "who"]
        assert len(found.data.column("prompt").chunks) == {1: 4, 3: 2}[value]


def test_examples_in_blocks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example([*range(n)], [n] * (2 * n)) for n in (3, 1, 4, 1, 5, 9, 2, 6)]
    whole = dataset_of_examples(examples)
    monkeypatch.setattr(mapped, "WORTH_BYTES", 0)
    monkeypatch.setattr(tokenize, "TOKENS", 12)
    found = dataset_of_examples(examples)
    assert found.to_list() == whole.to_list() == [one._asdict() for one in examples]
    assert found.features == whole.features
    assert len(found.data.column("labels").chunks) == 5
    with pytest.raises(DataError, match="no rows to tokenize"):
        dataset_of_examples([])


def test_a_column_of_chosen_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([{"text": f"t{i}", "n": i} for i in range(10)])
    monkeypatch.setattr(mapped, "BLOCK", 3)
    found = with_column(select(rows, [7, 2, 5, 9]), "n", "abcd")
    assert found.to_list() == [{"text": f"t{i}", "n": n} for i, n in zip((7, 2, 5, 9), "abcd", strict=True)]
    pieces = [(start, piece.to_pylist()) for start, piece in mapped.pieces(select(rows, [7, 2, 5, 9]), "n")]
    assert pieces == [(0, [7, 2, 5]), (3, [9])]


def test_no_room_for_rows(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "full").touch()
    full = lambda **_: (os.open("/dev/full", os.O_WRONLY), str(folder / "full"))  # noqa: E731
    monkeypatch.setattr(mapped, "mkstemp", full)
    with pytest.raises(DataError, match=f"'{folder}' takes no further rows: No space left") as caught:
        read_dataset(file)
    assert caught.value.hint == "set TMPDIR to a folder with room"
    assert not list(folder.iterdir())


def test_lazy() -> None:
    looked = list[int]()

    def item(i: int) -> int:
        looked.append(i)
        return i * i

    squares = Lazy(5, item)
    assert (len(squares), squares[2], squares[-1], squares[1:4]) == (5, 4, 16, [1, 4, 9])
    assert looked == [2, 4, 1, 2, 3]
    assert [*squares] == [0, 1, 4, 9, 16]
    with pytest.raises(IndexError):
        squares[5]
    assert pairs_of(Dataset.from_list([row(3)]))[:] == [(row(3)["prompt"], "3.")]
