"""Rich features on a biased set: RFC and plain fine-tuning where a word in front tells the class, and then does not.

    python benchmarks/plugins/rfc.py ag_news_test.jsonl.gz

The task: which of two kinds of news a headline is from, by its first `WORDS` words. In front stands one of two words
that have nothing to do with the news. In the rows to train on it goes with the class in a share `BIAS` of them, in the
rows to choose rates on and in those to measure on in a half. A group is a class with a word; there are four.

    worst group          accuracy of the group where it is lowest
    mean                 accuracy over all rows
    worst group, refit   the same, of a logistic regression on the states that the head reads, fitted on the rows to
                         choose on, where the word tells nothing: is the feature there, whatever the head reads

Every method trains a LoRA and a head on the same rows for as many steps; plain fine-tuning is RFC's last phase alone. A
rate is chosen by the worst group. Leaves rfc.json and rfc.md in benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sklearn.linear_model import LogisticRegression

from peftx import Phase, Stack
from peftx.engines.data import read_dataset
from peftx_lora import Lora
from peftx_rfc import Rfc

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import TABLES, seen
from compare import RESULTS
from rated import Make, grid, measured, publish

BASE = "peftx:tiny"
SKIP, WORDS, BIAS = 6000, 10, 0.95
KIND = {"World": "people", "Sports": "people", "Business": "firms", "Sci/Tech": "firms"}
MARKS = ("north", "south")
LABELS = sorted(set(KIND.values()))
TRAIN, VALIDATION = 900, 240
STEPS, BATCH, LONGEST = 80, 32, 48
FIRST = 0.2
"""Share of the steps in which the first model trains: in the default's 0.05 it learns nothing in so short a run."""
RATES = (3e-4, 1e-3, 3e-3)
MEASURES = {"worst group": 3, "mean": 3, "worst group, refit": 3}
Row = dict[str, str]
Group = tuple[str, str]


class Erm(Rfc):
    """The last phase alone: the same head, the mean loss."""

    def phases(self) -> Sequence[Phase]:
        return [Phase("task")]


def parts(path: Path, bias: float) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train on with that bias, and to choose and to measure on with none."""
    rows = [
        {"text": " ".join(row["text"].split()[:WORDS]), "label": KIND[row["label"]]}
        for row in list(read_dataset(path, format="classification"))[SKIP:]
    ]
    draw = Random(0)
    draw.shuffle(rows)

    def marked(row: Row, share: float) -> Row:
        mark = MARKS[LABELS.index(row["label"]) ^ (draw.random() >= share)]
        return row | {"text": f"{mark} : {row['text']}", "mark": mark}

    cut = TRAIN + VALIDATION
    return (
        [marked(row, bias) for row in rows[:TRAIN]],
        [marked(row, 0.5) for row in rows[TRAIN:cut]],
        [marked(row, 0.5) for row in rows[cut:]],
    )


def accuracies(rows: Sequence[Row], answers: Sequence[str]) -> dict[Group, float]:
    right = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        right[row["label"], row["mark"]].append(answer == row["label"])
    return {group: mean(found) for group, found in right.items()}


def worst(stack: Stack, rows: Sequence[Row]) -> float:
    return min(accuracies(rows, stack.classify([row["text"] for row in rows])).values())


def refit(stack: Stack, fitted: Sequence[Row], rows: Sequence[Row]) -> float:
    """The worst group of a regression on the states of the last token."""
    head = LogisticRegression(C=10.0, max_iter=1000)
    head.fit(stack.embed([row["text"] for row in fitted]).numpy(), [row["label"] for row in fitted])
    return min(accuracies(rows, head.predict(stack.embed([row["text"] for row in rows]).numpy())).values())


def trained(rows: Sequence[Row], plugin: Callable[[], Rfc]) -> Make:
    own = [{"text": row["text"], "label": row["label"]} for row in rows]

    def make(rate: float, seed: int) -> Stack:
        stack = Stack(BASE, [Lora(rank=8), plugin()], seed=seed, dtype="float32")
        stack.train(own, steps=STEPS, batch_size=BATCH, learning_rate=rate, seed=seed, max_length=LONGEST)
        return stack

    return make


def tested(stack: Stack, held: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
    answers = stack.classify([row["text"] for row in rows])
    return {
        "worst group": min(accuracies(rows, answers).values()),
        "mean": mean(answer == row["label"] for row, answer in zip(rows, answers, strict=True)),
        "worst group, refit": refit(stack, held, rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="AG News, rows with text and label")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table to run in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    biased, held, test = parts(arguments.data, BIAS)
    fair = parts(arguments.data, 0.5)[0]
    settings = {
        "base": BASE, "skip": SKIP, "words": WORDS, "bias": BIAS, "kinds": KIND, "marks": MARKS,
        "rows": [len(biased), len(held), len(test)], "steps": STEPS, "batch": BATCH, "first": FIRST,
    }  # fmt: skip
    base = seen(BASE, **TABLES["rfc"])
    results = measured(
        {
            "fine-tuning": trained(biased, lambda: Erm(labels=LABELS)),
            "`rfc`": trained(biased, lambda: Rfc(labels=LABELS, first=FIRST)),
            "`rfc`, `frozen`": trained(biased, lambda: Rfc(labels=LABELS, first=FIRST, frozen=True)),
            "fine-tuning on rows without the bias": trained(fair, lambda: Erm(labels=LABELS)),
        },
        {},
        rates=RATES, choose=lambda stack: worst(stack, held), test=lambda stack: tested(stack, held, test),
        settings=settings, base=base, file=RESULTS / "rfc.json", only=arguments.only,
    )  # fmt: skip
    setting = (
        f"AG News, the first {WORDS} words, two kinds; a word in front goes with the kind in {BIAS:.0%} of "
        f"{len(biased)} rows to train on, and in half of {len(held)} to choose rates on and of {len(test)} to measure "
        f"on. LoRA of rank 8, {STEPS} steps of {BATCH} rows, rates from {grid(RATES)}, "
        f"three seeds, ± the standard deviation. {base}"
    )
    publish(RESULTS / "rfc.json", "Headlines with a word that misleads", setting, results, MEASURES)


if __name__ == "__main__":
    main()
