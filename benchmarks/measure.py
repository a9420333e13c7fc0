"""Timing that a busy machine cannot bend: CPU time of this process, one thread, the least of rounds."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Mapping


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


def peak_megabytes() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
