"""A comparison carried out: what is missing is run, what is there is read, and all of it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftx.comparing.jobs import Job, JobResult, read_result, result_file
from peftx.comparing.on_ray import tasks
from peftx.comparing.page import page
from peftx.comparing.place import alone, check_place, side_by_side
from peftx.comparing.processes import Pool, processes
from peftx.comparing.schedule import Schedule
from peftx.comparing.table import Table, table_of
from peftx.comparing.writing import write
from peftx.composition.registry import Registry
from peftx.engines.clusters import require_ray
from peftx.engines.files import make_place
from peftx_spec.compare_load import LoadedCompare

TICK = 0.5
"""Seconds between two looks at the jobs."""
OURS = frozenset({"jobs", "data", "repeat", "results.json", "results.csv", "index.html", ".lock"})
"""What a comparison's folder holds; scratch folders beside."""


@dataclass(frozen=True)
class State:
    """How far a comparison is: numbers of jobs."""

    done: int
    total: int
    running: int
    failed: int


def compare(
    loaded: LoadedCompare,
    folder: Path,
    *,
    jobs: int = 0,
    retry: bool = False,
    ray: bool = False,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    progress: Callable[[State], None] | None = None,
) -> Table:
    """Run what `folder` has no result of, and write the table there.

    Args:
        jobs: processes side by side; 0: one a core, or one alone on an accelerator.
        retry: run again what has failed. ray: as tasks of Ray, on a cluster or here.
        progress: called twice a second, and when a job ends.

    Raises:
        PeftxError: no row can be built. BundleError: `folder` holds something else, or another process is at it.
    """
    if ray:
        require_ray("--ray")
    check_place(folder, OURS, "comparison")
    make_place(folder / "any")
    with alone(folder):
        schedule = Schedule(
            loaded, folder, registry=registry or Registry(), trust_remote_code=trust_remote_code
        )
        at_once, threads = side_by_side(jobs, ray=ray)
        make_place(folder / "jobs" / "any")
        start = tasks if ray else processes
        with start(folder, jobs=at_once, threads=threads, trust_remote_code=trust_remote_code) as pool:
            found = _run(schedule, folder, pool, retry, progress)
        table = table_of(schedule, found, threads=threads)
        write(table, page(table), folder)
    return table


def _run(
    schedule: Schedule, folder: Path, pool: Pool[Any], retry: bool, progress: Callable[[State], None] | None
) -> dict[str, JobResult]:
    found: dict[str, JobResult] = {}
    while True:
        waiting = [job for job in _unknown(schedule, found, folder, retry) if job.id not in pool.running]
        while waiting and pool.has_room():
            pool.start(waiting.pop(0))
        if progress is not None:
            progress(_state(schedule, found, len(pool.running)))
        if not pool.running:
            return found
        for result in pool.wait(TICK):
            found[result.id] = result


def _unknown(schedule: Schedule, found: dict[str, JobResult], folder: Path, retry: bool) -> list[Job]:
    """Jobs that must run; those that left a file before are read into `found`, and may make others possible."""
    while True:
        wanted = schedule.wanted(found)
        read = {job.id: result for job in wanted if (result := read_result(folder, job.id)) is not None}
        for id, result in read.items():
            if result.reason and retry:
                result_file(folder, id).unlink(missing_ok=True)
            else:
                found[id] = result
        if not any(id in found for id in read):
            return wanted


def _state(schedule: Schedule, found: dict[str, JobResult], running: int) -> State:
    failed = sum(bool(result.reason) for result in found.values())
    left = running if not schedule.wanted(found) else max(running, schedule.count() - len(found))
    return State(len(found), len(found) + left, running, failed)
