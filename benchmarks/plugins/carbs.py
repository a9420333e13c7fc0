"""How much of a front of quality and cost is found in 30 trials: samplers of `peftx search`, and chance.

    python benchmarks/plugins/carbs.py

On a made-up function of a size s in [1, 1000], which is its cost, and a rate r in [0, 1]: log10 s - 30 (r - 0.2)^2. Of
what was tried, the area under the front over log10 of the cost from 1 to 1000, above a quality of 0: 4.5 of the whole
front. One trial after another, five seeds. Leaves carbs.json in benchmarks/results.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution

from peftx.engines.files import write_text
from peftx.searching.samplers import Samplers, Setting

RESULTS = Path(__file__).parents[1] / "results"
SEEDS, TRIALS = range(5), 30
NAMES, OBJECTIVES = ("carbs", "tpe", "random"), ("quality", "train_seconds")
SPANS: dict[str, BaseDistribution] = {
    "size": FloatDistribution(1.0, 1000.0, log=True),
    "rate": FloatDistribution(0.0, 1.0),
}


def tried(params: Mapping[str, Any]) -> tuple[float, float]:
    """Quality and cost."""
    return math.log10(params["size"]) - 30 * (params["rate"] - 0.2) ** 2, params["size"]


def area(points: list[tuple[float, float]]) -> float:
    total, best, at = 0.0, 0.0, 0.0
    for quality, cost in sorted(points, key=lambda point: point[1]):
        total += best * (math.log10(cost) - at)
        best, at = max(best, quality), math.log10(cost)
    return total + best * (3 - at)


def found(name: str, seed: int) -> float:
    """The area after all trials. A sampler is made anew for each, as `peftx search` does."""
    kind, study = Samplers().load(name)(), optuna.create_study(directions=["maximize", "minimize"])
    for number in range(TRIALS):
        study.sampler = kind.sampler(
            Setting(1000 * seed + number, OBJECTIVES, higher=True, limits={}, distributions=SPANS, stacks=1)
        )
        trial = study.ask(dict(SPANS))
        study.tell(trial, tried(trial.params))
    return area([tried(trial.params) for trial in study.trials])


def main() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results = {}
    for name in NAMES:
        areas = [found(name, seed) for seed in SEEDS]
        results[name] = {"mean": {"area": statistics.mean(areas)}, "spread": {"area": statistics.stdev(areas)},
                         "runs": [{"area": each} for each in areas]}  # fmt: skip
        print(name, [round(each, 3) for each in areas])
    settings = {"trials": TRIALS, "seeds": list(SEEDS), "whole": 4.5}
    text = json.dumps({"settings": settings, "results": results}, indent=1)
    write_text(RESULTS / "carbs.json", text + "\n")


if __name__ == "__main__":
    main()
