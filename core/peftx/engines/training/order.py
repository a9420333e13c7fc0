"""In which order rows are trained on: it follows from the seed, so a run may prepare no more rows than it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback


def order_of(rows: int, seed: int, epoch: int) -> list[int]:
    """Every row once, in the order of an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    found: list[int] = torch.randperm(rows, generator=generator).tolist()
    return found


class Shuffled(Sampler[int]):
    """Rows in the order of each epoch; `drawn`: they stand in that of the first already, and there is no second."""

    def __init__(self, rows: int, seed: int, *, drawn: bool) -> None:
        self.rows, self.seed, self.drawn, self.epoch = rows, seed, drawn, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rows) if self.drawn else order_of(self.rows, self.seed, self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, where it knows the sampler; see `Epochs`."""
        self.epoch = epoch


class Epochs(TrainerCallback):
    """Tells the sampler which epoch begins. The Trainer does not where a run of several processes goes on in the middle
    of one: accelerate has wrapped the sampler three times by then, and hands the epoch through two."""

    def __init__(self, sampler: Shuffled) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
