"""Prompts that begin alike: hit rate, first token, throughput and memory with marconi, batchllm, hydragen and prefixkv,
beside plain LRU and no cache.

    python benchmarks/prefixes.py              # both parts, results/prefixes.json; about fifteen minutes
    python benchmarks/prefixes.py --requests 40

One trace, drawn by a seed: questions behind system prompts, questions behind examples, chats whose turns hold the
model's own answers. Hit rates, tokens and bytes are exact; times are CPU seconds as ratios to no cache. hydragen shares
within a batch alone, so it runs on batches as they come, and on batches of prompts in the order of their tokens.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from peftx import Generation, Stack
from peftx.engines.models import load_model
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.serving import Engine, Job, Request, Scheduler, Server
from peftx.toolkits.serving.prefix import PrefixCache
from peftx_batchllm import BatchLLM, Groups
from peftx_hydragen import Hydragen
from peftx_marconi import Marconi, RadixCache
from peftx_prefixkv import PrefixKV

RESULTS = Path(__file__).parent / "results"
NEW = 6
WORDS = "the keeper writes a log of wind and ships at the old harbour where rope tar fish and salt are sold"
Prompt = list[int]
Loader = Callable[[], tuple[Any, Any]]


def tiny_llama() -> tuple[Any, Any]:
    """The bundled one."""
    return load_model("peftx:tiny")


def tiny_hybrid() -> tuple[Any, Any]:
    """A random Qwen3-Next of two layers, whose states last."""
    model = tiny("qwen3_next", max_position_embeddings=1024)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(-4.0)
    return model, tiny_tokenizer()


def trace(load: Loader, count: int, seed: int, words: int) -> list[Prompt]:
    """Prompts in the order in which they come; `words`: of a system prompt or a set of examples."""
    draw, (model, tokenizer), known = random.Random(seed), load(), WORDS.split()
    model.eval()

    def text(length: int) -> Prompt:
        return list(tokenizer(" ".join(draw.choice(known) for _ in range(length)) + ". ").input_ids)

    heads = [text(words) for _ in range(4)] + [text(2 * words) for _ in range(4)]
    chats = [list(draw.choice(heads[:4])) for _ in range(max(1, count // 12))]
    found: list[Prompt] = []
    while len(found) < count:
        if draw.random() < 0.6:
            found.append(draw.choice(heads) + text(4))
            continue
        place = draw.randrange(len(chats))
        prompt = chats[place] + text(4)
        if len(prompt) > 6 * len(heads[0]):
            prompt = list(draw.choice(heads[:4])) + text(4)  # that chat is over, another begins
        found.append(prompt)
        with torch.no_grad():
            said = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        chats[place] = said[0].tolist()
    return found


class FirstToken:
    """When the model has read a prompt: CPU seconds."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.length, self.at = 0, 0.0
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: object, args: object, given: dict[str, Any], output: object) -> None:
        cache = given.get("past_key_values")
        if not self.at and cache is not None and cache.get_seq_length() >= self.length:
            self.at = time.process_time()


def asked(prompt: Prompt) -> Request:
    return Request("", ids=tuple(prompt), max_tokens=NEW, temperature=0.0)


def bytes_of(prefixes: PrefixCache | None) -> int:
    """Of keys, values and states that are held."""
    if prefixes is None:
        return 0
    if isinstance(prefixes, RadixCache):
        return prefixes.tree.bytes
    kept = [layer for cache in prefixes._kept.values() for layer in cache.layers]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)


def one_by_one(load: Loader, prompts: list[Prompt], plugins: list[Any], **policy: Any) -> dict[str, Any]:
    """Each prompt when the one before it is answered."""
    model, tokenizer = load()
    server = Server(Stack(model, plugins, tokenizer=tokenizer), scheduler=Scheduler(**policy))
    engine, first = Engine(server), FirstToken(model)
    waits, texts, most = list[float](), list[str](), 0
    with engine:
        engine.submit(asked(prompts[0][:4])).result()  # warm
        began = time.process_time()
        for prompt in prompts:
            first.length, first.at, start = len(prompt), 0.0, time.process_time()
            texts.append(engine.submit(asked(prompt)).result().text)
            waits.append(first.at - start)
            most = max(most, bytes_of(engine.prefixes))
        used = time.process_time() - began
    prefixes = engine.prefixes
    found = {
        "token_hit_rate": (prefixes.reused_tokens if prefixes else 0) / sum(map(len, prompts)),
        "first_token": statistics.median(waits), "seconds": used, "bytes": most, "texts": texts,
    }  # fmt: skip
    return found | ({"alpha": prefixes.tree.alpha} if isinstance(prefixes, RadixCache) else {})


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """By the tokens of the prompts: what begins alike comes together."""
    return sorted(jobs, key=lambda job: job.request.ids or ())


