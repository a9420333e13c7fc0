"""Accuracy of deep prompts: in every layer, in the last half, out of a network; beside LoRA and no training.

    python benchmarks/plugins/p_tuning_v2.py ag_news.jsonl.gz --skip 6000

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
from peftx.engines.data import read_dataset
from peftx_lora import Lora
from peftx_p_tuning_v2 import PTuningV2


def methods(layers: int) -> dict[str, tuple[Plugin, float]]:
    """Name -> plugin, learning rate."""
    last = ",".join(str(i) for i in range(layers - layers // 2, layers))
    return {
        "20 rows, lr 1e-2": (PTuningV2(length=20), 1e-2),
        "20 rows, lr 1e-1": (PTuningV2(length=20), 1e-1),
        "20 rows, last half of the layers, lr 1e-1": (
            PTuningV2(length=20, targets=f"attention layers={last}"),
            1e-1,
        ),
        "20 rows, projection 128, lr 1e-2": (PTuningV2(length=20, projection=128), 1e-2),
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

    layers = Stack("peftx:tiny").anatomy.num_layers
    results: dict[str, Any] = {}
    for name, (plugin, rate) in methods(layers).items():
        stack = Stack("peftx:tiny", [plugin])
        if not results:
            with stack.disabled():
                results["no training"] = {"trained_parameters": 0, **accuracy(stack)}
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
