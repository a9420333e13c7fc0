"""Rows that were tokenized once lie on the disk: the same result, for the same rows and settings alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from peftx.engines.data import kept, tokenize, tokenize_dataset
from peftx.engines.models import ASSETS, read_tokenizer
from peftx.errors import DataError

ROWS = Dataset.from_list([{"prompt": f"How many are {i}?", "completion": f"{i} of them"} for i in range(40)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path))
    monkeypatch.setattr(kept, "WORTH_BYTES", 0)
    monkeypatch.setattr(kept, "WORTH_SECONDS", 0.0)
    return tmp_path / "rows"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return read_tokenizer(str(ASSETS / "tiny"), trust_remote_code=False)


def made(tokenizer: Any, rows: Dataset = ROWS, **changed: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"format": "prompt-completion", "max_length": 64} | changed
    return list(tokenize_dataset(rows, tokenizer, **options))


@contextmanager
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is tokenized inside."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "dataset_of_examples", lambda found: pytest.fail("tokenized again"))
        yield


def test_the_same_rows_are_tokenized_once(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(tokenizer)
    with untouched(monkeypatch):
        assert made(tokenizer) == first
        assert made(tokenizer, Dataset.from_list(list(ROWS))) == first, "rows are known by what is in them"
        assert made(tokenizer, ROWS.add_column("more", [1] * 40)) == first, "a column that plays no part"
    monkeypatch.setenv("PEFTX_CACHE", "")
    assert made(tokenizer) == first


OTHERS: dict[str, dict[str, Any]] = {
    "another row": {
        "rows": ROWS.map(lambda row, i: {"prompt": "x" if i == 39 else row["prompt"]}, with_indices=True)
    },
    "another order": {"rows": ROWS.select(range(39, -1, -1))},
    "fewer rows": {"rows": ROWS.select(range(30))},
    "shorter": {"max_length": 7},
    "some of them": {"only": [3, 1]},
    "others of them": {"only": [1, 3]},
    "two towers": {"encoder_decoder": True},
    "a column to keep": {"rows": ROWS.add_column("weight", [0.5] * 40), "keep": ["weight"]},
    "another value to keep": {"rows": ROWS.add_column("weight", [0.25] * 40), "keep": ["weight"]},
}


def test_whatever_decides_about_the_ids_is_told_apart(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tokenizer)
    found = {name: made(tokenizer, **changed) for name, changed in OTHERS.items()}
    assert len(list(folder.glob("*.arrow"))) == len(OTHERS) + 1
    monkeypatch.setenv("PEFTX_CACHE", "")
    assert found == {name: made(tokenizer, **changed) for name, changed in OTHERS.items()}


def test_another_tokenizer_or_other_code_makes_them_anew(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tokenizer)
    other = read_tokenizer(str(ASSETS / "tiny"), trust_remote_code=False)
    other.add_tokens(["many"])
    assert made(other) != made(tokenizer)
    monkeypatch.setattr(kept, "_code", lambda: "another version")
    made(tokenizer)
    assert len(list(folder.glob("*.arrow"))) == 3


DAMAGES = [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-900] + b"\x01" * 100 + b[-800:]]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again_and_said(folder: Path, tokenizer: Any, damage: Any) -> None:
    first = made(tokenizer)
    (file,) = folder.glob("*.arrow")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=f"{re.escape(str(file))} is damaged and is made again"):
        assert made(tokenizer) == first
    assert made(tokenizer) == first


def test_a_row_that_is_refused_leaves_nothing(folder: Path, tokenizer: Any) -> None:
    bad = Dataset.from_list([*ROWS, {"prompt": "a", "completion": "word " * 99}])
    for _ in range(2):
        with pytest.raises(DataError, match="row 40"):
            made(tokenizer, bad)
    assert not list(folder.glob("**/*")), "half of a file"


def test_small_or_quick_rows_are_not_kept(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "WORTH_SECONDS", 1e9)
    made(tokenizer)
    monkeypatch.setattr(kept, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(kept, "WORTH_BYTES", 10**9)
    made(tokenizer)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_stops_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "WORTH_BYTES", 0)
    monkeypatch.setattr(kept, "WORTH_SECONDS", 0.0)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PEFTX_CACHE", str(tmp_path / "file"))
    assert len(made(tokenizer)) == 40


def test_what_was_used_longest_ago_goes_first(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tokenizer)
    (oldest,) = folder.glob("*.arrow")
    made(tokenizer, max_length=32)
    (second,) = set(folder.glob("*.arrow")) - {oldest}
    os.utime(oldest, (1, 1))
    os.utime(second, (2, 2))
    made(tokenizer)  # used again
    monkeypatch.setattr(kept, "MOST_BYTES", int(2.5 * oldest.stat().st_size))
    made(tokenizer, max_length=16)
    assert oldest.exists()
    assert not second.exists()


def test_the_same_values_have_one_digest_however_they_lie() -> None:
    rows = [
        {"text": f"row {n}" if n % 7 else None, "turns": [{"role": "user", "said": n}] * (n % 3)}
        for n in range(kept.AT_ONCE + 50)
    ]
    whole = Dataset.from_list(rows)
    table = whole.data.table
    pieces = Dataset(pa.concat_tables([table.slice(0, 700), table.slice(700, 9), table.slice(709)]))
    within = Dataset(pa.concat_tables([table.slice(5, 100), table]).slice(100))
    others = [pieces, within, pieces.select(list(range(len(rows))))]
    assert {kept._digest(other) for other in others} == {kept._digest(whole)}
    assert kept._digest(whole) != kept._digest(whole.select(range(len(rows) - 1)))
