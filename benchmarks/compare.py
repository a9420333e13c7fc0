"""Methods side by side: every method under several seeds, a curve of its score against CPU seconds, a table, a plot.

`peftx compare` does this for what a YAML file can say (`leaderboards/`). This file is for the rest: rows or scores that
need Python. A benchmark names its methods and how a stack is scored; this file chooses rates, trains, measures, draws:

    methods = [Method("LoRA, rank 8", lambda: [Lora(rank=8)]), ...]
    results = compare(methods, parts, score, rates=(3e-4, 1e-3, 3e-3), steps=200, every=50, target=0.8)
    write("token_trails", "Token Trails on dialogues", results, unit="perplexity", base=seen(...))

A method's rate is chosen on validation rows, and the rows that it is measured on play no part in that: the runs of the
first seed, one a rate, are looked at on the test rows too, and the curve of the chosen rate is that seed's. `write`
leaves benchmarks/results/<name>.json, .md and .png. One thread; seconds are CPU time of training alone.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftx import Plugin, Stack
from peftx.engines.data import Collator, tokenize_dataset
from peftx.engines.models import load_model
from peftx.engines.training.run import as_training_data

RESULTS = Path(__file__).parent / "results"
Rows = Sequence[Mapping[str, Any]]

if importlib.util.find_spec("matplotlib") is None:  # now, and not after an hour of training
    sys.exit("the plots need matplotlib: python3 tools/dev_install.py --extra bench")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Args:
        name: as the table says it. plugins: makes fresh plugins (none: the base, not trained).
        rates: that are tried in place of those of all; one alone is fixed, and part of what the row is about.
        times: what the rate of single plugins is multiplied by, by id.
    """

    name: str
    plugins: Callable[[], list[Plugin | tuple[str, Plugin]]]
    rates: Sequence[float] = ()
    times: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """Rows to train on, to choose rates on, and to measure on; no row is in two of them."""

    train: Rows
    validation: Rows
    test: Rows

    @classmethod
    def of(cls, rows: Rows, *, test: Rows, validation: float = 0.2) -> Parts:
        """The last share of `rows` to choose on."""
        cut = round(len(rows) * (1 - validation))
        return cls(rows[:cut], rows[cut:], test)


@dataclass
class Curve:
    """One method under one seed."""

    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """CPU seconds of training until then."""
    scores: list[float] = field(default_factory=list)
    seconds_to_target: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    """At the end: what else was scored, where the score is the first of several."""


