"""Accuracy on AG News under a prompt that the model has not seen: Propulsion's degrees, LoRA, full tuning, prompts.

    python benchmarks/plugins/propulsion.py ag_news_test.jsonl.gz --skip 6000

The data: rows with `text` and `label`. Rows before `--skip` are left out (the bundled model has read the first 6000 of
AG News, but asked otherwise). Every method sees the same batches under each seed; nothing but it trains. Leaves
propulsion.json, .md and .png in benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from peftx import Stack
from peftx.engines.data import read_dataset
from peftx_full_finetuning import FullFinetuning
from peftx_lora import Lora
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning
from peftx_propulsion import Propulsion

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import Source, seen
from compare import RESULTS, Method, Parts, Rows, compare, write

NEWS = "classify/ag_news_test.jsonl.gz"
RATES = (3e-4, 1e-3, 1e-2, 1e-1, 3e-1)
METHODS = (
    Method(name="no training", plugins=list),
    Method(name="Propulsion, k = 1", plugins=lambda: [Propulsion(degree=1)], rates=(1e-3,)),
    Method(name="Propulsion, k = 15", plugins=lambda: [Propulsion(degree=15)], rates=(1e-3,)),
    Method(
        name="Propulsion, k = 1, 15 times the rate", plugins=lambda: [Propulsion(degree=1)], rates=(1.5e-2,)
    ),
    Method(name="LoRA, rank 8", plugins=lambda: [Lora(rank=8)]),
    Method(name="prompt tuning, 20 tokens", plugins=lambda: [PromptTuning(length=20)]),
    Method(name="P-tuning v2, 20 rows", plugins=lambda: [PTuningV2(length=20)]),
    Method(name="full fine-tuning", plugins=lambda: [FullFinetuning()]),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows")
    parser.add_argument("--word", default="Section", help="stands between text and label")
    parser.add_argument("--train", type=int, default=1000, help="rows to train on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    found = list(read_dataset(arguments.data, format="classification"))[arguments.skip :]
    rows = [{"text": f"{row['text']}\n{arguments.word}:", "label": row["label"]} for row in found]
    train, test = rows[: arguments.train], rows[arguments.train :]

    def accuracy(stack: Stack, some: Rows) -> float:
        return stack.evaluate(some, metrics=["accuracy"], max_length=128)["accuracy"].value

    results = compare(
        METHODS,
        Parts.of(train, test=test),
        accuracy,
        rates=RATES,
        seeds=range(arguments.seeds),
        steps=arguments.steps,
        every=arguments.every,
        batch_size=arguments.batch_size,
        target=arguments.target,
    )
    names = ("skip", "word", "steps", "batch_size", "seeds")
    write(
        "propulsion",
        "Propulsion on AG News",
        results,
        unit="accuracy",
        base=seen(
            "peftx:tiny",
            training=Source(NEWS, arguments.skip),
            test=Source(NEWS, arguments.skip + arguments.train),
        ),
        target=arguments.target,
        settings={"train": len(train), "test": len(test)} | {n: getattr(arguments, n) for n in names},
        folder=arguments.output,
    )


if __name__ == "__main__":
    main()
