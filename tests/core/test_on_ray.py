"""Processes of Ray Train, real ones on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftx.comparing.jobs import Job
from peftx.comparing.on_ray import tasks
from peftx.engines.clusters import cluster
from peftx.engines.training.on_ray import PAUSE, Told, _gets_gpus, _in_worker
from peftx.errors import ClusterError, ConflictError, MissingExtraError, TrainingError
from peftx.pipeline import Run, load_run
from peftx_spec import SpecError

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, of itself

SPEC = """
peftx: 1
model: peftx:tiny
data: {{train: "peftx:sample/train.jsonl", holdout: {{share: 0.1, most: 4}}}}
stack: [{{use: {plugin}}}]
train:
  {{steps: {steps}, batch_size: 2, gradient_accumulation: {accumulation}, learning_rate: {rate}, checkpoint_every: 5}}
evaluate: [perplexity]
runtime: {runtime}
output: {output}
"""
RAY = "{engine: ray, workers: 2}"


def a_run(output: Path, **options: Any) -> Run:
    given = {"plugin": "lora", "steps": 20, "accumulation": 1, "rate": 1e-3, "runtime": RAY}
    return load_run(SPEC.format(output=output, **(given | options)))


class Recorder:
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def stage(self, name: str, ids: Any) -> None:
        self.told.append(("stage", name))

    def progress(self, done: int, total: int, values: Any) -> None:
        self.told.append(("progress", done, total))

    def finished(self, name: str, seconds: float, detail: str) -> None:
        self.told.append(("finished", name))


class Events:
    def __init__(self) -> None:
        self.put_in: list[Any] = []

    def put(self, event: Any) -> None:
        self.put_in.append(event)


def killed_behind_a_checkpoint(folder: Path, mark: str, killed: list[int]) -> None:
    """Kill one of the processes with `mark` in their environment when the first checkpoint is there."""
    limit = time.monotonic() + 120
    while not list(folder.glob("stage-*/checkpoint-5")) and time.monotonic() < limit:
        time.sleep(0.02)
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: -int(path.name)):
        try:
            mine = mark.encode() in (process / "environ").read_bytes()
            if mine and b"RayTrainWorker" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(int(process.name))
                return
        except OSError:
            continue


@pytest.mark.dear(
    "core/peftx/engines/training/", "core/peftx/engines/clusters.py", "tests/core/test_on_ray.py"
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_process_dies_and_the_run_ends_as_one_process_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes make the updates of one with twice the accumulation; what was lost is done again."""
    monkeypatch.setenv("PEFTX_TEST", mark := f"peftx-test-{os.getpid()}-{time.time_ns()}")
    killed: list[int] = []
    run, told = a_run(tmp_path / "two"), Recorder()
    run.reporter = told
    killer = threading.Thread(
        target=killed_behind_a_checkpoint, args=(tmp_path / "two.checkpoints", mark, killed)
    )
    killer.start()
    two = run.run()
    killer.join()
    assert killed
    assert told.told.count(("stage", "load")) == 2
    assert told.told[-1] == ("finished", "save")
    assert ("progress", 20, 20) in told.told
    one = a_run(tmp_path / "one", runtime="local", accumulation=2).run()
    found, expected = (
        load_file(next(path.rglob("*.safetensors"))) for path in (tmp_path / "two", tmp_path / "one")
    )
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
    assert two.stack.plugins.keys() == one.stack.plugins.keys()
    (stage,) = one.scores
    assert two.scores[stage]["perplexity"].value == pytest.approx(
        one.scores[stage]["perplexity"].value, rel=1e-4
    )
    assert (two.trainable, two.training[0].steps) == (one.trainable, 20)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["one", "two"]


@pytest.mark.slow
def test_what_a_process_refuses_ends_the_run(tmp_path: Path) -> None:
    """It does not begin again, and the error is the one that one process raises."""
    told = Recorder()
    run = a_run(tmp_path / "out", rate=1e30)
    run.reporter = told
    with pytest.raises(TrainingError, match="the loss 'task' of step 2 is nan"):
        run.run()
    assert told.told.count(("stage", "load")) == 1
    assert not list(tmp_path.glob("**/*.ray"))


def test_a_refusal_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an error Ray would think that the process had died."""
    import ray.train.torch

    def work(reporter: Any) -> None:
        raise ConflictError("these two", hint="one of them")

    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    events = Events()
    assert _in_worker({"work": work, "events": events}) is None
    assert events.put_in == [("refused", ("conflict", "these two", "one of them"))]
    with pytest.raises(ZeroDivisionError):  # what nobody foresaw may go well the next time
        _in_worker({"work": lambda reporter: 1 / 0, "events": events})


def test_more_processes_than_the_cluster_holds_are_refused() -> None:
    assert not _gets_gpus({"CPU": 2.0, "GPU": 1.0}, 2)
    assert _gets_gpus({"CPU": 2.0, "GPU": 2.0}, 2)
    with pytest.raises(ClusterError, match="3 workers on a cluster of 2 CPUs") as caught:
        _gets_gpus({"CPU": 2.0, "GPU": 8.0}, 3)
    assert caught.value.hint == "runtime: {engine: ray, workers: 2}"


def test_a_cluster_that_ran_here_before_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps the address of the last one, and waits for it without an end where it died."""
    import ray

    told: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in (("is_initialized", False), ("cluster_resources", {}), ("shutdown", None)):
        monkeypatch.setattr(ray, name, lambda value=value: value)
    monkeypatch.setattr(ray, "init", lambda **options: told.update(options))
    with cluster():
        assert told["address"] == "local"


