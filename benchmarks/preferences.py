"""Preference learning in one table: DPO by TRL, DPO with a shared prefix, D2O and AlignDistil on the same pairs.

    python benchmarks/preferences.py hh_harmless_base_test.jsonl.gz

Pairs are dialogues whose prompt and answer fit into `LONGEST` tokens, mixed with a seed: rows to train on, to choose
learning rates on, to measure on. Every method trains a LoRA of rank 8 for as many steps of as many pairs, in the same
order and with a constant rate. With r(y) = log pi(y|x) - log pi_0(y|x), a sum over the answer's tokens, pi_0 the base:

    margin       r(chosen) - r(rejected), nats, the mean over held-out pairs
    wins         the share of pairs whose margin is above 0
    chosen, rejected      the mean of r
    KL           KL(pi || pi_0) a token, at the states of answers that pi itself draws to held-out prompts

D2O reads no chosen answer, so its `chosen` says what became of answers that it never saw, and `wins` that the rejected
ones fell further than these: not that it learned what is preferred.

A rate is chosen by - log(1 + exp(- beta margin)), the mean over validation pairs.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bases import Source, seen
from compare import RESULTS
from datasets import Dataset
from plugins.dpo_prefix_sharing import read_pairs
from rated import Make, measured, table
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from peftx import Plugin, Stack
from peftx.engines.data import Collator, encode_pair, prompt_ids, text_ids
from peftx.engines.models import load_model
from peftx.engines.training.order import Shuffled
from peftx.toolkits.decoding.text import DRAWN, written
from peftx.toolkits.evaluation import evaluating
from peftx_aligndistil import AlignDistil, at_answers, log_probs
from peftx_d2o import D2o
from peftx_dpo_prefix_sharing import DpoPrefixSharing
from peftx_lora import Lora

LONGEST, VALIDATION, TEST = 96, 80, 208
STEPS, BATCH, BETA = 20, 8, 0.1
DRAWN_TOKENS, DRAWN_PROMPTS = 16, 64
ROWS = {"training and test": Source("preference/hh_harmless_base_test.jsonl.gz")}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
MEASURES = {"wins": 3, "margin": 2, "chosen": 2, "rejected": 2, "KL": 4}
Pair = dict[str, str]


class InOrder(DPOTrainer):
    """TRL's, on rows in the order of `stack.train`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
        return Shuffled(len(self.train_dataset), self.args.seed, drawn=False)


