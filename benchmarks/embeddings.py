"""Texts as vectors: retrieval and similarity on real text, of the base's states and of what plugins make of them.

    python benchmarks/embeddings.py --data FOLDER --base unseen

where `unseen` is what `tools/pretrain_tiny.py --prose` makes, which has seen no row of either set. The folder holds
`classify/ag_news_test.jsonl.gz` (AG News) and `classify/snips_train.jsonl.gz` and `classify/snips_validate.jsonl.gz`
(sonos/nlu-benchmark). Nobody graded pairs of these texts, so both tasks are made of what the sets hold:

    retrieval    the first sentence of a news item, mostly its title, finds the words behind it among those of all test
                 items; recall at k is the share that has them among its k nearest.
    similarity   Spearman's correlation, over all pairs of test utterances, of their cosine with the share of labels
                 that they have in common: |a & b| / |a | b|, of the intent and the kinds of slots. It is likeness of
                 what is asked for, not of meaning at large.

One model is trained for both: half of the rows are news (the negative is of the same topic), half are utterances (a
pair has the same labels; of the intent's utterances the negative is one with the fewest of them). A LoRA of rank 8 is
under each plugin. A rate is chosen by the mean of recall at 1 and the correlation, on validation rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bases import Source, seen
from compare import RESULTS
from rated import Make, measured, table
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from peftx import Plugin, Stack
from peftx.kernel.heads import mean_of
from peftx_lora import Lora
from peftx_multi_layer_trainable_pooling import MultiLayerTrainablePooling
from peftx_ullme import Ullme

UNREAD = 6000
"""Rows of AG News from here on are in peftx:tiny neither."""
ROWS = {
    "news": Source("classify/ag_news_test.jsonl.gz", UNREAD),
    "utterances' training": Source("classify/snips_train.jsonl.gz"),
    "utterances' test": Source("classify/snips_validate.jsonl.gz"),
}
WORDS, CHARACTERS = 16, 110
"""Of a passage: so many of the first, which makes a longer text than this no passage."""
NEWS, UTTERANCES = (200, 500), (200, 300)
"""Of validation, of test."""
STEPS, BATCH = 20, 12
RATES = (1e-3, 3e-3, 1e-2)
KS = (1, 5, 10)
MEASURES = {**{f"recall at {k}": 3 for k in KS}, "Spearman": 3}
Embed = Callable[[list[str]], Tensor]
"""N texts -> [N, d], of length 1."""
Row = dict[str, str]


@dataclass(frozen=True)
class Utterance:
    text: str
    intent: str
    labels: frozenset[str]
    """The intent and the kinds of slots."""


@dataclass(frozen=True)
class Tasks:
    """Queries with their passages, and utterances with labels."""

    pairs: list[tuple[str, str]]
    utterances: list[Utterance]

    def measure(self, embed: Embed) -> dict[str, float]:
        queries, passages = (embed(list(texts)) for texts in zip(*self.pairs, strict=True))
        scores = queries @ passages.T
        above = (scores > scores.diagonal()[:, None]).sum(1)
        found = {f"recall at {k}": float((above < k).float().mean()) for k in KS}
        vectors = embed([u.text for u in self.utterances])
        i, j = torch.triu_indices(len(vectors), len(vectors), offset=1)
        common = [
            len(a & b) / len(a | b)
            for a, b in zip(*([self.utterances[n].labels for n in of.tolist()] for of in (i, j)), strict=True)
        ]
        return found | {"Spearman": float(spearmanr((vectors[i] * vectors[j]).sum(1), common).statistic)}


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def news(folder: Path) -> list[tuple[str, str, str]]:
    """(first sentence, the words behind it, topic), no passage twice."""
    found = {}
    for row in read(folder / "classify" / "ag_news_test.jsonl.gz")[UNREAD:]:
        head, _, rest = row["text"].partition(". ")
        passage = " ".join((words := rest.split())[:WORDS])
        if len(head.split()) > 3 and len(words) > 7 and len(passage) <= CHARACTERS:
            found[passage] = (head, row["label"])
    return [(head, passage, topic) for passage, (head, topic) in found.items()]


def utterances(folder: Path, part: str) -> list[Utterance]:
    rows = read(folder / "classify" / f"snips_{part}.jsonl.gz")
    return [
        Utterance(r["text"], r["intent"], frozenset([r["intent"], *(s["slot"] for s in r["slots"])]))
        for r in rows
    ]


def news_rows(items: Sequence[tuple[str, str, str]], rng: random.Random) -> list[Row]:
    by_topic = defaultdict(list)
    for _, passage, topic in items:
        by_topic[topic].append(passage)
    return [
        {"prompt": head, "chosen": passage, "rejected": other(by_topic[topic], passage, rng)}
        for head, passage, topic in items
    ]


def utterance_rows(found: Sequence[Utterance], count: int, rng: random.Random) -> list[Row]:
    by_labels, by_intent = defaultdict(set), defaultdict(list)
    for u in found:
        by_labels[u.labels].add(u.text)
        by_intent[u.intent].append(u)
    intents = {u.labels: u.intent for u in found}
    rows = []
    for labels in rng.choices([labels for labels, texts in by_labels.items() if len(texts) > 1], k=count):
        query, chosen = rng.sample(sorted(by_labels[labels]), 2)
        of_intent = by_intent[intents[labels]]
        far = min(len(u.labels & labels) for u in of_intent)
        negatives = [u.text for u in of_intent if len(u.labels & labels) == far]
        rows.append({"prompt": query, "chosen": chosen, "rejected": other(negatives, chosen, rng)})
    return rows


def other(texts: Sequence[str], than: str, rng: random.Random) -> str:
    return rng.choice([text for text in texts if text != than])


def by_words(texts: Sequence[str]) -> Embed:
    """TF-IDF over words, the document frequencies those of `texts`."""
    counts = Counter(word for text in texts for word in set(text.lower().split()))
    place = {word: i for i, word in enumerate(counts)}
    idf = torch.tensor([math.log(len(texts) / n) for n in counts.values()])

    def embed(given: list[str]) -> Tensor:
        vectors = torch.zeros(len(given), len(place))
        for row, text in zip(vectors, given, strict=True):
            for word, n in Counter(text.lower().split()).items():
                row[place[word]] = n * idf[place[word]]
        return normalize(vectors, dim=-1)

    return embed


def trained_with(base: str, rows: list[Row], plugin: Plugin) -> Make:
    def make(rate: float, seed: int) -> Stack:
        stack = Stack(base, [Lora(rank=8), plugin], seed=seed, dtype="float32")
        stack.train(
            rows,
            steps=STEPS,
            batch_size=BATCH,
            learning_rate=rate,
            seed=seed,
            schedule="constant",
            max_length=192,
        )
        return stack

    return make


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of each measure, with the spread over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(12, 3.2), layout="constrained", sharey=True)
    names = list(results)[::-1]
    for ax, what in zip(axes, MEASURES, strict=True):
        means = [results[name]["mean"][what] for name in names]
        ax.barh(
            names, means, xerr=[results[name].get("spread", {}).get(what, 0.0) for name in names], capsize=2
        )
        ax.set(xlabel=what)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def page(results: dict[str, dict[str, Any]], base: str) -> str:
    setting = (
        f"Retrieval among {NEWS[1]} passages of AG News, similarity of {UTTERANCES[1]} utterances of SNIPS. "
        f"LoRA of rank 8 under each plugin, {STEPS} steps of {BATCH} rows, constant rates from "
        f"{', '.join(f'{rate:g}' for rate in RATES)}, chosen on {NEWS[0]} and {UTTERANCES[0]} other rows; three seeds, "
        f"± the standard deviation. One thread, CPU seconds of training. {seen(base, **ROWS)}"
    )
    lines = ["# Texts as vectors", "", setting, "", *table(results, MEASURES), ""]
    return "\n".join([*lines, "![Each measure of each method](embeddings.png)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True, help="peftx:tiny, or a folder")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table to run in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base, rng = arguments.base, random.Random(0)

    items, said = news(arguments.data), utterances(arguments.data, "validate")
    rng.shuffle(items), rng.shuffle(said)
    (valid, test), (few, many) = NEWS, UTTERANCES
    held = Tasks([item[:2] for item in items[:valid]], said[:few])
    tests = Tasks([item[:2] for item in items[valid : valid + test]], said[few : few + many])
    count = STEPS * BATCH // 2
    rows = news_rows(items[valid + test :][:count], rng)
    rows += utterance_rows(utterances(arguments.data, "train"), count, rng)
    words = by_words([t for pair in tests.pairs for t in pair] + [u.text for u in tests.utterances])
    plain = Stack(base, dtype="float32")

    def choose(stack: Stack) -> float:
        found = held.measure(stack.embed)
        return (found["recall at 1"] + found["Spearman"]) / 2

    pooling = {"latents": 32, "heads": 8}
    results = measured(
        {
            "contrast alone, mean, both ways": trained_with(
                base, rows, Ullme(generation_weight=0, kl_weight=0)
            ),
            "`ullme`": trained_with(base, rows, Ullme()),
            "`multi-layer-trainable-pooling`, causal": trained_with(
                base, rows, MultiLayerTrainablePooling(**pooling)
            ),
            "`multi-layer-trainable-pooling`, both ways": trained_with(
                base, rows, MultiLayerTrainablePooling(bidirectional=True, **pooling)
            ),
        },
        {
            "words in common (TF-IDF)": lambda: tests.measure(words),
            "base, last token": lambda: tests.measure(plain.embed),
            "base, mean": lambda: tests.measure(lambda texts: plain.embed(texts, pool=mean_of)),
        },
        rates=RATES,
        choose=choose,
        test=lambda stack: tests.measure(stack.embed),
        settings={
            "base": base,
            "steps": STEPS,
            "batch": BATCH,
            "words": WORDS,
            "news": NEWS,
            "utterances": UTTERANCES,
        },
        base=seen(base, **ROWS),
        file=RESULTS / "embeddings.json",
        only=arguments.only,
    )
    (RESULTS / "embeddings.md").write_text(page(results, base), encoding="utf-8")
    plot(results, RESULTS / "embeddings.png")
    print(page(results, base))


if __name__ == "__main__":
    main()
