"""Does the instruction residual keep a skill through further pre-training, and the new text too?

    python benchmarks/leaderboards/rows.py --data FOLDER -o rows
    python benchmarks/plugins/instruction_residual.py rows/snips.words.train.jsonl rows/snips.words.test.jsonl \
        FOLDER/math/gsm8k_train.jsonl.gz FOLDER/math/gsm8k_test.jsonl.gz --model unseen

A pair is made: the base by `tools/pretrain_tiny.py --prose`, and the same tuned to answer a request with its kind
(SNIPS). Both are pre-trained further on worked sums (GSM8K), all numbers of them, in the same steps. Of what comes out:
accuracy on requests and perplexity of sums, none of which was trained on. Rates are the best of one grid on validation
rows with seed 0: by accuracy for tuning, by perplexity for pre-training, of the base and of the tuned model apart.
Seeds draw the order of rows. Six minutes of one core. Writes benchmarks/results/instruction_residual.json and .md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from peftx import Plugin, Stack
from peftx_full_finetuning import FullFinetuning
from peftx_instruction_residual import InstructionResidual

sys.path.insert(0, str(Path(__file__).parents[1]))
from bases import Source, seen

RESULTS = Path(__file__).parents[1] / "results"
RATES = (3e-4, 1e-3, 3e-3)
VALIDATION, TESTS, TOKENS = 100, 300, 48
Rows = list[dict[str, str]]


def read(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


def best(score: Callable[[float], float]) -> float:
    """The rate with the highest score; the smaller of equals."""
    return max(RATES, key=lambda rate: (score(rate), -rate))


def mean(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def page(report: dict[str, Any]) -> str:
    """Markdown: a row a model."""
    lines = ["| model | accuracy on requests | perplexity of sums |", "| --- | --- | --- |"]
    for arm, scores in report["arms"].items():
        cells = [
            f"{scores[name]['mean']:.{digits}f}"
            + f" ± {scores[name]['std']:.{digits}f}" * bool(scores[name]["std"])
            for name, digits in (("accuracy", 3), ("perplexity", 1))
        ]
        lines.append(f"| {' | '.join((arm, *cells))} |")
    said = f"{report['steps']} steps of tuning, and of pre-training; ± over {len(report['seeds'])} seeds."
    return (
        "\n\n".join(["# What the instruction residual keeps", said, report["base"], "\n".join(lines)]) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requests", type=Path, help="rows to tune on, of rows.py")
    parser.add_argument("requests_test", type=Path)
    parser.add_argument("sums", type=Path, help="gsm8k_train.jsonl.gz")
    parser.add_argument("sums_test", type=Path)
    parser.add_argument("--model", default="unseen", help="the base")
    parser.add_argument("--steps", type=int, default=100, help="of tuning, and of pre-training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "instruction_residual.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    asked, asked_test = read(given.requests), read(given.requests_test)
    sums, sums_test = (
        [{"text": f"{row['question']}\n{row['answer']}"} for row in read(path)]
        for path in (given.sums, given.sums_test)
    )
    tuning, tuning_valid = asked[:-VALIDATION], asked[-VALIDATION:]
    text, text_valid = sums[:-VALIDATION], sums[-VALIDATION:]

    def accuracy(stack: Stack, rows: Rows) -> float:
        return stack.evaluate(rows, metrics=["accuracy"], max_length=TOKENS)["accuracy"].value

    def perplexity(stack: Stack, rows: Rows) -> float:
        return stack.evaluate(rows, metrics=["perplexity"], max_length=TOKENS)["perplexity"].value

    def scores(stack: Stack) -> dict[str, float]:
        return {
            "accuracy": accuracy(stack, asked_test[:TESTS]),
            "perplexity": perplexity(stack, sums_test[:TESTS]),
        }

    @cache
    def run(model: str, rows: Literal["requests", "sums"], rate: float, seed: int = 0) -> str:
        """Where the checkpoint of a model lies, all of whose numbers were trained on the rows."""
        stack = Stack(model, [FullFinetuning()], dtype="float32")
        stack.train(
            tuning if rows == "requests" else text,
            steps=given.steps,
            batch_size=8,
            learning_rate=rate,
            max_length=TOKENS,
            seed=seed,
        )
        return str(stack.export(Path(tempfile.mkdtemp(dir=folder)) / "model"))

    rates: dict[str, float] = {}
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates["tuning"] = best(lambda rate: accuracy(Stack(run(given.model, "requests", rate)), tuning_valid))
        tuned = run(given.model, "requests", rates["tuning"])
        for what, model in (("base", given.model), ("tuned", tuned)):
            rates[what] = best(
                lambda rate, model=model: -perplexity(Stack(run(model, "sums", rate)), text_valid)
            )
        print(json.dumps(rates), flush=True)

        def note(arm: str, model: str, *plugins: Plugin) -> None:
            found.setdefault(arm, []).append(scores(Stack(model, plugins, dtype="float32")))
            print(arm, found[arm][-1], flush=True)

        for seed in given.seeds:
            tuned = run(given.model, "requests", rates["tuning"], seed)
            later = run(given.model, "sums", rates["base"], seed)
            residual = InstructionResidual(instruct=tuned, base=given.model)
            note("the base", given.model)
            note("tuned", tuned)
            note("tuned, then pre-trained", run(tuned, "sums", rates["tuned"], seed))
            note("base, pre-trained", later)
            note("base, pre-trained, with the residual", later, residual)
    report = {
        "base": seen(
            given.model,
            **{
                "tuning": Source("classify/snips_train.jsonl.gz"),
                "tuning's test": Source("classify/snips_validate.jsonl.gz"),
                "pre-training": Source("math/gsm8k_train.jsonl.gz"),
                "pre-training's test": Source("math/gsm8k_test.jsonl.gz"),
            },
        ),
        "steps": given.steps,
        "seeds": given.seeds,
        "grid": RATES,
        "rates": rates,
        "arms": {
            arm: {
                name: {**mean([one[name] for one in runs]), "seeds": [one[name] for one in runs]}
                for name in ("accuracy", "perplexity")
            }
            for arm, runs in found.items()
        },
    }
    given.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    given.output.with_suffix(".md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
