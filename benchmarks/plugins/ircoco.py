"""IRCoCo on the completion of lines of code, beside fine-tuning for as many steps.

    python benchmarks/plugins/ircoco.py HumanEval.jsonl.gz

A row is a solved problem of HumanEval up to the end of a line of its solution, the last `CONTEXT` characters, and the
next line. Problems, not rows, are split into those to train on, to choose rates on and to measure on. After training
the model writes the likeliest line:

    edit similarity    of it and the true line, 2 c / (characters of both), c those of a longest common subsequence
    exact              share of lines that are the true one

Both methods train a LoRA of rank 8 on the same rows; of IRCoCo's steps the first are fine-tuning, the next train its
evaluator, the last are rewarded. A rate is chosen by edit similarity. Leaves ircoco.json and ircoco.md in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from peftx import Plugin, Stack, Worker
from peftx.toolkits.working import OfStack
from peftx_ircoco import Ircoco, edit
from peftx_lora import Lora

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import TABLES, seen
from compare import RESULTS
from rated import Make, grid, measured, publish

BASE = "peftx:tiny"
CONTEXT, LONGEST, NEW = 160, 128, 20
PROBLEMS = {"train": 100, "validation": 24}
ROWS = {"validation": 60, "test": 120}
STEPS, BATCH = 80, 8
RATES = (3e-4, 1e-3, 3e-3)
MEASURES = {"edit similarity": 3, "exact": 3}
Row = dict[str, str]


def lines_of(problem: Row) -> list[Row]:
    """A row for each line of a solution, but for empty ones."""
    lines = problem["canonical_solution"].rstrip("\n").split("\n")
    found = []
    for at, line in enumerate(lines):
        before = problem["prompt"] + "".join(f"{each}\n" for each in lines[:at])
        if line.strip():
            found.append({"prompt": before[-CONTEXT:], "completion": line})
    return found


def parts(path: Path) -> tuple[list[Row], list[Row], list[Row]]:
    problems = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    draw = Random(0)
    draw.shuffle(problems)
    first, second = PROBLEMS["train"], PROBLEMS["train"] + PROBLEMS["validation"]
    train, held, test = (
        [row for problem in some for row in lines_of(problem)]
        for some in (problems[:first], problems[first:second], problems[second:])
    )
    return train, draw.sample(held, ROWS["validation"]), draw.sample(test, ROWS["test"])


def completed(stack: Stack, rows: Sequence[Row]) -> dict[str, float]:
    found = Worker(OfStack(stack)).write([row["prompt"] for row in rows], max_new_tokens=NEW)
    pairs = [
        (y.text.split("\n")[0].strip(), row["completion"].strip()) for y, row in zip(found, rows, strict=True)
    ]
    return {
        "edit similarity": mean(edit(*pair) for pair in pairs),
        "exact": mean(y == truth for y, truth in pairs),
    }


def trained(rows: Sequence[Row], more: Callable[[], list[Plugin]]) -> Make:
    def make(rate: float, seed: int) -> Stack:
        stack = Stack(BASE, [Lora(rank=8), *more()], seed=seed, dtype="float32")
        stack.train(
            list(rows), steps=STEPS, batch_size=BATCH, learning_rate=rate, seed=seed, max_length=LONGEST
        )
        return stack

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="HumanEval, gzipped")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table to run in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, held, test = parts(arguments.data)
    counts = [len(train), len(held), len(test)]
    settings = {
        "base": BASE, "context": CONTEXT, "problems": PROBLEMS, "rows": counts, "steps": STEPS, "batch": BATCH,
        "new": NEW,
    }  # fmt: skip
    base = seen(BASE, **TABLES["ircoco"])
    results = measured(
        {
            "fine-tuning": trained(train, list),
            "`ircoco`": trained(train, lambda: [Ircoco(score="edit", max_new_tokens=NEW, window=LONGEST)]),
        },
        {"not trained": lambda: completed(Stack(BASE, dtype="float32"), test)},
        rates=RATES, choose=lambda stack: completed(stack, held)["edit similarity"],
        test=lambda stack: completed(stack, test), settings=settings, base=base, file=RESULTS / "ircoco.json",
        only=arguments.only,
    )  # fmt: skip
    setting = (
        f"The next line of solutions of HumanEval: {counts[0]} to train on, {counts[1]} to choose rates on, "
        f"{counts[2]} to measure on, of problems apart. LoRA of rank 8, {STEPS} steps of {BATCH} rows, rates from "
        f"{grid(RATES)}, three seeds, ± the standard deviation. {base}"
    )
    publish(RESULTS / "ircoco.json", "Lines of code", setting, results, MEASURES)


if __name__ == "__main__":
    main()
