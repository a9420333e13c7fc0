"""Air-Decoding on the polarity of sentences: how often a text has the value asked for, and how fluent it is.

    python tools/pretrain_tiny.py train --prose -o base      # a base that has read no review
    python benchmarks/plugins/air_decoding.py sentence_polarity.jsonl.gz --model base

Rows of the file, each a sentence of a review that praises or blames: those of `CLASSIFIER` train a classifier
(logistic regression on words and pairs of words), those of `PREFIXES` the prefixes, those of `VALIDATION` choose their
rate by how often the prefix of a sentence's own value finds it the likelier one, and those of `PROMPTS` begin with the
`OPENING` words that are gone on with, once for each value. What is measured, of what was written behind these words:

    accuracy     the share of texts that the classifier gives the value that was asked for
    perplexity   under the bundled model, over all tokens

for some strengths lambda, and the same with R_a = p_a, which weighs by Bayes' rule without the reconstruction. Leaves
air_decoding.json, .md and .png in benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

import peftx_air_decoding
from peftx import Stack
from peftx.engines.data import encode_pair, following_ids, prompt_ids, read_dataset
from peftx.engines.files import write_text
from peftx.toolkits.evaluation import Request, score_requests
from peftx_air_decoding import AirDecoding

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import Source, seen
from compare import RESULTS
from rated import grid, measured

FILE = "classify/sentence_polarity.jsonl.gz"
CLASSIFIER, PREFIXES, VALIDATION, PROMPTS = (0, 8000), (9000, 10200), (10200, 10350), (10350, 10390)
CHECKED = (8000, 9000)
"""Rows that tell how good the classifier is."""
OPENING, WRITTEN, TOP_K = 3, 20, 200
STEPS, BATCH, LONGEST = 150, 8, 160
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
STRENGTHS = {"air": (0.0, 20.0, 60.0, 140.0, 300.0), "plain": (0.0, 0.5, 1.0, 2.0, 4.0)}
NAMES = {"air": "R = -1 / log p (Air-Decoding)", "plain": "R = p (no reconstruction)"}
Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    """`completion` and `attribute` of each sentence, behind an empty prompt."""
    found = read_dataset(path, format="classification")
    return [
        {"prompt": "", "completion": row["text"], "attribute": int(row["label"] == "positive")}
        for row in found
    ]


def classifier_of(rows: Sequence[Row]) -> Pipeline:
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10)
    )
    return model.fit([row["completion"] for row in rows], [row["attribute"] for row in rows])


def trained(model: str, rows: Sequence[Row], rate: float, seed: int) -> Stack:
    stack = Stack(model, [AirDecoding()], seed=seed, dtype="float32")
    stack.train(
        list(rows), steps=STEPS, batch_size=BATCH, learning_rate=rate, warmup_ratio=0.1, seed=seed,
        max_length=LONGEST,
    )  # fmt: skip
    return stack


def told_apart(stack: Stack, rows: Sequence[Row]) -> float:
    """The share of sentences that the prefix of their own value finds likelier than the other's."""
    requests = []
    for row in rows:
        ids = encode_pair(stack.tokenizer, "", row["completion"], max_length=LONGEST, where="a row").input_ids
        requests.append(Request(inputs=ids[:-1], first=0, targets=[ids[1:]]))
    logs = []
    for value in (0, 1):
        with stack.columns(attribute=torch.tensor([value])):
            logs.append([float(one.sum()) for (one,) in score_requests(stack.model, requests, batch_size=1)])
    right = [(b > a) == bool(row["attribute"]) for a, b, row in zip(*logs, rows, strict=True)]
    return sum(right) / len(right)


def perplexity(judge: Stack, pairs: Sequence[tuple[str, str]]) -> float:
    """exp of the mean over all tokens of the second texts, each behind its first."""
    requests = []
    for prompt, text in pairs:
        head, tail = prompt_ids(judge.tokenizer, prompt), following_ids(judge.tokenizer, text)
        if tail:
            requests.append(Request(inputs=[*head, *tail[:-1]], first=len(head) - 1, targets=[tail]))
    logs = torch.cat([one for (one,) in score_requests(judge.model, requests, batch_size=16)])
    return math.exp(-float(logs.mean()))


@contextmanager
def weighing(way: str) -> Iterator[None]:
    """`plain`: the values' own probabilities in the place of what the paper makes of them."""
    ours = peftx_air_decoding.log_R
    try:
        if way == "plain":
            peftx_air_decoding.log_R = lambda log_p: log_p
        yield
    finally:
        peftx_air_decoding.log_R = ours


