"""Rows of the leaderboards, from the data sets that they are about.

    python benchmarks/leaderboards/rows.py --data FOLDER -o rows

The folder holds `classify/snips_train.jsonl.gz`, `classify/snips_validate.jsonl.gz` (sonos/nlu-benchmark) and
`classify/sentence_polarity.jsonl.gz` (Pang and Lee 2005). Rows are drawn with a seed, so that everybody has the same.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

TRAIN, TEST = 4000, 500


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, str]], count: int) -> None:
    chosen = random.Random(0).sample(rows, count)
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def main(
    data: Annotated[Path, typer.Option()], output: Annotated[Path, typer.Option("--output", "-o")]
) -> None:
    """Write train and test rows of both sets."""
    output.mkdir(parents=True, exist_ok=True)
    for part, name, count in (("train", "snips_train", TRAIN), ("test", "snips_validate", TEST)):
        rows = read(data / "classify" / f"{name}.jsonl.gz")
        labelled = [{"text": row["text"], "label": row["intent"]} for row in rows]
        write(output / f"snips.{part}.jsonl", labelled, count)
    rows = [
        {"text": r["text"], "label": r["label"]}
        for r in read(data / "classify" / "sentence_polarity.jsonl.gz")
    ]
    write(output / "polarity.train.jsonl", rows[:9000], TRAIN)
    write(output / "polarity.test.jsonl", rows[9000:], TEST)


if __name__ == "__main__":
    typer.run(main)
