"""Memory of a MeZO step against a forward pass and an AdamW step, and what the steps reach.

    python benchmarks/plugins/mezo.py ag_news.jsonl.gz --skip 6000

Memory: peak resident memory of a process of its own, less what it held before (model and batch loaded, one forward
pass of a single row done). Learning: LoRA of rank 8 on rows with `text` and `label` in prompt form; rows before
`--skip` are left out (the bundled model has read the first 6000 of AG News, but asked otherwise). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from peftx import Stack, TrainStep
from peftx.engines.data import read_dataset
from peftx.engines.machine import peak_memory
from peftx_lora import Lora
from peftx_mezo import Mezo

CASES = ("forward", "mezo", "mezo, 4 samples", "adamw")


def megabytes() -> float:
    return (peak_memory() or math.nan) / 2**20


def measure(case: str, batch: int, length: int) -> None:
    """Run one case in this process and print its peak, MiB above the start."""
    torch.set_num_threads(1)
    plugins = [Lora(rank=8), *([Mezo(samples=4 if "4" in case else 1)] if case.startswith("mezo") else [])]
    stack = Stack("peftx:tiny", plugins)
    ids = torch.randint(3, 4000, (batch, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    trained = [p for p in stack.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    with torch.no_grad():
        stack.model(input_ids=ids[:1], labels=ids[:1])
    before = megabytes()
    for index in range(2):
        if case == "forward":
            with torch.no_grad():
                stack.model(**inputs)
        else:
            stack.run_train_step(TrainStep(stack, inputs, index=index, learning_rate=1e-4))
            optimizer.step()
            optimizer.zero_grad()
    print(json.dumps(megabytes() - before))


def memory(batch: int, length: int) -> dict[str, Any]:
    found = {}
    # glibc: give freed blocks back at once, so that the peak is what was alive and not how the heap was cut up.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--rows", str(batch), "--length", str(length)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[case] = float(done.stdout)
    return {
        name: {"mebibytes": round(value, 1), "of a forward pass": round(value / found["forward"], 3)}
        for name, value in found.items()
    }


def learning(arguments: argparse.Namespace) -> dict[str, Any]:
    found = list(read_dataset(arguments.data, format="classification"))[arguments.skip :]
    rows = [{"text": f"{row['text']}\n{arguments.word}:", "label": row["label"]} for row in found]
    train, test = rows[: arguments.train], rows[arguments.train :][: arguments.test]
    results: dict[str, Any] = {}
    runs = {
        "mezo on the loss": ([Mezo()], arguments.steps, 1e-3),
        "mezo on accuracy": ([Mezo(objective="accuracy", eps=1e-2)], arguments.steps, 5e-3),
        "adamw": ([], arguments.steps // 10, 1e-3),
    }
    for name, (plugins, steps, rate) in runs.items():
        stack = Stack("peftx:tiny", [Lora(rank=8), *plugins])

        def accuracy(stack: Stack = stack) -> float:
            return round(stack.evaluate(test, metrics=["accuracy"], max_length=128)["accuracy"].value, 4)

        if not results:
            results["no training"] = {"accuracy": accuracy()}
        started = time.process_time()
        report = stack.train(
            train, steps=steps, batch_size=16, learning_rate=rate, schedule="constant", max_length=96
        )
        seconds = time.process_time() - started
        losses = [loss for _, loss in report.losses]
        tenth = max(1, len(losses) // 10)
        results[name] = {
            "steps": steps,
            "rate": rate,
            "objective, first tenth": round(sum(losses[:tenth]) / tenth, 4),
            "objective, last tenth": round(sum(losses[-tenth:]) / tenth, 4),
            "accuracy": accuracy(),
            "cpu_seconds": round(seconds, 1),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", type=Path, nargs="?", help="rows with text and label; memory alone if left out"
    )
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows")
    parser.add_argument("--word", default="Section", help="stands between text and label")
    parser.add_argument("--train", type=int, default=1000, help="rows to train on")
    parser.add_argument("--test", type=int, default=400, help="rows to test on")
    parser.add_argument("--steps", type=int, default=200, help="of MeZO; AdamW makes a tenth of them")
    parser.add_argument("--rows", type=int, default=16, help="batch of the memory measurement")
    parser.add_argument("--length", type=int, default=256, help="its tokens in a row")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case, arguments.rows, arguments.length)
        return
    torch.set_num_threads(1)
    results: dict[str, Any] = {"memory": memory(arguments.rows, arguments.length)}
    if arguments.data is not None:
        results["learning"] = learning(arguments)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
