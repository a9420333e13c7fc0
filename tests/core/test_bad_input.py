"""What must not go wrong when a process dies, a disk fills, or a folder was changed: the old state stays whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftx
from peftx import Claim, Delta, ModelView, Plugin, Stack, hookimpl
from peftx.composition.adapters import read_adapter
from peftx.engines import files
from peftx.engines.bundle import read_manifest, saving
from peftx.engines.checkpoints import check_weights
from peftx.engines.models import load_model
from peftx.engines.training import trainer
from peftx.errors import BundleError, MergeError, PeftxError
from peftx.testing import tiny, tiny_tokenizer
from peftx_lora import Lora

ROWS = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(8)]


class Gain(Delta):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.g

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.g[:, None], None if bias is None else bias * self.g


class Scaling(Plugin):
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.q,v"):
            site.attach(Gain(site.out_features))


def stack(value: float = 1.0) -> Stack:
    built = Stack(tiny("llama"), [Scaling()], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for tensor in built.ledger.tensors("scaling").values():
            tensor.fill_(value)
    return built


def value_in(folder: Path) -> float:
    """The gain that a bundle holds; every file is checked on the way."""
    read_manifest(folder)
    values = {float(v) for t in load_file(folder / "scaling.safetensors").values() for v in t.unique()}
    assert len(values) == 1, f"tensors of two saves in one bundle: {values}"
    return values.pop()


# ----------------------------------------------------------------------------------------------------- kill -9, a save
def killed(do: Callable[[], object]) -> None:
    """Run what kills its own process, in a fork of this one: the libraries are loaded here, and nothing outlives it."""
    child = os.fork()
    if child == 0:
        try:
            do()
        except BaseException:  # noqa: BLE001  shown, and the status says that it was not killed
            traceback.print_exc()
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == -signal.SIGKILL, f"it ended with status {code}"


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (saving, "save_file"),
        (saving, "sha256"),
        (saving, "_pipeline_text"),
        (os, "fsync"),
        (files, "_exchange"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_kill_during_a_save_leaves_the_old_bundle(tmp_path: Path, module: ModuleType, name: str) -> None:
    folder = tmp_path / "bundle"
    stack(1.0).save(folder)
    second = stack(2.0)

    def save() -> None:
        setattr(module, name, die)
        second.save(folder)

    killed(save)
    assert value_in(folder) == 1.0
    assert list(tmp_path.glob(".bundle.writing-*")), "the dead process left its half"
    stack(3.0).save(folder)
    assert value_in(folder) == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "and the next save clears it away"


def test_kill_between_the_renames_of_a_system_without_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old bundle stands aside for a moment; reading brings it back."""
    folder = tmp_path / "bundle"
    stack(1.0).save(folder)
    monkeypatch.setattr("peftx.engines.files._exchange", lambda one, two: False)
    rename, calls = Path.rename, []

    def stop(self: Path, target: Path) -> Any:
        if calls:  # the second that moves something
            raise KeyboardInterrupt
        moved = rename(self, target)
        calls.append(self)
        return moved

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        stack(2.0).save(folder)
    monkeypatch.setattr(Path, "rename", rename)
    assert not folder.exists()
    assert value_in(folder) == 1.0