def test_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1"):
        a_run(tmp_path / "out").run()


def test_found_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConflictError, match="'mezo' trains in one process, and there are 2: it makes no gradients"
    ):
        a_run(tmp_path / "out", plugin="mezo")
    with pytest.raises(SpecError, match="'output' says no place"):
        load_run(SPEC.format(plugin="lora", steps=1, accumulation=1, rate=1, runtime="ray", output="null"))
    with pytest.raises(SpecError, match="workers is of engine ray"):
        a_run(tmp_path / "out", runtime="{workers: 2}")
    monkeypatch.setitem(sys.modules, "ray.train.torch", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"runtime: ray needs ray") as caught:
        a_run(tmp_path / "out")
    assert caught.value.hint == "pip install 'peftx[ray]'"


def test_progress_is_told_now_and_then() -> None:
    events = Events()
    told = Told(events)
    for done in range(1, 1001):
        told.progress(done, 1000, {})
    assert events.put_in[-1] == ("progress", (1000, 1000, {}))
    assert len(events.put_in) < 2 + 10 / PAUSE


@pytest.mark.slow
def test_jobs_as_tasks_leave_what_processes_leave(tmp_path: Path) -> None:
    """One is done, one is killed, one is ended before its time."""
    import ray

    spec = SPEC.format(plugin="lora", steps=1, accumulation=1, rate=1e-3, runtime="local", output="out")
    steps = {"done": 1, "killed": 5000, "early": 5000}
    jobs = {
        name: Job(name, "seed", spec.replace("steps: 1,", f"steps: {count},"), "perplexity", 0, name)
        for name, count in steps.items()
    }
    (tmp_path / "jobs").mkdir()
    with tasks(tmp_path, jobs=1, threads=1, trust_remote_code=False) as pool:
        found = {}
        for name, job in jobs.items():
            assert pool.has_room()
            pool.start(job)
            assert not pool.has_room()
            assert pool.wait(0.01) == []
            if name == "killed":
                ray.cancel(pool.running[job.id].task, force=True)
            if name == "early":
                found[name] = pool.end(job.id, "enough seen")
            while pool.running:
                for result in pool.wait(1):
                    found[name] = result
        assert not list(Path(pool.scratch).iterdir())
    assert found["done"].reason == ""
    assert found["done"].value("perplexity") > 1
    assert found["killed"].reason
    assert (found["early"].reason, found["early"].ended_early) == ("enough seen", True)
    assert {path.stem for path in (tmp_path / "jobs").iterdir()} == {job.id for job in jobs.values()}


SEARCH = """
peftx: 1
search:
  base:
    model: peftx:tiny
    data:
      train: {path: "peftx:sample/train.jsonl", limit: 30}
      eval: {path: "peftx:sample/held_out.jsonl", limit: 4}
    train: {steps: 4, batch_size: 2}
    evaluate: [perplexity]
  stack: [lora]
  space:
    lora.rank: [1, 2]
    train.learning_rate: {log: [1e-5, 1e-2]}
  objectives: [quality, trained]
  trials: 2
  seeds: [0]
"""


@pytest.mark.slow
def test_a_search_by_ray_tune_is_the_search(tmp_path: Path) -> None:
    """The same points, and the same values to the bit; nothing of Tune's is left."""
    from peftx.composition.registry import Registry
    from peftx.searching.run import search
    from peftx.searching.samplers import Samplers
    from peftx_spec.search_load import load_search

    (tmp_path / "search.yaml").write_text(SEARCH, "utf-8")
    tables = []
    for ray in (False, True):
        loaded = load_search(tmp_path / "search.yaml", catalogue=Registry(), samplers=Samplers())
        told: list[Any] = []
        tables.append(search(loaded, tmp_path / str(ray), jobs=1, ray=ray, progress=told.append))
        assert told[-1].total == len(tables[-1].front)
    names = [sorted(path.name for path in (tmp_path / str(ray)).iterdir()) for ray in (False, True)]
    assert names[0] == names[1]
    files = [{path.stem: json.loads(path.read_text()) for path in (tmp_path / str(ray) / "jobs").iterdir()}
             for ray in (False, True)]  # fmt: skip
    assert files[0].keys() == files[1].keys()
    for id, job in files[0].items():
        assert job["scores"] == files[1][id]["scores"]