def at_once(load: Loader, prompts: list[Prompt], plugins: list[Any], **policy: Any) -> dict[str, Any]:
    """All prompts at the same time."""
    model, tokenizer = load()
    server = Server(Stack(model, plugins, tokenizer=tokenizer), scheduler=Scheduler(max_queue=1000, **policy))
    engine = Engine(server)
    whole, make = list[Generation](), engine._answers.generation

    def noted(jobs: Sequence[Job]) -> Generation:
        """A batch that runs whole, kept for its figures."""
        whole.append(make(jobs))
        return whole[-1]

    engine._answers.generation = noted  # type: ignore[method-assign]
    ends: list[float] = []
    jobs: list[Job] = [engine.submit(asked(prompt)) for prompt in prompts]
    for job in jobs:
        job.future.add_done_callback(lambda _: ends.append(time.process_time()))
    began = time.process_time()
    with engine:
        texts = [job.result().text for job in jobs]
    prefixes = engine.prefixes
    saved = 0
    if prefixes is not None:
        saved = prefixes.figures()["tokens_saved"] if isinstance(prefixes, Groups) else prefixes.reused_tokens
    saved += sum(int(batch.stats.get("shared_tokens", 0)) * (len(batch.input_ids) - 1) for batch in whole)
    held = [sum(batch.stats.get(name, 0.0) for batch in whole) for name in ("kv_bytes", "kv_bytes_plain")]
    return {
        "token_hit_rate": saved / sum(map(len, prompts)), "seconds": max(ends) - began,
        "answer": statistics.median(ends) - began, "texts": texts,
        "tokens_held": prefixes.most if isinstance(prefixes, Groups) else None,
        "kv_bytes_ratio": held[0] / held[1] if held[1] else None,
    }  # fmt: skip


def beside(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Times as ratios to those without a cache, and whether the texts are the same."""
    plain = found["none"]
    result = {}
    for name, figures in found.items():
        row = {
            key: value
            for key, value in figures.items()
            if key not in ("texts", "first_token", "seconds", "answer")
        }
        row["same_texts"] = sum(one == two for one, two in zip(figures["texts"], plain["texts"], strict=True))
        row["texts"] = len(plain["texts"])
        for key in ("first_token", "answer"):
            if key in figures:
                row[f"{key}_ratio"] = figures[key] / plain[key]
        row["throughput_ratio"] = plain["seconds"] / figures["seconds"]
        result[name] = {
            key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()
        }
        print(name, result[name], flush=True)
    return result


def main(
    requests: Annotated[int, typer.Option(help="of the trace")] = 240,
    seed: Annotated[int, typer.Option(help="of the trace")] = 0,
    share: Annotated[float, typer.Option(help="of what all of it would take, that a cache may take")] = 0.3,
) -> None:
    """Measure and write results/prefixes.json."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {"requests": requests, "seed": seed, "share": share}
    for name, load, words in (("peftx:tiny", tiny_llama, 60), ("qwen3_next", tiny_hybrid, 20)):
        prompts = trace(load, requests, seed, words)
        whole = one_by_one(load, prompts, [Marconi(capacity_mb=4096, alpha=0.0)])
        room = share * whole["bytes"] / 2**20
        print(
            name,
            len(prompts),
            "prompts,",
            sum(map(len, prompts)),
            "tokens,",
            whole["bytes"],
            "bytes",
            flush=True,
        )
        results[name] = beside({
            "none": one_by_one(load, prompts, []),
            "none, again": one_by_one(load, prompts, []),
            "last 16 texts": one_by_one(load, prompts, [], prefix_cache=True),
            "marconi, all": whole,
            "marconi, LRU": one_by_one(load, prompts, [Marconi(capacity_mb=room, alpha=0.0)]),
            "marconi": one_by_one(load, prompts, [Marconi(capacity_mb=room, bootstrap=1)]),
        })  # fmt: skip
        several: dict[str, tuple[list[Any], dict[str, Any]]] = {
            "none": ([], {}),
            "none, again": ([], {}),
            "last 16 texts": ([], {"prefix_cache": True}),
            "marconi": ([Marconi(capacity_mb=room, bootstrap=1)], {}),
        }
        if name == "peftx:tiny":
            several |= {
                "batchllm": ([BatchLLM(kv_tokens=32 * max(map(len, prompts)), rows=32)], {}),
                "whole batches of 8": ([Hydragen(min_prefix=10_000)], {"max_batch": 8}),
                "hydragen, as they come": ([Hydragen()], {"max_batch": 8}),
                "whole batches of 8, in order": (
                    [Hydragen(min_prefix=10_000)],
                    {"max_batch": 8, "order": in_order},
                ),
                "hydragen, in order": ([Hydragen()], {"max_batch": 8, "order": in_order}),
                "prefixkv, half": ([PrefixKV(budget=0.5)], {"max_batch": 8}),
            }
        at_once(load, prompts[:16], [])  # warm
        results[f"{name}, at once"] = beside(
            {way: at_once(load, prompts, plugins, **policy) for way, (plugins, policy) in several.items()}
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prefixes.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
