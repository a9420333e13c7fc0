"""A run on several processes (of torchrun, or of Ray Train), which make the same updates.

Each process computes its own micro-batches of a step. Their gradients are averaged once, behind the last of them and
before any plugin reads them. `DistributedDataParallel` does so inside of the backward pass, and knows the parameters
alone that trained when it was made: a plugin that lets others train in a later phase, or goes backward twice in a step,
would leave the processes apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from peftx.engines.training.state_io import flatten
from peftx.errors import ConflictError, TrainingError
from peftx.kernel.plugin import Claim

if TYPE_CHECKING:
    from peftx.kernel.members import Member
    from peftx.kernel.stack import Stack


@dataclass(frozen=True)
class Processes:
    """Which process this is, from 0, and how many there are."""

    index: int = 0
    count: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    @torch.no_grad()
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make the gradients the mean over all processes. Where one process has none it counts as zero; where none has
        any, there is none."""
        if self.count == 1:
            return
        there = torch.tensor(
            [p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device
        )
        dist.all_reduce(there)
        found = [p for p, processes in zip(parameters, there.tolist(), strict=True) if processes]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in found]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):  # one message for all of a kind
            own = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in own])
            dist.all_reduce(flat)
            for gradient, mean in zip(own, (flat / self.count).split([g.numel() for g in own]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        for p, gradient in zip(found, gradients, strict=True):
            p.grad = gradient


ALONE = Processes()


def launched() -> int:
    """How many processes whoever launched this one has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world() -> int:
    """How many processes there are in a loop of one's own: those that it has set up, or that were launched for it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else launched()


def leads() -> bool:
    """Is this the first of the processes, which writes and tells for all."""
    return int(os.environ.get("RANK", "0")) == 0


def check_processes(members: Sequence[Member], count: int) -> None:
    """Raises ConflictError where so many processes would not train one model."""
    for member in members if count > 1 else ():
        alone = member.claims(Claim.REPLACES_STEP)
        if why := "it makes no gradients to be averaged" if alone else member.plugin.one_process():
            said = f"'{member.id}' trains in one process, and there are {count}: {why}"
            raise ConflictError(said, hint="one process; gradient_accumulation makes a step larger")


@torch.no_grad()
def begin_alike(stack: Stack, processes: Processes) -> None:
    """Give every process the first one's numbers, as they were drawn there.

    Raises:
        PeftxError: the plugins are not the same ones, or chose otherwise.
    """
    if processes.count == 1:
        return
    tensors = [t for id in stack.plugins for t in stack.ledger.tensors(id).values()]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    states = {id: json.dumps(flatten(plugin.state, {})) for id, plugin in stack.plugins.items()}
    for other in processes.gather((shapes, states)):
        if other != (shapes, states):
            differ = [id for id in stack.plugins if other[1].get(id) != states[id]]
            raise TrainingError(
                f"the processes do not have the same stack: {', '.join(differ) or 'tensors'} differ",
                hint="build it alike in each, of one seed",
            )
    for tensor in tensors:
        own = tensor.data.contiguous()
        dist.broadcast(own, src=0)
        tensor.data.copy_(own)


def checksums(stack: Stack) -> dict[str, list[float]]:
    """Of what each plugin trains; exactly the same wherever the numbers are."""
    trained = {id: [p for p in stack.ledger.parameters(id) if p.requires_grad] for id in stack.plugins}
    sums = {id: [p.detach().sum(dtype=torch.float64) for p in own] for id, own in trained.items() if own}
    return {id: torch.stack(own).tolist() for id, own in sums.items()}


def check_alike(stack: Stack, processes: Processes, step: int) -> None:
    """Raises PeftxError where the processes have come apart."""
    if processes.count == 1:
        return
    own = checksums(stack)
    for other in processes.gather(own):
        if other != own:
            apart = next(id for id in stack.plugins if other.get(id) != own.get(id))
            raise TrainingError(
                f"after {step} steps the processes have different numbers in '{apart}': something of the stack decides "
                "by the rows of its own process",
                hint="train it in one process, with gradient_accumulation in the place of processes",
            )
