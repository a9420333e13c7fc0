"""Jobs side by side, on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar

from peftx.comparing.jobs import Check, Job, JobResult, read_checks, read_result, write_result
from peftx.comparing.work import work

_OWN_TURN = 5.0
"""Seconds that a process has to end when it is asked to."""


@dataclass
class Running:
    """A job that runs; a kind of pool adds what it runs in."""

    job: Job
    scratch: Path


_Each = TypeVar("_Each", bound=Running)


class Pool(ABC, Generic[_Each]):
    """At most `jobs` at a time, each in a process of its own, so that one that dies takes nothing with it."""

    def __init__(self, folder: Path, scratch: Path, jobs: int, threads: int, trust_remote_code: bool) -> None:
        self.folder, self.scratch = folder, scratch
        self.jobs, self.threads, self.trust_remote_code = jobs, threads, trust_remote_code
        self.running: dict[str, _Each] = {}

    @abstractmethod
    def begin(self, job: Job, scratch: Path) -> _Each:
        """Let `work` run in a process."""

    @abstractmethod
    def ended(self, seconds: float) -> list[_Each]:
        """Those of `running` that have ended, waiting so long for one."""

    @abstractmethod
    def terminate(self, those: list[_Each]) -> None:
        """End them before their time; they are gone on return."""

    @abstractmethod
    def lost(self, each: _Each) -> JobResult:
        """The result of one that ended and left none."""

    def start(self, job: Job) -> None:
        scratch = self.scratch / job.id
        scratch.mkdir()
        self.running[job.id] = self.begin(job, scratch)

    def has_room(self) -> bool:
        return len(self.running) < self.jobs

    def wait(self, seconds: float) -> list[JobResult]:
        """What the jobs left that ended, waiting so long for one. One that left nothing has failed."""
        return [self._result(each) for each in self.ended(seconds)]

    def checks(self, id: str) -> list[Check]:
        """How a running trial stood so far."""
        return read_checks(self.running[id].scratch)

    def end(self, id: str, reason: str) -> JobResult:
        """End a trial before its time; that it was is its result."""
        each = self.running[id]
        self.terminate([each])
        result = read_result(self.folder, id)  # it may have come to its end in the meantime
        if result is None:
            result = ended_early(each.job, each.scratch, self.threads, reason)
            write_result(self.folder, result)
        self._forget(each)
        return result

    def _result(self, each: _Each) -> JobResult:
        result = read_result(self.folder, each.job.id)
        if result is None:
            result = self.lost(each)
            write_result(self.folder, result)
        self._forget(each)
        return result

    def _forget(self, each: _Each) -> None:
        shutil.rmtree(each.scratch, ignore_errors=True)
        del self.running[each.job.id]

    def stop(self) -> None:
        self.terminate(list(self.running.values()))


@contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A scratch folder for jobs, gone at the end with what it holds."""
    for stale in folder.glob(".work-*"):  # of a comparison that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with TemporaryDirectory(dir=folder, prefix=".work-", ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def ended_early(job: Job, scratch: Path, threads: int, reason: str) -> JobResult:
    """The result of a trial that was ended before its time."""
    return JobResult(job.id, job.kind, job.seed, job.rate, reason, threads=threads, checks=read_checks(scratch),
                     ended_early=True)  # fmt: skip


def lost(job: Job, scratch: Path, threads: int, reason: str) -> JobResult:
    """The result of a job that ended without one."""
    log = scratch / "log"
    said = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
    return JobResult(job.id, job.kind, job.seed, job.rate, reason=reason, log=said, threads=threads)


@dataclass
class InProcess(Running):
    process: BaseProcess


@contextmanager
def processes(folder: Path, *, jobs: int, threads: int, trust_remote_code: bool) -> Iterator[Processes]:
    """A pool whose processes are gone at the end, whatever happened, and their scratch folders with them."""
    with scratch_in(folder) as scratch:
        pool = Processes(folder, scratch, jobs, threads, trust_remote_code)
        try:
            yield pool
        finally:
            pool.stop()


class Processes(Pool[InProcess]):
    """On this machine."""

    def __init__(self, folder: Path, scratch: Path, jobs: int, threads: int, trust_remote_code: bool) -> None:
        super().__init__(folder, scratch, jobs, threads, trust_remote_code)
        self.context = fresh("peftx.comparing.work")

    def begin(self, job: Job, scratch: Path) -> InProcess:
        arguments = (job, self.folder, scratch, self.threads, self.trust_remote_code)
        process: BaseProcess = self.context.Process(  # type: ignore[attr-defined]
            target=_begin, args=(work, *arguments)
        )
        process.start()
        return InProcess(job, scratch, process)

    def ended(self, seconds: float) -> list[InProcess]:
        by_sentinel = {each.process.sentinel: each for each in self.running.values()}
        sentinels = connection.wait(list(by_sentinel), timeout=seconds)
        found = [by_sentinel[sentinel] for sentinel in sentinels]  # type: ignore[index]
        for each in found:
            each.process.join()
        return found

    def terminate(self, those: list[InProcess]) -> None:
        for each in those:
            each.process.terminate()
        for each in those:
            each.process.join(_OWN_TURN)
            if each.process.is_alive():
                each.process.kill()
                each.process.join()

    def lost(self, each: InProcess) -> JobResult:
        code = each.process.exitcode or 0
        reason = f"the process ended with status {code} and left no result"
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"the process was ended by {name}" + (
                ", as the system does where memory runs out" if name == "SIGKILL" else ""
            )
        return lost(each.job, each.scratch, self.threads, reason)


def _begin(target: Callable[..., None], *arguments: object) -> None:
    """Ctrl-C is the parent's to handle; its own end is asked for by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    target(*arguments)


def fresh(loaded: str) -> BaseContext:
    """A fresh interpreter for each process; on Linux a fork of one that has imported the module `loaded` and run
    nothing, which starts in a tenth of a second."""
    if sys.platform != "linux":
        return get_context("spawn")
    # Torch asks for a GPU when it is imported; through CUDA itself, no fork could use one afterwards.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = get_context("forkserver")
    context.set_forkserver_preload([loaded])
    return context
