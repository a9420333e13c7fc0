"""Every kind of bad input: exit code 2, a message that names cause, place and way out, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from peftx import __version__

QUICK = ("--set", "evaluate.perplexity.limit=2", "--set", "train.batch_size=2")
SPEC = """\
peftx: 1
model: peftx:tiny
data: {{train: {data}}}
stack:
  - use: fake-gain
{options}train: {{steps: 2}}
output: out
"""


def spec(installed: Any, *, data: str = "rows.jsonl", options: str = "", extra: str = "") -> str:
    """A spec file with one plugin; the data file is there."""
    rows = [json.dumps({"prompt": f"Say {n}.", "completion": f"It is {n}."}) for n in range(6)]
    (installed.work / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    (installed.work / "spec.yaml").write_text(SPEC.format(data=data, options=options) + extra, "utf-8")
    return "spec.yaml"


# ----------------------------------------------------------------------------------------------------------- plugins
def test_unknown_plugin(installed: Any, refused: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    message = refused("apply", "--plugin", "fake-gian")
    assert "no plugin named 'fake-gian'" in message
    assert "did you mean 'fake-gain'" in message
    assert "pip install" not in message, "a misspelt name may be a package of anybody's"
    told = refused("apply", "--plugin", "zzzzzz")
    assert "peftx list has those that are installed; else install 'zzzzzz' from where" in told
    assert "pip install" not in told, "a name on PyPI that anybody may take"


def test_two_distributions_with_one_name(installed: Any, refused: Callable[..., str]) -> None:
    installed.publish("fake-twin", "")
    installed.publish("fake-twin", "", distribution="fake-other")
    message = refused("apply", "--plugin", "fake-twin")
    assert "claimed by two distributions" in message
    assert "peftx-fake-twin" in message
    assert "fake-other" in message
    assert "pip uninstall peftx-fake-twin" in message
    assert "pip uninstall fake-other" in message


def test_a_plugin_that_does_not_import(installed: Any, refused: Callable[..., str]) -> None:
    installed.publish("fake-torn", "import a_module_that_is_nowhere\n")
    for words in (["apply", "--plugin", "fake-torn"], ["plan", "--plugin", "fake-torn"]):
        assert "No module named 'a_module_that_is_nowhere'" in refused(*words)
    text = "peftx: 1\nmodel: peftx:tiny\nstack: [fake-torn]\ntrian: {}\n"
    (installed.work / "spec.yaml").write_text(text, "utf-8")
    message = refused("validate", "spec.yaml")
    assert "spec.yaml:3:" in message
    assert "a_module_that_is_nowhere" in message
    assert "did you mean 'train'" in message, "the other mistakes are told too"


def test_no_plugin_at_all(installed: Any, refused: Callable[..., str]) -> None:
    installed.publish("fake-number", "Fake = 3\n")
    assert "no subclass of peftx.Plugin" in refused("apply", "--plugin", "fake-number")


# ------------------------------------------------------------------- a stranger's distribution: the file and the line
def line_of(file: Path, text: str) -> str:
    """`file:line` of the line that begins with a text."""
    lines = file.read_text("utf-8").splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if line.startswith(text))
    return f"{file}:{number}"


def info(installed: Any, name: str, file: str) -> Path:
    return Path(installed.site, f"{name.replace('-', '_')}-0.1.0.dist-info", file)


@pytest.mark.parametrize(
    "asked", ["peftx>=0.1,<0.2", "peftx<0.2,>=0.1", "peftx >= 9", "PEFTX==0.1", "peftx>>1"]
)
def test_a_plugin_of_another_version(
    installed: Any,
    refused: Callable[..., str],
    ok_json: Callable[..., Any],
    run: Callable[..., Any],
    asked: str,
) -> None:
    source = "from __future__ import annotations\nimport nowhere\nfrom peftx import Plugin, hookimpl\n"  # an outline
    source += "class Fake(Plugin):\n    @hookimpl\n    def inject(self, model): ...\n"  # of it can be read
    installed.publish("fake-old", source, requires=["numpy", asked])
    place = line_of(info(installed, "peftx-fake-old", "METADATA"), f"Requires-Dist: {asked}")
    (installed.work / "spec.yaml").write_text("peftx: 1\nmodel: peftx:tiny\nstack: [fake-old]\n", "utf-8")
    for words in (["plan", "--plugin", "fake-old"], ["validate", "spec.yaml"], ["check", "fake-old"]):
        message = refused(*words)
        assert (
            f"plugin 'fake-old' (peftx-fake-old 0.1.0) needs {asked}, and this is peftx {__version__}"
            in message
        )
        assert place in message
        assert "pip install --upgrade peftx-fake-old" in message
        assert "nowhere" not in message, "it was imported"
    line = next(line for line in ok_json("list", "--json") if line["name"] == "fake-old")
    assert (line["status"], line["reason"]) == ("broken", f"needs {asked}, and this is peftx {__version__}")
    assert f"broken: fake-old: plugin 'fake-old' (peftx-fake-old 0.1.0) needs {asked}" in run("doctor").stdout


@pytest.mark.parametrize(
    "asked", ["peftx", f"peftx~={__version__}", "peftx<0.1; extra == 'old'", "peftx-fake-base<0.1"]
)
def test_a_plugin_of_this_version(installed: Any, ok: Callable[..., str], asked: str) -> None:
    source = "from peftx import Plugin, hookimpl\n\n\nclass Fake(Plugin):\n"
    installed.publish(
        "fake-new", f"{source}    @hookimpl\n    def inject(self, model): ...\n", requires=[asked]
    )
    assert "inject" in ok("info", "fake-new")


@pytest.mark.parametrize(
    ("asked", "fits"), [("peftx>=0.2", True), ("peftx>=0.3.0.dev1,<0.4", True), ("peftx>=0.2,<0.3", False)]
)
def test_a_version_under_development(monkeypatch: pytest.MonkeyPatch, asked: str, fits: bool) -> None:
    from peftx.composition import origins

    monkeypatch.setattr(origins, "__version__", "0.3.0.dev1")
    assert origins.misfit(["numpy", asked]) == ("" if fits else asked)


@pytest.mark.parametrize(
    ("source", "line", "why"),
    [
        (
            "import torch\n\nimport a_module_that_is_nowhere\n",
            3,
            "No module named 'a_module_that_is_nowhere'",
        ),
        ("import torch\nfrom peftx import Plugin\nclass Fake(Plugin)\n    pass\n", 3, "SyntaxError"),
        ("import json\ndef read():\n    return json.loads('{')\nread()\n", 3, "JSONDecodeError"),
        ("import torch\nfrom peftx import NoSuchName\n", 2, "NoSuchName"),
    ],
)
def test_the_line_at_which_an_import_fails(
    installed: Any, refused: Callable[..., str], source: str, line: int, why: str
) -> None:
    module = installed.publish("fake-torn", source)
    message = refused("plan", "--plugin", "fake-torn")
    assert f"does not import: {installed.site / module}.py:{line}: " in message
    assert why in message


def test_the_line_in_a_package(installed: Any, refused: Callable[..., str]) -> None:
    module = installed.publish("fake-torn", "")
    (installed.site / f"{module}.py").unlink()
    package = installed.site / module
    package.mkdir()
    (package / "__init__.py").write_text("from . import inner\n", "utf-8")
    (package / "inner.py").write_text("\n\nimport torch\n\ntorch.no_such_thing\n", "utf-8")
    assert f"does not import: {package / 'inner.py'}:5: AttributeError" in refused(
        "plan", "--plugin", "fake-torn"
    )


@pytest.mark.parametrize(
    "source", [None, "Other = 1\n", "Fake = 3\n"], ids=["no module", "no class", "no plugin"]
)
def test_the_line_of_an_entry_point(installed: Any, refused: Callable[..., str], source: str | None) -> None:
    module = installed.publish("fake-gone", source or "")
    if source is None:
        (installed.site / f"{module}.py").unlink()
    place = line_of(info(installed, "peftx-fake-gone", "entry_points.txt"), "fake-gone = ")
    assert place in refused("plan", "--plugin", "fake-gone")


def test_the_lines_of_a_taken_name(installed: Any, refused: Callable[..., str]) -> None:
    installed.publish("fake-twin", "")
    installed.publish("fake-twin", "", distribution="fake-other")
    message = refused("plan", "--plugin", "fake-twin")
    for owner in ("peftx-fake-twin", "fake-other"):
        assert f"'{owner}' ({line_of(info(installed, owner, 'entry_points.txt'), 'fake-twin = ')})" in message


def test_a_distribution_without_a_readme(installed: Any, refused: Callable[..., str]) -> None:
    installed.publish("fake-mute", "")
    message = refused("info", "fake-mute", "--readme")
    assert f"peftx-fake-mute brings no README: {info(installed, 'peftx-fake-mute', 'METADATA')} " in message
    assert 'readme = "README.md"' in message


def test_neither_or_both(installed: Any, refused: Callable[..., str]) -> None:
    assert "neither a spec nor a plugin" in refused("apply")
    assert "exclude each other" in refused("apply", "spec.yaml", "--plugin", "fake-gain")
    assert "there is no file" in refused("apply", "nowhere.yaml")


# -------------------------------------------------------------------------------------------------------------- spec
@pytest.mark.parametrize(
    ("options", "place", "words"),
    [
        ("    with: {powr: 2}\n", "spec.yaml:6:12", ["did you mean 'power'"]),
        ("    with: {power: two}\n", "spec.yaml:6:19", ["expected: a whole number", "'two'"]),
        ("    with: {power: 0}\n", "spec.yaml:6:19", ["0"]),
        ("    with: {power: 1, power: 2}\n", "spec.yaml:6:", ["power"]),
    ],
    ids=["misspelt option", "wrong type", "out of range", "duplicate key"],
)
def test_options_in_a_spec(
    installed: Any, refused: Callable[..., str], options: str, place: str, words: list[str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    message = refused("apply", spec(installed, options=options))
    assert place in message, message
    assert "^" in message, message
    assert all(word in message for word in words), message


def test_options_on_the_command_line(installed: Any, refused: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    assert "did you mean 'power'" in refused("apply", "--plugin", "fake-gain", "--set", "fake-gain.powr=2")
    assert "--set #1" in refused("apply", "--plugin", "fake-gain", "--set", "fake-gain.power=x")
    assert "'target=value'" in refused("apply", "--plugin", "fake-gain", "--set", "nonsense")


def test_a_float_with_an_exponent_is_a_float(installed: Any, ok: Callable[..., str]) -> None:
    """YAML 1.1 reads `1e-4` as text."""
    installed.scaffold("fake-gain", "inject")
    spec(installed)
    file = installed.work / "spec.yaml"
    file.write_text(file.read_text().replace("steps: 2", "learning_rate: 1e-4"), "utf-8")
    assert "learning_rate: 0.0001" in ok("apply", "spec.yaml", "--show-spec")


def test_all_mistakes_at_once(installed: Any, refused: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    message = refused(
        "apply", spec(installed, options="    with: {powr: 2}\n", extra="evalaute: []\nsteps: 3\n")
    )
    assert "3 problems in the spec" in message


# -------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("empty.jsonl", b"", ["empty"]),
        ("binary.jsonl", b"\x00\x01\x02\xff" * 50, ["binary.jsonl"]),
        ("latin.jsonl", '{"prompt": "é", "completion": "x"}'.encode("latin-1"), ["UTF-8"]),
        ("torn.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', ["torn.jsonl:2"]),
        ("list.jsonl", b"[1, 2]\n", ["list.jsonl:1"]),
        (
            "digits.jsonl",
            b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}\n",
            ["digits.jsonl:1"],
        ),
    ],
)
def test_data_files(
    installed: Any, refused: Callable[..., str], name: str, raw: bytes, words: list[str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    spec(installed, data=name)
    (installed.work / name).write_bytes(raw)
    message = refused("apply", "spec.yaml")
    assert all(word in message for word in words), message


def test_a_fault_far_down_is_found_before_anything_is_written(
    installed: Any, refused: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    spec(installed, data="torn.jsonl")
    good = b'{"prompt": "a", "completion": "b"}\n'
    (installed.work / "torn.jsonl").write_bytes(good * 40 + b"{nope}\n")
    assert "torn.jsonl:41" in refused("apply", "spec.yaml")


@pytest.mark.parametrize("command", ["validate", "plan", "apply"])
def test_a_missing_data_file_is_named_beside_the_other_mistakes(
    installed: Any, refused: Callable[..., str], command: str
) -> None:
    installed.scaffold("fake-gain", "inject")
    text = "peftx: 1\nmodel: peftx:tiny\ndata:\n  train: here.jsonl\n  eval: {path: nope.jsonl}\n"
    text += "  sources: {x: gone.jsonl}\n"
    text += "stack: [{use: fake-gain, with: {pwer: 2}}]\ntrain: {steps: 0}\n"
    (installed.work / "spec.yaml").write_text(text, "utf-8")
    (installed.work / "here.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")
    message = refused(command, "spec.yaml")
    for line in (
        "5:16: data file",
        "6:16: data file",
        "7:33: unknown option",
        "8:16:",
        "4 problems in the spec",
    ):
        assert line in message
    assert "here.jsonl does" not in message


def test_a_missing_data_file(installed: Any, refused: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    spec(installed, data="row.jsonl")
    for command in ("apply", "validate"):
        message = refused(command, "spec.yaml")
        assert "row.jsonl does not exist" in message
        assert "did you mean 'rows.jsonl'?" in message
    assert "peftx:sample/train.jsonl" in refused(
        "apply", "-p", "fake-gain", "--data", "peftx:sample/trian.jsonl"
    )


# -------------------------------------------------------------------------------------------------- models and targets
@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("attention.w", ["attention.w"]),
        ("attention.q,w", ["attention.w"]),
        ("attention.q layers=90", ["90"]),
    ],
    ids=["nothing", "only partly", "no such layer"],
)
def test_targets(installed: Any, refused: Callable[..., str], targets: str, words: list[str]) -> None:
    installed.scaffold("fake-gain", "inject")
    file = spec(installed, options=f'    with: {{targets: "{targets}"}}\n')
    message = refused("apply", file)
    assert "fake-gain" in message, message
    assert all(word in message for word in words), message
    assert refused("plan", file) == "", "a plan shows it as a conflict, on stdout"


def test_a_plugin_that_the_architecture_cannot_carry(installed: Any, refused: Callable[..., str]) -> None:
    from peftx.testing import tiny

    source = (
        "from peftx import AttentionEdit, Plugin, hookimpl\n\n\nclass Fake(Plugin):\n    @hookimpl\n"
        "    def inject(self, model):\n        for site in model.attention_sites():\n"
        "            model.attend(site, AttentionEdit())\n"
    )
    installed.publish("fake-attention", source)
    tiny("mamba").save_pretrained(installed.work / "mamba")
    message = refused("apply", "--plugin", "fake-attention", "--model", "./mamba", "--data", "rows.jsonl")
    assert "rows.jsonl does not exist" in message
    spec(installed)
    (installed.work / "spec.yaml").write_text(
        "peftx: 1\nmodel: ./mamba\ndata: {train: rows.jsonl}\nstack: [fake-attention]\ntrain: {}\n", "utf-8"
    )
    message = refused("apply", "spec.yaml")
    assert "mamba" in message
    assert "attention" in message
    assert "fake-attention" in message


def test_a_checkpoint_of_pickles(installed: Any, refused: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    folder = installed.work / "old"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    spec(installed)
    for words in (
        ["apply", "spec.yaml", "--model", "./old"],
        ["plan", "spec.yaml", "--model", "./old"],
        ["generate", "old", "x"],
        ["evaluate", "./old"],
    ):
        message = refused(*words)
        assert "only as pickles (pytorch_model.bin)" in message
        assert "safetensors" in message


def test_a_model_that_is_not_there(installed: Any, refused: Callable[..., str]) -> None:
    assert "there is no bundle or model 'nowhere'" in refused("generate", "nowhere", "x")
    assert "did you mean 'peftx:tiny'" in refused("generate", "peftx:tini", "x")
    assert "cannot be read" in refused("generate", "some-body/some-model", "x")


# ---------------------------------------------------------------------------------------------------------- conflicts
STEP = """
from peftx import Claim, Plugin, hookimpl


