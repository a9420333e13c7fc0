"""How far surgical fine-tuning chooses the same layers by other samples, of several sizes.

    python benchmarks/plugins/surgical_fim.py ag_news_test.jsonl.gz --skip 6000 --field text --answer label
    python benchmarks/plugins/surgical_fim.py gsm8k_test.jsonl.gz --field question --answer answer

The bundled model (6 layers). Each of `--seeds` runs draws its sample of N rows by its seed and scores all layers before
its one step. Of all pairs of runs: Spearman's correlation of the scores, and the share of the k chosen layers that both
choose (by chance k / 6): the mean, and the worst pair. Samples of one size come from the same `rows`, and large ones
overlap. Prints JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from peftx import Stack
from peftx_surgical_fim import SurgicalFim


def scores_of(rows: list[dict[str, str]], samples: int, seed: int) -> list[float]:
    """s_l of each layer, by a sample that the seed draws."""
    plugin = SurgicalFim(layers=1, samples=samples)
    stack = Stack("peftx:tiny", [plugin])
    stack.train(rows, steps=1, batch_size=8, learning_rate=1e-5, max_length=128, seed=seed)
    return list(plugin.state["scores"].values())


def stability(found: list[list[float]]) -> dict[str, Any]:
    """Of scores of several samples: how alike any two are."""
    pairs = list(combinations(found, 2))
    rank = [float(spearmanr(a, b).statistic) for a, b in pairs]
    report: dict[str, Any] = {"spearman": [round(sum(rank) / len(rank), 3), round(min(rank), 3)]}
    for k in range(1, len(found[0])):
        best = [set(sorted(range(len(s)), key=lambda i, s=s: -s[i])[:k]) for s in found]
        shared = [len(a & b) / k for a, b in combinations(best, 2)]
        report[f"overlap {k}"] = [round(sum(shared) / len(shared), 3), round(min(shared), 3)]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="JSON lines, gzipped")
    parser.add_argument("--field", required=True, help="what a row asks")
    parser.add_argument("--answer", required=True, help="what it answers")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = gzip.decompress(arguments.data.read_bytes()).decode().splitlines()[arguments.skip :]
    rows = [
        {"prompt": row[arguments.field], "completion": f" {row[arguments.answer]}"}
        for row in map(json.loads, lines)
    ]
    results: dict[str, Any] = {"rows": len(rows)}
    for samples in arguments.samples:
        found = [scores_of(rows, samples, seed) for seed in range(arguments.seeds)]
        mean = [round(sum(layer) / len(found), 5) for layer in zip(*found, strict=True)]
        results[str(samples)] = {"mean scores": mean} | stability(found)
        print(json.dumps({samples: results[str(samples)]}), flush=True)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
