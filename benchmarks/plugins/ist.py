"""Activations, gradients and learning of IST against LoRA on all layers and on random ones.

    python benchmarks/plugins/ist.py ag_news_test.jsonl.gz --skip 6000

LoRA of rank 8 on the bundled model (6 layers). Memory: bytes of the distinct tensors that autograd saves for the
backward pass, without the weights, and bytes of gradients, each the mean over 20 steps on one batch. Learning: rows
with `text` and `label` in prompt form; rows before `--skip` are left out (the bundled model has read the first 6000 of
AG News, but asked otherwise). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftx import Plugin, Stack, TrainStep
from peftx.engines.data import read_dataset
from peftx_ist import Ist
from peftx_lora import Lora

CASES = {"lora": None, "random layers": 0.0, "ist": 10.0}
"""Name -> the rate of s; None: all layers train."""


def stack_of(rate: float | None) -> Stack:
    plugins: list[Plugin] = [Lora(rank=8)]
    return Stack("peftx:tiny", plugins if rate is None else [*plugins, Ist(rate=rate)])


def memory(rate: float | None, batch: int, length: int, steps: int) -> dict[str, float]:
    """MiB of saved activations (largest and mean over the steps) and of gradients."""
    stack = stack_of(rate)
    ids = torch.randint(3, 4000, (batch, length), generator=torch.Generator().manual_seed(0))
    own = {p.untyped_storage().data_ptr() for p in stack.model.parameters()}
    activations, gradients = [], []
    for index in range(steps):
        sizes: dict[int, int] = {}

        def save(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            stack.run_train_step(TrainStep(stack, {"input_ids": ids, "labels": ids}, index=index))
        activations.append(sum(sizes.values()) / 2**20)
        found = [p.grad for p in stack.ledger.parameters("lora") if p.grad is not None]
        gradients.append(sum(g.nbytes for g in found) / 2**20)
        stack.model.zero_grad()
    return {
        "activations, mean MiB": round(sum(activations) / steps, 1),
        "activations, largest MiB": round(max(activations), 1),
        "gradients, mean MiB": round(sum(gradients) / steps, 3),
    }


def learning(rate: float | None, train: list[Any], test: list[Any], steps: int) -> dict[str, Any]:
    stack = stack_of(rate)
    started = time.process_time()
    report = stack.train(train, steps=steps, batch_size=8, learning_rate=1e-3, max_length=96)
    seconds = time.process_time() - started
    losses = [loss for _, loss in report.losses[-20:]]
    score = stack.evaluate(test, metrics=["accuracy"], max_length=128)["accuracy"]
    return {
        "loss, last 20 steps": round(sum(losses) / len(losses), 4),
        "accuracy": round(score.value, 4),
        "low": round(score.low or 0, 3),
        "high": round(score.high or 0, 3),
        "cpu seconds": round(seconds, 1),
        "scores": [round(s, 3) for s in stack.plugins["ist"].state.get("scores", [])] if rate else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", type=Path, nargs="?", help="rows with text and label; memory alone if left out"
    )
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"memory": {name: memory(rate, 8, 128, 20) for name, rate in CASES.items()}}
    if arguments.data is not None:
        found = list(read_dataset(arguments.data, format="classification"))[arguments.skip :]
        rows = [{"text": f"{row['text']}\nSection:", "label": row["label"]} for row in found]
        results["learning"] = {
            name: learning(rate, rows[:1000], rows[1000:1400], arguments.steps)
            for name, rate in CASES.items()
        }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