class Fake(Plugin):
    claims = {{Claim.{claim}}}

    @hookimpl
    def {hook}: ...
"""


@pytest.mark.parametrize(
    ("claim", "hook", "why"),
    [
        ("REPLACES_STEP", "train_step(self, step)", "both replace the training step"),
        ("REPLACES_ATTENTION", "inject(self, model)", "both compute the attention"),
    ],
)
def test_two_that_replace_the_same(
    installed: Any, refused: Callable[..., str], claim: str, hook: str, why: str
) -> None:
    for name in ("fake-one", "fake-two"):
        installed.publish(name, STEP.format(claim=claim, hook=hook))
    spec(installed)
    file = installed.work / "spec.yaml"
    file.write_text(
        file.read_text().replace("  - use: fake-gain", "  - use: fake-one\n  - use: fake-two"), "utf-8"
    )
    for command in ("apply", "validate"):
        message = refused(command, "spec.yaml")
        assert why in message
        assert "'fake-one' (spec.yaml:5" in message
        assert "'fake-two' (spec.yaml:6" in message


def test_compression_before_what_would_break_it(installed: Any, refused: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    installed.scaffold("fake-bits", "compress")
    message = refused("apply", "--plugin", "fake-bits", "--plugin", "fake-gain")
    assert "'fake-bits'" in message
    assert "this order works: fake-gain, fake-bits" in message


# ------------------------------------------------------------------------------------------------------------ bundles
@pytest.fixture
def bundle(installed: Any, ok: Callable[..., str]) -> Path:
    installed.scaffold("fake-gain", "inject")
    spec(installed)
    ok("apply", "spec.yaml")
    return Path(installed.work / "out")


def test_damaged_bundles(
    bundle: Path, installed: Any, refused: Callable[..., str], ok: Callable[..., str]
) -> None:
    weights = bundle / "fake-gain.safetensors"
    raw = weights.read_bytes()

    def message() -> str:
        texts = [
            refused("generate", "out", "x"),
            refused("evaluate", "out"),
            refused("merge", "out", "merged"),
        ]
        assert len(set(texts)) == 1
        return texts[0]

    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "fake-gain.safetensors is corrupted (sha256 differs)" in message()
    weights.unlink()
    assert "fake-gain.safetensors is missing" in message()
    weights.write_bytes(raw)
    (bundle / "extra.bin").write_bytes(b"?")
    assert "extra.bin is not in the manifest" in message()
    (bundle / "extra.bin").unlink()
    manifest = (bundle / "manifest.json").read_text("utf-8")
    (bundle / "manifest.json").write_text(manifest[:50], "utf-8")
    assert "manifest.json' is corrupted" in message()
    (bundle / "manifest.json").unlink()
    assert "manifest.json is missing" in message()
    (bundle / "manifest.json").write_text(manifest, "utf-8")
    ok("generate", "out", "x", "-n", "1")


def test_another_base_model(bundle: Path, installed: Any, refused: Callable[..., str]) -> None:
    from safetensors.torch import load_file, save_file

    from peftx.engines.models import model_path

    other = installed.work / "other"
    shutil.copytree(model_path("peftx:tiny"), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "another base model" in refused("generate", "out", "x", "--model", "./other")


def test_an_output_that_is_something_else(bundle: Path, installed: Any, refused: Callable[..., str]) -> None:
    (installed.work / "mine").mkdir()
    (installed.work / "mine" / "thesis.tex").write_text("years of work", "utf-8")
    assert "exists and is no bundle" in refused("apply", "spec.yaml", "--output", "mine")
    assert "not overwritten" in refused("merge", "out", "mine")


# -------------------------------------------------------------------------------------------------------- interruptions
def test_a_full_disk(
    installed: Any, run: Callable[..., Any], ok: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises an error of its own, which is no OSError."""
    from safetensors import SafetensorError

    import peftx.engines.bundle.saving

    installed.scaffold("fake-gain", "inject")
    spec(installed)
    ok("apply", "spec.yaml")
    before = installed.files()

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(peftx.engines.bundle.saving, "save_file", full)
        result = run("apply", "spec.yaml", "--set", "train.steps=1")
    assert result.exit_code == 2
    assert "the disk is full" in result.stderr
    assert "the old one is intact" in result.stderr
    assert "the training is not lost" in result.stderr
    kept = {name: data for name, data in installed.files().items() if ".checkpoints/" not in name}
    assert kept == before
    assert "train" in ok("apply", "spec.yaml", "--set", "train.steps=1", "--resume")
    assert not (installed.work / "out.checkpoints").exists()


