"""Time of a SparseLoRA training step against LoRA's, and what both reach.

    python benchmarks/plugins/sparselora.py
    python benchmarks/plugins/sparselora.py ag_news_test.jsonl.gz --skip 6000

Speed: random Llamas of 8 layers and the widths `--widths`, LoRA of rank 8, 4 rows of 256 tokens of which the last 26
have a label, float32, one thread; CPU time of the fastest of `--repeats` whole steps (forward, backward), the cases
taking turns. Learning: LoRA of rank 8 on the bundled model, rows with `text` and `label` in prompt form; rows before
`--skip` are left out (the bundled model has read the first 6000 of AG News, but asked otherwise). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftx import Plugin, Stack, TrainStep
from peftx.engines.data import IGNORE, read_dataset
from peftx_lora import Lora
from peftx_sparselora import Sparselora

CASES: dict[str, dict[str, Any] | None] = {
    "lora": None,
    "sparselora 0.5, 0.5": {"mlp": 0.5, "attention": 0.5},
    "sparselora 0.9, 0.5": {"mlp": 0.9, "attention": 0.5},
    "sparselora 0.99, 0.75": {},
    "sparselora 0.99, 0.75, all layers": {"mlp_layers": None, "attention_layers": None},
}
"""Name -> options; layers that are None there are all of the model's."""


def plugins_of(case: str, layers: int) -> list[Plugin]:
    options = CASES[case]
    everywhere = {name: list(range(layers)) for name, value in (options or {}).items() if value is None}
    return [Lora(rank=8), *([] if options is None else [Sparselora(**{**options, **everywhere})])]


def step_times(width: int, repeats: int) -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=8,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64,
    )  # fmt: skip
    ids = torch.randint(0, 1024, (4, 256), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-26] = IGNORE
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    stacks, build, best = {}, {}, dict.fromkeys(CASES, float("inf"))
    for case in CASES:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        started = time.process_time()
        stacks[case] = Stack(model, plugins_of(case, 8))
        build[case] = time.process_time() - started
    for _ in range(repeats):
        for case, stack in stacks.items():
            started = time.process_time()
            stack.run_train_step(TrainStep(stack, batch))
            best[case] = min(best[case], time.process_time() - started)
            stack.model.zero_grad()
    return {
        case: {
            "seconds": round(seconds, 3),
            "speed-up": round(best["lora"] / seconds, 2),
            "seconds to build": round(build[case], 1),
        }
        for case, seconds in best.items()
    }


def learning(case: str, train: list[Any], test: list[Any], steps: int) -> dict[str, Any]:
    stack = Stack("peftx:tiny", plugins_of(case, 6))
    started = time.process_time()
    report = stack.train(train, steps=steps, batch_size=8, learning_rate=1e-3, max_length=96)
    seconds = time.process_time() - started
    score = stack.evaluate(test, metrics=["accuracy"], max_length=128)["accuracy"]
    losses = [loss for _, loss in report.losses[-20:]]
    return {
        "loss, last 20 steps": round(sum(losses) / len(losses), 4),
        "accuracy": round(score.value, 4),
        "low": round(score.low or 0, 3),
        "high": round(score.high or 0, 3),
        "cpu seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", type=Path, nargs="?", help="rows with text and label: learning, instead of speed"
    )
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024], help="multiples of 128")
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data is None:
        results: dict[str, Any] = {
            str(width): step_times(width, arguments.repeats) for width in arguments.widths
        }
    else:
        found = list(read_dataset(arguments.data, format="classification"))[arguments.skip :]
        rows = [{"text": f"{row['text']}\nSection:", "label": row["label"]} for row in found]
        results = {case: learning(case, rows[:1000], rows[1000:1400], arguments.steps) for case in CASES}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