@dataclass
class Result:
    """One method under all seeds."""

    method: str
    rate: float
    trained_parameters: int
    curves: list[Curve]
    tried: list[tuple[float, float]]
    """Each rate, and its score on the validation rows; empty where there was nothing to choose."""

    @property
    def finals(self) -> list[float]:
        return [curve.scores[-1] for curve in self.curves]

    @property
    def mean(self) -> float:
        return statistics.mean(self.finals)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for a single one."""
        return statistics.stdev(self.finals) if len(self.finals) > 1 else 0.0


Score = Callable[[Stack, Rows], float | Mapping[str, float]]
"""Of several scores the first is what is compared."""


def compare(
    methods: Sequence[Method],
    parts: Parts,
    score: Score,
    *,
    rates: Sequence[float],
    seeds: Sequence[int] = (0, 1, 2),
    steps: int,
    every: int,
    batch_size: int = 8,
    max_length: int = 128,
    target: float | None = None,
    higher_is_better: bool = True,
    model: str = "peftx:tiny",
    jobs: Path | None = None,
) -> list[Result]:
    """Choose every method's rate with the first seed, then train it under the others on the same batches; score at the
    start and after every `every` steps.

    Args:
        score: of a stack on rows, as higher (or lower) is better. rates: tried for all methods without their own.
        target: the score whose first crossing is timed. jobs: a folder with a file for each run; what is there is done.
    """
    torch.set_num_threads(1)
    sign = 1 if higher_is_better else -1
    budget = Budget(steps=steps, batch_size=batch_size, max_length=max_length)

    def run(method: Method, rate: float, seed: int) -> tuple[Curve, float]:
        """The curve on the test rows and the last score on the validation rows; trains if the rate is not zero."""
        done = jobs and jobs / f"{method.name}-{rate:g}-{seed}-{steps}x{batch_size}.json"
        if done and done.exists():
            found = json.loads(done.read_text("utf-8"))
            return Curve(**found["curve"]), found["validation"]
        stack, curve = _stack(model, method, seed), Curve(seed)

        def look(step: int, seconds: float) -> None:
            if step % every == 0 or step == steps:
                found, curve.parts = _first(score(stack, parts.test))
                curve.steps.append(step)
                curve.seconds.append(round(seconds, 2))
                curve.scores.append(found)

        look(0, 0.0)
        if rate:
            _train(stack, method, rate, seed, parts.train, budget, look)
        if target is not None:
            reached = [sign * s >= sign * target for s in curve.scores]
            if any(reached):
                curve.seconds_to_target = curve.seconds[reached.index(True)]
        validation = _first(score(stack, parts.validation))[0]
        named = f"{method.name:32} rate {rate:g} seed {seed}"
        print(
            f"{named}  {curve.scores[-1]:.4f}, {validation:.4f} on validation rows, {curve.seconds[-1]:.1f} s",
            flush=True,
        )
        if done:
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps({"curve": asdict(curve), "validation": validation}), "utf-8")
        return curve, validation

    results = []
    for method in methods:
        trained = _stack(model, method, seeds[0]).trainable_parameters()
        grid = sorted(method.rates or rates) if trained else [0.0]
        runs = {rate: run(method, rate, seeds[0]) for rate in grid}
        tried = [(rate, validation) for rate, (_, validation) in runs.items()] if len(grid) > 1 else []
        rate = max(grid, key=lambda rate: sign * runs[rate][1])
        later = seeds[1:] if trained else ()  # without training nothing depends on the seed
        curves = [runs[rate][0], *(run(method, rate, seed)[0] for seed in later)]
        results.append(Result(method.name, rate, trained, curves, tried))
    return results


def _first(found: float | Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The score that is compared, and all that have names."""
    if not isinstance(found, Mapping):
        return round(float(found), 5), {}
    named = {name: round(float(value), 5) for name, value in found.items()}
    return next(iter(named.values())), named