class Judge:
    """Measures a stack against the base that it began as."""

    def __init__(self, base: str) -> None:
        self.start = Stack(base, dtype="float32")

    def batches(self, rows: Sequence[dict[str, list[int]]]) -> Iterator[dict[str, Tensor]]:
        collate = Collator(self.start.tokenizer.pad_token_id)
        yield from (collate(rows[i : i + 16]) for i in range(0, len(rows), 16))

    def encoded(self, pairs: Sequence[Pair], name: str) -> list[dict[str, list[int]]]:
        found = [
            encode_pair(self.start.tokenizer, p["prompt"], p[name], max_length=2 * LONGEST) for p in pairs
        ]
        return [row._asdict() for row in found]

    def ratios(self, stack: Stack, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """r of each pair's answers, [N] float32 each."""

        def r(batch: dict[str, Tensor]) -> Tensor:
            labels = batch.pop("labels")
            now, before = (log_probs(of.model(**batch).logits, labels) for of in (stack, self.start))
            return now - before

        with evaluating(stack.model), evaluating(self.start.model):
            return {
                name: torch.cat([r(batch) for batch in self.batches(self.encoded(pairs, name))])
                for name in ("chosen", "rejected")
            }

    def divergence(self, stack: Stack, pairs: Sequence[Pair]) -> float:
        """KL(pi || pi_0) at a token that pi draws, the mean over all of them, in nats; over the whole vocabulary."""
        torch.manual_seed(0)
        prompts = [prompt_ids(stack.tokenizer, pair["prompt"]) for pair in pairs]
        with evaluating(stack.model), evaluating(self.start.model):
            answers = written(stack, prompts, DRAWN_TOKENS, DRAWN)
            each = []
            rows = [
                {"input_ids": x + y, "labels": [-100] * len(x) + y}
                for x, y in zip(prompts, answers, strict=True)
            ]
            for batch in self.batches(rows):
                labels = batch.pop("labels")
                now, before = (
                    at_answers(of.model(**batch).logits, labels).log_softmax(-1) for of in (stack, self.start)
                )
                each.append((now.exp() * (now - before)).sum(-1))
        return float(torch.cat(each).mean())

    def choose(self, stack: Stack, pairs: Sequence[Pair]) -> float:
        r = self.ratios(stack, pairs)
        return float(logsigmoid(BETA * (r["chosen"] - r["rejected"])).mean())

    def test(self, stack: Stack, pairs: Sequence[Pair]) -> dict[str, float]:
        r = self.ratios(stack, pairs)
        margin = r["chosen"] - r["rejected"]
        return {
            "wins": float((margin > 0).float().mean()),
            "margin": float(margin.mean()),
            "chosen": float(r["chosen"].mean()),
            "rejected": float(r["rejected"].mean()),
            "KL": self.divergence(stack, pairs[:DRAWN_PROMPTS]),
        }


def by_plugin(base: str, pairs: list[Pair], plugin: Plugin) -> Make:
    def make(rate: float, seed: int) -> Stack:
        stack = Stack(base, [Lora(rank=8), plugin], seed=seed, dtype="float32")
        stack.train(
            pairs, steps=STEPS, batch_size=BATCH, learning_rate=rate, seed=seed, schedule="constant",
            max_length=2 * LONGEST,
        )  # fmt: skip
        return stack

    return make


def by_trl(base: str, pairs: list[Pair]) -> Make:
    rows = [pair | {name: " " + pair[name] for name in ("chosen", "rejected")} for pair in pairs]

    def make(rate: float, seed: int) -> Stack:
        stack = Stack(base, [Lora(rank=8)], seed=seed, dtype="float32")
        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=rate, seed=seed,
                lr_scheduler_type="constant", beta=BETA, max_length=2 * LONGEST, report_to=[], use_cpu=True,
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
                gradient_checkpointing=False, bf16=False,
            )  # fmt: skip
            stack.trainer(InOrder)(
                model=stack.model, ref_model=load_model(base, dtype="float32")[0], args=arguments,
                train_dataset=Dataset.from_list(rows), processing_class=stack.tokenizer,
            ).train()  # fmt: skip
        return stack

    return make


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """What was won against what it cost: a point a seed, a cross the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for index, (name, found) in enumerate(results.items()):
        for ax, what in zip(axes, ("wins", "margin"), strict=True):
            x, y = ([run[of] for run in found["runs"]] for of in ("KL", what))
            ax.plot(x, y, "o", color=f"C{index}", alpha=0.5)
            ax.plot(found["mean"]["KL"], found["mean"][what], "x", color=f"C{index}", markersize=9,
                    label=name if what == "wins" else None)  # fmt: skip
    for ax, what in zip(axes, ("share of held-out pairs won", "mean margin, nats"), strict=True):
        ax.set(xlabel="KL from the start, nats a token", ylabel=what, xscale="log")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def page(results: dict[str, dict[str, Any]], counts: Sequence[int], base: str) -> str:
    setting = (
        f"LoRA of rank 8, HH-RLHF (harmless, test) dialogues of at most {LONGEST} tokens: {counts[0]} pairs to "
        f"train on, {counts[1]} to choose rates on, {counts[2]} to measure on. {STEPS} steps of {BATCH} pairs, "
        f"constant rates from {', '.join(f'{rate:g}' for rate in RATES)}, three seeds, ± the standard deviation. One "
        f"thread, CPU seconds of training. {seen(base, **ROWS)}"
    )
    lines = ["# Preference learning", "", setting, "", *table(results, MEASURES), ""]
    return "\n".join([*lines, "![What is won against the divergence](preferences.png)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="rows with chosen and rejected dialogues")
    parser.add_argument(
        "--base", default="peftx:tiny", help="or a folder; it must not have read the dialogues"
    )
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table to run in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base, judge = arguments.base, Judge(arguments.base)

    def fits(pair: Pair) -> bool:
        prompt, *answers = (len(text_ids(judge.start.tokenizer, text)) for text in pair.values())
        return prompt + max(answers) <= LONGEST

    pairs = [pair for pair in read_pairs(arguments.data) if fits(pair)]
    random.Random(0).shuffle(pairs)
    held, test = pairs[:VALIDATION], pairs[VALIDATION : VALIDATION + TEST]
    rows = pairs[VALIDATION + TEST :][: STEPS * BATCH]
    counts = [len(rows), len(held), len(test)]
    settings = {
        "base": base, "pairs": counts, "longest": LONGEST, "steps": STEPS, "batch": BATCH, "beta": BETA,
    }  # fmt: skip
    results = measured(
        {
            "DPO, TRL's trainer": by_trl(base, rows),
            "`dpo-prefix-sharing`": by_plugin(base, rows, DpoPrefixSharing(beta=BETA)),
            "`aligndistil`": by_plugin(base, rows, AlignDistil(beta=BETA)),
            "`d2o`, 3 answers drawn": by_plugin(base, rows, D2o(samples=3, max_new_tokens=DRAWN_TOKENS)),
        },
        {},
        rates=RATES,
        choose=lambda stack: judge.choose(stack, held),
        test=lambda stack: judge.test(stack, test),
        settings=settings,
        base=seen(base, **ROWS),
        file=RESULTS / "preferences.json",
        only=arguments.only,
    )
    (RESULTS / "preferences.md").write_text(page(results, counts, base), encoding="utf-8")
    plot(results, RESULTS / "preferences.png")
    print(page(results, counts, base))


if __name__ == "__main__":
    main()
