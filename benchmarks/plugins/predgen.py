"""Accuracy on news topics that are asked for in words: PredGen beside LoRA that only writes, LoRA under a pooled head,
full fine-tuning and prompt tuning; and beside itself without scheduled sampling.

    python benchmarks/plugins/predgen.py ag_news_test.jsonl.gz --skip 6000

The data: rows with `text` and `label`; rows before `--skip` are left out (the bundled model has read the first 6000 of
AG News, but asked otherwise). Every method sees the same batches of the same texts, `text` and `--word` in a new line.
Without a head the most likely label is the answer. CPU seconds are of training alone; PredGen's hold its generation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainingData, TrainStep, hookimpl
from peftx.engines.data import CLASS_INDEX, Collator, class_ids, read_dataset, tokenize_classes
from peftx_lora import Lora
from peftx_predgen import Predgen
from peftx_prompt_tuning import PromptTuning

sys.path.insert(0, str(Path(__file__).parents[1]))
from compare import RESULTS, FullTuning, Method, compare, write

LENGTH = 96


class PooledHeadConfig(PluginConfig):
    labels: list[str] = Field(description="the classes")


class PooledHead(Plugin):
    """scores = W mean_t h_t: a linear map of the mean of the last hidden states."""

    Config = PooledHeadConfig
    claims = {Claim.CLASSIFIES, Claim.BESIDE_WEIGHTS}
    takes = ("classification",)
    gives = {"classification": "tokenized"}
    config: PooledHeadConfig

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        tokenize_classes(data, self.config.labels)

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.linear = model.keep("head", nn.Linear(model.hidden_size, len(self.config.labels)))

    def scores(self, outputs: Any, mask: Tensor) -> Tensor:
        return self.linear((outputs.hidden_states[-1] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        target = step.batch[CLASS_INDEX]
        step.batch = {name: x for name, x in step.batch.items() if name not in (CLASS_INDEX, "labels")}

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward(output_hidden_states=True)
            return F.cross_entropy(self.scores(outputs, step.batch["attention_mask"]), target), outputs

        step.replace_task_loss(loss)
        return (yield)

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        rows = [{"input_ids": class_ids(stack.tokenizer, text, max_length=LENGTH)} for text in texts]
        scores = []
        for start in range(0, len(rows), 32):
            batch = Collator(stack.tokenizer.pad_token_id)(rows[start : start + 32])
            outputs = stack.model(**batch, output_hidden_states=True)
            scores.append(self.scores(outputs, batch["attention_mask"]))
        return self.config.labels, torch.cat(scores)


def methods(labels: list[str], ramp: int) -> list[Method]:
    def predgen(**options: Any) -> Predgen:
        return Predgen(labels=labels, ramp=ramp, **options)

    return [
        Method(name="no training", plugins=list),
        Method(name="LoRA, rank 8, writes", plugins=lambda: [Lora(rank=8)], rate=3e-3),
        Method(
            name="LoRA, rank 8, pooled head",
            plugins=lambda: [Lora(rank=8), PooledHead(labels=labels)],
            rate=3e-3,
        ),
        Method(name="LoRA, rank 8, PredGen", plugins=lambda: [Lora(rank=8), predgen()], rate=3e-3),
        Method(
            name="LoRA, rank 8, PredGen, p = 0", plugins=lambda: [Lora(rank=8), predgen(p_max=0)], rate=3e-3
        ),
        Method(name="full fine-tuning, writes", plugins=lambda: [FullTuning()], rate=5e-4),
        Method(name="prompt tuning, 20 tokens, writes", plugins=lambda: [PromptTuning(length=20)], rate=1e-2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows")
    parser.add_argument("--word", default="Section", help="asks for the label")
    parser.add_argument("--train", type=int, default=1200, help="rows to train on")
    parser.add_argument("--test", type=int, default=100, help="rows to test on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--ramp", type=int, default=30, help="T_s; the paper's 500 are longer than the run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.8, help="accuracy whose first crossing is timed")
    parser.add_argument("--only", default="", help="methods whose name has this in it")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    found = list(read_dataset(arguments.data, format="classification"))[arguments.skip :]
    rows = [{"text": f"{row['text']}\n{arguments.word}:", "label": row["label"]} for row in found]
    train, test = rows[: arguments.train], rows[arguments.train :][: arguments.test]
    labels = sorted({row["label"] for row in train})
    results = compare(
        [method for method in methods(labels, arguments.ramp) if arguments.only in method.name],
        train,
        lambda stack: stack.evaluate(test, metrics=["accuracy"], max_length=LENGTH)["accuracy"].value,
        seeds=range(arguments.seeds),
        steps=arguments.steps,
        every=arguments.every,
        max_length=LENGTH,
        target=arguments.target,
    )
    settings = {"rows": f"{len(train)} of {arguments.data.name}", "tests": len(test), "batch": 8}
    settings |= {name: getattr(arguments, name) for name in ("skip", "steps", "ramp", "seeds")}
    write(
        "predgen", "PredGen: the answer is written, then read", results, unit="accuracy", target=arguments.target,
        settings=settings, folder=arguments.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
