"""The points of a search as rows of a comparison's table, so that they are shown as those are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial

from peftx.comparing.jobs import Job, JobResult
from peftx.comparing.statistics import SCALES, spread
from peftx.comparing.table import COLUMNS as OF_A_ROW
from peftx.comparing.table import Measured, Table, TableRow, costs_of, slugs_of
from peftx.searching.objectives import excess, front
from peftx.searching.space import Space
from peftx.searching.trials import JOB, REASON, Goal
from peftx.version import __version__
from peftx_spec.compare_load import row_name
from peftx_spec.search_load import Candidate, LoadedSearch, Point

Found = dict[str, JobResult]
"""Id of a job -> what it left."""


@dataclass
class TriedPoint:
    """A point, all trials of it, and what those left that came through."""

    candidate: Candidate
    point: Point
    trials: list[int]
    results: list[JobResult]
    reason: str = ""
    ended: bool = False
    over: str = ""
    front: bool = False

    @property
    def name(self) -> str:
        return row_name(self.candidate.name, self.point)

    def quality(self, metric: str) -> list[float]:
        return [result.value(metric) for result in self.results]


@dataclass(frozen=True)
class Tested:
    """What a point of the front came to on the test rows, with each seed."""

    jobs: list[Job]
    results: list[JobResult]


@dataclass(frozen=True)
class PointRow(TableRow):
    """One point.

    Attributes:
        value, std, low, high: on the validation rows, over the trials of the point. seeds: on the test rows.
        status: done, over a limit, ended early, or failed. note: front, or the status where it is another than done.
        trials: their numbers. test_value, test_std, test_low, test_high: over the seeds; of the front alone.
    """

    front: bool = False
    test_value: float | None = None
    test_std: float | None = None
    test_low: float | None = None
    test_high: float | None = None
    trials: list[int] = field(default_factory=list)


COLUMNS = (*OF_A_ROW, "front", "test_value", "test_std", "test_low", "test_high")
"""What a CSV has of a point."""


@dataclass(frozen=True)
class SearchTable(Table):
    """All points, by their first trial. refused: why points were drawn and never run. dropped: stack -> why it cannot
    be built."""

    objectives: list[str] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    sampler: str = ""
    refused: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def front(self) -> list[PointRow]:
        """The best first."""
        return [row for row in self.ordered if isinstance(row, PointRow) and row.front]


def points_of(trials: Sequence[FrozenTrial], found: Found, space: Space, goal: Goal) -> list[TriedPoint]:
    """The trials by point; those that none beats are the front."""
    points: list[TriedPoint] = []
    for trial in trials:
        result = found.get(trial.user_attrs[JOB])
        if result is None:
            continue
        candidate, values = space.point(trial.params)
        point = next((each for each in points if (each.candidate, each.point) == (candidate, values)), None)
        if point is None:
            point = TriedPoint(candidate, values, [], [])
            points.append(point)
        point.trials.append(trial.number)
        if REASON in trial.user_attrs:
            point.reason, point.ended = trial.user_attrs[REASON], result.ended_early
        else:
            point.results.append(result)
    _place(points, goal)
    return points


def _place(points: Sequence[TriedPoint], goal: Goal) -> None:
    """Say of each point whether it keeps the limits, and whether it is on the front."""
    good: list[TriedPoint] = []
    for point in points:
        if not point.results:
            continue
        broken = [name for name, over in excess(costs_of(point.results), goal.limits).items() if over > 0]
        point.over = ", ".join(broken)
        if not broken:
            good.append(point)
    values = [
        goal.signed(goal.values(statistics.fmean(point.quality(goal.metric)), costs_of(point.results)))
        for point in good
    ]
    for index in front(values):
        good[index].front = True


def table_of(
    points: Sequence[TriedPoint], tested: Mapping[int, Tested], goal: Goal, loaded: LoadedSearch, *, threads: int,
    refused: list[str], dropped: dict[str, str],
) -> SearchTable:  # fmt: skip
    """Everything that is known, as a table."""
    from importlib.metadata import version

    slugs = slugs_of([point.name for point in points])
    rows: list[TableRow] = [
        _row(point, tested.get(number), goal, slugs[point.name]) for number, point in enumerate(points)
    ]
    results = [result for point in points for result in point.results]
    validation, spec = loaded.validation, loaded.spec
    return SearchTable(
        metric=goal.metric,
        higher_is_better=goal.higher,
        model=loaded.candidates[0].pipeline(loaded.candidates[0].probes[0]).model.id,
        budget=f"{sum(len(point.trials) for point in points)} trials",
        seeds=list(spec.seeds),
        validation=f"{validation:g} of the training rows"
        if isinstance(validation, float)
        else validation.path,
        threads=threads,
        device="accelerator" if any(result.device_memory is not None for result in results) else "cpu",
        versions={
            "peftx": __version__,
            **{name: version(name) for name in ("torch", "transformers", "optuna")},
        },
        rows=rows,
        yaml={points[number].name: _yaml(points[number], each, threads) for number, each in tested.items()},
        objectives=list(goal.objectives),
        limits=dict(goal.limits),
        sampler=spec.sampler.use,
        refused=refused,
        dropped=dropped,
    )


def _row(point: TriedPoint, tested: Tested | None, goal: Goal, slug: str) -> PointRow:
    status = "over a limit" if point.over else "done"
    reason = f"over the limit of {point.over}" if point.over else ""
    told: dict[str, Any] = {}
    if not point.results:
        status, reason = ("ended early" if point.ended else "failed"), point.reason
    else:
        over = spread(point.quality(goal.metric), SCALES[goal.metric])
        told |= {
            "value": over.mean,
            "std": over.std,
            "low": over.low,
            "high": over.high,
            **costs_of(point.results),
        }
        told["steps"] = point.results[0].steps
    if tested is not None:
        told |= {"front": True, "repeat": f"repeat/{slug}.yaml", **_tested(tested, goal.metric)}
        reason = next((f"on the test rows: {each.reason}" for each in tested.results if each.reason), "")
    rate = point.point.get("train.learning_rate")
    return PointRow(
        row=point.name, method=point.candidate.name, place=point.candidate.place, status=status, reason=reason,
        note="front" if point.front else "" if status == "done" else status,
        learning_rate=float(rate) if isinstance(rate, int | float) else None,
        options=dict(point.point), trials=point.trials, **told,
    )  # fmt: skip


def _tested(tested: Tested, metric: str) -> dict[str, Any]:
    """A mean over the seeds that came through would flatter the point: one that failed leaves none."""
    seeds = [
        Measured(r.seed, None if r.reason else r.value(metric), r.reason, r.scores, r.losses)
        for r in tested.results
    ]
    if any(result.reason for result in tested.results):
        return {"seeds": seeds}
    over = spread([result.value(metric) for result in tested.results], SCALES[metric])
    found = {"test_value": over.mean, "test_std": over.std, "test_low": over.low, "test_high": over.high}
    return {
        "seeds": seeds,
        **{name: value for name, value in found.items() if value is None or math.isfinite(value)},
    }


def _yaml(point: TriedPoint, tested: Tested, threads: int) -> str:
    """The pipeline of the first seed on all training rows."""
    first, *others = tested.jobs
    more = (
        f"# the other seeds: {', '.join(f'--set train.seed={job.seed}' for job in others)}\n"
        if others
        else ""
    )
    return (
        f"# {' '.join(point.name.split())}, seed {first.seed}: {' '.join(point.candidate.place.split())}\n"
        f"# OMP_NUM_THREADS={threads} peftx apply THIS-FILE [--output BUNDLE]\n{more}{first.pipeline}"
    )
