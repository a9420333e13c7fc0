"""docs/recipes/shrink.yaml on real text: bytes, perplexity and tokens a second after each stage.

    python benchmarks/shrink.py --train wikitext2_valid.txt.gz --text wikitext2_test.txt.gz

The recipe as it stands, but for its rows, `--steps` in each of its two stretches of training and rows of 128 tokens. It
trains and calibrates on `--train`; perplexity is of the first `--bytes` of `--text`. The stack is saved wherever the
recipe measures it: bytes are those of the bundle's tensors, of the base those of its file. Tokens a second: one row
behind a prompt of 64 tokens, one thread, CPU time, the least of interleaved rounds of the bundles as they load.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measure import prompts_and_tokens
from run import RESULTS, machine

import peftx
from peftx.engines.models import base_bytes, load_model
from peftx.pipeline import Run, load_run

RECIPE = Path(__file__).parents[1] / "docs" / "recipes" / "shrink.yaml"


class Keeper:
    """A reporter that saves the stack wherever the run has measured it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Run | None = None

    def stage(self, name: str, ids: Sequence[str]) -> None: ...

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None: ...

    def finished(self, name: str, seconds: float, detail: str) -> None:
        print(f"{name:10} {seconds:6.1f} s  {detail}", flush=True)
        assert self.run is not None
        if name == "evaluate" and self.run.result is not None:
            stage = list(self.run.result.scores)[-1]
            if stage != "base":
                self.run.result.stack.save(self.folder / stage)


def rows_in(path: Path, folder: Path, *, size: int | None = None) -> Path:
    """The beginning of a text, whole or compressed, as rows of 600 characters."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        text = file.read(size).decode("utf-8", errors="ignore")
    rows = folder / f"{path.name}.jsonl"
    lines = (json.dumps({"text": text[i : i + 600]}) for i in range(0, len(text), 600))
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def measured(arguments: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    train = rows_in(arguments.train, scratch)
    held_out = rows_in(arguments.text, scratch, size=arguments.bytes)
    keeper = Keeper(scratch)
    overrides = [
        f"train.steps={arguments.steps}",
        "train.max_length=128",
        f"train.learning_rate={arguments.rate}",
    ]
    overrides += [
        f"output={scratch / 'out'}",
        f"data.train.path={train}",
        f"data.eval.path={held_out}",
        f"data.calibration.path={train}",
    ]
    keeper.run = load_run(RECIPE, overrides=overrides, reporter=keeper)
    scores = keeper.run.run().scores
    base, _ = load_model("peftx:tiny")
    models = {"base": base} | {name: peftx.load(scratch / name).model for name in scores if name != "base"}
    for model in models.values():
        model.eval().requires_grad_(False)
    seconds = prompts_and_tokens(models, rounds=arguments.rounds, prompt=64, written=16)
    return {
        name: {
            "bytes": base_bytes("peftx:tiny", base)
            if name == "base"
            else sum(file.stat().st_size for file in (scratch / name).rglob("*.safetensors")),
            "perplexity": [score["perplexity"].value, score["perplexity"].low, score["perplexity"].high],
            "token_seconds": seconds[name]["token"],
        }
        for name, score in scores.items()
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| after | bytes | perplexity (95 %) | tokens a second |", "| --- | --- | --- | --- |"]
    for name, found in results.items():
        value, low, high = found["perplexity"]
        speed = 1 / min(found["token_seconds"])
        lines.append(f"| {name} | {found['bytes']:,} | {value:.1f} ({low:.1f} to {high:.1f}) | {speed:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="to train and calibrate on; .gz or plain")
    parser.add_argument("--text", type=Path, required=True, help="held out; .gz or plain")
    parser.add_argument("--bytes", type=int, default=16_000, help="of the held-out text")
    parser.add_argument("--steps", type=int, default=80, help="of each stretch of training")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS / "shrink.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        results = measured(arguments, Path(scratch))
    settings = {name: getattr(arguments, name) for name in ("bytes", "steps", "rate", "rounds")}
    found = {"machine": machine(), "settings": settings, "results": results}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
