"""Wall time of `peftx --help` and `peftx list`, in seconds: the least of several starts of a fresh interpreter.

python benchmarks/run.py startup
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

LIMIT = 0.3


def seconds(*arguments: str, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "peftx_cli", *arguments], check=True, capture_output=True)
        best = min(best, time.perf_counter() - started)
    return best


def run(quick: bool = False) -> dict[str, dict[str, Any]]:
    """One entry a command; `ratio` is seconds, since the limit is."""
    rounds = 5 if quick else 15
    commands = {"peftx --help": ["--help"], "peftx list": ["list"], "peftx list --json": ["list", "--json"]}
    return {
        name: {"ratio": seconds(*arguments, rounds=rounds), "limit": LIMIT, "peer": "seconds, wall"}
        for name, arguments in commands.items()
    }