# --------------------------------------------------------------------------------------------------------- a full disk
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["device", "quota", "safetensors"])
def test_full_disk_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    folder = tmp_path / "bundle"
    stack(1.0).save(folder)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("peftx.engines.bundle.saving.save_file", full)
    with pytest.raises(BundleError, match=r"the disk is full.*the old one is intact"):
        stack(2.0).save(folder)
    assert value_in(folder) == 1.0
    with pytest.raises(BundleError) as caught:
        stack(2.0).save(tmp_path / "other")
    assert caught.value.message == f"the disk is full: '{tmp_path / 'other'}' was not written"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_another_error_while_saving_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> None:
        def failing(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("peftx.engines.bundle.saving.save_file", failing)

    fails(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        stack().save(tmp_path / "bundle")
    fails(errno.EACCES)
    with pytest.raises(BundleError, match="bundle' was not written: Permission denied"):
        stack().save(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_training_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = trainer.save_file, []

    def second_is_full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise FULL[2]
        save(*arguments)

    options = {"steps": 4, "batch_size": 2, "checkpoint_every": 1, "max_length": 48, "output": tmp_path}
    monkeypatch.setattr(trainer, "save_file", second_is_full)
    with pytest.raises(BundleError, match=r"the disk is full.*checkpoint-2"):
        stack().train(ROWS, **options)
    monkeypatch.setattr(trainer, "save_file", save)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert stack().train(ROWS, resume=True, **options).steps == 4


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="needs root, to mount a tiny disk"
)
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=False, capture_output=True
    ).returncode:
        pytest.skip("root may not mount here")
    try:
        (small / "ballast").write_bytes(b"0" * 60_000)
        with pytest.raises(BundleError, match="the disk is full"):
            stack().save(small / "bundle")
        assert [path.name for path in small.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", small], check=True)


# ------------------------------------------------------------------------------------------------- interrupted training
def test_interrupted_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options = {"steps": 6, "batch_size": 2, "checkpoint_every": 2, "max_length": 48, "learning_rate": 1e-2}
    straight = stack()
    straight.train(ROWS, output=tmp_path / "straight", **options)

    def interrupt(done: int, total: int, terms: dict[str, float]) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stack().train(ROWS, output=tmp_path / "run", progress=interrupt, **options)
    resumed = stack()
    resumed.train(ROWS, output=tmp_path / "run", resume=True, **options)
    for name, tensor in straight.ledger.tensors("scaling").items():
        assert torch.equal(tensor, resumed.ledger.tensors("scaling")[name]), name


def test_kill_during_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    options = {"steps": 4, "batch_size": 2, "checkpoint_every": 1, "max_length": 48, "output": tmp_path}
    save, written = trainer.save_state, []

    def die_at_the_second(path: Path, *rest: Any) -> None:
        if path.name == "optimizer":
            written.append(path)
            if len(written) == 2:
                die()
        save(path, *rest)

    def train() -> None:
        trainer.save_state = die_at_the_second
        stack().train(ROWS, **options)

    killed(train)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert stack().train(ROWS, resume=True, **options).steps == 4


# --------------------------------------------------------------------------------------------------- a changed folder
def test_every_changed_byte_of_a_bundle_is_seen(tmp_path: Path) -> None:
    folder = stack().save(tmp_path / "bundle")
    for name in json.loads((folder / "manifest.json").read_text("utf-8"))["files"]:
        raw = (folder / name).read_bytes()
        for place in (0, len(raw) // 2, len(raw) - 1):
            (folder / name).write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            with pytest.raises(BundleError, match=f"{name} is corrupted"):
                peftx.load(folder, model=tiny("llama"), tokenizer=tiny_tokenizer())
        (folder / name).write_bytes(raw)
    peftx.load(folder, model=tiny("llama"), tokenizer=tiny_tokenizer())


def sign_anew(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors in a bundle's file, and a manifest that says so."""
    from peftx.engines.bundle import own_digest
    from peftx.engines.files import sha256

    save_file(tensors, file)
    manifest = json.loads((file.parent / "manifest.json").read_text("utf-8"))
    manifest["files"][file.name] = sha256(file)
    manifest["own"] = own_digest(manifest)
    (file.parent / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_a_cast_of_half_a_module(tmp_path: Path) -> None:
    class TwoFactors(Delta):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y * self.a * self.b

    class Twice(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            for site in model.linears("attention.q"):
                site.attach(TwoFactors(site.out_features))

    folder = Stack(tiny("llama"), [Twice()]).save(tmp_path / "bundle")
    file = folder / "twice.safetensors"
    tensors = load_file(file)
    sign_anew(file, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    whole = peftx.load(folder, model=tiny("llama"))
    assert {p.dtype for p in whole.ledger.parameters("twice")} == {torch.bfloat16}, "the user's own cast"
    half = {name: t.to(torch.bfloat16) if name.endswith(".a") else t for name, t in tensors.items()}
    sign_anew(file, half)
    with pytest.raises(
        BundleError, match=r"twice\.safetensors.*\.b is torch\.float32, and .*\.a .* torch\.bfloat16"
    ):
        peftx.load(folder, model=tiny("llama"))


@pytest.mark.parametrize("change", ["missing", "extra", "renamed"])
def test_tensors_that_do_not_fit(tmp_path: Path, change: str) -> None:
    """Files that agree with their manifest, of another version of the plugin."""
    folder = stack().save(tmp_path / "bundle")
    file = folder / "scaling.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if change != "extra":
        moved = tensors.pop(first)
    if change != "missing":
        tensors["scaling.new"] = torch.zeros(3) if change == "extra" else moved
    sign_anew(file, tensors)
    with pytest.raises(BundleError, match="do not fit this model") as caught:
        peftx.load(folder, model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert ("missing" in caught.value.message) == (change != "extra")
    assert ("too many" in caught.value.message) == (change != "missing")


def test_another_base_model(tmp_path: Path) -> None:
    folder = stack().save(tmp_path / "bundle")
    other = tiny("llama")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(BundleError, match="is another base model"):
        peftx.load(folder, model=other, tokenizer=tiny_tokenizer())


def test_a_newer_format(tmp_path: Path) -> None:
    folder = stack().save(tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}), "utf-8")
    with pytest.raises(BundleError, match="format 99"):
        peftx.load(folder)


def test_saving_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work", "utf-8")
    (tmp_path / "file").write_text("a file", "utf-8")
    for name in ("mine", "file"):
        with pytest.raises(BundleError, match="not overwritten"):
            stack().save(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text("utf-8") == "years of work"


def test_merge_into_a_quantized_base(tmp_path: Path) -> None:
    """Whatever stands on integers cannot be folded into them; nothing is changed by the attempt."""
    from peftx.toolkits.compression import QuantLinear

    class Integers(Plugin):
        claims = {Claim.QUANTIZES}

        @hookimpl
        def compress(self, model: ModelView) -> None:
            for site in model.linears("attention.q,v"):
                site.replace(QuantLinear.from_linear(site.module, bits=8))

    built = Stack(tiny("llama"), [Integers(), Scaling()], tokenizer=tiny_tokenizer(), inject=False)
    built.compress(ids=["integers"])
    built.inject()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = built.model(ids).logits
        with pytest.raises(MergeError):
            built.merge()
        with pytest.raises(MergeError):
            built.export(tmp_path / "out")
        assert torch.equal(built.model(ids).logits, before)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    tiny("llama").save_pretrained(folder)
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(BundleError, match=r"only as pickles \(pytorch_model.bin\)"):
        Stack(str(folder))
    with pytest.raises(BundleError, match=r"only as pickles \(pytorch_model.bin\)"):
        load_model(str(folder), meta=True)  # a plan that no run could follow
    (folder / "pytorch_model.bin").unlink()
    (folder / "training_args.bin").write_bytes(b"\x80")  # a Trainer's, and no weights
    with pytest.raises(BundleError, match="holds no weights"):
        Stack(str(folder))
    assert load_model(str(folder), meta=True)[0].device.type == "meta"  # a shape needs none
    with pytest.raises(PeftxError, match="does not exist"):
        Stack(str(tmp_path / "nowhere"))


def test_a_bundle_in_the_place_of_a_model_or_an_adapter(tmp_path: Path) -> None:
    """Whoever trained one and wants to go on with it is told how."""
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="holds no model") as model:
        check_weights(tmp_path)
    assert model.value.hint == (
        f"it is a bundle: peftx export {tmp_path} merged --format hf writes a model, where its plugins fold"
    )
    with pytest.raises(BundleError, match="is no adapter of PEFT") as adapter:
        read_adapter(tmp_path)
    assert adapter.value.hint == f"it is a bundle: peftx export {tmp_path} adapter --format peft writes one"


def test_what_others_may_read_of_a_folder_they_may_read_of_its_files(tmp_path: Path) -> None:
    """safetensors writes for the owner alone, and a server runs as another user."""
    before = os.umask(0o022)
    try:
        saved = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer()).save(tmp_path / "b")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in saved.rglob("*") if path.is_file()} == {0o644}
