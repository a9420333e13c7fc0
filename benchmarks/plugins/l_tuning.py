"""L-Tuning beside full fine-tuning, LoRA, prompt tuning and prefix tuning under an ordinary head; and a class that it
was never trained on, by its label text alone.

    python benchmarks/plugins/l_tuning.py snips_train.jsonl.gz snips_validate.jsonl.gz

The data: rows with `text` and `intent`, to train and to test on. The rates are the best of a few; L-Tuning gets more
steps, since it learns more slowly. In the rows named "unseen" no training row is of that class: its text is added
afterwards, and the figure is the share of its test rows that are recognised among all classes.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path

from sk_tuning import MeanHead  # it makes `compare` known

from peftx import Stack
from peftx.engines.data import read_dataset
from peftx_l_tuning import LTuning, add_label
from peftx_lora import Lora
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning

from compare import RESULTS, FullTuning, Method, Result, compare, write  # isort: skip

PROMPT_RATE = 3e-3


def words(label: str) -> str:
    """AddToPlaylist -> Add to playlist."""
    return " ".join(re.findall(r"[A-Z][a-z]*|[^A-Z]+", label)).capitalize()


def l_tuning(labels: list[str], **options: object) -> LTuning:
    return LTuning(labels=labels, texts={label: words(label) for label in labels}, **options)


def methods(labels: list[str], n: int) -> list[Method]:
    def head() -> MeanHead:
        return MeanHead(labels=labels)

    return [
        Method(name="head alone", plugins=lambda: [head()], rate=3e-2),
        Method(name="full fine-tuning", plugins=lambda: [FullTuning(), head()], rate=1e-3),
        Method(name="LoRA, rank 8", plugins=lambda: [Lora(rank=8), head()], rate=1e-2),
        Method(name=f"prompt tuning, {n} rows", plugins=lambda: [PromptTuning(length=n), head()], rate=3e-2),
        Method(name=f"prefix tuning, {n} rows", plugins=lambda: [PTuningV2(length=n), head()], rate=3e-2),
        Method(name="L-Tuning, prompt", plugins=lambda: [l_tuning(labels)], rate=PROMPT_RATE),
        Method(name="L-Tuning, prefix", plugins=lambda: [l_tuning(labels, variant="prefix")], rate=1e-2),
        Method(
            name="L-Tuning, prefix, not pooled",
            plugins=lambda: [l_tuning(labels, variant="prefix", pool=False)],
            rate=3e-3,
        ),
    ]


def unseen_class(
    unseen: str,
    labels: list[str],
    train: list[dict[str, str]],
    test: list[dict[str, str]],
    seeds: range,
    steps: int,
) -> Result:
    """Trained without a class; its text is added: the share of its rows that are recognised among all classes."""
    seen = [label for label in labels if label != unseen]
    rows, asked = [r for r in train if r["label"] != unseen], [r for r in test if r["label"] == unseen]
    n = max(map(len, (Stack("peftx:tiny").tokenizer(words(label))["input_ids"] for label in labels)))

    def recall(stack: Stack) -> float:
        if stack.trained_steps and unseen not in stack.plugins["l-tuning"].texts.labels:
            add_label(stack, unseen, words(unseen))
        if unseen not in stack.plugins["l-tuning"].texts.labels:
            return 0.0
        return statistics.mean(
            float(label == unseen) for label in stack.classify([row["text"] for row in asked])
        )

    method = Method(
        name=f"L-Tuning, prompt, {unseen} unseen",
        plugins=lambda: [l_tuning(seen, length=n)],
        rate=PROMPT_RATE,
    )
    return compare([method], rows, recall, seeds=seeds, steps=steps, every=steps)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--label", default="intent", help="the column of the label")
    parser.add_argument("--rows", type=int, default=2000, help="rows to train on")
    parser.add_argument("--tests", type=int, default=140, help="rows to test on")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument(
        "--label-steps", type=int, default=300, help="steps of L-Tuning, which learns more slowly"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.9, help="accuracy whose first crossing is timed")
    parser.add_argument("--unseen", nargs="*", default=["GetWeather"], help="classes left out of training")
    parser.add_argument("--only", default="", help="methods whose name has this in it")
    parser.add_argument("--rate", type=float, help="another rate than each method's own")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    columns = {"text": "text", "label": arguments.label}
    train, test = (
        list(read_dataset(file, format="classification", columns=columns))
        for file in (arguments.train, arguments.test)
    )
    train, test = (
        train[: arguments.rows],
        test[:: len(test) // arguments.tests],
    )  # the tests come sorted by class
    labels = sorted({row["label"] for row in train})
    n = max(
        len(Stack("peftx:tiny").tokenizer(words(label), add_special_tokens=False)["input_ids"])
        for label in labels
    )
    chosen = [m for m in methods(labels, n) if arguments.only in m.name]
    if arguments.rate is not None:
        chosen = [Method(name=m.name, plugins=m.plugins, rate=arguments.rate) for m in chosen]
    seeds = range(arguments.seeds)

    def accuracy(stack: Stack) -> float:
        return stack.evaluate(test, metrics=["accuracy"])["accuracy"].value

    results = []
    for method in chosen:
        steps = arguments.label_steps if method.name.startswith("L-Tuning") else arguments.steps
        every = max(1, steps // 5)
        results += compare(
            [method], train, accuracy, seeds=seeds, steps=steps, every=every, target=arguments.target
        )
    for unseen in arguments.unseen:
        results.append(unseen_class(unseen, labels, train, test, seeds, arguments.label_steps))
    settings = {
        "rows": f"{len(train)} of {arguments.train.name}",
        "tests": f"{len(test)} of {arguments.test.name}",
        "steps": f"{arguments.steps}, of L-Tuning {arguments.label_steps}",
        "batch": 8,
    }
    write(
        "l_tuning", "L-Tuning: label texts as prompts", results, unit="accuracy", target=arguments.target,
        settings=settings, folder=arguments.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
