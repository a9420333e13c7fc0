"""Two processes on gloo, started as torchrun does, train what one process trains that takes as many micro-batches."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftx
from peftx.engines.training.processes import ALONE
from peftx.testing.models import tiny, tiny_tokenizer

SCRIPT = Path(__file__).parent / "two_processes.py"
TOGETHER = ("lora", "lt-sft", "prompt-tuning", "bert", "late", "reglu", "trainer")
LIMIT = 240
"""Seconds."""


class Ran:
    """What the processes of one start wrote."""

    def __init__(self, folder: Path, processes: int) -> None:
        names = [f"{processes}-{index}" for index in range(processes)]
        self.said: list[dict[str, Any]] = [
            json.loads((folder / f"{name}.json").read_text()) for name in names
        ]
        self.tensors = [load_file(folder / f"{name}.safetensors") for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One for all workers of a run of the tests: the processes are started once."""
    base = tmp_path_factory.getbasetemp()
    found = (base if worker_id == "master" else base.parent) / "processes"
    found.mkdir(exist_ok=True)
    with (found / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes later reads what is there
        if not (found / "done").exists():
            start(found)
            (found / "done").touch()
    return found


def start(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def one(folder: Path) -> Ran:
    return Ran(folder, 1)


@pytest.fixture(scope="module")
def two(folder: Path) -> Ran:
    return Ran(folder, 2)


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_train_what_one_does(one: Ran, two: Ran, name: str) -> None:
    found = [key for key in one.tensors[0] if key.startswith(f"{name}/")]
    assert found
    for key in found:
        torch.testing.assert_close(two.tensors[0][key], one.tensors[0][key], atol=1e-5, rtol=1e-5, msg=key)
        assert torch.equal(two.tensors[0][key], two.tensors[1][key]), key
    if name != "trainer":
        losses = [torch.tensor(ran.said[0]["losses"][name]) for ran in (two, one)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sharded-lora", "sharded-prompt"])
def test_sharded_weights_train_and_are_saved_as_whole_ones(
    one: Ran, two: Ran, folder: Path, name: str
) -> None:
    """FSDP2: the first process writes the bundle of all, from gathered weights."""
    again, expected = (
        peftx.load(folder / f"{name}-{count}", model=tiny("llama"), tokenizer=tiny_tokenizer())
        for count in (2, 1)
    )
    (id,) = expected.plugins
    for key, tensor in expected.ledger.tensors(id).items():
        torch.testing.assert_close(again.ledger.tensors(id)[key], tensor, atol=1e-5, rtol=1e-5, msg=key)
    losses = torch.tensor([process["losses"][name] for process in two.said]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(one.said[0]["losses"][name]), atol=1e-5, rtol=1e-5)
    for doing in ("merging", "compressing", "an export"):
        assert all(
            f"the weights are sharded, and {doing} needs" in process["errors"][name] for process in two.said
        )


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_goes_on_bit_for_bit(one: Ran, two: Ran, number: int) -> None:
    """Dropout and all: each process has its random state back."""
    ran = (one, two)[number - 1]
    assert not ran.said[0]["errors"].keys() & {"whole", "half", "resumed"}
    for tensors, said in zip(ran.tensors, ran.said, strict=True):
        assert said["losses"]["resumed"] == said["losses"]["whole"]
        for key in (key for key in tensors if key.startswith("whole/")):
            assert torch.equal(tensors[key], tensors[key.replace("whole", "resumed")]), key


def test_one_checkpoint_is_written_with_the_random_states_of_all(two: Ran, folder: Path) -> None:
    names = [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert sorted(path.name for path in (folder / "half-2").iterdir()) == names
    states = sorted(path.name for path in (folder / "half-2" / "checkpoint-6").glob("random-*.json"))
    assert states == ["random-0.json", "random-1.json"]


def test_what_was_drawn_apart_begins_alike(two: Ran) -> None:
    assert "drawn" in two.said[0]["losses"]
    keys = [key for key in two.tensors[0] if key.startswith("drawn/")]
    assert keys
    assert all(torch.equal(two.tensors[0][key], two.tensors[1][key]) for key in keys)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mezo", "'mezo' trains in one process, and there are 2: it makes no gradients"),
        ("alone", "after 1 steps the processes have different numbers in 'decides-alone'"),
        ("states", "the processes do not have the same stack: remembers differ"),
    ],
)
def test_what_would_come_apart_is_refused(one: Ran, two: Ran, name: str, said: str) -> None:
    assert all(said in process["errors"][name] for process in two.said)
    assert name not in one.said[0]["errors"]


def test_the_bundle_of_a_trainer_is_written_once_and_loads(two: Ran, folder: Path) -> None:
    stack = peftx.load(folder / "trainer", model=tiny("llama"), tokenizer=tiny_tokenizer())
    saved = {f"trainer/lora/{key}": value for key, value in stack.ledger.tensors("lora").items()}
    assert saved
    assert all(torch.equal(two.tensors[0][key], value) for key, value in saved.items())


def test_one_process_says_nothing_to_others() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    ALONE.average([p])
    assert p.grad is None
    assert ALONE.gather(3) == [3]
