"""`import`, `export` and adapters of HF PEFT in a spec and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftx import Stack
from peftx.interop import to_peft
from peftx_full_finetuning import FullFinetuning
from peftx_lora import Lora

ROWS = [{"ask": f"{n} + {n}", "reply": str(2 * n)} for n in range(1, 9)]
NAMES = "prompt=ask,completion=reply"


@pytest.fixture
def adapter(installed: Any) -> Path:
    """An adapter of PEFT on the bundled model, and rows with columns of their own."""
    import torch

    stack = Stack("peftx:tiny", [Lora(rank=2, targets="attention.q"), FullFinetuning(targets="norm.final")])
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.2)
    folder: Path = installed.work / "theirs"
    to_peft(stack, folder)
    (installed.work / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    return folder


def test_there_and_back(
    adapter: Path, ok: Callable[..., str], run: Callable[..., Any], installed: Any
) -> None:
    assert json.loads(ok("import", "theirs", "-o", "ours", "--json"))["plugins"] == [
        "lora",
        "full-finetuning",
    ]
    texts = {ok("generate", name, "Once upon", "-n", "6") for name in ("theirs", "ours")}
    ok("export", "ours", "back", "--format", "peft")
    ok("export", "ours", "-o", "plain")
    ok("merge", "ours", "-o", "folded")
    texts |= {ok("generate", name, "Once upon", "-n", "6") for name in ("back", "plain", "folded")}
    assert len(texts) == 1 != {ok("generate", "peftx:tiny", "Once upon", "-n", "6")}
    told = json.loads((installed.work / "back/adapter_config.json").read_text("utf-8"))
    assert told["r"] == 2
    assert told["modules_to_save"] == ["model.norm"]
    result = run("export", "ours", "x", "--format", "pfet")
    assert result.exit_code == 2
    assert "there is no such format" in result.stderr
    assert "peft" in result.stderr
    result = run("export", "ours", "x", "--format", "vLLM")
    assert result.exit_code == 2
    assert "a program, which reads hf, peft, compressed-tensors" in " ".join(result.stderr.split())
    result = run("merge", "a", "b", "--method", "linear", "-o", "c", "--format", "vllm")
    assert "a program, which reads hf, peft" in " ".join(result.stderr.split())
    for words, message in ((["x", "-o", "y"], "two folders to write"), ([], "no folder to write")):
        result = run("export", "ours", *words)
        assert result.exit_code == 2
        assert message in result.stderr
    result = run("export", "ours", "x", "--id", "lora")
    assert result.exit_code == 2
    assert "hf holds all of them" in result.stderr


def test_in_the_place_of_a_bundle(
    adapter: Path, ok: Callable[..., str], run: Callable[..., Any], installed: Any, monkeypatch: Any
) -> None:
    """Of every command that takes one, with the base that --model names."""
    fields = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": None}))
    named = ("--adapter", "theirs", "--model", "peftx:tiny")
    text = ok("generate", "Once upon", "-n", "6", *named)
    assert text != ok("generate", "peftx:tiny", "Once upon", "-n", "6")
    measured = ("--data", "rows.jsonl", "--columns", NAMES, "--json")
    nll = json.loads(ok("evaluate", *named, *measured))
    assert nll == json.loads(ok("evaluate", "theirs", "-m", "peftx:tiny", *measured))
    ok("merge", "merged", *named)
    assert ok("generate", "merged", "Once upon", "-n", "6") == text
    served: list[str] = []
    monkeypatch.setattr(
        "peftx.toolkits.serving.http.run_http", lambda *servers, **_: served.extend(s.name for s in servers)
    )
    ok("serve", *named, "--port", "0")
    ok("serve", "other=theirs", *named, "--port", "0")
    assert served == ["theirs", "other", "theirs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "peftx:tiny", "A", "--adapter", "theirs"], "stands in the place of 'peftx:tiny'"),
        (["evaluate", "peftx:tiny", "--adapter", "theirs"], "--model peftx:tiny"),
        (["merge", "peftx:tiny", "out", "--adapter", "theirs"], "stands in the place of 'peftx:tiny'"),
        (
            ["merge", "a", "b", "--method", "linear", "-o", "c", "--adapter", "theirs"],
            "name them as arguments",
        ),
        (["merge", "out"], "one bundle is folded into one folder"),
        (["generate", "A", "--adapter", "rows.jsonl"], "is no adapter of PEFT"),
        (["generate", "--adapter", "theirs"], "there is no prompt"),
        (["generate", "peftx:tiny"], "there is no prompt"),
        (["evaluate"], "no bundle or model is named"),
        (["serve"], "no bundle or model is named"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_adapter_and_what_stands_in_its_place(
    adapter: Path, run: Callable[..., Any], words: list[str], message: str
) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_in_a_spec(adapter: Path, ok: Callable[..., str], run: Callable[..., Any], installed: Any) -> None:
    text = """peftx: 1
model: peftx:tiny
stack:
  - use: peft
    path: theirs
    id: first
  - {use: prompt-tuning, with: {length: 2}}
data: {train: {path: rows.jsonl, columns: {prompt: ask, completion: reply}}}
train: {steps: 1, batch_size: 2}
output: out
"""
    (installed.work / "spec.yaml").write_text(text, "utf-8")
    assert "3 plugins" in ok("validate", "spec.yaml")
    ok("apply", "spec.yaml")
    told = json.loads((installed.work / "out/manifest.json").read_text("utf-8"))
    assert [entry["use"] for entry in told["plugins"]] == ["lora", "prompt-tuning", "full-finetuning"]
    assert told["plugins"][0]["id"] == "first"
    (installed.work / "wrong.yaml").write_text(text.replace("path: theirs", "path: thiers"), "utf-8")
    result = run("validate", "wrong.yaml")
    assert result.exit_code == 2
    assert "wrong.yaml:5:11:" in result.stderr
    assert "is no adapter of PEFT" in result.stderr
    (installed.work / "bare.yaml").write_text(text.replace("    path: theirs\n", ""), "utf-8")
    assert "does not say where the adapter is" in run("validate", "bare.yaml").stderr


def test_on_the_command_line(adapter: Path, ok: Callable[..., str], run: Callable[..., Any]) -> None:
    words = ["--adapter", "theirs", "--data", "rows.jsonl", "--columns", NAMES, "--steps", "1"]
    spec = ok("apply", *words, "--split", "0.5", "--show-spec")
    assert "holdout: 0.5" in spec
    assert "completion: reply" in spec
    assert "use: lora" in spec
    ok("apply", *words, "-o", "out", "--metric", "none")
    for wrong, message in [
        (["--columns", "prompt"], "'prompt' is no pair of names"),
        (["--columns", "prompt=ask,prompt=reply"], "names one twice"),
        (["--split", "0.5", "--eval", "rows.jsonl"], "exclude each other"),
    ]:
        result = run("apply", *words, *wrong)
        assert result.exit_code == 2
        assert message in result.stderr, result.stderr
    assert "there is neither" in run("apply", "--plugin", "lora", "--columns", NAMES).stderr
