"""Rows of a stream of six tasks with 12 classes, from five data sets.

    python benchmarks/stream_rows.py --data FOLDER -o rows

Of leaderboards/rows.py the files, and beside them `classify/ag_news_test.jsonl.gz` (mhjabreel/CharCnn_Keras),
`generate/e2e_devset.csv.gz` (the E2E challenge: what is said of a restaurant) and `dialogue/sgd_dev_sample.jsonl.gz`
(google-research-datasets: two turns of a user). Each class is called by a word that is one token to the models that are
measured, so that a likelihood costs one pass. Rows to test on come from a part of their own of each set: SNIPS's own
validation rows, the last rows of news and reviews, other restaurants, other dialogues. Those to choose by come from the
training part, and are not trained on.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from bases import Source
from leaderboards.rows import NEWS, SNIPS_TEST, SNIPS_TRAIN, read

TRAIN, VALID, TEST = 80, 6, 10
"""Rows of a class."""
Rows = tuple[list[tuple[str, str]], list[tuple[str, str]]]
"""(text, class of the set): a part to train and to choose on, and one to test on."""
SOURCES = {
    "utterances'": Source(SNIPS_TRAIN), "tested utterances'": Source(SNIPS_TEST), "news": Source(NEWS),
    "reviews'": Source("classify/sentence_polarity.jsonl.gz"), "restaurants'": Source("generate/e2e_devset.csv.gz"),
    "dialogues'": Source("dialogue/sgd_dev_sample.jsonl.gz"),
}  # fmt: skip
"""What the rows are of."""

TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "songs": ("snips", {"AddToPlaylist": "list", "PlayMusic": "play"}),
    "abroad": ("news", {"World": "world", "Sports": "game"}),
    "trips": ("sgd", {"Flights_3": "air", "Buses_1": "bus"}),
    "kitchens": ("food", {"English": "British", "Chinese": "Chinese"}),
    "evenings": ("snips", {"GetWeather": "weather", "BookRestaurant": "book"}),
    "reviews": ("polarity", {"negative": "bad", "positive": "good"}),
}
"""Task -> its set, and what its classes are called."""


def labelled(data: Path, name: str, label: str = "label") -> list[tuple[str, str]]:
    return [(row["text"], row[label]) for row in read(data / "classify" / f"{name}.jsonl.gz")]


def restaurants(data: Path) -> Rows:
    """Texts that say a restaurant's food and not its place; every fourth restaurant is tested on."""
    with gzip.open(data / "generate" / "e2e_devset.csv.gz", "rt", encoding="utf-8") as file:
        said = [(row["ref"], dict(re.findall(r"(\w+)\[([^]]*)]", row["mr"]))) for row in csv.DictReader(file)]
    tested = set(sorted({told["name"] for _, told in said})[::4])

    food, place = "English|British|Chinese", "(?i)river|cent(re|er)|city"
    about = [
        (text, told)
        for text, told in said
        if "food" in told and re.search(food, text) and not re.search(place, text)
    ]
    first, last = (
        [(text, told["food"]) for text, told in about if (told["name"] in tested) is test]
        for test in (False, True)
    )
    return first, last


def turns(data: Path) -> Rows:
    """A turn of the user's and the next one, of dialogues about one service; every fourth dialogue is tested on."""

    def pairs(dialogues: list[dict[str, list[dict[str, str]]]]) -> Iterator[tuple[str, str]]:
        for dialogue in dialogues:
            own = [turn["text"] for turn in dialogue["turns"] if turn["speaker"] == "user"]
            yield from ((f"{a} {b}", str(dialogue["services"][0])) for a, b in pairwise(own))

    dialogues = read(data / "dialogue" / "sgd_dev_sample.jsonl.gz")
    tested = dialogues[::4]
    return [*pairs([d for d in dialogues if d not in tested])], [*pairs(tested)]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(
    data: Annotated[Path, typer.Option()], output: Annotated[Path, typer.Option("--output", "-o")]
) -> None:
    """Write train rows of each task and of all, and those of all to choose by and to test on."""
    output.mkdir(parents=True, exist_ok=True)
    news, reviews = labelled(data, "ag_news_test"), labelled(data, "sentence_polarity")
    sets: dict[str, Rows] = {
        "snips": (labelled(data, "snips_train", "intent"), labelled(data, "snips_validate", "intent")),
        "news": (news[:6000], news[6000:]),
        "polarity": (reviews[:9000], reviews[9000:]),
        "food": restaurants(data),
        "sgd": turns(data),
    }
    parts: dict[str, list[dict[str, str]]] = {"all": [], "valid": [], "test": []}
    draw = random.Random(0)
    for task, (name, words) in TASKS.items():
        train = []
        for label, word in words.items():
            first, last = (sorted({text for text, of in part if of == label}) for part in sets[name])
            chosen = draw.sample(first, TRAIN + VALID)
            train += [{"text": text, "label": word} for text in chosen[VALID:]]
            parts["valid"] += [{"text": text, "label": word, "task": task} for text in chosen[:VALID]]
            parts["test"] += [{"text": text, "label": word, "task": task} for text in draw.sample(last, TEST)]
        write(output / f"stream.{task}.jsonl", train)
        parts["all"] += [{**row, "task": task} for row in train]
    for part, rows in parts.items():
        write(output / f"stream.{part}.jsonl", rows)


if __name__ == "__main__":
    typer.run(main)
