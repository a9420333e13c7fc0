#!/usr/bin/env python3
"""Pre-train, evaluate and export the small language model that is bundled with peftx.

The model is a plain Llama of 5.4 million parameters with a byte-level BPE vocabulary of 4096 entries,
trained on a few tens of megabytes of public English text.  Every stage is a sub-command::

    pretrain_tiny.py tokenizer --data DATA --work WORK     # learn the vocabulary
    pretrain_tiny.py train     --data DATA --work WORK --tokens 40M
    pretrain_tiny.py export    --work WORK --out DIR       # fp16 safetensors + tokenizer
    pretrain_tiny.py evaluate  --data DATA --model DIR     # bits per byte, zero-shot accuracy, as JSON
    pretrain_tiny.py card      --data DATA --work WORK --model DIR

``train`` may be stopped at any time (SIGTERM and SIGINT write a checkpoint first) and continues from its
last checkpoint when it is started again, with another ``--threads`` or ``--tokens`` if wished.  A checkpoint
is one safetensors file: weights, optimizer moments, and the state of the data sampler as JSON in its header.

``--prose`` leaves out every task set, AG News as running text included: such a model has seen no row that
a benchmark about data trains or tests on.

Held out, never trained on: the WikiText-2 test split, the GSM8K test split, the SNIPS validation split, the
AG News rows from index 6000 on, and the sentence polarity rows from index 9000 on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tiny.card import card
from tiny.measuring import evaluate
from tiny.tokenizer import learn_tokenizer
from tiny.training import export, train


def count(text: str) -> int:
    """A number of tokens, with an optional K or M behind it."""
    factor = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    return int(float(text.rstrip("kKmM")) * factor)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], *folders: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=run.__doc__,
            description=run.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        texts = {
            "data": "folder of gzip files with MANIFEST.json",
            "work": "folder of tokenizer and checkpoint",
            "model": "exported model folder",
            "out": "folder to write the exported model to",
        }
        for folder in folders:
            sub.add_argument(f"--{folder}", type=Path, required=True, help=texts[folder])
        return sub

    learning = command("tokenizer", learn_tokenizer, "data", "work")
    sub = training = command("train", train, "data", "work")
    sub.add_argument("--tokens", type=count, default=count("40M"), help="token budget; may change on resume")
    sub.add_argument("--batch-tokens", type=count, default=4096, help="tokens per step")
    sub.add_argument("--context", type=int, default=256, help="window length before the decay")
    sub.add_argument("--long-context", type=int, default=512, help="window length during the decay")
    sub.add_argument("--muon-lr", type=float, default=0.02, help="peak rate of the hidden matrices")
    sub.add_argument("--adam-lr", type=float, default=0.003, help="peak rate of embedding and norms")
    sub.add_argument(
        "--weight-decay", type=float, default=0.05, help="decoupled decay of the hidden matrices"
    )
    sub.add_argument("--warmup", type=int, default=100, help="warm-up steps")
    sub.add_argument("--decay", type=float, default=0.3, help="part of the budget with a falling rate")
    sub.add_argument("--seed", type=int, default=0, help="seed of weights and data order")
    sub.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    sub.add_argument("--device", default="cpu", help="torch device")
    sub.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    sub.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    sub.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    sub.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    sub.add_argument("--max-steps", type=int, default=-1, help="stop at this step; -1 for never")
    command("export", export, "work", "out")
    sub = command("evaluate", evaluate, "data", "model")
    sub.add_argument("--quick", action="store_true", help="only a part of every set")
    second = command("card", card, "data", "work", "model")
    for one in (learning, training):
        one.add_argument("--prose", action="store_true", help="running text alone: no row of a task set")
    for one in (sub, second):
        one.add_argument("--context", type=int, default=512, help="window length of the bits per byte")
        one.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command."""
    args = parser().parse_args(argv)
    with contextlib.suppress(BrokenPipeError):
        args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
