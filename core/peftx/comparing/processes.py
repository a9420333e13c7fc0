"""Jobs side by side, each in a process of its own, so that one that dies takes nothing with it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from peftx.comparing.jobs import Check, Job, JobResult, read_checks, read_result, write_result
from peftx.comparing.work import work

_OWN_TURN = 5.0
"""Seconds that a process has to end when it is asked to."""


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    scratch: Path


@contextmanager
def processes(folder: Path, *, jobs: int, threads: int, trust_remote_code: bool) -> Iterator[Pool]:
    """A pool whose processes are gone at the end, whatever happened, and their scratch folders with them."""
    for stale in folder.glob(".work-*"):  # of a comparison that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with TemporaryDirectory(dir=folder, prefix=".work-", ignore_cleanup_errors=True) as scratch:
        pool = Pool(folder, Path(scratch), jobs, threads, trust_remote_code)
        try:
            yield pool
        finally:
            pool.stop()


class Pool:
    """At most `jobs` processes at a time."""

    def __init__(self, folder: Path, scratch: Path, jobs: int, threads: int, trust_remote_code: bool) -> None:
        self.folder, self.scratch = folder, scratch
        self.jobs, self.threads, self.trust_remote_code = jobs, threads, trust_remote_code
        self.running: dict[str, _Running] = {}
        self.context = _context()

    def start(self, job: Job) -> None:
        scratch = self.scratch / job.id
        scratch.mkdir()
        arguments = (job, self.folder, scratch, self.threads, self.trust_remote_code)
        process: BaseProcess = self.context.Process(  # type: ignore[attr-defined]
            target=_begin, args=(work, *arguments)
        )
        process.start()
        self.running[job.id] = _Running(job, process, scratch)

    def has_room(self) -> bool:
        return len(self.running) < self.jobs

    def wait(self, seconds: float) -> list[JobResult]:
        """What the jobs left that ended, waiting so long for one. One that left nothing has failed."""
        by_sentinel = {each.process.sentinel: each for each in self.running.values()}
        ended = connection.wait(list(by_sentinel), timeout=seconds)
        return [self._ended(by_sentinel[sentinel]) for sentinel in ended]  # type: ignore[index]

    def checks(self, id: str) -> list[Check]:
        """How a running trial stood so far."""
        return read_checks(self.running[id].scratch)

    def end(self, id: str, reason: str) -> JobResult:
        """End a trial before its time; that it was is its result."""
        each = self.running[id]
        _terminate([each])
        result = read_result(self.folder, id)  # it may have come to its end in the meantime
        if result is None:
            job = each.job
            result = JobResult(job.id, job.kind, job.seed, job.rate, reason, threads=self.threads,
                               checks=self.checks(id), ended_early=True)  # fmt: skip
            write_result(self.folder, result)
        self._forget(each)
        return result

    def _ended(self, each: _Running) -> JobResult:
        each.process.join()
        result = read_result(self.folder, each.job.id)
        if result is None:
            result = _lost(each, self.threads)
            write_result(self.folder, result)
        self._forget(each)
        return result

    def _forget(self, each: _Running) -> None:
        shutil.rmtree(each.scratch, ignore_errors=True)
        del self.running[each.job.id]

    def stop(self) -> None:
        _terminate(self.running.values())


def _terminate(those: Collection[_Running]) -> None:
    for each in those:
        each.process.terminate()
    for each in those:
        each.process.join(_OWN_TURN)
        if each.process.is_alive():
            each.process.kill()
            each.process.join()


def _lost(each: _Running, threads: int) -> JobResult:
    """The result of a process that ended without one."""
    code = each.process.exitcode or 0
    job = each.job
    reason = f"the process ended with status {code} and left no result"
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"the process was ended by {name}" + (
            ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
        )
    log = each.scratch / "log"
    said = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
    return JobResult(job.id, job.kind, job.seed, job.rate, reason=reason, log=said, threads=threads)


def _begin(target: Callable[..., None], *arguments: object) -> None:
    """Ctrl-C is the parent's to handle; its own end is asked for by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    target(*arguments)


def _context() -> BaseContext:
    """A fresh interpreter for each job; on Linux a fork of one that has imported everything and run nothing, which
    starts in a tenth of a second."""
    if sys.platform != "linux":
        return get_context("spawn")
    # Torch asks for a GPU when it is imported; through CUDA itself, no fork could use one afterwards.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = get_context("forkserver")
    context.set_forkserver_preload(["peftx.comparing.work"])
    return context