def test_an_interrupted_run_resumes_to_the_same_bits(
    installed: Any, run: Callable[..., Any], ok: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftx_cli.progress import LineReporter

    installed.scaffold("fake-gain", "inject")
    spec(installed)
    words = [
        "apply",
        "spec.yaml",
        "--steps",
        "6",
        "--set",
        "train.batch_size=2",
        "--set",
        "train.checkpoint_every=2",
    ]
    ok(*words, "--output", "straight")

    def interrupt(self: LineReporter, done: int, total: int, values: dict[str, float]) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LineReporter, "progress", interrupt)
        result = run(*words, "--output", "stopped")
    assert result.exit_code == 130
    assert "checkpoint-4" in result.stderr
    assert "--resume" in result.stderr
    assert not (installed.work / "stopped").exists(), "no half-written bundle"
    again = run(*words, "--output", "other")
    assert "can be resumed" not in again.stderr, "it stands beside another output"
    with monkeypatch.context() as patched:
        patched.setattr(LineReporter, "stage", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        again = run(*words, "--output", "stopped")
    assert again.exit_code == 130
    warning = again.stderr.partition("interrupted\n")[0]
    assert "warning: an interrupted run into this folder can be resumed" in warning, "before the run starts"
    assert "checkpoint-4" in warning
    assert "--resume" in warning
    resumed = run(*words, "--output", "stopped", "--resume")
    assert resumed.exit_code == 0
    (line,) = [line for line in resumed.stderr.splitlines() if line.startswith("resume")]
    assert "goes on behind step 4 of 6: " in line
    assert line.endswith("/checkpoint-4")
    name = "fake-gain.safetensors"
    assert (installed.work / "stopped" / name).read_bytes() == (
        installed.work / "straight" / name
    ).read_bytes()
    assert not (installed.work / "stopped.checkpoints").exists()


@pytest.mark.parametrize("leads", [True, False])
def test_whom_another_process_left_alone_was_interrupted(
    installed: Any, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, leads: bool
) -> None:
    """Ctrl-C reaches all processes: one that waits for the rest hears first that its connection is gone."""
    from peftx.pipeline import Run

    installed.scaffold("fake-gain", "inject")

    def alone(self: Run) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        self.leads = leads
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Run, "here", alone)
    result = run("apply", spec(installed), "--steps", "2")
    assert result.exit_code == 130
    assert "Connection closed" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[0] == "error: interrupted"
    assert (len(lines) > 1) == leads, "the first process says how to go on"


