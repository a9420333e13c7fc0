"""Every mistake on the command line: exit code 2, nothing written, no traceback, and a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

WAYS_OUT = (
    *("hint: ", "expected: ", "did you mean", "Did you mean", "-h' for help", "write ", "leave ", "add "),
    *(
        "name the option too",
        "by its id instead",
        "change it in the file",
        "for these rows there is",
        "at most",
    ),
)
GAIN = ("apply", "--plugin", "fake-gain")
BITS = ("apply", "--plugin", "fake-bits")
COMMANDS: list[tuple[str, ...]] = [
    ("apply",),
    ("apply", "spec.yaml", "--plugin", "fake-gain"),
    ("apply", "--plugin", ""),
    ("apply", "--plugin", "fake-gian"),
    ("apply", "--plugin", "Fake-Gain"),
    ("apply", "--plugin", "fake-gain,fake-bits"),
    ("apply", "--plugin", "fake-bits", "--plugin", "fake-gain"),
    ("apply", "--plugin", "fake-gain", "extra.yaml"),
    ("plan", "--plugin", "fake-gian"),
    ("train", "--plugin", "fake-bits"),
    (*GAIN, "--set", ""),
    (*GAIN, "--set", "fake-gain"),
    (*GAIN, "--set", "power=2"),
    (*GAIN, "--set", "fake-gain.powr=2"),
    (*GAIN, "--set", "fake-gain.power=x"),
    (*GAIN, "--set", "fake-gain.power=0"),
    (*GAIN, "--set", "fake-gain.power.x=0"),
    (*GAIN, "--set", "fake-gain=2"),
    (*GAIN, "--set", "fake-gian.power=2"),
    (*GAIN, "--set", "fake-gain.targets=attention.w"),
    (*GAIN, "--set", "fake-gain.targets=["),
    (*GAIN, "--set", "fake-gain.power=${env:PEFTX_NOT_SET}"),
    (*GAIN, "--set", "train.stps=3"),
    (*GAIN, "--set", "train.steps=0"),
    (*GAIN, "--set", "train.steps=many"),
    (*GAIN, "--set", "train.steps=" + "9" * 5000),
    (*GAIN, "--set", "model.dtype=fp8"),
    (*GAIN, "--set", "model.device=gpu"),
    (*GAIN, "--set", "model.trust_remote_code=true"),
    (*GAIN, "--set", "data.holdout=2"),
    (*GAIN, "--set", "data.trian=x"),
    (*GAIN, "--set", "evaluate.accuracy.limit=2"),
    (*GAIN, "--set", "evaluate=[foo]"),
    (*GAIN, "--set", "stack=[lora]"),
    (*GAIN, "--set", "run=[]"),
    (*GAIN, "--set", "peftx=2"),
    (*GAIN, "--set", "output="),
    (*GAIN, "--metric", "perplexty"),
    (*GAIN, "--metric", "accuracy"),
    (*GAIN, "--metric", ""),
    (*GAIN, "--steps", "0"),
    (*GAIN, "--steps", "x"),
    (*GAIN, "--step", "3"),
    (*GAIN, "--model", "nope"),
    (*GAIN, "--model", "./nope"),
    (*GAIN, "--model", "peftx:tini"),
    (*GAIN, "--data", "nope.jsonl"),
    (*GAIN, "--data", "."),
    (*GAIN, "--data", "rows.jsonl"),
    (*GAIN, "--eval", "nope.jsonl"),
    (*GAIN, "--calibration", "notes.txt"),
    (*BITS, "--calibration", "nope.txt"),
    (*BITS, "--steps", "3"),
    (*GAIN, "--output", "mine"),
    (*GAIN, "--output", "mine/thesis.tex/out"),
    ("apply", "spec.yaml", "--set", "fake-gain.powr=2"),
    ("apply", "spec.yaml", "--metric", "accuracy"),
    ("apply", "spec.yaml", "--calibration", "notes.txt"),
    ("apply", "nope.yaml"),
    ("apply", "mine"),
    ("validate",),
    ("validate", "spec.yaml", "--set", "x"),
    ("info", "fake-gian"),
    ("check", "fake-gian"),
    ("check", "fake-gain", "--set", "powr=2"),
    ("check", "fake-gain", "--set", "power"),
    ("check", "fake-gain", "--set", "power=["),
    ("check", "fake-gain", "--model", "lama"),
    ("check", "fake-gain", "--only", "nothing"),
    ("matrix", "fake-gian"),
    ("matrix", "fake-gain", "--output", "page.pdf"),
    ("matrix", "fake-gain", "--output", "nowhere/page.html"),
    ("list", "--hook", "injekt"),
    ("list", "--fidelity", "gold"),
    ("list", "--evidence", "gold"),
    ("list", "--family", "low-rang"),
    ("new", "fake-gain"),
    ("new", "Bad Name"),
    ("new", "fine-name", "--hook", "injekt"),
    ("generate", "nope", "x"),
    ("generate", "peftx:tiny", ""),
    ("generate", "peftx:tiny", "x", "--stream", "--json"),
    ("generate", "peftx:tiny", "x", "--model", "peftx:tiny"),
    ("generate", "peftx:tiny", "x", "--top-p", "2"),
    ("generate", "mine", "x"),
    ("evaluate", "peftx:tiny", "--metric", "perplexty"),
    ("evaluate", "peftx:tiny", "--metric", "accuracy"),
    ("evaluate", "peftx:tiny", "--data", "nope.jsonl"),
    ("merge", "nope", "out"),
    ("merge", "peftx:tiny", "mine"),
    ("serve", "nope"),
    ("serve", "peftx:tiny", "--port", "99999"),
    ("aply",),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_a_way_out(installed: Any, refused: Callable[..., str], words: tuple[str, ...]) -> None:
    for name, hook in (("fake-gain", "inject"), ("fake-bits", "compress")):
        installed.scaffold(name, hook)
    work = installed.work
    (work / "rows.jsonl").write_text(
        json.dumps({"prompt": "Say 1.", "completion": "It is 1."}) + "\n", "utf-8"
    )
    (work / "notes.txt").write_text("Once upon a time.", "utf-8")
    (work / "mine").mkdir()
    (work / "mine" / "thesis.tex").write_text("years of work", "utf-8")
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: rows.jsonl}\nstack: [fake-gain]\ntrain: {steps: 1}\n"
    (work / "spec.yaml").write_text(text, "utf-8")
    message = refused(*words)
    assert any(way in message for way in WAYS_OUT), message
