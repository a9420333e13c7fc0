"""Speed and perplexity of Router-Tuning at the share of attentions that runs learned to leave out.

    python benchmarks/plugins/router_tuning.py ag_news_test.jsonl.gz --skip 6000

The bundled model, 60 steps of 8 texts at rate 1e-3 for each weight c and seed, half the layers routed (3 of 6). Rows
before `--skip` are left out; of the rest the first 1,000 train, the next 200 test. Perplexity is of 100 test texts.
Times are of prompts of `--length` tokens, made of test texts one behind the other: the model without routers and the
stack in turn, one thread, CPU time. A ratio is that of the sums over all prompts, with 1 and with 64 tokens behind
them; `skipped layers` is the mean over prompts of those whose attention was left out. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftx import Stack
from peftx.engines.data import read_dataset
from peftx_router_tuning import RouterTuning

TOKENS = (1, 64)


def seconds(model: Any, ids: Tensor, tokens: int) -> float:
    started = time.process_time()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.process_time() - started


def layers_in_cache(model: Any, ids: Tensor) -> int:
    """Layers that keep keys and values of a prompt; a skipped one keeps a number a token."""
    sizes = [layer.keys.nbytes for layer in model(ids, use_cache=True).past_key_values.layers]
    return sum(size == max(sizes) for size in sizes)


@torch.inference_mode()
def speed(base: Any, routed: Any, prompts: list[Tensor]) -> dict[str, Any]:
    left = [base.config.num_hidden_layers - layers_in_cache(routed, ids) for ids in prompts]
    told: dict[str, Any] = {"skipped layers": sum(left) / len(left)}
    for tokens in TOKENS:
        pairs = [
            (seconds(base, ids, tokens), seconds(routed, ids, tokens)) for ids in (prompts[0], *prompts)
        ][1:]
        told[f"speed {tokens}"] = round(sum(a for a, _ in pairs) / sum(b for _, b in pairs), 3)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="rows with text and label")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.08, 1.0, 3.0], help="c")
    parser.add_argument("--length", type=int, default=900, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = list(read_dataset(arguments.data, format="classification"))[arguments.skip :]
    train, test = ([{"text": row["text"]} for row in part] for part in (found[:1000], found[1000:1200]))
    bare = Stack("peftx:tiny", [])
    ids = bare.tokenizer(" ".join(row["text"] for row in test), return_tensors="pt")["input_ids"]
    prompts = [*ids.split(arguments.length, dim=1)][: arguments.prompts]
    assert prompts[-1].shape[1] == arguments.length, "more texts, or fewer prompts"
    rows = test[:100]
    results: dict[str, Any] = {
        "no routers": {"perplexity": round(bare.evaluate(rows, max_length=128)["perplexity"].value, 2)}
    }
    for c in arguments.weights:
        for seed in range(arguments.seeds):
            stack = Stack("peftx:tiny", [RouterTuning(share=0.5, c=c)], seed=seed)
            stack.train(train, steps=60, batch_size=8, learning_rate=1e-3, max_length=128, seed=seed)
            told = speed(bare.model, stack.model, prompts)
            told["perplexity"] = round(stack.evaluate(rows, max_length=128)["perplexity"].value, 2)
            results[f"c {c:g}, seed {seed}"] = told
            print(json.dumps({f"c {c:g}, seed {seed}": told}), flush=True)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
