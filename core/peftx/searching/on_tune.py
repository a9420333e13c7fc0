"""The trials of a search as trials of Ray Tune, on the machines of a cluster.

Tune starts them, hears of them while they train, and ends those that are beaten. Which point comes next is Optuna's to
say, as on one machine: the same study, so that a search goes on wherever it is taken up again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from peftx.comparing.jobs import Check, Job, JobResult, read_result, write_result
from peftx.comparing.on_ray import OnRay
from peftx.comparing.processes import ended_early, lost
from peftx.comparing.work import work
from peftx.searching.going import TICK, Progress, Search

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
}
"""Of Tune's: no tables and no logs beside ours, Ctrl-C as everywhere, and checks that are heard when they are made."""


def try_points(search: Search, pool: OnRay, progress: Callable[[Progress], None] | None) -> None:
    """Run trials until there are enough. pool: where, and how many at once.

    Raises:
        PeftxError: all points that were drawn were refused before they ran.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    proposals = Proposals(search, pool)
    place = pool.folder.absolute(), pool.scratch.absolute(), pool.threads, pool.trust_remote_code
    tune.Tuner(
        tune.with_resources(partial(_trial, place), {"cpu": pool.threads, "gpu": pool.gpus}),
        tune_config=tune.TuneConfig(
            search_alg=proposals, scheduler=Early(proposals), num_samples=-1, max_concurrent_trials=pool.jobs
        ),
        run_config=tune.RunConfig(
            storage_path=str(pool.scratch.absolute()), verbose=0, callbacks=[Telling(proposals, progress)]
        ),
    ).fit()
    search.check_tried()


def _trial(place: tuple[Path, Path, int, bool], config: Mapping[str, Any]) -> None:
    """In a process of its own, on some machine."""
    folder, scratch, threads, trust_remote_code = place
    job = Job(**config["job"])
    own = scratch / job.id
    own.mkdir(exist_ok=True)
    work(job, folder, own, threads, trust_remote_code, lambda check: tune.report(asdict(check)))


class Proposals(Searcher):
    """What Tune asks for the next trial, and tells of the end of one."""

    def __init__(self, search: Search, pool: OnRay) -> None:
        super().__init__()  # what is better, Optuna knows
        self.search, self.pool = search, pool
        self.jobs: dict[str, Job] = {}
        """Tune's name of a trial that runs -> its job."""
        self.reasons: dict[str, str] = {}
        """Why it is ended early."""

    def suggest(self, trial_id: str) -> Any:
        job = self.search.next({job.id for job in self.jobs.values()})
        if job is None:
            return Searcher.FINISHED
        self.jobs[trial_id] = job
        return {"job": asdict(job)}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        job = self.jobs.pop(trial_id)
        known = read_result(self.pool.folder, job.id)
        if known is None:
            known = self._left(job, self.reasons.get(trial_id))
            write_result(self.pool.folder, known)
        self.search.tell(known)

    def _left(self, job: Job, reason: str | None) -> JobResult:
        scratch = self.pool.scratch / job.id
        if reason is not None:
            return ended_early(job, scratch, self.pool.threads, reason)
        return lost(job, scratch, self.pool.threads, "the process ended and left no result")

    def save(self, checkpoint_path: str) -> None:
        """Optuna's file has all that a search goes on from."""

    restore = save


class Early(FIFOScheduler):
    """Ends a trial that is beaten while it trains."""

    def __init__(self, proposals: Proposals) -> None:
        super().__init__()
        self.proposals = proposals

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        if "share" not in result or not self.proposals.search.checks:
            return str(TrialScheduler.CONTINUE)
        check = Check(**{name: result[name] for name in Check.__dataclass_fields__})
        reason = self.proposals.search.beaten(self.proposals.jobs[trial.trial_id].id, [check])
        if not reason:
            return str(TrialScheduler.CONTINUE)
        self.proposals.reasons[trial.trial_id] = reason
        return str(TrialScheduler.STOP)


class Telling(tune.Callback):
    """Says how far the search is."""

    def __init__(self, proposals: Proposals, progress: Callable[[Progress], None] | None) -> None:
        self.proposals, self.progress = proposals, progress
        self.last = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.progress is not None and time.monotonic() - self.last >= TICK:
            self.last = time.monotonic()
            self.progress(self.proposals.search.progress(len(self.proposals.jobs)))
