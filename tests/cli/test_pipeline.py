"""`apply`, `train`, `plan`, `validate`, `schema`; and what one does with a bundle: `evaluate`, `generate`, `merge`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--set", "evaluate.perplexity.limit=2", "--set", "train.batch_size=2")


def small_data(folder: Path, rows: int = 6) -> Path:
    file = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Say {n}.", "completion": f"It is {n}."}) for n in range(rows)]
    file.write_text("\n".join(lines), "utf-8")
    return file


@pytest.fixture
def bundle(installed: Any, ok: Callable[..., str]) -> Path:
    """A trained gain on the bundled model."""
    installed.scaffold("fake-gain", "inject")
    small_data(installed.work)
    ok("train", "--plugin", "fake-gain", "--data", "rows.jsonl", "--steps", "2", "--output", "gain", *QUICK)
    return Path("gain")


def test_apply_ends_in_one_table_and_samples(installed: Any, run: Callable[..., Any]) -> None:
    installed.scaffold("fake-gain", "inject")
    installed.scaffold("fake-bits", "compress")
    words = [
        "apply",
        "--plugin",
        "fake-gain",
        "--plugin",
        "fake-bits",
        "--steps",
        "2",
        "--set",
        "fake-bits.bits=8",
    ]
    result = run(*words, "--output", "out", *QUICK)
    assert result.exit_code == 0, result.output
    lines = [line.split("  ")[0] for line in result.stdout.splitlines()]
    wanted = ["trainable parameters", "bytes on disk before", "bytes on disk after"]
    wanted += ["perplexity, base", "perplexity, adapted", "perplexity, compressed", "training steps"]
    assert [line for line in lines if line in wanted] == wanted
    assert result.stdout.count("prompt:") == 2
    assert result.stdout.count("model:") == 2
    stages = [line.split()[0] for line in result.stderr.splitlines() if " s  " in line]
    assert stages == ["load", "evaluate", "inject", "train", "evaluate", "compress", "evaluate", "save"]
    assert (installed.work / "out" / "manifest.json").is_file()
    assert not (installed.work / "out.checkpoints").exists()


def test_apply_json_is_one_document(installed: Any, ok_json: Callable[..., Any]) -> None:
    installed.scaffold("fake-gain", "inject")
    found = ok_json("apply", "--plugin", "fake-gain", "--steps", "3", "--output", "out", "--json", *QUICK)
    assert found["plugins"] == ["fake-gain"]
    assert 0 < found["trainable_parameters"] < found["base_parameters"]
    assert list(found["scores"]) == ["base", "adapted"]
    assert found["training"][0]["steps"] == 3
    size = sum(file.stat().st_size for file in (installed.work / "out").rglob("*") if file.is_file())
    assert found["bytes_after"] == size
    assert found["scores"]["adapted"]["perplexity"]["value"] != found["scores"]["base"]["perplexity"]["value"]


def test_plugins_and_the_yaml_that_is_shown_give_the_same_bundle(
    installed: Any, ok: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    words = ["--plugin", "fake-gain", "--steps", "2", *QUICK]
    ok("apply", *words, "--output", "one")
    (installed.work / "shown.yaml").write_text(ok("apply", *words, "--output", "two", "--show-spec"), "utf-8")
    ok("apply", "shown.yaml")
    name = "fake-gain.safetensors"
    assert (installed.work / "one" / name).read_bytes() == (installed.work / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("hook", "kinds"),
    [
        ("prepare_data", ["evaluate", "prepare", "save"]),
        ("evaluate", ["evaluate", "save"]),
        ("decode", ["evaluate", "save"]),
        ("compress", ["evaluate", "compress", "evaluate", "save"]),
        ("inject", ["evaluate", "inject", "train", "evaluate", "save"]),
    ],
)
def test_stages_that_no_plugin_takes_part_in_are_left_out(
    installed: Any, ok_json: Callable[..., Any], hook: str, kinds: list[str]
) -> None:
    installed.scaffold("fake-one", hook)
    assert [stage["name"] for stage in ok_json("plan", "--plugin", "fake-one", "--json")["stages"]] == kinds


def test_options_of_the_command_line_go_into_a_spec(installed: Any, ok: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    small_data(installed.work)
    folder = installed.work / "specs"
    folder.mkdir()
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: rows.jsonl}\nstack: [fake-gain]\ntrain: {steps: 9}\n"
    (folder / "one.yaml").write_text(text, "utf-8")
    small_data(folder)
    shown = ok(
        "apply", "specs/one.yaml", "--data", "rows.jsonl", "--steps", "4", "--output", "o", "--show-spec"
    )
    assert "steps: 4" in shown
    assert str(installed.work / "rows.jsonl") in shown, "a path of the command line is seen from here"
    assert str(installed.work / "o") in shown
    assert "rows.jsonl" in ok("plan", "specs/one.yaml", "--json")
    assert str(folder) in ok("plan", "specs/one.yaml", "--json")


def test_train_leaves_compression_out(installed: Any, ok_json: Callable[..., Any]) -> None:
    installed.scaffold("fake-gain", "inject")
    installed.scaffold("fake-bits", "compress")
    words = ["train", "-p", "fake-gain", "-p", "fake-bits", "--steps", "2", "-o", "out", "--json", *QUICK]
    found = ok_json(*words)
    assert found["plugins"] == ["fake-gain"]
    assert not any("compress" in name for name in found["seconds"])


def test_train_without_anything_to_train(installed: Any, refused: Callable[..., str]) -> None:
    installed.scaffold("fake-bits", "compress")
    assert "nothing trains" in refused("train", "--plugin", "fake-bits")
    assert "--steps has no effect" in refused("apply", "--plugin", "fake-bits", "--steps", "3")


# -------------------------------------------------------------------------------------------------- looking, not doing
def test_plan(installed: Any, ok: Callable[..., str], ok_json: Callable[..., Any]) -> None:
    from peftx_spec import Plan

    installed.scaffold("fake-gain", "inject")
    before = installed.files()
    text = ok("plan", "--plugin", "fake-gain", "--set", "fake-gain.targets=attention.q")
    plan = Plan.model_validate(
        ok_json("plan", "-p", "fake-gain", "-s", "fake-gain.targets=attention.q", "--json")
    )
    assert {module.role for module in plan.modules} == {"attention.q"}
    assert plan.totals.trainable_params == sum(module.params for module in plan.modules) > 0
    assert plan.modules[0].path in text
    assert f"{plan.totals.trainable_params:,}" in text
    assert installed.files() == before


def test_the_table_of_a_plan_has_rows_of_every_plugin(installed: Any, ok: Callable[..., str]) -> None:
    """Two plugins of more modules than are shown: the later one's are there too."""
    from peftx_cli.commands.inspect import MODULES_SHOWN

    stack = ["--plugin", "lora", "--plugin", "prompt-tuning", "--plugin", "nf4"]
    blocks = ok("plan", *stack).split("\n\n")
    (plugins,) = (block.splitlines() for block in blocks if block.startswith("plugins"))
    assert [line.split()[:2] for line in plugins[3:]] == [
        ["lora", "42"],
        ["prompt-tuning", "1"],
        ["nf4", "42"],
    ]
    (modules,) = (block.splitlines()[3:] for block in blocks if block.startswith("touched modules"))
    *rows, more = modules
    assert [sum(f" {id} " in row for row in rows) for id in ("lora", "prompt-tuning", "nf4")] == [13, 1, 13]
    assert len(rows) <= MODULES_SHOWN
    assert more == f"... and {85 - len(rows)} more; --all shows them"
    every = ok("plan", *stack, "--all").partition("touched modules")[2].partition("totals")[0]
    assert len(every.strip().splitlines()) == 2 + 85


