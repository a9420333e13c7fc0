"""Methods with several measures: a learning rate for each from one grid, then three seeds, a table.

    def make(rate, seed): ...  # a stack that is trained
    results = measured({"lora": make}, {"base": lambda: test(base)}, rates=(1e-3, 1e-2), choose=..., test=..., ...)

`choose` scores a stack on validation rows, more is better; `test` gives the measures of the table. The first seed
trains at each rate, the others at the best one, the smaller of equals. What is in the file already, of the same
settings, does not run again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from run import machine

from peftx import Stack
from peftx.engines.files import write_text

Make = Callable[[float, int], Stack]
"""(learning rate, seed) -> a stack that is trained."""
SEEDS = (0, 1, 2)


def measured(
    trained: Mapping[str, Make],
    untrained: Mapping[str, Callable[[], dict[str, float]]],
    *,
    rates: Sequence[float],
    choose: Callable[[Stack], float],
    test: Callable[[Stack], dict[str, float]],
    settings: Mapping[str, Any],
    base: str,
    file: Path,
    only: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Measures of each method, and leave them in `file`.

    Args:
        trained, untrained: by what the table says. choose: of a stack, on validation rows. test: of a stack, by
            measure. settings: all that decides about the results. base: which of the rows it has read (`bases.seen`).
            only: names to run here, so that several processes may share the work; all if left out.

    Returns:
        What the file has then, in the order of the methods.
    """
    told = json.loads(json.dumps(dict(settings) | {"rates": list(rates), "seeds": list(SEEDS)}))
    for name in only or [*untrained, *trained]:
        if name not in _known(file, told):
            found = (
                _summary([untrained[name]()])
                if name in untrained
                else _rated(name, trained[name], rates, choose, test)
            )
            whole = {
                "machine": machine(),
                "settings": told,
                "base": base,
                "results": _known(file, told) | {name: found},
            }
            write_text(file, json.dumps(whole, indent=1) + "\n")
    known = _known(file, told)
    return {name: known[name] for name in [*untrained, *trained] if name in known}


def _known(file: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Results of these settings in the file."""
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return known["results"] if known.get("settings") == settings else {}


def _rated(
    name: str,
    make: Make,
    rates: Sequence[float],
    choose: Callable[[Stack], float],
    test: Callable[[Stack], dict[str, float]],
) -> dict[str, Any]:
    stacks, scores, seconds = {}, {}, []
    for rate in rates:
        started = time.process_time()
        stacks[rate] = make(rate, SEEDS[0])
        seconds.append(time.process_time() - started)
        scores[rate] = choose(stacks[rate])
        print(f"{name:40} rate {rate:g}  {scores[rate]:.4f}", flush=True)
    best = max(sorted(scores), key=lambda rate: scores[rate])
    runs = [test(stacks[best])]
    for seed in SEEDS[1:]:
        started = time.process_time()
        stack = make(best, seed)
        seconds.append(time.process_time() - started)
        runs.append(test(stack))
    print(f"{name:40} {best:g}  {runs}", flush=True)
    return _summary(runs) | {
        "rate": best,
        "edge": best in (min(rates), max(rates)),
        "validation": {f"{rate:g}": score for rate, score in scores.items()},
        "cpu_seconds": round(statistics.mean(seconds), 1),
    }


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds; no deviation of one run."""
    by_name = {name: [run[name] for run in runs] for name in runs[0]}
    found: dict[str, Any] = {"mean": {name: statistics.mean(values) for name, values in by_name.items()}}
    if len(runs) > 1:
        found["spread"] = {name: statistics.stdev(values) for name, values in by_name.items()}
    return found | {"runs": runs}


def table(results: Mapping[str, Mapping[str, Any]], measures: Mapping[str, int]) -> list[str]:
    """Lines of Markdown. measures: as the table says them -> digits behind the point."""
    lines = [
        f"| | {' | '.join(measures)} | learning rate | CPU seconds |",
        "| --- |" + " --- |" * (len(measures) + 2),
    ]
    for name, found in results.items():
        spread = found.get("spread", {})
        cells = [
            f"{found['mean'][what]:.{digits}f}" + (f" ± {spread[what]:.{digits}f}" if spread else "")
            for what, digits in measures.items()
        ]
        rate = f"{found['rate']:g}" + (", edge" if found["edge"] else "") if "rate" in found else ""
        seconds = f"{found['cpu_seconds']:.0f}" if "cpu_seconds" in found else ""
        lines.append("| " + " | ".join([name, *cells, rate, seconds]) + " |")
    return lines


def grid(rates: Sequence[float]) -> str:
    """Rates as a page says them."""
    return ", ".join(f"{rate:g}" for rate in rates)


def publish(
    file: Path,
    title: str,
    setting: str,
    results: Mapping[str, Mapping[str, Any]],
    measures: Mapping[str, int],
) -> None:
    """Write the page of a table beside its JSON `file`, and print it."""
    page = "\n".join([f"# {title}", "", setting, "", *table(results, measures), ""])
    write_text(file.with_suffix(".md"), page)
    print(page)