def _stack(model: str, method: Method, seed: int) -> Stack:
    """In float32, however the base is stored: float16 is ten times as slow on a CPU."""
    base, tokenizer = load_model(model, dtype="float32")
    return Stack(base, method.plugins(), tokenizer=tokenizer, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How every method trains; `max_length` in tokens."""

    steps: int
    batch_size: int
    max_length: int


def _train(
    stack: Stack,
    method: Method,
    rate: float,
    seed: int,
    rows: Rows,
    budget: Budget,
    look: Callable[[int, float], None] = lambda step, seconds: None,
) -> None:
    """`look` is told each step and the CPU seconds until then, the model in evaluation mode."""
    torch.manual_seed(seed)
    data = stack.prepare(as_training_data(stack, list(rows), seed=seed, max_length=budget.max_length))
    tokenized = list(
        tokenize_dataset(data.train, stack.tokenizer, format=data.format, max_length=data.max_length)
    )
    collate = Collator(stack.tokenizer.pad_token_id)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(_groups(stack, method, rate))
    queue: list[int] = []
    spent = 0.0
    for step in range(1, budget.steps + 1):
        if len(queue) < budget.batch_size:
            queue += torch.randperm(len(tokenized), generator=order).tolist()
        batch = collate([tokenized[queue.pop(0)] for _ in range(budget.batch_size)])
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - (step - 1) / budget.steps)  # linear to zero
        stack.model.train()
        started = time.process_time()
        stack.train_step(batch, optimizer=optimizer)
        spent += time.process_time() - started
        stack.model.eval()
        look(step, spent)


def _groups(stack: Stack, method: Method, rate: float) -> list[dict[str, Any]]:
    """Parameters that train, by learning rate."""
    own = {id(p): rate * k for owner, k in method.times.items() for p in stack.ledger.parameters(owner)}
    by_rate: dict[float, list[torch.nn.Parameter]] = {}
    for parameter in stack.model.parameters():
        if parameter.requires_grad:
            by_rate.setdefault(own.get(id(parameter), rate), []).append(parameter)
    return [{"params": found, "lr": each, "rate": each} for each, found in by_rate.items()]


def table(results: Sequence[Result], *, unit: str, target: float | None = None) -> str:
    """Markdown: a row a method, mean and standard deviation over the seeds."""
    timed = f" | CPU seconds to {target:g}" if target is not None else ""
    lines = [
        f"| method | rate | trained | {unit} | CPU seconds{timed} |",
        "| --- | --- | --- | --- | --- |" + (" --- |" if target is not None else ""),
    ]
    for result in results:
        seconds = statistics.mean(curve.seconds[-1] for curve in result.curves)
        cells = [
            result.method,
            f"{result.rate:g}" if result.trained_parameters else "",
            f"{result.trained_parameters:,}",
            f"{result.mean:.3f} ± {result.spread:.3f}" if len(result.curves) > 1 else f"{result.mean:.3f}",
            f"{seconds:.0f}",
        ]
        if target is not None:
            reached = [c.seconds_to_target for c in result.curves if c.seconds_to_target is not None]
            missing = len(result.curves) - len(reached)
            said = f"{statistics.mean(reached):.0f}" if reached else "not reached"
            cells.append(
                said + (f" ({missing} of {len(result.curves)} never)" if reached and missing else "")
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(
    name: str,
    title: str,
    results: Sequence[Result],
    *,
    unit: str,
    base: str,
    target: float | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> None:
    """Leave <name>.json, <name>.md and <name>.png in `folder`, and print the table.

    Args:
        base: which rows the base has seen, as `bases.seen` says it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "title": title,
        "unit": unit,
        "base": base,
        "settings": dict(settings or {}),
        "results": [asdict(r) for r in results],
    }
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = table(results, unit=unit, target=target)
    said = ", ".join(f"{key} {value}" for key, value in (settings or {}).items())
    page = (
        f"# {title}\n\n{base}\n\n{said}\n\n{lines}\n\n![{unit} against CPU seconds of training]({name}.png)\n"
    )
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    plot(results, title, unit, folder / f"{name}.png", target=target)
    print(f"{base}\n\n{lines}")


def plot(
    results: Sequence[Result], title: str, unit: str, path: Path, *, target: float | None = None
) -> None:
    """Left: score against seconds of training, mean and range over the seeds. Right: against trained parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, result in enumerate(results):
        color = f"C{index % 10}"
        scores = list(zip(*(curve.scores for curve in result.curves), strict=True))
        means = [statistics.mean(row) for row in scores]
        if not result.trained_parameters:
            left.axhline(means[0], color="0.5", linestyle=":", label=result.method)
            right.axhline(means[0], color="0.5", linestyle=":")
            continue
        seconds = [statistics.mean(row) for row in zip(*(c.seconds for c in result.curves), strict=True)]
        left.plot(seconds, means, color=color, marker=".", label=result.method)
        left.fill_between(
            seconds, [min(r) for r in scores], [max(r) for r in scores], color=color, alpha=0.15
        )
        right.errorbar(
            result.trained_parameters, result.mean, yerr=result.spread, color=color, marker="o", capsize=3
        )
    if target is not None:
        left.axhline(target, color="0.8", linewidth=0.8)
    left.set(xlabel="CPU seconds of training", ylabel=unit)
    right.set(xlabel="trained parameters", ylabel=unit, xscale="log")
    low, high = right.get_xlim()
    right.set_xlim(low / 3, high * 3)
    right.xaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
