"""The processes of a run, started by Ray Train: together, and all again when one of them dies.

Ray brings the processes, their group, and the restart. What each does is `peftx.engines.training.processes`; what they
go on from is the run's own checkpoints, which every machine must see. This file is read without Ray.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from peftx.engines.clusters import cluster, last_line
from peftx.engines.reporting import Reporter
from peftx.errors import ClusterError, PeftxError, TrainingError, with_code

if TYPE_CHECKING:
    from peftx_spec.models import RuntimeSpec

_Outcome = TypeVar("_Outcome")
PAUSE = 0.25
"""Seconds between two reports of progress, and between two looks for them."""


@dataclass
class Told:
    """A reporter whose words go to the process that started all."""

    events: Any
    last: float = 0.0

    def stage(self, name: str, ids: Sequence[str]) -> None:
        self.events.put(("stage", (name, list(ids))))

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        if done == total or time.monotonic() - self.last > PAUSE:
            self.last = time.monotonic()
            self.events.put(("progress", (done, total, values)))

    def finished(self, name: str, seconds: float, detail: str) -> None:
        self.events.put(("finished", (name, seconds, detail)))


def together(
    work: Callable[[Reporter], _Outcome], runtime: RuntimeSpec, *, place: Path, reporter: Reporter
) -> _Outcome:
    """Let `runtime.workers` processes do `work`, each with the environment of a process of torchrun.

    Args:
        work: can be pickled; goes on from its own checkpoints when it is called again.
        place: a folder that is not there, on a disk that all machines see; Ray's, and gone afterwards.

    Returns:
        What `work` returned in the first process.

    Raises:
        PeftxError: what `work` raised in one of them, which ends the run; or processes died more often than
            `runtime.restarts` allows.
    """
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    with cluster() as there:
        gpus = _gets_gpus(there, runtime.workers)
        events = Queue(actor_options={"num_cpus": 0})
        refused: list[PeftxError] = []
        try:
            trainer = TorchTrainer(
                _in_worker,
                train_loop_config={"work": work, "events": events},
                scaling_config=ScalingConfig(num_workers=runtime.workers, use_gpu=gpus),
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
                run_config=RunConfig(
                    storage_path=str(place), failure_config=FailureConfig(max_failures=runtime.restarts)
                ),
            )
            with _signals(), _listening(events, reporter, refused):
                found = trainer.fit()
        except SystemExit as error:  # Ray ended the run, as Ctrl-C asks it to
            raise KeyboardInterrupt from error
        except (RayError, RuntimeError) as error:  # TrainFailedError is a RuntimeError
            if refused:
                raise refused[0] from error
            raise TrainingError(
                f"the processes failed {runtime.restarts + 1} times: {last_line(error)}",
                hint="its cause is in the logs of Ray; checkpoints that were written are still there: --resume",
            ) from error
        finally:
            shutil.rmtree(place, ignore_errors=True)
        if refused:
            raise refused[0]
        outcome: _Outcome = found.return_value  # type: ignore[attr-defined]  # of the second version of Ray Train
        return outcome


def _in_worker(config: dict[str, Any]) -> Any:
    """What a process of Ray Train runs. A refusal is told and not raised: Ray would begin again."""
    import ray.train.torch

    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        return config["work"](Told(config["events"]))
    except PeftxError as error:
        config["events"].put(("refused", (error.code, error.message, error.hint)))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # whoever waits for this process waits no longer
        return None


@contextmanager
def _signals() -> Iterator[None]:
    """Ray takes the handler of Ctrl-C and keeps it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _gets_gpus(there: Mapping[str, float], workers: int) -> bool:
    """Does each process get a GPU.

    Raises:
        ClusterError: the cluster has fewer CPUs than processes, for which Ray would wait for ever.
    """
    cpus = int(there.get("CPU", 0))
    if cpus < workers:
        raise ClusterError(
            f"runtime: {workers} workers on a cluster of {cpus} CPUs, and each needs one",
            hint=f"runtime: {{engine: ray, workers: {max(1, cpus)}}}",
        )
    return there.get("GPU", 0) >= workers


@contextmanager
def _listening(events: Any, reporter: Reporter, refused: list[PeftxError]) -> Iterator[None]:
    """Pass on what the processes tell, until they have ended."""
    from ray.util.queue import Empty

    ended = threading.Event()

    def listen() -> None:
        while True:
            last = ended.is_set()
            with suppress(Empty, KeyboardInterrupt):  # Ray ends the run where Ctrl-C is pressed
                while True:
                    kind, values = events.get(block=False)
                    if kind == "refused":
                        code, message, hint = values
                        refused.append(with_code(code)(message, hint=hint))
                    else:
                        getattr(reporter, kind)(*values)
            if last:
                return
            ended.wait(PAUSE)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
