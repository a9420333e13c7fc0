"""Code that a checkpoint brings along runs when the user says so for this run, and never because a file says so."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STRANGE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class StrangeConfig(LlamaConfig):
    model_type = "strange"


class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""
SPEC = """\
peftx: 1
model: {model}
data: {{train: rows.jsonl}}
stack: [fake-gain]
train: {{steps: 1, batch_size: 2}}
output: out
"""
FLAG = "--trust-remote-code"


@dataclass
class Stranger:
    """A model folder whose Python code leaves a file when it runs."""

    work: Path
    marker: Path

    def spec(self, model: str = "./stranger") -> str:
        (self.work / "spec.yaml").write_text(SPEC.format(model=model), "utf-8")
        return "spec.yaml"

    def ran(self) -> bool:
        """Whether the code ran since the last look."""
        found = self.marker.exists()
        self.marker.unlink(missing_ok=True)
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]  # the next load imports it anew
        return found


@pytest.fixture
def stranger(installed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    from peftx.engines.models import model_path

    installed.scaffold("fake-gain", "inject")
    folder = installed.work / "stranger"
    shutil.copytree(model_path("peftx:tiny"), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"model_type": "strange", "architectures": ["StrangeModel"]}
    config["auto_map"] = {
        "AutoConfig": "strange.StrangeConfig",
        "AutoModelForCausalLM": "strange.StrangeModel",
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    marker = tmp_path / "it-ran"
    (folder / "strange.py").write_text(STRANGE.format(marker=str(marker)), "utf-8")
    rows = [json.dumps({"prompt": f"Say {n}.", "completion": f"It is {n}."}) for n in range(6)]
    (installed.work / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    cache = tmp_path / "modules"
    cache.mkdir()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    found = Stranger(installed.work, marker)
    yield found
    found.ran()


@pytest.mark.parametrize("value", ["true", "false", "yes"])
@pytest.mark.parametrize("command", ["validate", "plan", "apply", "train"])
def test_a_spec_cannot_ask_for_it(
    stranger: Stranger, refused: Callable[..., str], command: str, value: str
) -> None:
    file = stranger.spec(f"{{id: ./stranger, trust_remote_code: {value}}}")
    message = refused(command, file)
    assert "spec.yaml:2:25: 'trust_remote_code' is not a spec's to set" in message
    assert FLAG in message
    assert not stranger.ran()


@pytest.mark.parametrize(
    "override", ["model.trust_remote_code=true", "model={id: x, trust_remote_code: true}"]
)
@pytest.mark.parametrize("command", ["validate", "plan", "apply"])
def test_nor_can_an_override(
    stranger: Stranger, refused: Callable[..., str], command: str, override: str
) -> None:
    message = refused(command, stranger.spec(), "--set", override)
    assert "--set #1" in message
    assert FLAG in message
    assert not stranger.ran()
    if command != "validate":
        assert FLAG in refused(command, "-p", "fake-gain", "-m", "./stranger", "--set", override)
        assert not stranger.ran()


def test_without_the_flag_nothing_of_the_model_runs(stranger: Stranger, refused: Callable[..., str]) -> None:
    file = stranger.spec()
    for words in (
        ["apply", file],
        ["train", file],
        ["plan", file],
        ["apply", "-p", "fake-gain", "-m", "./stranger"],
        ["generate", "./stranger", "x"],
        ["evaluate", "./stranger"],
        ["serve", "./stranger"],
    ):
        assert "custom code" in refused(*words)
        assert not stranger.ran(), words


def test_the_refusal_names_the_flag(stranger: Stranger, refused: Callable[..., str]) -> None:
    for words in (["apply", stranger.spec()], ["plan", stranger.spec()], ["generate", "./stranger", "x"]):
        assert FLAG in refused(*words)


def test_with_the_flag_it_runs_and_no_file_remembers_it(
    stranger: Stranger, ok: Callable[..., str], refused: Callable[..., str]
) -> None:
    ok("apply", stranger.spec(), FLAG)
    assert stranger.ran()
    assert "trust" not in (stranger.work / "out" / "pipeline.yaml").read_text("utf-8")
    for words in (
        ["generate", "out", "Say 3.", "-n", "2"],
        ["evaluate", "out", "--data", "rows.jsonl"],
        ["merge", "out", "merged"],
    ):
        assert "custom code" in refused(*words), "the bundle was made with it, and does not ask for it"
        assert not stranger.ran()
        ok(*words, FLAG)
        assert stranger.ran(), words
    ok("train", "spec.yaml", FLAG, "--output", "again")
    assert stranger.ran()


def test_serve_takes_the_flag(stranger: Stranger, ok: Callable[..., str], monkeypatch: Any) -> None:
    import uvicorn

    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: None)
    ok("serve", "./stranger", FLAG)
    assert stranger.ran()


def test_plan_takes_the_flag(stranger: Stranger, ok: Callable[..., str]) -> None:
    assert "fake-gain" in ok("plan", stranger.spec(), FLAG)
    assert stranger.ran()
    assert "fake-gain" in ok("plan", "-p", "fake-gain", "-m", "./stranger", FLAG)


def test_python_takes_it_as_an_argument(stranger: Stranger) -> None:
    import peftx
    from peftx.errors import BundleError
    from peftx.pipeline import load_run

    file = stranger.work / stranger.spec()
    with pytest.raises(BundleError, match="custom code"):
        peftx.run(file)
    assert not stranger.ran()
    assert peftx.run(file, trust_remote_code=True).trainable > 0
    assert stranger.ran()
    assert load_run(file, trust_remote_code=True).trust_remote_code
    assert not load_run(file).trust_remote_code


def test_a_bundle_with_a_base_of_its_own_does_not_ask_either(
    stranger: Stranger, installed: Any, ok: Callable[..., str], run: Callable[..., Any]
) -> None:
    """A compressed bundle holds its base's configuration, and `transformers` asks at the keyboard unless it is told."""
    from peftx.engines.bundle.manifest import own_digest
    from peftx.engines.files import sha256

    installed.scaffold("fake-bits", "compress")
    ok("apply", "-p", "fake-bits", "--output", "small", "--metric", "none")
    bundle = stranger.work / "small"
    shutil.copy(stranger.work / "stranger" / "strange.py", bundle / "base" / "strange.py")
    config = json.loads((bundle / "base" / "config.json").read_text("utf-8"))
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (bundle / "base" / "config.json").write_text(json.dumps(config), "utf-8")
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    files = [file for file in bundle.rglob("*") if file.is_file() and file.name != "manifest.json"]
    manifest["files"] = {str(file.relative_to(bundle)): sha256(file) for file in files}
    manifest["own"] = own_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert not stranger.ran()
    result = run("generate", "small", "x", "-n", "1", input="y\n" * 3)
    assert not stranger.ran(), "the bundle's code ran"
    assert result.exit_code == 2
    assert FLAG in result.stderr