def curves(stack: Stack, prompts: Sequence[str], classifier: Pipeline, judge: Stack) -> dict[str, float]:
    """Accuracy and perplexity of each strength of each way."""
    plugin, found = stack.plugins["air-decoding"], {}
    for way, strengths in STRENGTHS.items():
        for strength in strengths:
            plugin.config = plugin.config.model_copy(update={"strength": strength})
            texts, asked = list[str](), list[int]()
            for value in (0, 1):
                plugin.steer = value
                with weighing(way):
                    texts += stack.generate(
                        list(prompts), max_new_tokens=WRITTEN, do_sample=True, top_k=TOP_K, seed=value
                    )
                asked += [value] * len(prompts)
            plugin.steer = None
            given = classifier.predict(texts)
            found[f"{way} {strength:g}: accuracy"] = float((given == asked).mean())
            found[f"{way} {strength:g}: perplexity"] = perplexity(
                judge, [*zip([*prompts] * 2, texts, strict=True)]
            )
    return found


def page(found: Mapping[str, Any], setting: str, base: str) -> str:
    lines = ["| | lambda | accuracy | perplexity |", "| --- | --- | --- | --- |"]
    for way, strengths in STRENGTHS.items():
        for strength in strengths:
            cells = [
                f"{found['mean'][name]:.{digits}f} ± {found['spread'][name]:.{digits}f}"
                for name, digits in (
                    (f"{way} {strength:g}: accuracy", 3),
                    (f"{way} {strength:g}: perplexity", 1),
                )
            ]
            lines.append(f"| {NAMES[way]} | {strength:g} | {' | '.join(cells)} |")
    return "\n".join([
        "# Air-Decoding on the polarity of sentences", "", base, "", setting, "", *lines, "",
        "![Accuracy against perplexity](air_decoding.png)", "",
    ])  # fmt: skip


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy against perplexity, a curve for each way, a point for each strength."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for way, strengths in STRENGTHS.items():
        names = [f"{way} {strength:g}" for strength in strengths]
        x, y = ([found["mean"][f"{n}: {what}"] for n in names] for what in ("perplexity", "accuracy"))
        dx, dy = ([found["spread"][f"{n}: {what}"] for n in names] for what in ("perplexity", "accuracy"))
        axes.errorbar(x, y, xerr=dx, yerr=dy, marker="o", capsize=2, label=NAMES[way])
        for a, b, strength in zip(x, y, strengths, strict=True):
            axes.annotate(f"{strength:g}", (a, b), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(
        xscale="log", xlabel="perplexity under the bundled model", ylabel="accuracy of the value asked for"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True, help="a base that has not read the file")
    parser.add_argument("--output", type=Path, default=RESULTS / "air_decoding.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(arguments.data)
    part = {name: rows[slice(*ends)] for name, ends in (
        ("classifier", CLASSIFIER), ("checked", CHECKED), ("prefixes", PREFIXES), ("validation", VALIDATION),
        ("prompts", PROMPTS),
    )}  # fmt: skip
    classifier = classifier_of(part["classifier"])
    checked = part["checked"]
    sure = classifier.score([r["completion"] for r in checked], [r["attribute"] for r in checked])
    judge = Stack("peftx:tiny", [], dtype="float32")
    words = [row["completion"].split() for row in part["prompts"]]
    prompts = [" ".join(some[:OPENING]) for some in words]
    own = [" " + " ".join(some[OPENING:]) for some in words]
    people = perplexity(judge, [*zip(prompts, own, strict=True)])
    base = seen("base", training=Source(FILE, PREFIXES[0]), prompts=Source(FILE, PROMPTS[0]))
    results = measured(
        {"air-decoding": lambda rate, seed: trained(arguments.model, part["prefixes"], rate, seed)},
        {},
        rates=RATES,
        choose=lambda stack: told_apart(stack, part["validation"]),
        test=lambda stack: curves(stack, prompts, classifier, judge),
        settings={
            "classifier": CLASSIFIER, "checked": CHECKED, "prefixes": PREFIXES, "validation": VALIDATION,
            "prompts": PROMPTS, "opening": OPENING, "written": WRITTEN, "top_k": TOP_K, "steps": STEPS,
            "batch_size": BATCH, "max_length": LONGEST, "strengths": STRENGTHS,
            "accuracy of the classifier": round(sure, 4), "perplexity of the sentences": round(people, 1),
        },
        base=base,
        file=arguments.output,
    )  # fmt: skip
    found = results["air-decoding"]
    best = max(found["validation"].values())
    setting = (
        f"Prefixes of {STEPS} steps of {BATCH} sentences, at {found['rate']:g} of {grid(RATES)}, chosen by how often "
        f"they tell the values of {VALIDATION[1] - VALIDATION[0]} validation rows apart ({best:.3f}). {WRITTEN} tokens "
        f"behind the first {OPENING} words of {len(prompts)} other sentences, from the {TOP_K} best tokens, once for "
        "each value, three seeds, ± the standard deviation. The classifier, trained on rows that neither prefixes nor "
        f"prompts have, is right for {sure:.3f} of {len(checked):,} sentences that it has not read. Perplexity is that "
        f"of the bundled model; what people wrote behind these words has {people:.1f}."
    )
    write_text(arguments.output.with_suffix(".md"), page(found, setting, base))
    plot(found, arguments.output.with_suffix(".png"))
    print(arguments.output.with_suffix(".md").read_text("utf-8"))


if __name__ == "__main__":
    main()
