"""A search while it goes on: points that run, what they left, and which of them is beaten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx.comparing.jobs import Check, Job, JobResult, read_result
from peftx.comparing.processes import Pool
from peftx.errors import OptionError, PeftxError, TrialError
from peftx.quantities import plain
from peftx.searching.samplers import Samplers
from peftx.searching.space import Space
from peftx.searching.stacks import Stacks
from peftx.searching.table import Tested, TriedPoint, points_of
from peftx.searching.trials import JOB, STUDY, Goal, Trials
from peftx_spec.models import HIGHER_IS_BETTER
from peftx_spec.search import CHECKS, QUALITY
from peftx_spec.search_load import Candidate, LoadedSearch, Point, reason_of

if TYPE_CHECKING:
    import optuna

TICK = 0.5
"""Seconds between two looks at the jobs."""
MOST_REFUSED = 50
"""Points in a row that are refused before they run, after which the search is over."""


@dataclass(frozen=True)
class Progress:
    """How far a search is: numbers of trials, and of runs on the test rows when these are done."""

    done: int
    total: int
    running: int
    failed: int


@dataclass
class _Running:
    """A trial whose job runs. numbers: that train. sizing: as `_Done`."""

    trial: optuna.Trial
    candidate: Candidate
    numbers: int
    sizing: Point


@dataclass(frozen=True)
class _Done:
    """A trial that came through. sizing: options of what compresses."""

    candidate: Candidate
    sizing: Point
    result: JobResult


class Search:
    """The trials of a search, and what their jobs left.

    Raises:
        PeftxError: the sampler cannot serve the search.
    """

    def __init__(self, loaded: LoadedSearch, folder: Path, stacks: Stacks) -> None:
        self.spec, self.folder, self.stacks = loaded.spec, folder, stacks
        costs = [name for name in self.spec.objectives if name != QUALITY]
        limits = {str(name): limit for name, limit in self.spec.limits.items()}
        self.goal = Goal(loaded.metric, HIGHER_IS_BETTER[loaded.metric], (QUALITY, *costs), limits)
        self.space = Space(self.spec, stacks.candidates)
        use = self.spec.sampler.use
        sampler = Samplers().load(use)(**self.spec.sampler.options)
        if sampler.whole and self.spec.checks:
            message = f"the sampler '{use}' learns from what a trial cost to its end, so none may end early"
            raise OptionError(message, hint="leave 'checks' out")
        self.checks = self.spec.checks if self.spec.checks is not None else 0 if sampler.whole else CHECKS
        self.trials = Trials(folder / STUDY, self._name(), self.goal, self.space, sampler, self.spec.seed)
        self.running: dict[str, list[_Running]] = {}
        self.found: dict[str, JobResult] = {}
        self.done: list[_Done] = []
        self.refusals = 0
        for trial in self.trials.all():
            candidate, point = self.space.point(trial.params)
            result = read_result(folder, trial.user_attrs[JOB])
            if result is not None:
                self._keep(candidate, stacks.sizing(candidate, point), result)

    def _name(self) -> str:
        """By what Optuna knows a search: all that decides about its trials but their number."""
        told = self.spec.model_dump(mode="json", exclude={"trials", "jobs", "seeds", "base"})
        base = [
            each.pipeline(each.probes[0]).model_dump(mode="json") for each in self.stacks.candidates.values()
        ]
        text = json.dumps([told, base, self.stacks.identities()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    # -- trials ------------------------------------------------------------------------------------------------------

    def try_points(self, pool: Pool[Any], progress: Callable[[Progress], None] | None) -> None:
        """Run trials until there are enough.

        Raises:
            PeftxError: all points that were drawn were refused before they ran.
        """
        while True:
            while pool.has_room() and (job := self.next(pool.running)) is not None:
                pool.start(job)
            if progress is not None:
                progress(self.progress(len(pool.running)))
            if not pool.running:
                break
            for id in list(pool.running) if self.checks else ():
                reason = self.beaten(id, pool.checks(id))
                if reason:
                    self.tell(pool.end(id, reason))
            for result in pool.wait(TICK):
                self.tell(result)
        self.check_tried()

    def check_tried(self) -> None:
        """Raises PeftxError where all points that were drawn were refused before they ran."""
        if not self.trials.all():
            reasons = self.trials.refused()
            raise TrialError(
                f"no point of the space can be tried: of {len(reasons)} that were drawn, all were refused; the last, "
                f"{reasons[-1]}",
                hint="widen the space, or the limits",
            )

    def next(self, running: Container[str]) -> Job | None:
        """A job to start; None where there are trials enough, or nothing but refusals.

        Args:
            running: ids of jobs that have been started.
        """
        while len(self.trials.all()) < self.spec.trials and self.refusals < MOST_REFUSED:
            job = self._propose()
            known = None if job is None else read_result(self.folder, job.id)
            if known is not None:
                self.tell(known)
            elif job is not None and job.id not in running:
                return job
        return None

    def _propose(self) -> Job | None:
        """A point, and the job that tries it; None where it is refused before it runs."""
        trial = self.trials.ask()
        candidate, point = self.space.point(trial.params)
        try:
            pipeline = self.stacks.pipeline(candidate, point)
            reason, numbers = self.stacks.seen(pipeline)
        except PeftxError as error:
            reason, numbers = reason_of(error), 0
        over = numbers / self.spec.limits.get("trained", float("inf")) - 1
        if reason or over > 0:
            told = (
                reason
                or f"it trains {numbers:,} numbers, and the limit is {self.spec.limits['trained']:,.0f}"
            )
            self.trials.refuse(trial, f"{candidate.name}: {told}", 1.0 if reason else over)
            self.refusals += 1
            return None
        self.refusals = 0
        # One that was tried before trains with the next seed: what a point is worth is a mean.
        repeats = self.trials.count(lambda params: self.space.point(params) == (candidate, point))
        job = self.stacks.trial_job(candidate, pipeline, numbers=numbers, repeats=repeats, checks=self.checks)
        self.trials.begin(trial, job.id)
        running = _Running(trial, candidate, numbers, self.stacks.sizing(candidate, point))
        self.running.setdefault(job.id, []).append(running)
        return job

    def tell(self, result: JobResult) -> None:
        """What a job left."""
        for running in self.running.pop(result.id, ()):
            self.trials.tell(running.trial, result)
            self._keep(running.candidate, running.sizing, result)

    def _keep(self, candidate: Candidate, sizing: Point, result: JobResult) -> None:
        self.found[result.id] = result
        if not self.goal.flaw(result):
            self.done.append(_Done(candidate, sizing, result))

    def beaten(self, id: str, checks: Sequence[Check]) -> str:
        """Why a job that runs is not worth its time any more; empty where it is."""
        found = (self._beaten(self.running[id][0], checks[-1], other) for other in self.done if checks)
        return next(filter(None, found), "")

    def _beaten(self, running: _Running, now: Check, other: _Done) -> str:
        """Why a trial is worse than one of its stack that is done, in all that is known of it while it trains."""
        costs = set(self.goal.objectives) - {QUALITY}
        larger = other.result.trained > running.numbers or other.sizing != running.sizing
        if other.candidate is not running.candidate or (larger and costs - {"train_seconds"}):
            return ""
        before = [check for check in other.result.checks if check.share <= now.share]
        after = [check for check in other.result.checks if check.share >= now.share]
        if now.share >= 1 or not before or not after:  # one that has trained is measured as any other
            return ""
        ahead = before[-1].value > now.value if self.goal.higher else before[-1].value < now.value
        if not ahead or ("train_seconds" in costs and after[0].seconds > now.seconds):
            return ""
        had = f"{self.goal.metric} {plain(now.value, 4)}, where a trial of this stack that costs no more had"
        return f"ended early, after {now.share:.0%} of its steps: {had} {plain(before[-1].value, 4)}"

    def progress(self, running: int) -> Progress:
        """How far the trials are, while so many jobs run."""
        failed = sum(bool(result.reason) and not result.ended_early for result in self.found.values())
        left = sum(map(len, self.running.values()))
        return Progress(len(self.trials.all()) - left, self.spec.trials, running, failed)

    # -- the front ---------------------------------------------------------------------------------------------------

    def points(self) -> list[TriedPoint]:
        return points_of(self.trials.all(), self.found, self.space, self.goal)

    def test(self, pool: Pool[Any], progress: Callable[[Progress], None] | None) -> dict[int, Tested]:
        """The points that none beats, measured on the test rows, by their places in `points`."""
        jobs = {
            number: self.stacks.test_jobs(point.candidate, point.point)
            for number, point in enumerate(self.points())
            if point.front
        }
        unique: dict[str, Job] = {job.id: job for each in jobs.values() for job in each}
        known = {id: result for id in unique if (result := read_result(self.folder, id)) is not None}
        left = [job for id, job in unique.items() if id not in known]
        while left or pool.running:
            while left and pool.has_room():
                pool.start(left.pop(0))
            if progress is not None:
                progress(Progress(len(known), len(unique), len(pool.running), 0))
            known |= {result.id: result for result in pool.wait(TICK)}
        return {number: Tested(each, [known[job.id] for job in each]) for number, each in jobs.items()}
