"""SK-Tuning beside full fine-tuning, LoRA, prompt tuning and prefix tuning, all under the same head; and beside itself
with a random start, to see what the meaning of the sentence is worth.

    python benchmarks/plugins/sk_tuning.py snips_train.jsonl.gz snips_validate.jsonl.gz

The data: rows with `text` and `intent`, to train and to test on. Few training rows, since the question is how fast a
method learns. Every method sees the same batches; the rates are the best of a few.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, TrainingData, TrainStep, hookimpl
from peftx.engines.data import CLASS_INDEX, Collator, class_ids, read_dataset, tokenize_classes
from peftx_lora import Lora
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning
from peftx_sk_tuning import SkTuning

sys.path.insert(0, str(Path(__file__).parents[1]))
from compare import RESULTS, FullTuning, Method, compare, write

TEXT = "Utterance: classify the intent of the text. Intent:"


class MeanHeadConfig(PluginConfig):
    labels: list[str] = Field(description="the classes")


class MeanHead(Plugin):
    """SK-Tuning's head on what the other plugins of the stack make of the model; nothing else."""

    Config = MeanHeadConfig
    claims = {Claim.CLASSIFIES, Claim.BESIDE_WEIGHTS}
    takes = ("classification",)
    config: MeanHeadConfig

    @hookimpl
    def prepare_data(self, data: TrainingData) -> None:
        tokenize_classes(data, self.config.labels)

    @hookimpl
    def inject(self, model: ModelView) -> None:
        self.head = model.head("head", len(self.config.labels), dropout=0.1)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        target = step.batch[CLASS_INDEX]
        step.batch = {name: x for name, x in step.batch.items() if name not in (CLASS_INDEX, "labels")}

        def loss() -> tuple[Tensor, Any]:
            outputs = step.forward(output_hidden_states=True)
            return F.cross_entropy(
                self.head(outputs.hidden_states[-1], step.batch["attention_mask"]), target
            ), outputs

        step.replace_task_loss(loss)
        return (yield)

    def classify(self, stack: Stack, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        rows = [{"input_ids": class_ids(stack.tokenizer, text, max_length=128)} for text in texts]
        scores = []
        for start in range(0, len(rows), 32):
            batch = Collator(stack.tokenizer.pad_token_id)(rows[start : start + 32])
            outputs = stack.model(**batch, output_hidden_states=True)
            scores.append(self.head(outputs.hidden_states[-1], batch["attention_mask"]))
        return self.config.labels, torch.cat(scores)


class RandomStartConfig(PluginConfig):
    """No options."""


class RandomStart(Plugin):
    """Exchanges E_s of the SK-Tuning before it for numbers of the same size without meaning."""

    Config = RandomStartConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        with torch.no_grad():
            for name, E in stack.ledger.tensors("sk-tuning").items():
                if name.endswith(".E"):
                    E.normal_(std=float(E.std()))


def sk_tuning(variant: str, labels: list[str], text: str) -> SkTuning:
    return SkTuning(variant=variant, labels=labels, text=text)


def start_loss(plugins: list[Plugin], rows: list[dict[str, str]], labels: list[str], seed: int) -> float:
    """Cross entropy at step 0 of a head that is fitted to half of the rows, on the other half."""
    stack = Stack("peftx:tiny", plugins, seed=seed)
    plugin = stack.plugins["sk-tuning"]
    width = plugin.head.linear.in_features
    plugin.head.linear = torch.nn.Linear(width, width, bias=False)
    torch.nn.init.eye_(plugin.head.linear.weight)  # so that the mean of the hidden states is the score
    states = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([class_ids(stack.tokenizer, row["text"], max_length=128)])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            states.append(plugin.scores(partial(stack.model, **batch), batch["attention_mask"])[0])
    x, y = torch.cat(states), torch.tensor([labels.index(row["label"]) for row in rows])
    x, half = (x - x.mean(0)) / x.std(0), len(rows) // 2
    head = torch.nn.Linear(x.shape[1], len(labels))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x[:half]), y[:half]) + 0.01 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(F.cross_entropy(head(x[half:]), y[half:]).detach())


def methods(labels: list[str], text: str) -> list[Method]:
    n = len(Stack("peftx:tiny").tokenizer(text)["input_ids"])

    def sk(variant: str) -> SkTuning:
        return sk_tuning(variant, labels, text)

    def head() -> MeanHead:
        return MeanHead(labels=labels)

    return [
        Method(name="head alone", plugins=lambda: [head()], rate=3e-2),
        Method(name="full fine-tuning", plugins=lambda: [FullTuning(), head()], rate=1e-3),
        Method(name="LoRA, rank 8", plugins=lambda: [Lora(rank=8), head()], rate=1e-2),
        Method(name=f"prompt tuning, {n} rows", plugins=lambda: [PromptTuning(length=n), head()], rate=3e-2),
        Method(name=f"prefix tuning, {n} rows", plugins=lambda: [PTuningV2(length=n), head()], rate=3e-2),
        Method(name="SK-Tuning, prompt", plugins=lambda: [sk("prompt")], rate=3e-2),
        Method(
            name="SK-Tuning, prompt, random start", plugins=lambda: [sk("prompt"), RandomStart()], rate=3e-2
        ),
        Method(name="SK-Tuning, prefix", plugins=lambda: [sk("prefix")], rate=3e-2),
        Method(
            name="SK-Tuning, prefix, random start", plugins=lambda: [sk("prefix"), RandomStart()], rate=3e-2
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--label", default="intent", help="the column of the label")
    parser.add_argument("--text", default=TEXT, help="the sentence s")
    parser.add_argument("--rows", type=int, default=1000, help="rows to train on")
    parser.add_argument("--fit", type=int, default=400, help="rows for the loss at step 0; 0: leave it out")
    parser.add_argument("--tests", type=int, default=140, help="rows to test on")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.9, help="accuracy whose first crossing is timed")
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
    chosen = [m for m in methods(labels, arguments.text) if arguments.only in m.name]
    if arguments.rate is not None:
        chosen = [Method(name=m.name, plugins=m.plugins, rate=arguments.rate) for m in chosen]
    results = compare(
        chosen,
        train,
        lambda stack: stack.evaluate(test, metrics=["accuracy"])["accuracy"].value,
        seeds=range(arguments.seeds),
        steps=arguments.steps,
        every=arguments.every,
        target=arguments.target,
    )
    settings: dict[str, Any] = {}
    for variant in ("prompt", "prefix") if arguments.fit else ():
        for start, extra in (("sentence", []), ("random", [RandomStart])):
            losses = [
                start_loss(
                    [sk_tuning(variant, labels, arguments.text), *(kind() for kind in extra)],
                    train[: arguments.fit],
                    labels,
                    seed,
                )
                for seed in range(arguments.seeds if extra else 1)
            ]
            settings[f"loss of a fitted head at step 0, {variant}, {start}"] = round(
                statistics.mean(losses), 4
            )
    settings |= {
        "rows": f"{len(train)} of {arguments.train.name}",
        "tests": f"{len(test)} of {arguments.test.name}",
        "steps": arguments.steps,
        "batch": 8,
        "sentence": repr(arguments.text),
    }
    write(
        "sk_tuning", "SK-Tuning: a sentence as the start", results, unit="accuracy", target=arguments.target,
        settings=settings, folder=arguments.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
