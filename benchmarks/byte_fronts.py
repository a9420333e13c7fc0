"""Bits per byte of byte front ends, and of the bundled model's own tokens, after as many steps on as much prose.

    python benchmarks/byte_fronts.py wikitext2_test.txt.gz

Rows are pieces of `PIECE` characters of the text, in three parts that follow each other: to train on, to choose rates
on, to measure on. Every method starts from the bundled model and trains all of it, as the papers do, for `STEPS` steps
of the same rows. What a front end brings starts at random, and the tokens' embeddings do not: so the model is also
trained with its table of embeddings (which is its head too) drawn anew, as large as it was.

A rate is chosen by bits per byte. Leaves byte_fronts.json and byte_fronts.md in benchmarks/results.
"""

from __future__ import annotations

import argparse
import gzip
import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bases import Source, seen
from compare import RESULTS
from rated import Make, grid, measured, publish

from peftx import Plugin, Stack
from peftx.engines.models import load_model
from peftx_byte2word import Byte2Word
from peftx_full_finetuning import FullFinetuning
from peftx_hierarchical_byte_transformer import HierarchicalByteTransformer
from peftx_word_pooled_lm import WordPooled

BASE = "peftx:tiny"
ROWS = {"training and test": Source("text/wikitext2_test.txt.gz")}
PIECE, LONGEST = 256, 640
STEPS, BATCH = 40, 4
VALIDATION, TEST = 24, 64
RATES = (3e-4, 1e-3, 3e-3)
MEASURES = {"bits per byte": 3}
Row = dict[str, str]


def front(plugin: Callable[[], Plugin]) -> Callable[[int], Stack]:
    return lambda seed: Stack(BASE, [plugin(), FullFinetuning()], seed=seed, dtype="float32")


def tokens(seed: int) -> Stack:
    return Stack(BASE, [FullFinetuning()], seed=seed, dtype="float32")


def tokens_anew(seed: int) -> Stack:
    """Embeddings of the model's own tokens, and with them its head, as random as a front end is."""
    model, tokenizer = load_model(BASE, dtype="float32")
    with torch.no_grad():
        E = model.get_input_embeddings().weight
        E.copy_(E.std() * torch.randn(E.shape, generator=torch.Generator().manual_seed(seed)))
    return Stack(model, [FullFinetuning()], tokenizer=tokenizer, seed=seed)


METHODS: dict[str, Callable[[int], Stack]] = {
    "tokens": tokens,
    "tokens, embeddings drawn anew": tokens_anew,
    "`byte2word`": front(Byte2Word),
    "`word-pooled-lm`": front(WordPooled),
    "`hierarchical-byte-transformer`": front(HierarchicalByteTransformer),
}


def bits(stack: Stack, rows: Sequence[Row]) -> float:
    scores = stack.evaluate(list(rows), metrics=["perplexity"], max_length=LONGEST)
    return scores["bits_per_byte"].value


def trained(start: Callable[[int], Stack], rows: Sequence[Row]) -> Make:
    def make(rate: float, seed: int) -> Stack:
        stack = start(seed)
        stack.train(
            list(rows), steps=STEPS, batch_size=BATCH, learning_rate=rate, seed=seed, max_length=LONGEST
        )
        return stack

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", type=Path, help="gzipped prose")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table to run in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = gzip.decompress(arguments.text.read_bytes()).decode()
    pieces = [{"text": text[at : at + PIECE]} for at in range(0, len(text) - PIECE, PIECE)]
    rows, rest = pieces[: STEPS * BATCH], pieces[STEPS * BATCH :]
    held, test = rest[:VALIDATION], rest[VALIDATION : VALIDATION + TEST]
    settings = {
        "base": BASE, "piece": PIECE, "rows": [len(rows), len(held), len(test)], "steps": STEPS, "batch": BATCH,
    }  # fmt: skip
    base = seen(BASE, **ROWS)
    results = measured(
        {name: trained(start, rows) for name, start in METHODS.items()},
        {"tokens, not trained": lambda: {"bits per byte": bits(Stack(BASE, dtype="float32"), test)}},
        rates=RATES, choose=lambda stack: -bits(stack, held), test=lambda stack: {"bits per byte": bits(stack, test)},
        settings=settings, base=base, file=RESULTS / "byte_fronts.json", only=arguments.only,
    )  # fmt: skip
    setting = (
        f"WikiText-2 in pieces of {PIECE} characters: {len(rows)} to train on, {len(held)} to choose rates on, "
        f"{len(test)} to measure on. The whole model trains, {STEPS} steps of {BATCH} pieces, rates from "
        f"{grid(RATES)}, three seeds, ± the standard deviation. {base}"
    )
    publish(RESULTS / "byte_fronts.json", "Bytes and tokens", setting, results, MEASURES)


if __name__ == "__main__":
    main()
