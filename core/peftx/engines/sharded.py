"""Weights that `torch.distributed.fsdp.fully_shard` has spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from peftx.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def sharded(model: nn.Module) -> list[FSDPModule]:
    """The modules whose weights no process has whole."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole(model: nn.Module) -> Iterator[bool]:
    """Gather the weights for as long as the block lasts, if they are sharded; all processes must come here then.

    Yields:
        Is this process the one that writes.
    """
    modules = sharded(model)
    for module in modules:
        module.unshard()
    try:
        yield not modules or dist.get_rank() == 0
    finally:
        for module in modules:
            module.reshard()
        if modules:
            dist.barrier()  # what was written is there for all


def refuse_shards(model: nn.Module, doing: str) -> None:
    """Raises UnsupportedError where the weights are sharded: no process has the matrices that `doing` changes."""
    if sharded(model):
        raise UnsupportedError(
            f"the weights are sharded, and {doing} needs whole matrices",
            hint="stack.save in all processes, then peftx.load in one",
        )
