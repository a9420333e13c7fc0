"""Perplexity on the system's turns of real dialogues: speaker embeddings beside LoRA, with the speakers' names in the
text and without them.

    python benchmarks/plugins/token_trails.py sgd_dev_sample.jsonl.gz

The data: rows with `turns` of `speaker` (user or system) and `text`, as in the Schema-Guided Dialogue set. Where
`User:` and `Assistant:` open the turns, a model can read who speaks, and vectors that say it again have nothing to add.
So the turns also stand without names, one a line, and who speaks is told to Token Trails alone, as `token_type_ids`: a
column that no YAML file can give. Every method sees the same batches; the last `--test` dialogues are held out, and
rates are chosen on the fifth before them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftx import Stack
from peftx.engines.data import IGNORE, Collator, text_ids, tokenize_dataset
from peftx.engines.models import load_model
from peftx.engines.training.run import as_training_data
from peftx_lora import Lora
from peftx_token_trails import TokenTrails

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import TABLES, seen
from compare import RESULTS, Method, Parts, Result, compare, write

Row = dict[str, Any]
ROLES = {"user": "user", "system": "assistant"}
TYPES = {"user": 1, "system": 2}
"""Places in TokenTrails's `speakers`."""
FASTER = {"token-trails": 10.0}
"""R has 512 numbers, which start at 0: it learns at ten times LoRA's rate."""
RATES = (1e-3, 3e-3, 1e-2)


LORA = ("LoRA", lambda: [Lora(rank=8)])
BOTH = ("LoRA and Token Trails", lambda: [Lora(rank=8), TokenTrails()])


def dialogues(path: Path) -> list[list[dict[str, str]]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["turns"] for line in lines]


def named(turns: list[dict[str, str]]) -> Row:
    return {"messages": [{"role": ROLES[t["speaker"]], "content": t["text"]} for t in turns]}


def nameless(tokenizer: Any, turns: list[dict[str, str]], max_length: int, *, types: bool) -> Row:
    """Ids of the turns, a line each, of which the system's are learned; with `types` who speaks stands beside them."""
    ids, labels, speakers = [tokenizer.bos_token_id], [IGNORE], [0]
    for turn in turns:
        own = text_ids(tokenizer, f"{turn['text']}\n")
        ids += own
        labels += own if turn["speaker"] == "system" else [IGNORE] * len(own)
        speakers += [TYPES[turn["speaker"]]] * len(own)
    row = {"input_ids": ids, "labels": labels} | ({"token_type_ids": speakers} if types else {})
    return {name: column[:max_length] for name, column in row.items()}


@torch.no_grad()
def perplexity(stack: Stack, rows: list[Row], max_length: int) -> float:
    """exp of the mean over all tokens of the system's turns, their ends included."""
    data = as_training_data(stack, rows, seed=0, max_length=max_length)
    tokenized = list(tokenize_dataset(data.train, stack.tokenizer, format=data.format, max_length=max_length))
    tokenized.sort(key=lambda row: len(row["input_ids"]))
    collate = Collator(stack.tokenizer.pad_token_id)
    nats, count = 0.0, 0
    for start in range(0, len(tokenized), 8):
        batch = collate(tokenized[start : start + 8])
        learned = int((batch["labels"][:, 1:] != IGNORE).sum())
        nats += float(stack.model(**batch).loss) * learned
        count += learned
    return math.exp(nats / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="peftx:tiny")
    parser.add_argument("--test", type=int, default=84, help="dialogues to measure on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    turns, size = dialogues(arguments.data), arguments.max_length
    tokenizer = load_model(arguments.model)[1]
    cases = (
        (LORA, "names in the text", named),
        (BOTH, "names in the text", named),
        (LORA, "no names", partial(nameless, tokenizer, max_length=size, types=False)),
        (BOTH, "no names", partial(nameless, tokenizer, max_length=size, types=True)),
    )
    results: list[Result] = []
    for (name, plugins), told, form in cases:
        rows = [form(some) for some in turns]
        results += compare(
            [Method(name=f"{name}, {told}", plugins=plugins, times=FASTER if plugins is BOTH[1] else {})],
            Parts.of(rows[: -arguments.test], test=rows[-arguments.test :]),
            lambda stack, some: perplexity(stack, list(some), size),
            rates=RATES, seeds=range(arguments.seeds), steps=arguments.steps, every=arguments.every,
            batch_size=arguments.batch_size, max_length=size, higher_is_better=False, model=arguments.model,
        )  # fmt: skip
    write(
        "token_trails",
        "Token Trails on the Schema-Guided Dialogue set",
        results,
        unit="perplexity of the system's turns",
        base=seen(arguments.model, **TABLES["token-trails"]),
        settings={
            name: getattr(arguments, name) for name in ("test", "steps", "batch_size", "max_length", "seeds")
        },
        folder=arguments.output,
    )


if __name__ == "__main__":
    main()
