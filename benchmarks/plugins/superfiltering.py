"""Superfiltering on rows of which some have the answer of another: which of them it keeps, and which it drops.

    python benchmarks/plugins/superfiltering.py roleplay_instruct.json.gz --prompt instruction --completion response

The data: rows with a prompt and a completion. In each of `--seeds` draws of `--rows` rows, a share of the answers is
exchanged among themselves. Prints JSON: how many of the exchanged are among the rows that are kept, for some shares,
and among those that go because their IFD is 1 or more; and how well the scores of two small models agree, if `--other`
names a second one (Spearman's rank correlation).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from peftx import Stack, Worker
from peftx.engines.data import read_dataset
from peftx.toolkits.working import OfStack
from peftx_superfiltering import ifd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--prompt", default="prompt", help="column of the prompts")
    parser.add_argument("--completion", default="completion", help="column of the completions")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--exchanged", type=float, default=0.2, help="share of the answers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scorer", default="peftx:tiny")
    parser.add_argument("--other", help="a second scorer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    columns = {"prompt": arguments.prompt, "completion": arguments.completion}
    found = read_dataset(arguments.data, format="prompt-completion", columns=columns)
    pairs = [(row["prompt"], row["completion"]) for row in found if row["completion"].strip()]
    workers = [Worker(OfStack(Stack(name))) for name in (arguments.scorer, arguments.other) if name]
    draws = [draw(pairs, workers, seed, arguments) for seed in range(arguments.seeds)]
    summary = {
        key: {"mean": mean(one[key] for one in draws), "sd": stdev(one[key] for one in draws)}
        for key in draws[0]
    }
    print(
        json.dumps(
            {"rows": arguments.rows, "exchanged": arguments.exchanged, "summary": summary, "draws": draws}
        )
    )


def draw(pairs: list[tuple[str, str]], workers: list[Worker], seed: int, arguments: Any) -> dict[str, float]:
    rng = random.Random(seed)
    rows = rng.sample(pairs, min(arguments.rows, len(pairs)))
    places = rng.sample(range(len(rows)), int(arguments.exchanged * len(rows)))
    for place, (_, answer) in zip(places, [rows[i] for i in places[1:] + places[:1]], strict=True):
        rows[place] = rows[place][0], answer
    wrong, scores = set(places), ifd(workers[0], rows)
    best = sorted((i for i in scores if scores[i] < 1), key=lambda i: -scores[i])
    over = [i for i in scores if scores[i] >= 1]
    result = {
        f"exchanged among the kept, share {share}": share_of(wrong, best[: int(share * len(rows))])
        for share in (0.05, 0.1, 0.15, 0.5)
    }
    result |= {
        "IFD of 1 or more": len(over) / len(rows),
        "exchanged among these": share_of(wrong, over),
        "mean IFD, right": mean(scores[i] for i in scores if i not in wrong),
        "mean IFD, exchanged": mean(scores[i] for i in wrong),
    }
    if len(workers) > 1:
        result["rank correlation"] = spearman([*scores.values()], [*ifd(workers[1], rows).values()])
    return result


def share_of(wrong: set[int], places: list[int]) -> float:
    return sum(i in wrong for i in places) / len(places) if places else 0.0


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(x, dtype=torch.float64).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()
