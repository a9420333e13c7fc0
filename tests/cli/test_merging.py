"""`peftx merge` of several adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx import Stack, load
from peftx.engines import files
from peftx.interop import to_peft
from peftx_cli.commands import merging
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning


@pytest.fixture
def pair(installed: Any) -> Path:
    """The bundle `a` and the folder of PEFT `b`, on the bundled model."""
    import torch

    for name, targets in (("a", "attention.q,v layers=0"), ("b", "attention.q layers=0,1")):
        stack = Stack("peftx:tiny", [Lora(rank=2, targets=targets)])
        with torch.no_grad():
            for parameter in stack.ledger.parameters("lora"):
                parameter.normal_(std=0.5)
        stack.save(installed.work / name) if name == "a" else to_peft(stack, installed.work / name)
    Stack("peftx:tiny", [PromptTuning(length=2)]).save(installed.work / "prompt")
    work: Path = installed.work
    return work


def test_every_format(pair: Path, ok: Callable[..., str], ok_json: Callable[..., Any]) -> None:
    words = ["merge", "a", "b", "--method", "linear", "--weights", "1,-0.5"]
    shown = ok(*words, "-o", "both")
    assert "a + b by linear" in shown
    assert [line.split()[:3] for line in shown.splitlines()[3:5]] == [
        ["attention.q", "2", "2"],
        ["attention.v", "1", "2"],
    ]
    assert "bundle on peftx:tiny; 100 % of the difference's Frobenius norm is kept" in shown
    manifest = json.loads(Path("both/manifest.json").read_text("utf-8"))
    assert manifest["base"]["id"] == "peftx:tiny"
    assert not Path("both/tokenizer").exists()  # the base's place has it
    told = ok_json(*words, "-o", "adapter", "--format", "peft", "--json")
    assert told["format"] == "peft"
    assert told["norm_kept"] == 1
    assert {place["rank"] for place in told["places"]} == {2, 4}
    ok(*words, "-o", "plain", "--format", "hf")
    assert "full" in ok("merge", "a", "b", "--method", "ties", "-o", "trimmed", "--format", "hf")
    texts = {ok("generate", name, "Once upon", "-n", "8") for name in ("both", "adapter", "plain")}
    assert len(texts) == 1
    assert texts != {ok("generate", "peftx:tiny", "Once upon", "-n", "8")}


def test_options_reach_the_merge(pair: Path, ok: Callable[..., str], ok_json: Callable[..., Any]) -> None:
    words = ["merge", "a", "b", "--method", "dare", "--rank", "1", "--density", "0.5", "--json"]
    kept = [
        ok_json(*words, "-o", "out", *more)["norm_kept"] for more in ([], ["--seed", "0"], ["--seed", "1"])
    ]
    assert kept[0] == kept[1] != kept[2]
    assert 0 < kept[0] < 1
    assert load("out").plugins["lora"].config.rank == 1  # type: ignore[attr-defined]
    assert load("out").scores["norm-kept"].value == kept[2]
    told = ok_json(*words[:4], "dare-ties", "--rank", "1", "--json", "-o", "out", "--model", "peftx:tiny")
    assert told["method"] == "dare-ties"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "--weights", "1,2"], "--weights goes with --method"),
        (["a", "out", "--format", "hf"], "--format goes with --method"),
        (["a", "b", "-o", "out"], "and 3 are named"),
        (["a"], "and 1 are named"),
        (["a", "b", "out"], "and 3 are named"),
        (["a", "b", "--method", "linear"], "not said where the result goes"),
        (["a", "b", "--method", "linear", "-o", "out", "--weights", "1;2"], "these are no numbers"),
        (["a", "b", "--method", "linear", "-o", "out", "--format", "gguf"], "there is no such format"),
        (["a", "b", "--method", "ties", "-o", "out"], "ties needs the rank"),
        (["a", "b", "--method", "linaer", "-o", "out"], "no method 'linaer'"),
        (["a", "nope", "--method", "linear", "-o", "out"], "no bundle at 'nope'"),
        (["a", "prompt", "--method", "linear", "-o", "out"], "'prompt': 'prompt-tuning' does not fold"),
        (
            ["a", "b", "--method", "linear", "-o", "prompt/manifest.json"],
            "no folder, so it is not overwritten",
        ),
    ],
)
def test_refusals_write_nothing(
    words: list[str], message: str, pair: Path, refused: Callable[..., str]
) -> None:
    assert message in refused("merge", *words)


def test_what_stood_there_stays_until_the_end(
    pair: Path, ok: Callable[..., str], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["merge", "a", "b", "--method", "linear", "-o", "both"]
    ok(*words)
    before = {file.name: file.read_bytes() for file in Path("both").iterdir()}

    def full(new: Path, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "_put", full)
    result = run(*words, "--weights", "1,2")
    assert result.exit_code == 2
    assert "the disk is full" in result.stderr
    assert {file.name: file.read_bytes() for file in Path("both").iterdir()} == before
    assert not list(Path().glob(".both*"))


class Told:
    """Notes what a bar would show."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def stage(self, name: str, ids: Any) -> None:
        self.seen.append((name, *ids))

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        self.seen.append((done, total))


def test_a_bar_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    clock = iter([0.0, 1.9, 2.1, 3.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    told: Any = Told()
    progress = merging._patient(told, ["a", "b"])
    for done in range(3):
        progress(done, 3)
    assert told.seen == [("merge", "a", "b"), (1, 3), (2, 3)]


def test_a_share_is_rounded_down() -> None:
    assert merging._share(1.0) == merging._share(1 - 1e-7) == "100 %"
    assert merging._share(0.99999) == "99.99 %"
    assert merging._share(0.5) == "50 %"


def test_help_has_two_examples(ok: Callable[..., str]) -> None:
    assert ok("merge", "--help").count("Example: peftx merge") == 2
    assert json.dumps(list(merging.FORMATS)) == '["bundle", "peft", "hf"]'
