"""LeMo beside training on all tokens: memory of a step against the length of a text, and the loss that is reached.

    python benchmarks/plugins/lemo.py --data /path/to/data

The bundled model and WikiText-2's test file (`text/wikitext2_test.txt.gz` of the folder `--data`), which it was not
pre-trained on, in pieces of `LENGTH` tokens: the first ones train, the next ones choose the learning rate, those behind
are measured. Full fine-tuning and LoRA on q, k, v and o, each alone and with LeMo, three seeds.

    loss      the mean over all tokens of the measured pieces, with every token attending
    memory    MiB: the most that tensors took at once in a training step (forward, loss, backward) of one text over what
              was there before, gradients of an earlier step included; of the first seed, since no number changes it

One thread, a quarter of an hour. Leaves lemo.json and lemo.md in benchmarks/results.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from dpo_prefix_sharing import peak_megabytes
from torch.nn.functional import cross_entropy

from peftx import Plugin, Stack
from peftx.engines.files import write_text
from peftx.toolkits.evaluation import evaluating
from peftx_full_finetuning import FullFinetuning
from peftx_lemo import Lemo
from peftx_lora import Lora

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import Source, seen
from rated import SEEDS, Make, grid, measured, table
from run import RESULTS

BASE, FILE = "peftx:tiny", "text/wikitext2_test.txt.gz"
LENGTH, TRAINING, VALIDATION, TEST = 512, 40, 5, 12
"""Tokens of a piece, and pieces of each part."""
STEPS, BATCH, RATES = 40, 1, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
OPTIONS: dict[str, Any] = {"block": 16, "hidden": 32, "predictor_steps": 24, "predictor_rate": 1e-3}
LENGTHS = (256, 512, 1024)
"""Of the texts whose memory is measured."""
FULL, LORA = "full fine-tuning", "LoRA"
ARMS = (FULL, f"{FULL}, `lemo`", LORA, f"{LORA}, `lemo`")


def plugins_of(arm: str) -> list[Plugin]:
    tuned = FullFinetuning() if arm.startswith(FULL) else Lora(targets="attention.q,k,v,o")
    return [tuned, *([Lemo(**OPTIONS)] if "lemo" in arm else [])]


def loss(stack: Stack, pieces: Sequence[Sequence[int]]) -> float:
    """Of all their tokens but the first of each, without a training step's eliminations."""
    with evaluating(stack.model):
        found = [
            float(cross_entropy(stack.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float(), ids[1:]))
            for ids in map(torch.tensor, pieces)
        ]  # fmt: skip
    return sum(found) / len(found)


def trained(arm: str, pieces: Sequence[Sequence[int]]) -> Make:
    def make(rate: float, seed: int) -> Stack:
        stack = Stack(BASE, plugins_of(arm), seed=seed, dtype="float32")
        rows = [{"input_ids": list(ids), "labels": list(ids)} for ids in pieces]
        stack.train(
            rows, steps=STEPS, batch_size=BATCH, learning_rate=rate, warmup_ratio=0.1, seed=seed, max_length=LENGTH
        )  # fmt: skip
        return stack

    return make


def memory(stack: Stack, ids: Sequence[int]) -> dict[str, float]:
    """Of a step on the first tokens, by their number."""
    found = {}
    stack.model.train()
    for length in LENGTHS:
        text = torch.tensor([ids[:length]])
        batch = {"input_ids": text, "labels": text, "attention_mask": torch.ones_like(text)}
        stack.train_step(batch)  # its gradients are there then
        found[str(length)] = round(peak_megabytes(lambda batch=batch: stack.train_step(batch)), 1)
    return found


def page(
    results: Mapping[str, Mapping[str, Any]], held: Mapping[str, Mapping[str, float]], base: str, setting: str
) -> str:
    lines = [
        f"| | {' | '.join(f'{length:,} tokens' for length in LENGTHS)} |",
        f"| --- |{' --- |' * len(LENGTHS)}",
    ]
    for arm, found in held.items():
        dense = held[FULL if arm.startswith(FULL) else LORA]
        cells = [
            f"{mib:.0f}" + ("" if found is dense else f" ({1 - mib / dense[length]:.0%} less)")
            for length, mib in found.items()
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join([
        "# LeMo beside training on all tokens", "", base, "", setting, "", "## Loss", "",
        *table(results, {"loss": 3}), "", "## Memory of a training step, MiB", "", *lines, "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", choices=ARMS, nargs="+", default=ARMS, help="losses to measure in this run")
    parser.add_argument("--output", type=Path, default=RESULTS / "lemo.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = gzip.decompress((arguments.data / FILE).read_bytes()).decode("utf-8")
    plain = Stack(BASE, [], dtype="float32")
    assert plain.tokenizer is not None
    ids = plain.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH, LENGTH)]
    training, rest = pieces[:TRAINING], pieces[TRAINING:]
    validation, test = rest[:VALIDATION], rest[VALIDATION : VALIDATION + TEST]
    held: dict[str, dict[str, float]] = {}
    makes = {arm: trained(arm, training) for arm in ARMS}
    base = seen(BASE, training=Source(FILE), test=Source(FILE))
    results = measured(
        makes,
        {"the base": lambda: {"loss": loss(plain, test)}},
        rates=RATES,
        choose=lambda stack: -loss(stack, validation),
        test=lambda stack: {"loss": loss(stack, test)},
        settings={
            "length": LENGTH, "training": TRAINING, "validation": VALIDATION, "test": TEST, "steps": STEPS,
            "batch_size": BATCH, "lemo": OPTIONS,
        },
        base=base,
        file=arguments.output,
        only=["the base", *arguments.only],
    )  # fmt: skip
    for arm in ARMS:  # steps do not change it, and predictors are to be fitted
        stack = Stack(BASE, plugins_of(arm), seed=SEEDS[0], dtype="float32")
        stack.train(
            [{"input_ids": list(training[0]), "labels": list(training[0])}],
            steps=1,
            batch_size=1,
            max_length=LENGTH,
        )
        held[arm] = memory(stack, ids)
        print(arm, held[arm], flush=True)
    whole = json.loads(arguments.output.read_text("utf-8")) | {"memory": held}
    write_text(arguments.output, json.dumps(whole, indent=1) + "\n")
    ways = ", ".join(f"{name} {value}" for name, value in OPTIONS.items())
    setting = (
        f"{STEPS} steps of batch {BATCH}, texts of {LENGTH} tokens, rates of {grid(RATES)} by the loss of "
        f"{VALIDATION} other texts, loss of {TEST} texts behind these, three seeds, ± the standard deviation. "
        "`lemo` with its defaults, "
        f"which leave tokens out in layers 3 and 4 of 6, but for {ways}."
    )
    write_text(arguments.output.with_suffix(".md"), page(results, held, base, setting))
    print(arguments.output.with_suffix(".md").read_text("utf-8"))


if __name__ == "__main__":
    main()
