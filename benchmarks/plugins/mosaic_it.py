"""Mosaic-IT beside plain instruction tuning: rows, steps, CPU time, loss on held-out rows, tags that are obeyed.

    python benchmarks/plugins/mosaic_it.py math_data.json.gz --prompt instruction --completion output --test 12

The data: rows with a prompt and a completion. Plain: LoRA for `--copies` epochs. Mosaic: LoRA for one pass over as
many mosaic copies, and again with the plain run's number of steps, since a small model trained for few steps has
learned little of anything. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from peftx import Stack, TrainingData
from peftx.engines.data import IGNORE, encode_pair, read_dataset
from peftx_lora import Lora
from peftx_mosaic_it import TAG_SHAPES, TAG_WORDS, MosaicIt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--prompt", default="prompt", help="column of the prompts")
    parser.add_argument("--completion", default="completion", help="column of the completions")
    parser.add_argument("--train", type=int, default=96, help="rows to train on")
    parser.add_argument("--test", type=int, default=24, help="rows to test on")
    parser.add_argument("--short", type=int, default=100, help="rows of at most this many tokens are used")
    parser.add_argument(
        "--copies", type=int, default=4, help="epochs of the plain run, copies of the mosaics"
    )
    parser.add_argument("--k-max", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    stack = Stack("peftx:tiny")
    columns = {"prompt": arguments.prompt, "completion": arguments.completion}

    def length(text: str) -> int:
        return len(stack.tokenizer(text, verbose=False)["input_ids"])

    found = read_dataset(arguments.data, format="prompt-completion", columns=columns).shuffle(seed=0)
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"]}
        for row in found
        if row["completion"].strip() and length(row["prompt"] + row["completion"]) <= arguments.short
    ]
    train, test = rows[: arguments.train], rows[arguments.train :][: arguments.test]

    def prepared(rows: list[dict[str, str]], *plugins: MosaicIt) -> TrainingData:
        data = TrainingData(
            train=Dataset.from_list(rows), eval=None, tokenizer=stack.tokenizer, seed=0,
            format="prompt-completion", max_length=arguments.max_length,
        )  # fmt: skip
        return Stack("peftx:tiny", plugins).prepare(data)

    started = time.process_time()
    mosaic = prepared(train, MosaicIt(k_max=arguments.k_max, copies=arguments.copies))
    composing = time.process_time() - started
    asked = prepared(
        test, MosaicIt(k_max=3, distribution="fixed", copies=1, strategies=["format"], tags=1)
    ).train

    def measured(data: list[dict[str, str]], steps: int) -> dict[str, Any]:
        trained = Stack("peftx:tiny", [Lora()])
        started = time.process_time()
        if steps:
            trained.train(
                data, steps=steps, batch_size=arguments.batch_size, learning_rate=1e-3,
                max_length=arguments.max_length,
            )  # fmt: skip
        seconds = round(time.process_time() - started, 1)
        tokens = sum(length(row["prompt"]) + length(row["completion"]) for row in data)
        answers = trained.generate(list(asked["prompt"]), max_new_tokens=150)
        obeyed = 0
        for completion, answer in zip(asked["completion"], answers, strict=True):
            begin, end = tags_of(completion)
            obeyed += answer.count(begin) == 3 and answer.count(end) == 3
        return {
            "rows": len(data), "steps": steps, "tokens_in_rows": tokens, "cpu_seconds": seconds,
            "nll_plain": loss(trained, test), "nll_mosaic": loss(trained, asked),
            "tags_obeyed": f"{obeyed} of {len(asked)}",
        }  # fmt: skip

    plain_steps = arguments.copies * -(-len(train) // arguments.batch_size)
    mosaic_rows = mosaic.train.select_columns(["prompt", "completion"]).to_list()
    mosaic_steps = -(-len(mosaic_rows) // arguments.batch_size)
    results: dict[str, Any] = {}
    for name, data, steps in (
        ("untrained", train, 0),
        ("plain", train, plain_steps),
        ("mosaic", mosaic_rows, mosaic_steps),
        ("mosaic, steps of plain", mosaic_rows, plain_steps),
    ):
        results[name] = measured(data, steps)
        print(name, results[name], file=sys.stderr)
    options = {name: value for name, value in vars(arguments).items() if name != "data"}
    print(json.dumps({**options, "composing_cpu_seconds": round(composing, 2), "results": results}, indent=1))


def tags_of(completion: str) -> tuple[str, str]:
    """Begin and end tag of a mosaic's completion."""
    for shape, (begin, end) in product(reversed(TAG_SHAPES), TAG_WORDS):  # <<START>> holds <START>
        if shape.format(begin) in completion and shape.format(end) in completion:
            return shape.format(begin), shape.format(end)
    raise ValueError(f"no tags in {completion!r}")


def loss(stack: Stack, rows: list[dict[str, str]] | Dataset) -> float:
    """Nats for each token of the completions, after their prompts."""
    total, count = 0.0, 0
    for row in rows:
        example = encode_pair(stack.tokenizer, row["prompt"], row["completion"], max_length=1024)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        tokens = int((labels != IGNORE).sum())
        with torch.inference_mode():
            total += float(stack.model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return round(total / count, 3)


if __name__ == "__main__":
    main()
