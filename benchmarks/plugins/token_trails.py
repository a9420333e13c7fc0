"""Perplexity on the system's turns of real dialogues: speaker embeddings beside LoRA, full fine-tuning and prompts.

    python benchmarks/plugins/token_trails.py sgd_dev_sample.jsonl.gz

The data: rows with `turns` of `speaker` (user or system) and `text`, as in the Schema-Guided Dialogue set. The system's
turns become the assistant's. Every method sees the same batches; the last `--test` dialogues are held out from all of
them, though the bundled model has read the whole set in its pre-training, the system under the name `System:`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from peftx import Stack
from peftx.engines.data import Collator, tokenize_dataset
from peftx.engines.training.run import as_training_data
from peftx_lora import Lora
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning
from peftx_token_trails import TokenTrails

sys.path.insert(0, str(Path(__file__).parent.parent))
from compare import RESULTS, FullTuning, Method, compare, write

ROLES = {"user": "user", "system": "assistant"}
METHODS = (
    Method(name="no training", plugins=list),
    Method(name="Token Trails alone", plugins=lambda: [TokenTrails()], rate=1e-2),
    Method(name="LoRA, rank 8", plugins=lambda: [Lora(rank=8)], rate=1e-3),
    Method(
        name="LoRA, rank 8, and Token Trails",
        plugins=lambda: [Lora(rank=8), TokenTrails()],
        rate=1e-3,
        rates={"token-trails": 1e-2},
    ),
    Method(name="prompt tuning, 20 tokens", plugins=lambda: [PromptTuning(length=20)], rate=1e-2),
    Method(name="P-tuning v2, 20 rows", plugins=lambda: [PTuningV2(length=20)], rate=1e-2),
    Method(name="full fine-tuning", plugins=lambda: [FullTuning()], rate=1e-4),
)


def dialogues(path: Path) -> list[dict[str, Any]]:
    """Rows of messages; what follows the system's last turn is left out."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["turns"] for line in lines]
    return [
        {"messages": [{"role": ROLES[t["speaker"]], "content": t["text"]} for t in turns]} for turns in found
    ]


@torch.no_grad()
def perplexity(stack: Stack, rows: list[dict[str, Any]], max_length: int) -> float:
    """exp of the mean over all tokens of the assistant's turns, their ends included."""
    data = as_training_data(stack, rows, seed=0, max_length=max_length)
    tokenized = list(tokenize_dataset(data.train, stack.tokenizer, format="messages", max_length=max_length))
    tokenized.sort(key=lambda row: len(row["input_ids"]))
    collate = Collator(stack.tokenizer.pad_token_id)
    nats, count = 0.0, 0
    for start in range(0, len(tokenized), 8):
        batch = collate(tokenized[start : start + 8])
        learned = int((batch["labels"][:, 1:] != -100).sum())
        nats += float(stack.model(**batch).loss) * learned
        count += learned
    return math.exp(nats / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--test", type=int, default=84, help="dialogues to measure on")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=14.0, help="perplexity whose first reaching is timed")
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    rows = dialogues(arguments.data)
    train, test = rows[: -arguments.test], rows[-arguments.test :]
    results = compare(
        [method for method in METHODS if arguments.only in method.name],
        train,
        lambda stack: perplexity(stack, test, arguments.max_length),
        seeds=range(arguments.seeds),
        steps=arguments.steps,
        every=arguments.every,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        target=arguments.target,
        higher_is_better=False,
    )
    names = ("steps", "batch_size", "max_length", "seeds")
    write(
        "token_trails",
        "Token Trails on the Schema-Guided Dialogue set",
        results,
        unit="perplexity of the system's turns",
        target=arguments.target,
        settings={"train": len(train), "test": len(test)}
        | {name: getattr(arguments, name) for name in names},
        folder=arguments.output,
    )


if __name__ == "__main__":
    main()
