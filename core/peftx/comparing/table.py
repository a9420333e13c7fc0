"""The one structure that JSON, CSV, page and terminal show: a row a method, or a point of its grid."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peftx.comparing.jobs import JobResult
from peftx.comparing.schedule import Found, PlannedRow, Schedule
from peftx.comparing.statistics import SCALES, Spread, spread
from peftx.version import __version__
from peftx_spec.portable import portable


@dataclass(frozen=True)
class Tried:
    """A learning rate on the validation rows: its score, or why there is none."""

    rate: float
    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """A row with one seed: every metric of it, and (step, loss)."""

    seed: int
    value: float | None
    reason: str = ""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Other:
    """A metric that rows are not chosen by: mean and standard deviation over the seeds, None with one."""

    mean: float
    std: float | None
    unit: str


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        row: its name. options: the point of the grid. place: in the file.
        status: done, or failed with a reason; a row of which one seed failed has failed.
        value, std, low, high: of the metric over the seeds, the interval by Student's t at 95 %, on the
            metric's scale (`statistics.SCALES`).
        note: best; inside the noise of the best; failed.
        learning_rate: the chosen one. edge: it is the smallest or the largest that was tried, so a better one may lie
            beyond. steps: of the optimizer.
        trained: numbers. trained_percent: of the base's. bundle_bytes: on disk. base_within: the bundle holds the base,
            compressed. shipped_bytes: of all that must be there to run: the bundle, and the base's weights where it is
            without them. memory_bytes: at most, of the process, or of the tensors on an accelerator; None where the
            system does not tell.
        train_seconds: mean. token_seconds: of one generated token.
        others: what else was measured, by name, where every seed has it.
        repeat: the file that repeats the row's first seed.
    """

    row: str
    method: str
    place: str
    status: str
    reason: str = ""
    value: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    learning_rate: float | None = None
    edge: bool = False
    steps: int | None = None
    trained: int | None = None
    trained_percent: float | None = None
    bundle_bytes: int | None = None
    base_within: bool | None = None
    shipped_bytes: int | None = None
    memory_bytes: int | None = None
    train_seconds: float | None = None
    token_seconds: float | None = None
    repeat: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    rates: list[Tried] = field(default_factory=list)
    seeds: list[Measured] = field(default_factory=list)
    others: dict[str, Other] = field(default_factory=dict)
    log: str = ""

    @property
    def spread(self) -> Spread:
        assert self.value is not None
        return Spread(self.value, self.std, self.low, self.high)


COLUMNS = tuple(
    name
    for name in TableRow.__dataclass_fields__
    if name not in ("options", "rates", "seeds", "others", "log")
)
"""What a CSV has of a row."""

COSTS = {
    "trained": "numbers trained",
    "bundle_bytes": "size of the bundle",
    "shipped_bytes": "size of bundle and base",
    "memory_bytes": "peak memory",
    "train_seconds": "seconds of training",
    "token_seconds": "seconds a token",
}
"""What quality is paid with: column -> words."""


