"""Which jobs a comparison needs, given what is known: rates on validation rows first, then every seed with the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftx.comparing.jobs import Job, JobResult, identity_of
from peftx.comparing.pipelines import on_validation, split, trained, untrained
from peftx.composition.registry import Registry
from peftx.errors import PeftxError, TrialError
from peftx.pipeline import Run
from peftx.planning import plan
from peftx_spec import dump
from peftx_spec.compare_load import Compared, LoadedCompare
from peftx_spec.models import HIGHER_IS_BETTER, Pipeline

PACED_STEPS = 20
"""Steps of the pipeline that is timed; its process stops sooner where a quarter of the budget is used up."""

Found = Mapping[str, JobResult]
"""What is known: id of a job -> what it left."""


@dataclass(frozen=True)
class PlannedRow:
    """A row whose stack was looked at; `pipeline` is None, with a `reason`, where it cannot be built."""

    compared: Compared
    pipeline: Pipeline | None
    reason: str = ""
    rates: tuple[float, ...] = ()
    """What is tried, from small to large; empty where nothing trains."""
    identity: str = field(default="", repr=False)
    rate_identity: str = field(default="", repr=False)
    """Of the jobs that rates are chosen by: they never read what rows are measured on, so it is no part of it."""

    @property
    def name(self) -> str:
        return self.compared.name


class Schedule:
    """The jobs of a comparison, made as their turn comes. What is held out of the training data for all rows is written
    to `folder/data`.

    Raises:
        PeftxError: no row can be built; or data that none can do without is not there.
    """

    def __init__(
        self, loaded: LoadedCompare, folder: Path, *, registry: Registry, trust_remote_code: bool = False
    ) -> None:
        self.spec, self.metric, self.validation = loaded.spec, loaded.metric, loaded.validation
        self.higher = HIGHER_IS_BETTER[loaded.metric]
        self.registry, self.trust_remote_code = registry, trust_remote_code
        self.folder = folder
        self.rows = [self._planned(row) for row in loaded.rows]
        if not any(row.pipeline for row in self.rows):
            reasons = dict.fromkeys(row.reason for row in self.rows)
            raise TrialError("no row of the comparison can be built:\n" + "\n".join(reasons))

    # -- before anything runs ----------------------------------------------------------------------------------------

    def _planned(self, row: Compared) -> PlannedRow:
        """Look at the stack without weights: conflicts, data, and whether anything trains."""
        if row.pipeline is None:
            return PlannedRow(row, None, row.reason)
        try:
            pipeline = split(row.pipeline, self.folder / "data")
            Run(pipeline, registry=self.registry)
            seen = plan(pipeline, registry=self.registry, trust_remote_code=self.trust_remote_code)
            for conflict in seen.conflicts:
                remedy = f" ({conflict.remedy})" if conflict.remedy else ""
                return PlannedRow(row, None, conflict.reason + remedy)
            hooks = frozenset[str]().union(*(self.registry.hooks(entry.use) for entry in pipeline.stack))
            trains = pipeline.train is not None and bool(
                seen.totals.trainable_params or "train_step" in hooks
            )
            if not trains:
                pipeline = untrained(pipeline, hooks)
            rates = tuple(sorted(row.learning_rates)) if trains else ()
            identity = identity_of(pipeline, self.registry)
            rate_identity = identity_of(self._without_eval(pipeline), self.registry) if len(rates) > 1 else ""
        except PeftxError as error:
            return PlannedRow(row, None, error.message + (f" ({error.hint})" if error.hint else ""))
        return PlannedRow(row, pipeline, "", rates, identity, rate_identity)

    # -- the jobs ----------------------------------------------------------------------------------------------------

    def wanted(self, found: Found) -> list[Job]:
        """The jobs that can run now and have left nothing yet."""
        jobs = {job.id: job for row in self.rows for job in self._wanted(row, found) if job.id not in found}
        return list(jobs.values())

    def _wanted(self, row: PlannedRow, found: Found) -> Sequence[Job]:
        if row.pipeline is None:
            return ()
        steps = self.steps(row, found)
        if steps is None:
            return (self.pace_job(row),)
        rates = self.rate_jobs(row, steps)
        if any(job.id not in found for job in rates):
            return rates
        return self.seed_jobs(row, found)

    def count(self) -> int:
        """How many jobs there are if none fails; rows that share one count it each."""
        return sum(self._count(row) for row in self.rows if row.pipeline is not None)

    def _count(self, row: PlannedRow) -> int:
        if not row.rates:
            return 1
        paced = self.spec.budget.seconds is not None
        return paced + (len(row.rates) if len(row.rates) > 1 else 0) + len(self.spec.seeds)

    def steps(self, row: PlannedRow, found: Found) -> int | None:
        """Optimizer steps of a row; 0 where nothing trains, None where they are not timed yet, or could not be."""
        budget = self.spec.budget
        if not row.rates or row.pipeline is None or row.pipeline.train is None:
            return 0
        if budget.steps is not None:
            return budget.steps
        if budget.rows is not None:
            train = row.pipeline.train
            return -(-budget.rows // (train.batch_size * train.gradient_accumulation))
        timed = found.get(self.pace_job(row).id)
        return None if timed is None or timed.reason else timed.steps

    def pace_job(self, row: PlannedRow) -> Job:
        """Times steps; only of a row that trains, for a budget in seconds."""
        pipeline = _trained(_of(row), PACED_STEPS, row.rates[0], self.spec.seeds[0])
        return Job(row.name, "pace", dump(pipeline), self.metric, self.spec.seeds[0], row.identity,
                   row.rates[0], self.spec.budget.seconds)  # fmt: skip

    def rate_jobs(self, row: PlannedRow, steps: int) -> tuple[Job, ...]:
        """One a rate, with the first seed, on rows of the training data alone; none where there is no choice."""
        if len(row.rates) < 2:
            return ()
        seed = self.spec.seeds[0]
        base = self._without_eval(_of(row))
        return tuple(
            Job(
                row.name,
                "rate",
                dump(_trained(base, steps, rate, seed)),
                self.metric,
                seed,
                row.rate_identity,
                rate,
            )
            for rate in row.rates
        )

    def seed_jobs(self, row: PlannedRow, found: Found) -> tuple[Job, ...]:
        """One a seed, with the chosen rate, on all training rows; one alone where nothing trains; none where no rate
        came through."""
        if not row.rates:
            job = Job(row.name, "seed", dump(_of(row)), self.metric, self.spec.seeds[0], row.identity)
            return (job,)
        steps, rate = self.steps(row, found), self.chosen(row, found)
        if steps is None or rate is None:
            return ()
        return tuple(
            Job(
                row.name,
                "seed",
                dump(_trained(_of(row), steps, rate, seed)),
                self.metric,
                seed,
                row.identity,
                rate,
            )
            for seed in self.spec.seeds
        )

    def chosen(self, row: PlannedRow, found: Found) -> float | None:
        """The rate that is best on the validation rows, the smaller one of equals; None where none came through."""
        if len(row.rates) == 1:
            return row.rates[0]
        steps = self.steps(row, found)
        if steps is None:
            return None
        results = [found[job.id] for job in self.rate_jobs(row, steps) if job.id in found]
        best: JobResult | None = None
        for result in results:
            if not result.reason and (
                best is None or self.better(result.value(self.metric), best.value(self.metric))
            ):
                best = result
        return None if best is None else best.rate

    def better(self, one: float, other: float) -> bool:
        return one > other if self.higher else one < other

    def _without_eval(self, pipeline: Pipeline) -> Pipeline:
        return on_validation(pipeline, self.metric, self.validation, self.spec.seeds[0])


def _of(row: PlannedRow) -> Pipeline:
    assert row.pipeline is not None
    return row.pipeline


def _trained(pipeline: Pipeline, steps: int, rate: float, seed: int) -> Pipeline:
    return trained(pipeline, seed, steps=steps, num_train_epochs=None, learning_rate=rate)
