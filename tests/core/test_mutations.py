"""Damaged, odd and hostile files are refused by name, or change nothing. benchmarks/mutations.py tries many more."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from peftx.errors import PeftxError
from peftx.testing.attempt import Outcome, Reading, attempt
from peftx.testing.mutations import CANARY, HUGE, KINDS, mutate

FILE = Path(__file__).parents[2] / "benchmarks" / "mutations.py"
SAMPLE, SEED = 40, 3
SECONDS = 20.0

Change = Callable[[Path, Path], str]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("peftx_benchmark_mutations", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def bench(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return benchmark.Bench(tmp_path_factory.mktemp("mutations"), seconds=SECONDS)


def damaged(bench: Any, case: str, change: Change) -> Any:
    """What reading says of this case's folder after a change."""
    module = sys.modules[type(bench).__module__]
    found = next(known for known in module.CASES if known.name == case)
    result = bench.one(found, "", "", change=change)
    assert result is not None
    return result


def refused(bench: Any, case: str, change: Change, *words: str) -> None:
    result = damaged(bench, case, change)
    if case == "checkpoint" and result.outcome.word == "read":
        assert not result.finding, str(result)  # it went on from the whole one before, to the same bits
        return
    assert result.outcome.word == "refused", str(result)
    for word in words:
        assert word in result.outcome.detail, str(result)


# ------------------------------------------------------------------------------------------------------------- a sample
def test_a_sample_of_mutations(benchmark: ModuleType, bench: Any) -> None:
    """Without those of a terabyte, which take their time where they are found, and have tests of their own below."""
    kinds = [kind for kind in KINDS if kind != "huge"]
    results = list(benchmark.results(bench, SAMPLE, SEED, benchmark.CASES, kinds))
    assert len(results) == SAMPLE
    assert not [str(result) for result in results if result.finding]


# --------------------------------------------------------------------------------------------------- code and questions
def auto_map(name: str, **more: Any) -> Change:
    """`name` points at a class of a module that lies beside it, as the models of remote code do."""

    def change(folder: Path, outside: Path) -> str:
        file = folder / name
        config = json.loads(file.read_text("utf-8")) | more
        config["auto_map"] = {"AutoConfig": "strange.Strange", "AutoTokenizer": ["strange.Strange", None]}
        file.write_text(json.dumps(config), "utf-8")
        code = f"open({str(outside / CANARY)!r}, 'w').close()\nclass Strange: pass\n"
        (file.parent / "strange.py").write_text(code, "utf-8")
        return name

    return change


@pytest.mark.parametrize(
    ("case", "name", "more"),
    [
        ("base", "config.json", {"model_type": "strange", "architectures": ["Strange"]}),
        ("base", "tokenizer_config.json", {"tokenizer_class": "Strange"}),
        ("prefixquant bundle, signed", "base/config.json", {"model_type": "strange"}),
        ("prefixquant bundle, signed", "tokenizer/tokenizer_config.json", {"tokenizer_class": "Strange"}),
    ],
)  # fmt: skip
def test_auto_map_neither_runs_nor_asks(bench: Any, case: str, name: str, more: dict[str, Any]) -> None:
    refused(bench, case, auto_map(name, **more))


def pickled(folder: Path, outside: Path) -> bytes:
    return f"cposix\nsystem\n(S'touch {outside / CANARY}'\ntR.".encode()


