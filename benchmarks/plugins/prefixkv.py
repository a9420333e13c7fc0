"""PrefixKV against the full cache and against one size for all layers, on the bundled model; JSON to stdout.

    python benchmarks/plugins/prefixkv.py --text FILE

`FILE` is the text of WikiText-2's test part, which the model was not trained on. A seed is other texts: 8 of 448
tokens to read and 64 that follow. `ratio` is the perplexity of those 64, one call a token, over that of the full
cache on the same texts; `same`, of 32 greedy tokens, those before the text is another than that of the full cache;
`bytes`, of keys and values at last, over those of all. `uniform` keeps tokens by the same importance, round(r n) in
each layer; `last` are the same two with the importance that the prompt's last 32 queries give, and not all. Mean and
standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from statistics import mean, stdev

import torch
from torch import Tensor

from peftx import Generation, Stack
from peftx.toolkits.decoding.evicting import KeptLayer, held_bytes, looked_at
from peftx_prefixkv import PrefixKV

SEEDS, TEXTS, PROMPT, BEHIND, NEW, LAST = 4, 8, 448, 64, 32, 32
BUDGETS = (0.2, 0.4, 0.6, 0.8)


def uniform(budget: float):
    """Sizes of every layer alike."""
    return lambda importance, real: (budget * real.sum(1)).round().long().expand(len(importance), -1)


def last(
    layer: KeptLayer, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, reading: bool
) -> None:
    """Importance by the last queries of a prompt that is read at once and has no pads."""
    if reading:
        layer.weight += looked_at(query[:, :, -LAST:], key, mask, scaling)


@torch.no_grad()
def loss(plugin: PrefixKV, model: torch.nn.Module, ids: Tensor) -> tuple[float, float]:
    """Mean loss of what follows the prompts; bytes of keys and values at last, over those of all."""
    with plugin.evictor.watching(PROMPT) as cache:
        steps = [ids[:, :PROMPT], *ids[:, PROMPT:-1].split(1, 1)]
        logits = [model(step, past_key_values=cache, logits_to_keep=1).logits[:, -1] for step in steps]
        held, plain = held_bytes(cache)
    scores = torch.stack(logits, 1).log_softmax(-1)  # [B, BEHIND, V]
    return -float(scores.gather(-1, ids[:, PROMPT:, None]).mean()), held / plain


def greedy(stack: Stack, ids: Tensor) -> Tensor:
    """What is written behind the prompts, [B, NEW]."""
    made = Generation(
        model=stack.model, input_ids=ids[:, :PROMPT], attention_mask=torch.ones_like(ids[:, :PROMPT])
    )
    made.generation_config.update(max_new_tokens=NEW, eos_token_id=None, do_sample=False)
    return stack.decode(made)[:, PROMPT:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    torch.set_num_threads(1)
    stacks = {}
    for budget in (1.0, *BUDGETS):
        for name in ("full",) if budget == 1 else ("prefixkv", "uniform", "prefixkv, last", "uniform, last"):
            plugin = PrefixKV(budget=budget)
            stacks[name, budget] = Stack("peftx:tiny", [plugin]), plugin
            if name.startswith("uniform"):
                plugin.policy.sizes = uniform(budget)  # type: ignore[method-assign]
            if name.endswith("last"):
                plugin.policy.look = last  # type: ignore[method-assign]
    with gzip.open(parser.parse_args().text, "rt", encoding="utf-8") as file:
        tokens = torch.tensor(stacks["full", 1.0][0].tokenizer(file.read())["input_ids"])
    length = PROMPT + BEHIND
    texts = tokens[: len(tokens) // length * length].view(-1, length)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).split(TEXTS)[:SEEDS]
    rows: dict[tuple[str, float], list[dict[str, float]]] = {key: [] for key in stacks}
    for chosen in order:
        ids, full = texts[chosen], None
        for key, (stack, plugin) in stacks.items():
            nll, held = loss(plugin, stack.model, ids)
            text = greedy(stack, ids)
            full = (nll, text) if full is None else full  # the first one
            same = (text == full[1]).long().cumprod(1).sum(1)
            rows[key].append({"perplexity": math.exp(nll), "ratio": math.exp(nll - full[0]), "bytes": held,
                              "same": float(same.float().mean())})  # fmt: skip
            print(key, rows[key][-1], file=sys.stderr, flush=True)
    table = [
        {"cache": name, "budget": budget}
        | {what: [round(f([one[what] for one in found]), 4) for f in (mean, stdev)] for what in found[0]}
        for (name, budget), found in rows.items()
    ]
    less = {
        f"{budget}{kind}": [round(a["ratio"] / b["ratio"], 4) for a, b in zip(
            rows[f"prefixkv{kind}", budget], rows[f"uniform{kind}", budget], strict=True)]
        for budget in BUDGETS for kind in ("", ", last")
    }  # fmt: skip
    print(json.dumps({"table": table, "prefixkv_over_uniform": less}, indent=1))


if __name__ == "__main__":
    main()
