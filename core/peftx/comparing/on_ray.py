"""Jobs as tasks of Ray, on the machines of a cluster. The folder of the results lies where all of them see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftx.comparing.jobs import Job, JobResult
from peftx.comparing.processes import Pool, Running, lost, scratch_in
from peftx.comparing.work import work
from peftx.engines.clusters import cluster, last_line


@dataclass
class _Task(Running):
    task: Any


@contextmanager
def tasks(folder: Path, *, jobs: int, threads: int, trust_remote_code: bool) -> Iterator[OnRay]:
    """As `processes`; `jobs` 0: as many as the cluster has room for.

    Raises:
        ClusterError: no cluster answers.
    """
    with cluster() as there, scratch_in(folder) as scratch:
        pool = OnRay(folder, scratch, jobs or room(there, threads), threads, trust_remote_code, there)
        try:
            yield pool
        finally:
            pool.stop()


def room(there: Mapping[str, float], threads: int) -> int:
    """Jobs that a cluster runs at once: one a GPU, or one for each so many CPUs."""
    return max(1, int(there.get("GPU", 0)) or int(there.get("CPU", 0)) // threads)


class OnRay(Pool[_Task]):
    """At most `jobs` tasks at a time, each in a process of its own."""

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        jobs: int,
        threads: int,
        trust_remote_code: bool,
        there: Mapping[str, float],
    ) -> None:
        import ray

        super().__init__(folder, scratch, jobs, threads, trust_remote_code)
        self.gpus = 1 if there.get("GPU") else 0
        self.ray = ray
        # A process that takes one job alone; what it leaves is a file, and a second try is the user's to ask for.
        self.work = ray.remote(num_cpus=threads, num_gpus=self.gpus, max_calls=1, max_retries=0)(work)

    def begin(self, job: Job, scratch: Path) -> _Task:
        task = self.work.remote(
            job, self.folder.absolute(), scratch.absolute(), self.threads, self.trust_remote_code
        )
        return _Task(job, scratch, task)

    def ended(self, seconds: float) -> list[_Task]:
        by_task = {each.task: each for each in self.running.values()}
        done, _ = self.ray.wait(list(by_task), num_returns=1, timeout=seconds)
        return [by_task[task] for task in done]

    def terminate(self, those: list[_Task]) -> None:
        for each in those:
            self.ray.cancel(each.task, force=True)
        for each in those:
            self.ray.wait([each.task])

    def lost(self, each: _Task) -> JobResult:
        try:
            self.ray.get(each.task)
        except Exception as error:  # noqa: BLE001  the process died, in one of the ways that Ray tells apart
            return lost(each.job, each.scratch, self.threads, last_line(error))
        return lost(each.job, each.scratch, self.threads, "the process ended and left no result")
