"""Accuracy against trained parameters: no training, Propulsion with k = 1 and k = 15, LoRA.

    python benchmarks/plugins/propulsion.py ag_news.jsonl.gz --skip 6000

The data: rows with `text` and `label`. Rows before `--skip` are left out (the bundled model has read the first 6000 of
AG News, but asked otherwise). Every method sees the same batches; nothing but it trains, no head. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from peftx import Plugin, Stack
from peftx.data import read_dataset
from peftx_lora import Lora
from peftx_propulsion import Propulsion


def methods() -> dict[str, tuple[Plugin, float]]:
    """Name -> plugin, learning rate (Adam's step in z moves the gain by k times the rate)."""
    return {
        "propulsion k=1, lr 1e-3": (Propulsion(degree=1), 1e-3),
        "propulsion k=15, lr 1e-3": (Propulsion(), 1e-3),
        "propulsion k=1, lr 1.5e-2": (Propulsion(degree=1), 1.5e-2),
        "lora rank 8, lr 1e-3": (Lora(rank=8), 1e-3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows")
    parser.add_argument("--word", default="Section", help="stands between text and label")
    parser.add_argument("--train", type=int, default=1000, help="rows to train on")
    parser.add_argument("--test", type=int, default=400, help="rows to test on")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    found = list(read_dataset(arguments.data, format="classification"))[arguments.skip :]
    rows = [{"text": f"{row['text']}\n{arguments.word}:", "label": row["label"]} for row in found]
    train, test = rows[: arguments.train], rows[arguments.train :][: arguments.test]

    def accuracy(stack: Stack) -> dict[str, float]:
        score = stack.evaluate(test, metrics=["accuracy"], max_length=128)["accuracy"]
        return {"accuracy": round(score.value, 4), "low": round(score.low, 4), "high": round(score.high, 4)}

    results: dict[str, Any] = {}
    for name, (plugin, rate) in methods().items():
        stack = Stack("peftx:tiny", [plugin])
        if not results:
            results["no training"] = {"trained_parameters": 0, **accuracy(stack)}  # identity at the start
        started = time.process_time()
        report = stack.train(
            train, steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=rate, max_length=128
        )
        seconds = time.process_time() - started
        results[name] = {
            "trained_parameters": report.trainable,
            **accuracy(stack),
            "cpu_seconds": round(seconds, 1),
        }
    options = {name: getattr(arguments, name) for name in ("skip", "word", "steps", "batch_size")}
    print(json.dumps({"train": len(train), "test": len(test), **options, "results": results}, indent=1))


if __name__ == "__main__":
    main()
