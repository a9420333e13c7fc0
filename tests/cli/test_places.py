"""Places that no file can have, or that cannot be read or written: exit code 2 and a message, before the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

LONG = "x" * 300
DEEP = "x/" * 3000 + "x"
READS = [
    ["validate", "{}"],
    ["apply", "{}"],
    ["apply", "-p", "fake-gain", "--model", "{}"],
    ["apply", "-p", "fake-gain", "--data", "{}"],
    ["apply", "-p", "fake-gain", "--eval", "{}"],
    ["apply", "-p", "fake-bits", "--calibration", "{}"],
    ["apply", "spec.yaml", "--data", "{}"],
    ["train", "spec.yaml", "--model", "{}"],
    ["generate", "{}", "x"],
    ["generate", "out", "x", "--model", "{}"],
    ["evaluate", "{}"],
    ["evaluate", "peftx:tiny", "--data", "{}"],
    ["serve", "{}"],
    ["merge", "{}", "merged"],
]
WRITES = [
    ["apply", "-p", "fake-gain", "--output", "{}"],
    ["apply", "spec.yaml", "--output", "{}"],
    ["merge", "peftx:tiny", "{}"],
    ["schema", "--output", "{}"],
    ["new", "two-words", "--dir", "{}"],
    ["matrix", "fake-gain", "--output", "{}/m.html"],
]
CASES = [
    *((words, LONG) for words in [*READS, *WRITES]),
    *((words, "spec.yaml/below") for words in [*READS, *WRITES]),
    *((words, "~nobody-of-this-name/x/y") for words in READS),
    *((words, DEEP) for words in (READS[0], READS[2], READS[8], WRITES[0], WRITES[2])),
]


@pytest.mark.parametrize(
    ("words", "place"), CASES, ids=lambda part: part[:9] if isinstance(part, str) else " ".join(part)
)
def test_a_place_that_cannot_be(
    installed: Any, refused: Callable[..., str], words: list[str], place: str
) -> None:
    for name, hook in (("fake-gain", "inject"), ("fake-bits", "compress")):
        installed.scaffold(name, hook)
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: 'peftx:sample/train.jsonl'}\n"
    text += "stack: [fake-gain]\ntrain: {steps: 1}\noutput: out\n"
    (installed.work / "spec.yaml").write_text(text, "utf-8")
    message = refused(*(word.format(place) for word in words))
    assert message.strip()