def test_plan_shows_a_conflict_and_says_what_would_work(installed: Any, run: Callable[..., Any]) -> None:
    installed.scaffold("fake-gain", "inject")
    installed.scaffold("fake-bits", "compress")
    result = run("plan", "--plugin", "fake-bits", "--plugin", "fake-gain")
    assert result.exit_code == 2
    assert "conflict: " in result.stdout
    assert "fake-gain, fake-bits" in result.stdout


def test_validate(installed: Any, ok: Callable[..., str], ok_json: Callable[..., Any]) -> None:
    installed.scaffold("fake-gain", "inject")
    small_data(installed.work)
    text = "peftx: 1\nmodel: peftx:tiny\ndata: {train: rows.jsonl}\nstack: [fake-gain]\ntrain: {}\n"
    (installed.work / "spec.yaml").write_text(text, "utf-8")
    assert ok("validate", "spec.yaml") == "ok: 1 plugin, 2 stages (inject, train)\n"
    assert ok_json("validate", "spec.yaml", "--json")["stages"] == ["inject", "train"]


def test_schema(installed: Any, ok: Callable[..., str], run: Callable[..., Any]) -> None:
    installed.scaffold("fake-gain", "inject")
    installed.publish("fake-torn", "raise RuntimeError('torn')\n")
    ok("schema", "--output", "schema.json")
    schema = json.loads((installed.work / "schema.json").read_text("utf-8"))
    assert "with.fake-gain" in schema["$defs"]
    assert "with.fake-torn" not in schema["$defs"]
    result = run("schema")
    assert json.loads(result.stdout) == schema
    assert "left out" in result.stderr
    assert "fake-torn" in result.stderr