@pytest.mark.slow
def test_ctrl_c_of_torchrun(installed: Any) -> None:
    """It has a traceback of its own; its processes have none."""
    installed.scaffold("fake-gain", "inject")
    spec(installed)
    words = ["apply", "spec.yaml", "--steps", "100000", "--set", "train.checkpoint_every=1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "peftx"]
    process = subprocess.Popen(
        [sys.executable, *launch, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not list(installed.work.glob("out.checkpoints/stage-*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint was written in time"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert errors.count("error: interrupted") == 2, errors
    assert errors.count("Traceback") == 1, errors
    assert "SignalException" in errors
    assert errors.count("to go on: torchrun --nproc-per-node 2 -m peftx apply spec.yaml") == 1


def test_ctrl_c_of_a_real_process(installed: Any) -> None:
    installed.scaffold("fake-gain", "inject")
    spec(installed)
    words = ["apply", "spec.yaml", "--steps", "100000", "--set", "train.checkpoint_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "peftx_cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not list(installed.work.glob("out.checkpoints/stage-*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint was written in time"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "to go on: peftx apply spec.yaml" in errors
    assert not (installed.work / "out").exists()


def test_resume_without_a_checkpoint_says_so(installed: Any, run: Callable[..., Any]) -> None:
    installed.scaffold("fake-gain", "inject")
    result = run("apply", spec(installed), "--resume")
    assert result.exit_code == 0
    assert "no checkpoint to resume from" in result.stderr


# ----------------------------------------------------------------------------------------------------------- the shell
def test_a_bug_keeps_its_traceback_and_exits_with_1(installed: Any, spawn: Callable[..., Any]) -> None:
    code = (
        "import sys; from peftx.composition.registry import Registry\n"
        "def broken(self): raise ZeroDivisionError('a bug')\n"
        "Registry.names = broken\nfrom peftx_cli.main import main\nsys.argv = ['peftx', 'list']\nmain()"
    )
    done = spawn(python=("-c", code))
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr
    assert "Traceback" in done.stderr


def test_traceback_on_request(installed: Any, spawn: Callable[..., Any]) -> None:
    plain = spawn("info", "nowhere")
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    asked = spawn("--traceback", "info", "nowhere")
    assert asked.returncode == 2
    assert "Traceback" in asked.stderr
    assert "RegistryError" in asked.stderr


def test_no_words_of_ours_are_colored_in_a_log(installed: Any, spawn: Callable[..., Any]) -> None:
    done = spawn("info", "nowhere")
    assert done.stderr.startswith("error[registry]: no plugin named 'nowhere'")
    assert "\x1b" not in done.stderr
    assert os.linesep.join(["", "hint: "]) in done.stderr


def test_an_error_in_a_plugin_s_module_names_the_line(installed: Any, refused: Callable[..., str]) -> None:
    """Outside of a hook's own body: in the forward of its delta, or in a term of the loss."""
    source = (
        "import torch\nfrom peftx import Claim, Delta, Plugin, hookimpl\n\n\n"
        "class Bad(Delta):\n"
        "    def forward(self, x, y):\n"
        "        return torch.cta([x, y])\n\n\n"
        "class Fake(Plugin):\n"
        "    @hookimpl\n"
        "    def inject(self, model):\n"
        "        self.bad = [site.attach(Bad()) for site in model.linears('mlp.down')]\n"
    )
    installed.publish("fake-forward", source)
    message = refused(
        "apply", "--plugin", "lora", "--plugin", "fake-forward", "--steps", "1", "--metric", "none"
    )
    assert "error[plugin]: plugin 'fake-forward' failed at " in message
    assert ".py:7: AttributeError: module 'torch' has no attribute 'cta'" in message
    assert len(message.splitlines()) < 8


def test_a_port_that_is_taken_is_found_before_a_model_is_loaded(refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused("serve", "no-such-bundle", "--port", str(port))
    assert message.startswith(f"error[server]: nothing can listen at 127.0.0.1:{port}: ")
    assert "hint: another --port, or --port 0 for a free one" in message
