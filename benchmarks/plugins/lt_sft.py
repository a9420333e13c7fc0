"""What LT-SFT reaches at several densities, and what is left of two skills in one model.

    python benchmarks/plugins/lt_sft.py ag_news_test.jsonl.gz tinyshakespeare.txt.gz --skip 6000

The bundled model. Task: AG News in prompt form; rows before `--skip` are left out (the model has read the first 6000,
but asked otherwise). Style: next tokens of a text. Accuracy on 400 rows, perplexity on 100 passages, none trained on.
Steps are those of phase 2; a run with a phase 1 makes as many before. Prints JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from peftx import Stack
from peftx.engines.data import read_dataset
from peftx_lt_sft import LtSft, Skill, Skills, take


def passages(path: Path, words: int) -> list[dict[str, str]]:
    found = gzip.decompress(path.read_bytes()).decode().split()
    return [{"text": " ".join(found[i : i + words])} for i in range(0, len(found) - words, words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", type=Path, help="rows with text and label")
    parser.add_argument("style", type=Path, help="a text, gzipped")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows of the task")
    parser.add_argument("--steps", type=int, default=40, help="of phase 2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = list(read_dataset(arguments.task, format="classification"))[arguments.skip :]
    rows = [{"text": f"{row['text']}\nSection:", "label": row["label"]} for row in found]
    text = passages(arguments.style, 60)
    task, task_test = rows[:1000], rows[1000:1400]
    style, style_test = text[:1000], text[-100:]

    def scores(stack: Stack) -> dict[str, float]:
        accuracy = stack.evaluate(task_test, metrics=["accuracy"], max_length=128)["accuracy"]
        perplexity = stack.evaluate(style_test, metrics=["perplexity"], max_length=128)["perplexity"]
        return {
            "accuracy": round(accuracy.value, 4),
            "low": round(accuracy.low or 0, 3),
            "high": round(accuracy.high or 0, 3),
            "perplexity": round(perplexity.value, 2),
        }

    def learn(data: list[Any], **options: float) -> tuple[Skill, dict[str, Any]]:
        stack = Stack("peftx:tiny", [LtSft(**options)])
        steps = arguments.steps * (2 if options.get("phase1", 0.5) else 1)
        started = time.process_time()
        stack.train(data, steps=steps, batch_size=8, learning_rate=5e-4, max_length=96, schedule="constant")
        seconds = time.process_time() - started
        skill = take(stack)
        with tempfile.TemporaryDirectory() as folder:
            size = skill.save(Path(folder) / "skill.safetensors").stat().st_size
        report = {"numbers": len(skill), "MB": round(size / 1e6, 2), "cpu seconds": round(seconds, 1)}
        return skill, report | scores(stack)

    results: dict[str, Any] = {"no training": scores(Stack("peftx:tiny", []))}
    task_skill, results["task, density 0.08"] = learn(task, density=0.08)
    _, results["task, density 0.01"] = learn(task, density=0.01)
    _, results["task, density 0.01, random mask"] = learn(task, density=0.01, phase1=0)
    _, results["task, density 1"] = learn(task, density=1.0, phase1=0)
    style_skill, results["style, density 0.08"] = learn(style, density=0.08)
    stack = Stack("peftx:tiny", [])
    skills = Skills(stack.model)
    skills.add("task", task_skill)
    skills.add("style", style_skill)
    results["task and style"] = scores(stack)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
