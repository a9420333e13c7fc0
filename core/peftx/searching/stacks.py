"""The stacks of a search: which can be built, and the jobs of their points."""

from __future__ import annotations

from pathlib import Path

from peftx.comparing.jobs import Job, identity_of
from peftx.comparing.pipelines import on_validation, split, trained, untrained
from peftx.composition.registry import Registry
from peftx.errors import PeftxError, TrialError
from peftx.pipeline import Run
from peftx.planning import plan
from peftx_spec import dump
from peftx_spec.models import Pipeline
from peftx_spec.search_load import Candidate, LoadedSearch, Point, reason_of


class Stacks:
    """Of a loaded search. What is held out of the training data to test on is written to `folder/data`.

    Raises:
        PeftxError: no stack can be built.
    """

    def __init__(
        self, loaded: LoadedSearch, folder: Path, registry: Registry, trust_remote_code: bool
    ) -> None:
        self.loaded, self.spec, self.metric = loaded, loaded.spec, loaded.metric
        self.folder, self.registry, self.trust_remote_code = folder, registry, trust_remote_code
        self._identities: dict[tuple[str, bool], str] = {}
        self.dropped: dict[str, str] = {}
        self.candidates = {each.name: each for each in loaded.candidates if self._can_be_built(each)}
        if not self.candidates:
            told = "\n".join(f"{name}: {reason}" for name, reason in self.dropped.items())
            raise TrialError(f"no stack of the search can be built:\n{told}")

    def _can_be_built(self, candidate: Candidate) -> bool:
        """Is there a point of the stack that nothing stands in the way of."""
        reasons: list[str] = []
        for point in candidate.probes:
            try:
                pipeline = self.pipeline(candidate, point)
                Run(pipeline, registry=self.registry)
                reason = self.seen(pipeline)[0]
            except PeftxError as error:
                reason = reason_of(error)
            if not reason:
                return True
            reasons.append(reason)
        self.dropped[candidate.name] = reasons[0]
        return False

    def pipeline(self, candidate: Candidate, point: Point) -> Pipeline:
        """With the rows that it is measured on at the end in `data.eval`.

        Raises:
            PeftxError: the values do not fit each other.
        """
        return split(candidate.pipeline(point), self.folder / "data")

    def seen(self, pipeline: Pipeline) -> tuple[str, int]:
        """What stands in the way of a pipeline, and how many numbers it trains; no weights are loaded."""
        seen = plan(pipeline, registry=self.registry, trust_remote_code=self.trust_remote_code)
        for conflict in seen.conflicts:
            return conflict.reason + (f" ({conflict.remedy})" if conflict.remedy else ""), 0
        return "", seen.totals.trainable_params

    def sizing(self, candidate: Candidate, point: Point) -> Point:
        """Values of the options of what compresses, which decide about bytes beside the numbers trained."""
        stack = self.pipeline(candidate, candidate.probes[0]).stack
        compress = {entry.id for entry in stack if "compress" in self.registry.hooks(entry.use)}
        return {key: value for key, value in point.items() if key.partition(".")[0] in compress}

    def identities(self) -> list[str]:
        """Of all stacks that can be built, as their trials have them."""
        return [
            self._identity(each, self.pipeline(each, each.probes[0]), False)
            for each in self.candidates.values()
        ]

    def _identity(self, candidate: Candidate, pipeline: Pipeline, testing: bool) -> str:
        key = (candidate.name, testing)
        if key not in self._identities:
            read = pipeline if testing else self._on_validation(candidate, pipeline)
            self._identities[key] = identity_of(read, self.registry)
        return self._identities[key]

    def _on_validation(self, candidate: Candidate, pipeline: Pipeline) -> Pipeline:
        """Also where nothing trains some of the training rows are what a stack is scored on."""
        if pipeline.data.train is None:
            data = pipeline.data.model_copy(update={"train": candidate.rows})
            pipeline = pipeline.model_copy(update={"data": data})
        return on_validation(pipeline, self.metric, self.loaded.validation, self.spec.seed)

    def trial_job(
        self, candidate: Candidate, pipeline: Pipeline, *, numbers: int, repeats: int, checks: int
    ) -> Job:
        """A point on the validation rows. numbers: that train. repeats: so many seeds of it were tried already."""
        scored, seed = self._on_validation(candidate, pipeline), self.spec.seed
        hooks = self._hooks(pipeline)
        if not _trains(pipeline, hooks, numbers):
            scored = untrained(scored, hooks)
        else:
            assert scored.train is not None
            seed += repeats
            looks = {
                "eval_steps": -(-scored.train.steps // (checks + 1)),
                "metric_for_best_model": self.metric,
            }
            scored = trained(scored, seed, **(looks if checks else {}))
        identity = self._identity(candidate, pipeline, False)
        return Job(candidate.name, "trial", dump(scored), self.metric, seed, identity)

    def test_jobs(self, candidate: Candidate, point: Point) -> list[Job]:
        """A point on the test rows, with each seed on all training rows; one job alone where nothing trains."""
        pipeline = self.pipeline(candidate, point)
        hooks = self._hooks(pipeline)
        identity = self._identity(candidate, pipeline, True)
        seeds = self.spec.seeds
        if _trains(pipeline, hooks, self.seen(pipeline)[1]):
            made = {seed: trained(pipeline, seed) for seed in seeds}
        else:
            made = {seeds[0]: untrained(pipeline, hooks)}
        return [
            Job(candidate.name, "seed", dump(each), self.metric, seed, identity)
            for seed, each in made.items()
        ]

    def _hooks(self, pipeline: Pipeline) -> frozenset[str]:
        return frozenset[str]().union(*(self.registry.hooks(entry.use) for entry in pipeline.stack))


def _trains(pipeline: Pipeline, hooks: frozenset[str], numbers: int) -> bool:
    return pipeline.train is not None and bool(numbers or "train_step" in hooks)
