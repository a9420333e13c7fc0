"""Places that no file can have, or that cannot be read or written: exit code 2 and a message, before the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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


UNWRITABLE = "/proc/peftx-test"  # a folder that exists, and in which not even root can write


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc, where nobody can write")
@pytest.mark.parametrize(
    "words",
    [
        ["apply", "-p", "fake-gain", "--output", UNWRITABLE],
        ["apply", "spec.yaml", "--output", UNWRITABLE],
        ["train", "spec.yaml", "--output", f"{UNWRITABLE}/deeper/out"],
        ["apply", "saves.yaml"],
        ["merge", "peftx:tiny", UNWRITABLE],
        ["matrix", "fake-gain", "--output", f"{UNWRITABLE}.html"],
    ],
    ids=" ".join,
)
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    installed: Any, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    from peftx.engines.models import load_model

    def loads(*arguments: Any, meta: bool = False, **options: Any) -> Any:
        assert meta, "the weights were loaded first"
        return load_model(*arguments, meta=meta, **options)

    monkeypatch.setattr("peftx.stack.load_model", loads)
    monkeypatch.setattr("peftx.testing.matrix.run_matrix", loads)
    installed.scaffold("fake-gain", "inject")
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: 'peftx:sample/train.jsonl'}\n"
    text += "stack: [fake-gain]\ntrain: {steps: 1}\n"
    (installed.work / "spec.yaml").write_text(text + "output: out\n", "utf-8")
    stages = f"run: [inject, train, {{save: {UNWRITABLE}}}]\n"
    (installed.work / "saves.yaml").write_text(text.replace("{steps: 1}", "{}") + stages, "utf-8")
    message = refused(*words)
    assert f"output '{UNWRITABLE}" in message
    assert "hint: choose another folder" in message


def test_every_folder_that_a_run_saves_to_is_looked_at_first(
    installed: Any, refused: Callable[..., str], ok: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    (installed.work / "mine").mkdir()
    (installed.work / "mine" / "thesis.tex").write_text("years of work", "utf-8")
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: 'peftx:sample/train.jsonl'}\nstack: [fake-gain]\n"
    text += "run: [inject, {train: {steps: 1}}, {save: mine}]\n"
    (installed.work / "spec.yaml").write_text(text, "utf-8")
    message = refused("apply", "spec.yaml")
    assert "mine' exists and is no bundle" in message
    assert "train " not in message
    (installed.work / "spec.yaml").write_text(text.replace("save: mine", "save: new/deep"), "utf-8")
    ok("apply", "spec.yaml")
    assert (installed.work / "new" / "deep" / "manifest.json").is_file()
    assert not list(installed.work.glob("new/*tmp*"))