def index_of(folder: Path, target: Any) -> None:
    """The weights, all of which an index names to lie in `target`."""
    names = list(load_file(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def test_an_index_that_points_at_a_pickle(bench: Any) -> None:
    def change(folder: Path, outside: Path) -> str:
        (folder / "pytorch_model.bin").write_bytes(pickled(folder, outside))
        index_of(folder, "pytorch_model.bin")
        return "index"

    refused(bench, "base", change, "model.safetensors.index.json", "pytorch_model.bin")


# ------------------------------------------------------------------------------------------------- out of the folder
LEADING_OUT = {
    "up": lambda folder, target: os.path.relpath(target, folder),
    "absolute": lambda folder, target: str(target),
    "a link": lambda folder, target: "link.safetensors",
}


@pytest.mark.parametrize("how", LEADING_OUT)
def test_an_index_that_leads_out_of_the_folder(bench: Any, how: str) -> None:
    def change(folder: Path, outside: Path) -> str:
        target = outside / "x.safetensors"
        shutil.copyfile(folder / "model.safetensors", target)
        if how == "a link":
            (folder / "link.safetensors").symlink_to(target)
        index_of(folder, LEADING_OUT[how](folder, target))
        return how

    result = damaged(bench, "base", change)
    if how == "a link":  # as in the cache of a hub, whose files are links
        assert result.outcome.word in ("refused", "outside"), str(result)
    else:
        assert result.outcome.word == "refused", str(result)
        assert "model.safetensors.index.json" in result.outcome.detail


@pytest.mark.parametrize("how", LEADING_OUT)
def test_a_manifest_that_leads_out_of_the_folder(bench: Any, how: str) -> None:
    def change(folder: Path, outside: Path) -> str:
        target = outside / "x.safetensors"
        shutil.move(folder / "lora.safetensors", target)
        if how == "a link":
            (folder / "link.safetensors").symlink_to(target)
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text("utf-8"))
        name = LEADING_OUT[how](folder, target)
        manifest["plugins"][0]["file"] = name
        manifest["files"][name] = manifest["files"].pop("lora.safetensors")
        file.write_text(json.dumps(manifest), "utf-8")
        return how

    refused(bench, "lora bundle, signed", change)


@pytest.mark.parametrize("case", ["lora bundle", "lora bundle, signed"])
@pytest.mark.parametrize("name", ["lora.safetensors", "README.md", "manifest.json"])
def test_a_file_of_a_bundle_that_is_a_link(bench: Any, case: str, name: str) -> None:
    def change(folder: Path, outside: Path) -> str:
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(outside / name)
        return name

    refused(bench, case, change, name)


# --------------------------------------------------------------------------------------------------- what is no file
PLACES = [
    ("lora bundle", "manifest.json"),
    ("lora bundle, signed", "lora.safetensors"),
    ("prefixquant bundle", "base/config.json"),
    ("base", "config.json"),
    ("base", "model.safetensors"),
    ("base", "tokenizer.json"),
    ("base in shards", "model-00002-of-00003.safetensors"),
    ("base in shards", "model.safetensors.index.json"),
    ("checkpoint", "checkpoint-2/trainer_state.json"),
    ("checkpoint", "checkpoint-2/run.json"),
    ("checkpoint", "checkpoint-2/optimizer.json"),
    ("checkpoint", "checkpoint-2/trained.safetensors"),
    ("peft adapter", "adapter_config.json"),
    ("peft adapter", "adapter_model.safetensors"),
    ("export over another", "peftx_export.json"),
    ("spec", "pipeline.yaml"),
]
INSTEAD: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "nothing": lambda file: None,
}


@pytest.mark.parametrize("what", INSTEAD)
@pytest.mark.parametrize(("case", "name"), PLACES)
def test_something_else_in_place_of_a_file(bench: Any, case: str, name: str, what: str) -> None:
    """It must not hang. A missing tokenizer leaves a model without one; a folder without a marker is no export."""

    def change(folder: Path, outside: Path) -> str:
        (folder / name).unlink()
        INSTEAD[what](folder / name)
        return f"{name} is {what}"

    if (name, what) == ("tokenizer.json", "nothing"):
        pytest.skip("tokenizer_config.json alone may make a tokenizer")
    refused(bench, case, change)


@pytest.mark.parametrize(("case", "name"), PLACES)
def test_a_file_of_a_terabyte(bench: Any, case: str, name: str) -> None:
    def change(folder: Path, outside: Path) -> str:
        os.truncate(folder / name, HUGE)
        return name

    refused(bench, case, change)


# ----------------------------------------------------------------------------------------------------- what is missing
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("lora bundle", "lora.safetensors"),
        ("lora bundle, signed", "lora.safetensors"),
        ("prefixquant bundle, signed", "base.safetensors"),
        ("prefixquant bundle, signed", "base/config.json"),
        ("base in shards", "model-00002-of-00003.safetensors"),
        ("base in shards", "model.safetensors.index.json"),
        ("peft adapter", "adapter_model.safetensors"),
        ("peft adapter", "adapter_config.json"),
    ],
)
def test_a_missing_file_is_named(bench: Any, case: str, name: str) -> None:
    def change(folder: Path, outside: Path) -> str:
        (folder / name).unlink()
        return name

    refused(bench, case, change, name.removeprefix("base/"))


@pytest.mark.parametrize("change", ["missing", "renamed"])
@pytest.mark.parametrize("case", ["base", "base in shards", "export"])
def test_tensors_of_a_base_are_all_there(bench: Any, case: str, change: str) -> None:
    """transformers fills what is missing with random numbers, and says so in a log."""

    def edit(folder: Path, outside: Path) -> str:
        file = max(folder.glob("model*.safetensors"))
        tensors = load_file(file)
        name = sorted(tensors)[-1]
        tensor = tensors.pop(name)
        if change == "renamed":
            tensors[f"{name}.x"] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
        return f"{name} {change}"

    refused(bench, case, edit)


# -------------------------------------------------------------------------------------------------- changed checkpoints
@pytest.mark.parametrize("case", ["checkpoint", "finished checkpoint"])
@pytest.mark.parametrize("name", ["trained", "optimizer", "random-0"])
def test_a_changed_tensor_of_a_checkpoint(bench: Any, case: str, name: str) -> None:
    def change(folder: Path, outside: Path) -> str:
        file = folder / "checkpoint-2" / f"{name}.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        return name

    refused(bench, case, change, f"{name}.safetensors")


