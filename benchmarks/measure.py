"""Timing that a busy machine cannot bend: CPU time of this process, one thread, the least of rounds."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from peftx.engines.machine import peak_memory


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, inner: int = 1, warmup: int = 1
) -> dict[str, float]:
    """Seconds of CPU time of one call of each candidate: all candidates in turn, `rounds` times, the least of each.

    Args:
        inner: calls in one measurement, for those shorter than the clock's grain.
    """
    for _ in range(warmup):
        for call in candidates.values():
            call()
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, call in candidates.items():
            gc.collect()
            gc.disable()
            started = time.process_time()
            for _ in range(inner):
                call()
            best[name] = min(best[name], (time.process_time() - started) / inner)
            gc.enable()
    return best


@torch.no_grad()
def prompts_and_tokens(
    models: Mapping[str, Any], *, rounds: int, prompt: int, written: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of CPU time of a prompt, and of a token behind it, of each model: all in turn, one entry a round; the
    first round warms up and is not told.

    Args:
        prompt: tokens of the prompt. written: tokens behind it that are timed together.
    """
    ids = torch.arange(5, 5 + prompt)[None]
    found: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "token": []} for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            cache = model(input_ids=ids, use_cache=True).past_key_values
            read = time.process_time()
            for token in range(written):
                cache = model(
                    ids[:, token : token + 1], use_cache=True, past_key_values=cache
                ).past_key_values
            end = time.process_time()
            if turn:
                found[name]["prompt"].append(read - start)
                found[name]["token"].append((end - read) / written)
    return found


def peak_megabytes() -> float:
    """Peak resident memory of this process so far."""
    return (peak_memory() or math.nan) / 2**20