@dataclass(frozen=True)
class Table:
    """All rows, in the order of the file; `yaml` repeats each, by name of the row."""

    metric: str
    higher_is_better: bool
    model: str
    budget: str
    seeds: list[int]
    validation: str
    threads: int
    device: str
    versions: dict[str, str]
    rows: list[TableRow]
    yaml: dict[str, str] = field(default_factory=dict)

    @property
    def ordered(self) -> list[TableRow]:
        """The best first, those that failed last."""
        sign = -1 if self.higher_is_better else 1
        return sorted(self.rows, key=lambda row: math.inf if row.value is None else sign * row.value)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: text in its place."""
        found = asdict(self)
        del found["yaml"]
        return {key: _finite(value) for key, value in found.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def table_of(schedule: Schedule, found: Found, *, threads: int) -> Table:
    """Everything that is known, as a table."""
    from importlib.metadata import version

    slugs = slugs_of([row.name for row in schedule.rows])
    rows = [_row(schedule, row, found, slugs[row.name]) for row in schedule.rows]
    yaml = {row.name: _yaml(schedule, row, found, threads) for row in schedule.rows}
    pipeline = next(row.pipeline for row in schedule.rows if row.pipeline is not None)
    spec = schedule.spec
    on_device = any(result.device_memory is not None for result in found.values())
    validation = schedule.validation
    return Table(
        metric=schedule.metric,
        higher_is_better=schedule.higher,
        model=pipeline.model.id,
        budget=str(spec.budget),
        seeds=list(spec.seeds),
        validation=f"{validation:g} of the training rows"
        if isinstance(validation, float)
        else validation.path,
        threads=threads,
        device="accelerator" if on_device else "cpu",
        versions={"peftx": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        rows=_noted(rows, schedule),
        yaml={name: text for name, text in yaml.items() if text},
    )


def slugs_of(names: Sequence[str]) -> dict[str, str]:
    """Names of files, each its own."""
    found: dict[str, str] = {}
    for name in names:
        slug = portable(re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80].strip("-.") or "row")
        taken = {other.lower() for other in found.values()}
        number = 2
        free = slug
        while free.lower() in taken:
            free, number = f"{slug}-{number}", number + 1
        found[name] = free
    return found


def _row(schedule: Schedule, row: PlannedRow, found: Found, slug: str) -> TableRow:
    told: dict[str, Any] = {
        "row": row.name, "method": row.compared.method, "place": row.compared.place,
        "options": dict(row.compared.options),
    }  # fmt: skip
    if row.pipeline is None:
        return TableRow(**told, status="failed", reason=row.reason)
    steps = schedule.steps(row, found)
    if steps is None:
        timed = found.get(schedule.pace_job(row).id)
        return TableRow(**told, status="failed", reason=_reason(timed), log=timed.log if timed else "")
    tried = [found[job.id] for job in schedule.rate_jobs(row, steps) if job.id in found]
    told["rates"] = [_tried(result, schedule.metric) for result in tried]
    rate = schedule.chosen(row, found)
    if rate is None and row.rates:
        first = tried[0] if tried else None
        return TableRow(**told, status="failed", reason=_reason(first), log=first.log if first else "")
    told |= {
        "learning_rate": rate,
        "edge": _is_edge(rate, row.rates),
        "steps": steps,
        "repeat": f"repeat/{slug}.yaml",
    }
    results = [found[job.id] for job in schedule.seed_jobs(row, found) if job.id in found]
    told["seeds"] = [_measured(result, schedule.metric) for result in results]
    bad = next((result for result in results if result.reason), None)
    if bad is not None or not results:
        words = f"seed {bad.seed}: " if bad is not None and len(results) > 1 else ""
        return TableRow(**told, status="failed", reason=words + _reason(bad), log=bad.log if bad else "")
    over = spread([result.value(schedule.metric) for result in results], SCALES[schedule.metric])
    return TableRow(
        **told,
        status="done",
        value=over.mean,
        std=over.std,
        low=over.low,
        high=over.high,
        others=_others(told["seeds"]),
        **costs_of(results),
    )


def _reason(result: JobResult | None) -> str:
    return "it was not run" if result is None else result.reason


def _is_edge(rate: float | None, rates: Sequence[float]) -> bool:
    return len(rates) > 1 and rate in (rates[0], rates[-1])


def _tried(result: JobResult, metric: str) -> Tried:
    assert result.rate is not None
    return Tried(result.rate, None if result.reason else result.value(metric), result.reason)


def _measured(result: JobResult, metric: str) -> Measured:
    value = None if result.reason else result.value(metric)
    return Measured(result.seed, value, result.reason, result.scores, result.losses)


def _others(seeds: Sequence[Measured]) -> dict[str, Other]:
    """By the name of the score; what is a seed's own value is the metric."""
    found = {}
    for name in seeds[0].scores:
        scores = [seed.scores.get(name, {}) for seed in seeds]
        values = [one.get("value") for one in scores]
        numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        if len(numbers) == len(values) and values != [seed.value for seed in seeds]:
            over = spread(numbers)
            found[name] = Other(over.mean, over.std, str(scores[0].get("unit", "")))
    return found


def costs_of(results: Sequence[JobResult]) -> dict[str, Any]:
    """Of all seeds: the most memory, means of the rest."""
    first = results[0]
    base = first.base_bytes
    held = [r.memory if r.device_memory is None else r.device_memory for r in results]
    times = [result.token_seconds for result in results if result.token_seconds is not None]
    return {
        "trained": first.trained,
        "trained_percent": 100 * first.trained / max(1, first.base_parameters),
        "bundle_bytes": first.bundle_bytes,
        "base_within": None if base is None else base == 0,
        "shipped_bytes": None if base is None else first.bundle_bytes + base,
        "memory_bytes": None if None in held else max(most for most in held if most is not None),
        "train_seconds": statistics.fmean(result.seconds for result in results),
        "token_seconds": statistics.median(times) if times else None,
    }


def _noted(rows: Sequence[TableRow], schedule: Schedule) -> list[TableRow]:
    """Say which row is the best, and which cannot be told from it."""
    from dataclasses import replace

    done = [row for row in rows if row.value is not None]
    sign = -1 if schedule.higher else 1
    best = min(done, key=lambda row: sign * row.spread.mean, default=None)
    noted = []
    for row in rows:
        note = ""
        if row.value is not None and best is not None:
            near = row.spread.overlaps(best.spread)
            note = "best" if row is best else "inside the noise of the best" if near else ""
        noted.append(replace(row, note=note if row.status == "done" else "failed"))
    return noted


def _yaml(schedule: Schedule, row: PlannedRow, found: Found, threads: int) -> str:
    """The pipeline of the row's first seed, as it was run; empty where it never came so far."""
    if row.pipeline is None or schedule.steps(row, found) is None:
        return ""
    jobs = schedule.seed_jobs(row, found)
    if not jobs:
        return ""
    head = f"# {row.name}, seed {jobs[0].seed}: {' '.join(row.compared.place.split())}\n"
    others = ", ".join(f"--set train.seed={job.seed}" for job in jobs[1:])
    more = f"# the other seeds: {others}\n" if others else ""
    how = f"# OMP_NUM_THREADS={threads} peftx apply THIS-FILE [--output BUNDLE]\n"
    return head + how + more + jobs[0].pipeline
