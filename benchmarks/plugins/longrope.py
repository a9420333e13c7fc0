"""Perplexity over length: factors that LongRoPE finds, linear interpolation, NTK, YaRN, and the model as it is.

    python benchmarks/plugins/longrope.py --data /path/to/data

The bundled model, made for 1,024 tokens, reads texts of WikiText-2's test file (`text/wikitext2_test.txt.gz` of the
folder `--data`), which it was not pre-trained on, of up to twice (s = 2) and four times (s = 4) as many. A search sees
one text of s times 1,024 tokens from the file's beginning, another one for each of three seeds; what is measured lies
behind these: the first 1,024, 2,048 and 4,096 tokens of the same `TEXTS` texts. Nothing is trained.

    perplexity                exp of the mean loss over all tokens of all texts
    texts better than YaRN    of those texts, how many have a lower loss with the factors found

"in pieces" is what needs no longer context: the same texts cut every 1,024 tokens, each piece read by itself. YaRN is
without its temperature, as in the search. 10 minutes of one core. Leaves longrope.json and longrope.md in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from peftx import Stack
from peftx.engines.files import write_text
from peftx_longrope import LongRope

sys.path.insert(0, str(Path(__file__).parent.parent))
from bases import Source, seen
from rated import SEEDS
from run import RESULTS, machine

BASE, LIMIT = "peftx:tiny", 1024
FILE = "text/wikitext2_test.txt.gz"
SEARCH: dict[str, Any] = {
    "population": 16, "parents": 6, "mutations": 6, "crossovers": 6, "rounds": 4, "texts": 1,
}  # fmt: skip
PIECE, TEXTS = 30_000, 6
"""Characters that a search may read of, and texts that are measured."""
LENGTHS = {2: (1024, 2048), 4: (2048, 4096)}
"""s -> tokens that are read; up to 1,024 no way changes anything."""
KNOWN = {"none": "no factors", "linear": "linear", "ntk": "NTK", "yarn": "YaRN"}
PIECES, FOUND = "no factors, in pieces", "LongRoPE"


@torch.no_grad()
def losses(stack: Stack, texts: Tensor, piece: int = 0) -> Tensor:
    """Of each of the texts [N, T] the sum over its tokens; cut into pieces of so many, if not 0. [N]"""
    found = []
    for text in texts:
        parts = text.split(piece or len(text))
        logits = [stack.model(input_ids=part[None], use_cache=False).logits[0, :-1].float() for part in parts]
        each = [F.cross_entropy(z, part[1:], reduction="sum") for z, part in zip(logits, parts, strict=True)]
        found.append(torch.stack(each).sum() / (len(text) - len(parts)))
    return torch.stack(found)


def perplexity(of_texts: Tensor) -> float:
    return float(of_texts.mean().exp())


def named(s: int, length: int) -> str:
    return f"s = {s}, {length:,} tokens"


def searched(s: int, text: str, seed: int) -> tuple[Stack, LongRope]:
    """Factors for s times the length, found on this text."""
    plugin = LongRope(scale=s, **SEARCH)
    stack = Stack(BASE, [plugin], seed=seed, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        file.write_text(text, encoding="utf-8")
        stack.compress(file, samples=s + 1, length=LIMIT)
    return stack, plugin


def summary(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean, and over several seeds the standard deviation."""
    found: dict[str, Any] = {"mean": {k: statistics.mean(run[k] for run in runs) for k in runs[0]}}
    if len(runs) > 1:
        found["spread"] = {k: statistics.stdev(run[k] for run in runs) for k in runs[0]}
    return found | {"runs": list(runs)}


def measured(text: str) -> dict[str, Any]:
    """By way: perplexities, and what the searches found."""
    plain = Stack(BASE, [], dtype="float32")
    assert plain.tokenizer is not None
    ids = plain.tokenizer(text[len(SEEDS) * PIECE :], add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(map(max, LENGTHS.values()))
    texts = torch.tensor(ids[: TEXTS * longest]).view(TEXTS, longest)
    runs: dict[str, list[dict[str, float]]] = {name: [{}] for name in (*KNOWN.values(), PIECES)}
    runs[FOUND] = [{} for _ in SEEDS]
    factors: dict[str, Any] = {}
    for s, lengths in LENGTHS.items():
        searches = [searched(s, text[k * PIECE : (k + 1) * PIECE], seed) for k, seed in enumerate(SEEDS)]
        for seed, (_, plugin) in zip(SEEDS, searches, strict=True):
            f = [round(float(each), 2) for each in plugin.delta.f]
            factors[f"s = {s}, seed {seed}"] = {"f": f, "n": int(plugin.delta.n)}
        print(factors, flush=True)
        stack, plugin = searches[0]
        found = plugin.delta.f.clone(), int(plugin.delta.n)
        starts = plugin.starts(stack.view("longrope"))
        for length in lengths:
            part, of, key = texts[:, :length], dict[str, Tensor](), named(s, length)
            for name, f in starts.items():
                plugin.take((f, 0))
                of[name] = losses(stack, part)
                runs[KNOWN[name]][0][key] = perplexity(of[name])
            plugin.take(found)
            runs[PIECES][0][key] = perplexity(losses(plain, part, LIMIT))
            for run, (one, _) in zip(runs[FOUND], searches, strict=True):
                own = losses(one, part)
                run[key] = perplexity(own)
                if length > LIMIT:
                    run[f"{key}: texts better than YaRN"] = float((own < of["yarn"]).sum())
            print(key, {name: [run[key] for run in some] for name, some in runs.items()}, flush=True)
    return {"results": {name: summary(some) for name, some in runs.items()}, "factors": factors}


COLUMNS = [named(s, length) for s, lengths in LENGTHS.items() for length in lengths]


def table(results: dict[str, Any]) -> list[str]:
    """Lines of Markdown, to one digit."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name, row in results.items():
        spread = row.get("spread", {})
        cells = [f"{row['mean'][c]:.1f}" + (f" ± {spread[c]:.1f}" if spread else "") for c in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def page(found: dict[str, Any]) -> str:
    ways = ", ".join(f"{name} {value}" for name, value in SEARCH.items())
    better = found["results"][FOUND]
    told = [
        f"{name.split(':')[0]}: {value:.1f} ± {better['spread'][name]:.1f} of {TEXTS}"
        for name, value in better["mean"].items()
        if ":" in name
    ]
    setting = (
        f"Perplexity of the first tokens of {TEXTS} texts; three searches ({ways}), each on another text, ± the "
        f"standard deviation. Texts that the factors found read better than YaRN: {'; '.join(told)}."
    )
    lines = ["# LongRoPE on longer texts", "", found["base"], "", setting, "", *table(found["results"]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=RESULTS / "longrope.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = gzip.decompress((arguments.data / FILE).read_bytes()).decode("utf-8")
    found = {
        "machine": machine(),
        "settings": {
            "search": SEARCH, "texts": TEXTS, "limit": LIMIT, "seeds": SEEDS,
            "lengths": {str(s): lengths for s, lengths in LENGTHS.items()},
        },
        "base": seen(BASE, searched=Source(FILE), measured=Source(FILE)),
        **measured(text),
    }  # fmt: skip
    write_text(arguments.output, json.dumps(found, indent=1) + "\n")
    write_text(arguments.output.with_suffix(".md"), page(found))
    print(page(found))


if __name__ == "__main__":
    main()
