"""Bundles and rows of the Hugging Face Hub, against one on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import peftx
from peftx import sharing
from peftx.engines import hub as engine
from peftx.engines.bundle import own_digest
from peftx.errors import BundleError, HubError
from peftx.merging import merge_adapters
from peftx.testing import loopback_hub
from peftx.testing.hub import LoopbackHub
from peftx_ia3 import Ia3
from peftx_lora import Lora

PROMPT = "Once upon a time"
SECRET = "a sentence of the user's own rows"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    engine.pinned_rows.cache_clear()
    with loopback_hub() as found:
        yield found
        monkeypatch.undo()  # what a test set in place of the hub's values goes before they do, or it brings them back


def bundle(path: Path, plugin: peftx.Plugin | None = None) -> Path:
    stack = peftx.Stack("peftx:tiny", [plugin or Lora(rank=2, targets="attention.q")])
    with torch.no_grad():
        for name in stack.plugins:
            for parameter in stack.ledger.parameters(name):
                parameter.normal_(std=0.2)
    return stack.save(path)


@pytest.fixture
def saved(installed: Any) -> Path:
    return bundle(installed.work / "out")


def logits(stack: peftx.Stack) -> torch.Tensor:
    ids = torch.tensor([stack.tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        return stack.model.eval()(ids).logits


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def manifest(names: dict[str, bytes]) -> bytes:
    """A manifest that names these files, with the digests that they have."""
    return json.dumps(
        {"format": 1, "files": {n: hashlib.sha256(c).hexdigest() for n, c in names.items()}}
    ).encode()


# ------------------------------------------------------------------------------------------------- there and back
def test_there_and_back(
    hub: LoopbackHub, saved: Path, ok: Callable[..., str], ok_json: Callable[..., Any]
) -> None:
    told = ok("push", "out", "me/greeter")
    there = hub.repos["models/me/greeter"]
    assert there.private
    assert len(there.commits) == 2  # the Hub's own, and the push
    assert f"hub:me/greeter@{there.tags['main']}" in told
    pushed = hub.files("models/me/greeter")
    assert {name: pushed[name] for name in pushed if name != ".gitattributes"} == files(saved)

    found = ok_json("pull", "me/greeter", "-o", "back", "--json")
    assert found["commit"] == there.tags["main"]
    assert found["revision"] == "main"
    assert found["id"] in told
    ours = {n: c for n, c in files(Path("back")).items() if n != "manifest.json"}
    assert ours == {n: c for n, c in files(saved).items() if n != "manifest.json"}
    noted = json.loads(Path("back/manifest.json").read_text("utf-8"))["hub"]
    assert noted == {"repo": "me/greeter", "revision": "main", "commit": found["commit"]}
    assert torch.equal(logits(peftx.load("back")), logits(peftx.load(saved)))
    ok("report", "back", "-o", "report.html")
    assert found["commit"] in Path("report.html").read_text("utf-8")


def test_the_rows_stay_here(hub: LoopbackHub, installed: Any, ok: Callable[..., str]) -> None:
    rows = "\n".join(json.dumps({"text": f"{SECRET}, number {n}"}) for n in range(8))
    (installed.work / "rows.jsonl").write_text(rows, "utf-8")
    ok("train", "--plugin", "lora", "--data", "rows.jsonl", "--steps", "1", "--metric", "none", "-o", "out")
    ok("push", "out", "me/greeter", "--public")
    assert not hub.repos["models/me/greeter"].private
    assert all(SECRET.encode() not in content for content in hub.files("models/me/greeter").values())


def test_a_second_push_replaces_the_first_in_one_commit(
    hub: LoopbackHub, saved: Path, tmp_path: Path
) -> None:
    first = peftx.push(saved, "me/greeter")
    hub.put("models/me/greeter", hub.files("models/me/greeter") | {"LICENSE": b"mine"})
    count = len(hub.repos["models/me/greeter"].commits)
    other = bundle(tmp_path / "other", Ia3())
    second = peftx.push(other, "hub:me/greeter")
    assert len(hub.repos["models/me/greeter"].commits) == count + 1
    assert set(hub.files("models/me/greeter")) == {".gitattributes", "LICENSE", *files(other)}
    assert list(peftx.load("hub:me/greeter").plugins) == ["ia3"]
    assert list(peftx.load(first.id).plugins) == ["lora"]  # a commit stays what it was
    assert second.commit != first.commit


def test_nobody_elses_commit_is_buried(
    hub: LoopbackHub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peftx.push(saved, "me/greeter")
    own = sharing._own_files

    def meanwhile(folder: Path) -> list[str]:
        hub.put("models/me/greeter", hub.files("models/me/greeter") | {"LICENSE": b"theirs"})
        return own(folder)

    monkeypatch.setattr(sharing, "_own_files", meanwhile)
    other = bundle(saved.parent / "other", Ia3())
    with pytest.raises(HubError, match="changed meanwhile, and nothing was written"):
        peftx.push(other, "me/greeter")
    assert "ia3.safetensors" not in hub.files("models/me/greeter")


def test_a_revision_becomes_a_commit(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    first = peftx.push(saved, "me/greeter")
    hub.repos["models/me/greeter"].tags["v1"] = first.commit
    peftx.push(bundle(tmp_path / "other", Ia3()), "me/greeter")
    for revision in ("v1", first.commit):
        found = peftx.pull(f"me/greeter@{revision}", tmp_path / "back")
        assert (found.revision, found.commit) == (revision, first.commit)
        assert list(peftx.load(tmp_path / "back").plugins) == ["lora"]


def test_where_a_bundle_is_expected(
    hub: LoopbackHub, saved: Path, tmp_path: Path, ok: Callable[..., str]
) -> None:
    id = peftx.push(saved, "me/greeter").id
    wanted = logits(peftx.load(saved))
    assert ok("generate", "hub:me/greeter", PROMPT, "-n", "6") == ok("generate", "out", PROMPT, "-n", "6")
    assert torch.equal(logits(peftx.load_together({"a": id})["a"]), wanted)
    ok("merge", id, "plain")
    merged = merge_adapters([id, saved], method="linear", weights=[0.5, 0.5])
    assert torch.allclose(logits(merged.stack), wanted, rtol=0, atol=1e-4)
    teacher = peftx.companion(peftx.Stack("peftx:tiny", []), id)
    ids = torch.tensor([peftx.load(saved).tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        assert torch.equal(teacher(ids).logits, wanted)


def test_a_commit_that_is_here_needs_no_network(
    hub: LoopbackHub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = peftx.push(saved, "me/greeter").id
    peftx.load(id)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert list(peftx.load(id).plugins) == ["lora"]
    assert peftx.pull(id, tmp_path / "back").commit == id.partition("@")[2]
    assert not hub.asked
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        peftx.load("hub:me/greeter")


def test_the_card_names_a_base_of_the_hub_only(saved: Path, tmp_path: Path) -> None:
    assert "base_model" not in (saved / "README.md").read_text("utf-8")  # the Hub refuses peftx:tiny
    stack = peftx.load(saved)
    stack.base_id = "owner/base"
    stack.save(tmp_path / "named")
    assert "base_model: owner/base" in (tmp_path / "named/README.md").read_text("utf-8")


# ------------------------------------------------------------------------------------------ what is not fetched
STRANGE = (
    "pickle.bin",
    "code.py",
    "../outside.json",
    "/outside.json",
    "a/../b.json",
    ".cache/x.json",
    "a\\b.json",
)


@pytest.mark.parametrize("name", STRANGE)
def test_only_files_of_a_bundle_are_fetched(hub: LoopbackHub, tmp_path: Path, name: str) -> None:
    hub.put("models/them/trap", {"manifest.json": manifest({name: b"x"}), name: b"x"})
    with pytest.raises(HubError, match="which no bundle has, and nothing was fetched"):
        peftx.pull("them/trap", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert {line for line in hub.asked if "/resolve/" in line} == {
        f"{method} /them/trap/resolve/{hub.repos['models/them/trap'].tags['main']}/manifest.json"
        for method in ("HEAD", "GET")
    }


def test_what_else_lies_in_the_repository_stays_there(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    hub.put("models/them/more", files(saved) | {"modeling.py": b"raise SystemExit", "weights.bin": b"\x80"})
    peftx.pull("them/more", tmp_path / "back")
    assert files(tmp_path / "back").keys() == files(saved).keys()


def test_damage_is_found(
    hub: LoopbackHub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(saved)
    hub.put("models/them/damaged", whole | {"pipeline.yaml": whole["pipeline.yaml"] + b"\n# more"})
    with pytest.raises(BundleError, match=r"pipeline.yaml is corrupted"):
        peftx.pull("them/damaged", tmp_path / "back")
    hub.put("models/them/damaged", {n: c for n, c in whole.items() if n != "lora.safetensors"})
    with pytest.raises(HubError, match=r"names 'lora.safetensors', and it is not there"):
        peftx.pull("them/damaged", tmp_path / "back")
    edited = json.loads(whole["manifest.json"]) | {"seed": 7}
    hub.put("models/them/damaged", whole | {"manifest.json": json.dumps(edited).encode()})
    with pytest.raises(BundleError, match="was edited"):
        peftx.pull("them/damaged", tmp_path / "back")
    monkeypatch.setattr(sharing, "MOST_JSON", len(whole["manifest.json"]))
    hub.put("models/them/damaged", whole | {"README.md": b" " * (len(whole["manifest.json"]) + 1)})
    with pytest.raises(HubError, match=r"'README.md' has .* bytes, and at most"):
        peftx.pull("them/damaged", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not list((Path(constants.HF_HOME) / "peftx" / "them--damaged").glob("*"))


def test_a_folder_with_other_files_is_left_alone(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    peftx.push(saved, "me/greeter")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine", "utf-8")
    with pytest.raises(BundleError, match="is not overwritten"):
        peftx.pull("me/greeter", tmp_path / "notes")
    peftx.pull("me/greeter", saved)  # a bundle is replaced
    assert list(peftx.load(saved).plugins) == ["lora"]


# --------------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_pushed(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="a push makes a commit on main"):
        peftx.push(saved, "me/greeter@v1")
    with pytest.raises(HubError, match="names nothing on the Hub"):
        peftx.push(saved, "greeter")
    with pytest.raises(BundleError, match="no bundle at"):
        peftx.push(tmp_path / "nowhere", "me/greeter")
    (saved / "rows.jsonl").write_text("{}", "utf-8")
    with pytest.raises(BundleError, match=r"rows.jsonl is not in the manifest"):
        peftx.push(saved, "me/greeter")
    found = json.loads((saved / "manifest.json").read_text("utf-8"))
    found["files"]["rows.jsonl"] = hashlib.sha256(b"{}").hexdigest()
    found["own"] = own_digest(found)
    (saved / "manifest.json").write_text(json.dumps(found), "utf-8")
    with pytest.raises(BundleError, match=r"rows.jsonl' is no file that is shared"):
        peftx.push(saved, "me/greeter")
    assert not hub.repos


def test_a_repository_of_something_else_is_left_alone(hub: LoopbackHub, saved: Path) -> None:
    hub.put("models/me/model", {"README.md": b"# Mine", "model.safetensors": b"weights"})
    with pytest.raises(HubError, match=r"holds model.safetensors and no manifest.json"):
        peftx.push(saved, "me/model")
    hub.put("models/me/empty", {".gitattributes": b"", "README.md": b"# To come"})
    peftx.push(saved, "me/empty")
    assert hub.files("models/me/empty")["README.md"] == (saved / "README.md").read_bytes()


def test_tokens(hub: LoopbackHub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="your token does not allow it"):
        peftx.push(saved, "forbidden/greeter")
    hub.put("models/me/secret", files(saved), private=True)
    peftx.pull("me/secret", tmp_path / "back")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(HubError, match="the Hub does not take your token") as caught:
        peftx.push(saved, "me/greeter")
    assert "hf auth login" in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="a push needs a token") as caught:
        peftx.push(saved, "me/greeter")
    assert "hf auth login, or HF_TOKEN" in str(caught.value)
    with pytest.raises(HubError, match="or it is private") as caught:
        peftx.pull("me/secret@v9", tmp_path / "back2")
    assert "hf auth login" in str(caught.value)


def test_what_is_not_there(
    hub: LoopbackHub, saved: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such repository" in refused("pull", "me/nothing", "-o", "back")
    assert "no such repository" in refused("generate", "hub:me/nothing", PROMPT)
    peftx.push(saved, "me/greeter")
    assert "no such revision" in refused("pull", "me/greeter@v9", "-o", "back")
    hub.put("models/them/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    told = refused("pull", "them/adapter", "-o", "back")
    assert "manifest.json is missing" in told
    assert "hf download them/adapter --local-dir DIR" in told
    assert "names nothing on the Hub" in refused("pull", "greeter", "-o", "back")
    assert "names nothing on the Hub" in refused("generate", "hub:me/greeter/rows.jsonl", PROMPT)
    assert "Cannot have -- or .." in refused("pull", "me/gree..ter", "-o", "back")


@pytest.fixture
def silent() -> Iterator[str]:
    """A host that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_host_that_does_not_answer(
    hub: LoopbackHub, saved: Path, silent: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.5)
    monkeypatch.setattr(sharing, "PATIENCE", 60.0)  # so that it is the thread's own limit that is tried
    for endpoint in (silent, "http://127.0.0.1:1", "http://no-such-host.invalid"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for words in (
            ("pull", "me/x", "-o", "back"),
            ("push", "out", "me/x"),
            ("generate", "hub:me/x", PROMPT),
        ):
            told = refused(*words)
            assert f"{endpoint} does not answer" in told
            assert "HF_ENDPOINT" in told
            assert len(told.splitlines()) == 3  # the error, the hint and where more is


@pytest.mark.parametrize(
    ("offline", "words", "wanted"),
    [
        ("0", ["generate", "hub:me/x", PROMPT], "does not answer"),
        ("1", ["push", "out", "me/x"], "HF_HUB_OFFLINE is set"),
        ("1", ["pull", "me/x", "-o", "back"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_within_seconds(offline: str, words: list[str], wanted: str, silent: str, saved: Path) -> None:
    """The error comes before torch is imported, which takes seconds of its own."""
    code = (
        "import sys, time, huggingface_hub; from peftx_cli.main import app; from typer.testing import CliRunner\n"
        f"began = time.monotonic(); result = CliRunner().invoke(app, {words}); taken = time.monotonic() - began\n"
        "print(result.stderr); assert taken < 5, taken; assert result.exit_code == 2, result\n"
        "assert 'torch' not in sys.modules"
    )
    here = {"HF_ENDPOINT": silent, "HF_HUB_OFFLINE": offline, "HF_TOKEN": "hf_x"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **here}
    )
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout


# ------------------------------------------------------------------------------------------------------- rows
ROWS = "\n".join(json.dumps({"text": f"The harbour opens at {n}."}) for n in range(1, 13)).encode()


def test_rows_of_the_hub(
    hub: LoopbackHub, installed: Any, ok: Callable[..., str], refused: Callable[..., str]
) -> None:
    commit = hub.put("datasets/me/rows", {"train.jsonl": ROWS, "load.py": b"raise SystemExit"})
    spec = """peftx: 1
model: peftx:tiny
stack: [{use: lora, with: {rank: 2}}]
data: {train: "hub:me/rows/train.jsonl", holdout: 0.2}
train: {steps: 1, batch_size: 2}
evaluate: [perplexity]
output: out
"""
    (installed.work / "spec.yaml").write_text(spec, "utf-8")
    ok("validate", "spec.yaml")
    ok("plan", "spec.yaml")
    ok("train", "spec.yaml")
    saved = (installed.work / "out/pipeline.yaml").read_text("utf-8")
    assert f"hub:me/rows@{commit}/train.jsonl" in saved
    hub.put("datasets/me/rows", {"train.jsonl": b'{"text": "other"}'})
    (installed.work / "again.yaml").write_text(saved.replace("/out", "/again"), "utf-8")
    ok("train", "again.yaml")
    assert files(Path("out"))["lora.safetensors"] == files(Path("again"))["lora.safetensors"]
    ok("data", "again.yaml")
    ok("plan", "--plugin", "lora", "--data", "hub:me/rows/train.jsonl", "--split", "0.5")
    assert not any("load.py" in line for line in hub.asked)

    for path, wanted in (
        ("hub:me/rows/tarin.jsonl", "did you mean 'train.jsonl'?"),
        ("hub:me/nothing/train.jsonl", "no such repository"),
        ("hub:me/rows@v9/train.jsonl", "no such revision"),
        ("hub:me/rows/load.py", "is no file of rows"),
        ("hub:me/rows", "names nothing on the Hub"),
    ):
        (installed.work / "wrong.yaml").write_text(spec.replace("hub:me/rows/train.jsonl", path), "utf-8")
        engine.pinned_rows.cache_clear()
        told = refused("validate", "wrong.yaml")
        assert wanted in told
        assert "wrong.yaml:4" in told


def test_rows_of_a_commit_need_the_hub_once(
    hub: LoopbackHub, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"hub:me/rows@{hub.put('datasets/me/rows', {'train.jsonl': ROWS})}/train.jsonl"
    monkeypatch.setattr(engine, "PATIENCE", 0.5)
    endpoint = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    with pytest.raises(HubError, match="does not answer"):
        engine.rows_path(path)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert engine.rows_path(path).read_bytes() == ROWS
    engine.pinned_rows.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    hub.asked.clear()
    assert engine.rows_path(path).read_bytes() == ROWS
    assert not hub.asked


def test_rows_in_python(hub: LoopbackHub) -> None:
    hub.put("datasets/me/rows", {"deep/train.jsonl": ROWS})
    stack = peftx.Stack("peftx:tiny", [Lora(rank=2)])
    stack.train("hub:me/rows/deep/train.jsonl", steps=1, batch_size=2)
    assert stack.evaluate("hub:me/rows/deep/train.jsonl", metrics=["perplexity"])["perplexity"].count
