"""TransCoder's knowledge prefix, learned on three programming languages, for a fourth one with few rows.

    python benchmarks/plugins/transcoder.py codegen_instruct.json.gz

Rows are tasks in words and the beginning of their solution, `CODE` characters at most. Source tasks are the rows that
name Java, C++ or JavaScript, the target `TARGET_ROWS` rows that name C#. Measured is the perplexity of code in C# that
nothing was trained on, and a rate is chosen by it on other rows. Beside LoRA trains:

    `transcoder`                     the prefix, through all source tasks in rounds and then the target
    `transcoder`, no source tasks    the prefix, random, on the target
    LoRA, source rows first          none: LoRA learns the source rows, mixed, as long, and goes on to the target
    LoRA                             none: the target alone

All train on the target for as many steps. Leaves transcoder.json and transcoder.md in benchmarks/results.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from peftx import Plugin, Stack
from peftx_lora import Lora
from peftx_transcoder import Transcoder

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import TABLES, seen
from compare import RESULTS
from rated import Make, grid, measured, publish

BASE = "peftx:tiny"
SOURCES = {"java": r"\bJava\b", "cpp": r"C\+\+", "javascript": r"JavaScript|Node\.js"}
TARGET = r"C#"
TARGET_ROWS, VALIDATION, SOURCE_ROWS = 32, 30, 200
CODE, LONGEST = 200, 192
ROUNDS, VISIT, STEPS, BATCH = 2, 8, 16, 6
RATES = (3e-4, 1e-3, 3e-3)
MEASURES = {"perplexity": 2}
Row = dict[str, str]


def read(path: Path) -> tuple[dict[str, list[Row]], list[Row]]:
    """Rows of each source task, and of the target; those that name two of the languages are left out."""
    found: dict[str, list[Row]] = {name: [] for name in (*SOURCES, "target")}
    for row in json.loads(gzip.decompress(path.read_bytes())):
        asked = f"{row['instruction']} {row['input']}"
        named = [name for name, said in {**SOURCES, "target": TARGET}.items() if re.search(said, asked)]
        if len(named) == 1 and row["response"].strip():
            found[named[0]].append(
                {"prompt": f"{asked.strip()}\n", "completion": row["response"].strip()[:CODE]}
            )
    draw = Random(0)
    for rows in found.values():
        draw.shuffle(rows)
    target = found.pop("target")
    return {name: rows[:SOURCE_ROWS] for name, rows in found.items()}, target


def perplexity(stack: Stack, rows: Sequence[Row]) -> float:
    return stack.evaluate(list(rows), metrics=["perplexity"], max_length=LONGEST)["perplexity"].value


class Runs:
    """Ways to train on the sources and the target."""

    def __init__(self, sources: dict[str, list[Row]], target: list[Row]) -> None:
        self.sources, self.target = sources, target
        self.before = len(sources) * ROUNDS * VISIT

    def stack(self, seed: int, *more: Plugin) -> Stack:
        return Stack(BASE, [Lora(rank=8), *more], seed=seed, dtype="float32")

    def train(self, stack: Stack, rows: Sequence[Row], steps: int, rate: float, **sources: list[Row]) -> None:
        stack.train(
            list(rows), sources=sources, steps=steps, batch_size=BATCH, learning_rate=rate, seed=stack.seed,
            schedule="constant", max_length=LONGEST,
        )  # fmt: skip

    def transcoder(self, rate: float, seed: int) -> Stack:
        stack = self.stack(seed, Transcoder(tasks=tuple(self.sources), rounds=ROUNDS, steps=VISIT))
        self.train(stack, self.target, self.before + STEPS, rate, **self.sources)
        return stack

    def random_prefix(self, rate: float, seed: int) -> Stack:
        stack = self.stack(seed, Transcoder())
        self.train(stack, self.target, STEPS, rate)
        return stack

    def sources_first(self, rate: float, seed: int) -> Stack:
        stack = self.stack(seed)
        self.train(stack, [row for rows in self.sources.values() for row in rows], self.before, rate)
        self.train(stack, self.target, STEPS, rate)
        return stack

    def lora(self, rate: float, seed: int) -> Stack:
        stack = self.stack(seed)
        self.train(stack, self.target, STEPS, rate)
        return stack


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="rows with instruction, input and response, gzipped")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table to run in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sources, target = read(arguments.data)
    cut = TARGET_ROWS + VALIDATION
    rows, held, test = target[:TARGET_ROWS], target[TARGET_ROWS:cut], target[cut:]
    counts = [len(rows), len(held), len(test)]
    settings = {
        "base": BASE, "sources": SOURCES, "target": TARGET, "source rows": SOURCE_ROWS, "rows": counts, "code": CODE,
        "rounds": ROUNDS, "visit": VISIT, "steps": STEPS, "batch": BATCH,
    }  # fmt: skip
    runs, base = Runs(sources, rows), seen(BASE, **TABLES["transcoder"])
    methods: dict[str, Make] = {
        "LoRA": runs.lora,
        "LoRA, source rows first": runs.sources_first,
        "`transcoder`, no source tasks": runs.random_prefix,
        "`transcoder`": runs.transcoder,
    }
    results = measured(
        methods,
        {"not trained": lambda: {"perplexity": perplexity(Stack(BASE, dtype="float32"), test)}},
        rates=RATES, choose=lambda stack: -perplexity(stack, held),
        test=lambda stack: {"perplexity": perplexity(stack, test)}, settings=settings, base=base,
        file=RESULTS / "transcoder.json", only=arguments.only,
    )  # fmt: skip
    setting = (
        f"codegen_instruct, the first {CODE} characters of code in C#: {counts[0]} rows to train on, {counts[1]} to "
        f"choose rates on, {counts[2]} to measure on; {SOURCE_ROWS} rows of each of {len(SOURCES)} languages before. "
        f"LoRA of rank 8; {ROUNDS} visits of {VISIT} steps to each source task, {STEPS} steps on the target, of "
        f"{BATCH} rows; constant rates from {grid(RATES)}, three seeds, ± the standard "
        f"deviation. {base}"
    )
    publish(RESULTS / "transcoder.json", "A fourth language", setting, results, MEASURES)


if __name__ == "__main__":
    main()
