"""Languages ranked by their similarity with English on the Universal Declaration of Human Rights.

    python benchmarks/plugins/language_ranker.py udhr_parallel.json.gz

The data: a JSON object, language (ISO 639-3) -> the whole text. Texts are cut at the headings of the 30 articles; an
article's paragraphs are paired with the English ones where both have as many. As a control the same paragraphs are
compared with the English of the next paragraph: what is left there is not the paragraph's content. Prints JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from pathlib import Path

import torch

from peftx import Stack
from peftx_language_ranker import LanguageRanker

ARTICLES = 30


def articles(text: str) -> list[list[str]]:
    """The paragraphs of each article, without their numbers."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heads = [i for i, line in enumerate(lines) if len(line.split()) <= 4 and len(line) < 32][-ARTICLES:]
    for number, i in enumerate(heads, start=1):
        # "Article premier" names no number.
        assert number == 1 or re.search(rf"\b{number}\b", lines[i]), (
            f"no heading of article {number}: {lines[i]!r}"
        )
    ends = [*heads[1:], len(lines)]
    return [
        [re.sub(r"^\(?\d+[.)]\s*", "", line) for line in lines[start + 1 : end]]
        for start, end in zip(heads, ends, strict=True)
    ]


def paired(texts: dict[str, str], english: str) -> list[dict[str, str | None]]:
    """A row for each English paragraph; None where an article is cut otherwise in that language."""
    cut = {language: articles(text) for language, text in texts.items()}
    return [
        {
            language: parts[number][index] if len(parts[number]) == len(paragraphs) else None
            for language, parts in cut.items()
        }
        for number, paragraphs in enumerate(cut[english])
        for index in range(len(paragraphs))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--english", default="eng")
    parser.add_argument("--model", default="peftx:tiny")
    parser.add_argument("--paragraphs", type=int, default=60, help="the first so many are used")
    parser.add_argument("--output", type=Path, help="folder for the figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    with gzip.open(arguments.data, "rt", encoding="utf-8") as file:
        texts = json.load(file)
    rows = paired(texts, arguments.english)[: arguments.paragraphs]
    references = [row[arguments.english] for row in rows]
    moved = [
        {**row, arguments.english: other}
        for row, other in zip(rows, references[1:] + references[:1], strict=True)
    ]
    started = time.process_time()
    found = {}
    for name, data in (("paired", rows), ("next paragraph", moved)):
        stack = Stack(arguments.model, [LanguageRanker(english=arguments.english)])
        output = arguments.output if name == "paired" else None
        found[name] = stack.evaluate(data, metrics=["language-ranker"], output_dir=output)
    scores = found["paired"]
    order = sorted((set(texts) - {arguments.english}), key=lambda language: scores[f"rank/{language}"].value)
    layers = sum(name.startswith(f"similarity/{order[0]}/layer-") for name in scores)
    table = {
        language: {
            "similarity": round(score.value, 4),
            "interval": [round(score.low, 4), round(score.high, 4)],
            "pairs": score.count,
            "with_next_paragraph": round(found["next paragraph"][f"similarity/{language}"].value, 4),
            "layers": [
                round(scores[f"similarity/{language}/layer-{k}"].value, 3) for k in range(1, layers + 1)
            ],
        }
        for language in order
        for score in [scores[f"similarity/{language}"]]
    }
    seconds = round(time.process_time() - started, 1)
    print(json.dumps({"model": arguments.model, "cpu_seconds": seconds, "languages": table}, indent=1))


if __name__ == "__main__":
    main()