@pytest.mark.parametrize(
    "name", ["optimizer.json", "plugins.json", "random-0.json", "scheduler.json", "trainer_state.json"]
)
def test_a_changed_text_of_a_checkpoint(bench: Any, name: str) -> None:
    def change(folder: Path, outside: Path) -> str:
        file = folder / "checkpoint-2" / name
        file.write_text(file.read_text("utf-8") + " ", "utf-8")
        return name

    refused(bench, "checkpoint", change, name)


# ------------------------------------------------------------------------------------------ the tools see what is wrong
def raising(error: BaseException) -> Callable[[Path], Reading]:
    def read(folder: Path) -> Reading:
        raise error

    return read


def asking(folder: Path) -> Reading:
    return Reading(input("Do you wish to run the custom code? [y/N] "))


def looking_out(folder: Path) -> Reading:
    return Reading((folder.parent / "outside" / "secret").read_text("utf-8"))


def running(folder: Path) -> Reading:
    (folder.parent / "outside" / CANARY).touch()
    return Reading("")


def sleeping(folder: Path) -> Reading:
    time.sleep(60)
    return Reading("")


def dying(folder: Path) -> Reading:
    os.abort()


@pytest.mark.parametrize(
    ("read", "word"),
    [
        (lambda folder: Reading("1"), "read"),
        (raising(PeftxError("weights.json is damaged")), "refused"),
        (raising(PeftxError("something is damaged")), "nameless"),
        (raising(PeftxError("weights.json: \ud800")), "refused"),  # an error is made printable
        (raising(PeftxError("weights.json" + "9" * 5000)), "endless"),
        (raising(KeyError("weights.json")), "raw"),
        (raising(KeyboardInterrupt()), "raw"),
        (asking, "asked"),
        (looking_out, "outside"),
        (running, "executed"),
        (sleeping, "hang"),
        (dying, "died"),
    ],
    ids=[
        "read", "refused", "nameless", "printable", "endless", "raw", "interrupt", "asked", "outside", "executed",
        "hang", "died",
    ],
)  # fmt: skip
def test_an_attempt_tells_how_it_ended(tmp_path: Path, read: Callable[[Path], Reading], word: str) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "weights.json").touch()
    (outside / "secret").write_text("s", "utf-8")
    outcome: Outcome = attempt(read, folder, outside, seconds=1.0 if word == "hang" else SECONDS)
    assert outcome.word == word, outcome


def test_other_numbers_are_a_finding(benchmark: ModuleType, bench: Any) -> None:
    """Where a folder has checksums, always; where it has none, if they are not what its files hold."""
    base, signed, bundle = (
        next(case for case in benchmark.CASES if case.name == name)
        for name in ("base", "lora bundle, signed", "lora bundle")
    )
    whole = Reading("1")

    def finding(case: Any, kind: str, reading: Reading, what: str = "lora.safetensors: x") -> str:
        return bench._finding(case, kind, what, Outcome("read", reading=reading), whole)

    assert finding(bundle, "tensor value", Reading("1")) == ""
    assert finding(bundle, "tensor value", Reading("2")) == "different"
    assert finding(signed, "tensor value", Reading("2")) == ""
    assert finding(signed, "tensor value", Reading("2", faithful=False)) == "unfaithful"
    assert finding(signed, "json drop", Reading("2"), "manifest.json: x") == "different"
    assert finding(base, "json value", Reading("2")) == ""
    assert finding(base, "tensor drop", Reading("2")) == "different"


def test_mutations_are_made_again_from_their_seed(benchmark: ModuleType, bench: Any, tmp_path: Path) -> None:
    """And every kind finds something to change, which it does change."""
    case = next(case for case in benchmark.CASES if case.name == "prefixquant bundle")
    bench.whole(case)
    whole = bench._copy(case)

    def state(folder: Path) -> Any:
        if not folder.is_dir() or folder.is_symlink():
            return oct(os.lstat(folder).st_mode) if os.path.lexists(folder) else None
        return {
            str(p.relative_to(folder)): (p.lstat().st_mode, p.lstat().st_size < HUGE and p.is_file() and p.read_bytes())
            for p in folder.rglob("*")
        }  # fmt: skip

    before = state(whole)
    for kind in KINDS:
        found = []
        for _ in range(2):
            shutil.rmtree(tmp_path / "x", ignore_errors=True)
            shutil.copytree(whole, tmp_path / "x" / "it")
            what = mutate(tmp_path / "x" / "it", tmp_path / "x" / "outside", kind, random.Random(7))
            found.append((what, state(tmp_path / "x" / "it")))
        assert found[0] == found[1], kind
        assert found[0][0] is not None, kind
        assert found[0][1] != before, kind