def test_schema_of_one_plugin(
    installed: Any, ok_json: Callable[..., Any], refused: Callable[..., str]
) -> None:
    """What the whole one has of it, without the word of a plugin that is broken."""
    installed.scaffold("fake-gain", "inject")
    installed.publish("fake-torn", "raise RuntimeError('torn')\n")
    own = ok_json("schema", "fake-gain")
    whole = ok_json("schema")["$defs"]["with.fake-gain"]
    assert own["properties"] == whole["properties"] != {}
    assert own["title"] == "options of fake-gain"
    assert "did you mean 'fake-gain'" in refused("schema", "fake-gian")
    assert "torn" in refused("schema", "fake-torn")


# ---------------------------------------------------------------------------------------------------- with the bundle
def test_generate(bundle: Path, ok: Callable[..., str], ok_json: Callable[..., Any]) -> None:
    words = ["generate", str(bundle), "Say 3.", "--max-new-tokens", "6"]
    text = ok(*words)
    assert text == ok(*words), "greedy decoding repeats"
    assert ok(*words, "--stream").strip() == text.strip()
    assert ok("generate", str(bundle), "-", "-n", "6", input="Say 3.") == text
    found = ok_json(*words, "--json")
    assert found["text"].strip() == text.strip()
    assert found["new_tokens"] <= 6
    sampled = [*words, "--temperature", "1.5", "--seed", "7"]
    assert ok(*sampled) == ok(*sampled)
    assert len({ok(*words, "--temperature", "1.5", "--seed", str(seed)) for seed in range(4)}) > 1


def test_evaluate_a_bundle_and_a_model(
    bundle: Path, ok: Callable[..., str], ok_json: Callable[..., Any], refused: Callable[..., str]
) -> None:
    found = ok_json("evaluate", str(bundle), "--data", "rows.jsonl", "--json")
    plain = ok_json("evaluate", "peftx:tiny", "--data", "rows.jsonl", "--json")
    assert found["perplexity"]["count"] == plain["perplexity"]["count"]
    assert found["perplexity"]["value"] < plain["perplexity"]["value"]
    assert "perplexity" in ok("evaluate", "peftx:tiny", "--limit", "1")
    assert "did you mean 'perplexity'" in refused("evaluate", str(bundle), "--metric", "perplexty")


def test_evaluate_rows_whose_columns_have_other_names(
    installed: Any, ok_json: Callable[..., Any], refused: Callable[..., str]
) -> None:
    for name, columns in (("ours", ("prompt", "completion")), ("theirs", ("ask", "reply"))):
        row = json.dumps(dict(zip(columns, ("Tea?", " Yes."), strict=True)))
        (installed.work / f"{name}.jsonl").write_text(row + "\n", "utf-8")
    named = ("--columns", "prompt=ask,completion=reply")
    theirs = ok_json("evaluate", "peftx:tiny", "--data", "theirs.jsonl", *named, "--json")
    assert theirs == ok_json("evaluate", "peftx:tiny", "--data", "ours.jsonl", "--json")
    assert "hint: --columns OURS=THEIRS" in refused("evaluate", "peftx:tiny", "--data", "theirs.jsonl")
    assert "there is no column 'ask'" in refused("evaluate", "peftx:tiny", "--data", "ours.jsonl", *named)
    assert "and there is none" in refused("evaluate", "peftx:tiny", *named)


def test_merge_writes_a_plain_checkpoint(bundle: Path, installed: Any, ok_json: Callable[..., Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import peftx

    found = ok_json("merge", str(bundle), "merged", "--json")
    assert found["plugins"] == ["fake-gain"]
    merged = AutoModelForCausalLM.from_pretrained(installed.work / "merged", dtype=torch.float32)
    stack = peftx.load(bundle)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, stack.model(ids).logits, atol=1e-4)
    assert not any("peftx" in name for name in merged.state_dict())


def test_merge_into_a_quantized_base_is_refused(
    installed: Any, ok: Callable[..., str], refused: Callable[..., str]
) -> None:
    installed.scaffold("fake-bits", "compress")
    ok("apply", "--plugin", "fake-bits", "--output", "small", *QUICK[:2])
    message = refused("merge", "small", "merged")
    assert "quantized" in message or "does not fold" in message
