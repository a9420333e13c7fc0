"""Rows of the leaderboards, from the data sets that they are about.

    python benchmarks/leaderboards/rows.py --data FOLDER -o benchmarks/leaderboards/rows

The folder holds `classify/snips_train.jsonl.gz`, `classify/snips_validate.jsonl.gz` (sonos/nlu-benchmark),
`classify/sentence_polarity.jsonl.gz` (Pang and Lee 2005) and `classify/ag_news_test.jsonl.gz` (the test split of
mhjabreel/CharCnn_Keras). Rows are drawn with a seed, so that everybody has the same.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))
from bases import READ_BEFORE, Source

TRAIN, TEST = 4000, 500
NEWS_TRAIN = 1200
"""Rows of AG News to train on; all that are left behind them are to test on."""
OPENING, FIRST_TEST = 16, 5000
"""Words of a news item that its short form has; the row that its test rows are drawn from on."""
SEARCHES = ("SearchCreativeWork", "SearchScreeningEvent")
"""The two intents of SNIPS that are most alike."""

SNIPS_WORDS = {
    "AddToPlaylist": "list", "BookRestaurant": "food", "GetWeather": "weather", "PlayMusic": "music",
    "RateBook": "book", "SearchCreativeWork": "work", "SearchScreeningEvent": "film",
}  # fmt: skip
NEWS_WORDS = {"World": "world", "Sports": "game", "Business": "business", "Sci/Tech": "science"}
"""Labels as common words: what a frozen model is to answer with must be something that it says."""

SNIPS_TRAIN, SNIPS_TEST, NEWS = (
    f"classify/{name}.jsonl.gz" for name in ("snips_train", "snips_validate", "ag_news_test")
)
UNREAD = READ_BEFORE[NEWS]
SOURCES = {
    "snips.train": Source(SNIPS_TRAIN),
    "snips.test": Source(SNIPS_TEST),
    "snips.words.train": Source(SNIPS_TRAIN),
    "snips.words.test": Source(SNIPS_TEST),
    "searches.train": Source(SNIPS_TRAIN),
    "searches.test": Source(SNIPS_TEST),
    "news.train": Source(NEWS, UNREAD),
    "news.test": Source(NEWS, UNREAD + NEWS_TRAIN),
    "news.words.train": Source(NEWS),
    "news.words.test": Source(NEWS, FIRST_TEST),
}
"""File of rows -> what they are of."""


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, str]], count: int) -> None:
    chosen = random.Random(0).sample(rows, count)
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def main(
    data: Annotated[Path, typer.Option()], output: Annotated[Path, typer.Option("--output", "-o")]
) -> None:
    """Write train and test rows of all sets."""
    output.mkdir(parents=True, exist_ok=True)
    for part, file, count in (("train", SNIPS_TRAIN, TRAIN), ("test", SNIPS_TEST, TEST)):
        labelled = [{"text": row["text"], "label": row["intent"]} for row in read(data / file)]
        write(output / f"snips.{part}.jsonl", labelled, count)
        asked = [
            {"text": f"{row['text']}\nThis is about", "label": SNIPS_WORDS[row["label"]]} for row in labelled
        ]
        write(output / f"snips.words.{part}.jsonl", asked, count)
        searches = [row for row in labelled if row["label"] in SEARCHES]
        write(output / f"searches.{part}.jsonl", searches, min(count, len(searches)))
    rows = [{"text": f"{r['text']}\nSection:", "label": r["label"]} for r in read(data / NEWS)[UNREAD:]]
    write(output / "news.train.jsonl", rows[:NEWS_TRAIN], NEWS_TRAIN)
    write(output / "news.test.jsonl", rows[NEWS_TRAIN:], len(rows) - NEWS_TRAIN)
    opened = [
        {
            "text": f"{' '.join(r['text'].split()[:OPENING])}\nThis is about",
            "label": NEWS_WORDS[r["label"]],
        }
        for r in read(data / NEWS)
    ]
    write(output / "news.words.train.jsonl", opened[:FIRST_TEST], TRAIN)
    write(output / "news.words.test.jsonl", opened[FIRST_TEST:], TEST)


if __name__ == "__main__":
    typer.run(main)
