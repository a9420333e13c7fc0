"""Random numbers of one plugin, whatever the others draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, id: str) -> Iterator[None]:
    """Torch's global generators at a state of this plugin's own; as they were afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if devices:
            torch.manual_seed(_seed_of(seed, id))
        else:  # `torch.manual_seed` keeps a stack trace for a GPU that nobody uses
            torch.default_generator.manual_seed(_seed_of(seed, id))
        yield


def _seed_of(seed: int, id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:8], "big") >> 1
