"""Bytes of a bundle's tensors before there are any: what `peftx plan` says, on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from peftx.engines.bundle.sparse import KnowsChanges, pruned_about
from peftx.engines.models import base_bytes
from peftx.kernel.chain import is_ours
from peftx.kernel.parts import BasePart
from peftx.kernel.stack import Stack


@runtime_checkable
class KnowsPruned(Protocol):
    """A plugin that sets numbers of other plugins' tensors to zero, and knows ahead how many it leaves."""

    def left_when_pruned(self, stack: Stack) -> Iterable[tuple[Sequence[Tensor], int]]:
        """Tensors, and how many of their numbers are left, wherever, once the stack has trained; asked after `inject`,
        on the meta device too."""


@runtime_checkable
class DoubtsBytes(Protocol):
    """A plugin whose bytes in a bundle the training decides."""

    def bytes_hang_on(self) -> str:
        """In which way a bundle may be of another size than the plan says, and why, as 'at most: ...' or 'at least:
        ...'; empty if with these options it is not."""


def pruned_of(stack: Stack) -> list[tuple[list[Tensor], int]]:
    """What all plugins say of it."""
    there = (member.plugin for member in stack.members if stack.standing[member.id].injected)
    known = (plugin for plugin in there if isinstance(plugin, KnowsPruned))
    return [(list(tensors), left) for plugin in known for tensors, left in plugin.left_when_pruned(stack)]


def doubts(stack: Stack) -> str:
    """What plugins say of the bytes that only the training tells, in one line."""
    found = (
        (member.id, member.plugin.bytes_hang_on())
        for member in stack.members
        if stack.standing[member.id].injected and isinstance(member.plugin, DoubtsBytes)
    )
    return "; ".join(f"bytes of '{id}': {said}" for id, said in found if said)


def own_bytes(stack: Stack, *, whole: bool, trains: bool) -> int:
    """Of the plugins' tensors.

    Args:
        whole: the bundle holds the base, so trained numbers of it are whole. trains: the stack trains before.
    """
    total, there = 0, dict[int, int]()
    for member in stack.members:
        knows = stack.standing[member.id].injected and not whole
        known = member.plugin.changed_bytes() if knows and isinstance(member.plugin, KnowsChanges) else 0
        base = {id(t) for part in stack.ledger.of(member.id, BasePart) for t in part.tensors().values()}
        own = [t for t in stack.ledger.tensors(member.id).values() if not known or id(t) not in base]
        there |= {id(t): _stored(t) for t in own}
        total += known + sum(map(_stored, own))
    for tensors, left in pruned_of(stack) if trains else ():
        some = [t for t in tensors if id(t) in there]  # not what went into the weights meanwhile
        total += pruned_about(some, left) - sum(there[id(t)] for t in some)
    return total


def _stored(tensor: Tensor) -> int:
    """A mask is of bits."""
    return -(-tensor.numel() // 8) if tensor.dtype == torch.bool else tensor.nbytes


def base_in_bundle(
    stack: Stack, model: str, in_memory: int, replaced: Mapping[str, int], cut: Collection[str]
) -> int:
    """Of the base in a bundle, which holds it where layers are replaced: these at their size; the rest, and what was
    only cut, at that of the base's file, whose half precision is half precision still.

    Args:
        model: its id. in_memory: bytes of the base. replaced: path of a layer -> bytes that it takes then. cut: those
            of them that only lost rows or columns.
    """
    if not replaced:
        return 0
    mine = {id(t) for member in stack.members for t in stack.ledger.tensors(member.id).values()}
    inside = tuple(f"{path}." for path in replaced)
    rest = {
        id(p): p.nbytes
        for name, p in stack.model.named_parameters()
        if id(p) not in mine and not name.startswith(inside) and not is_ours(name)
    }
    smaller = sum(replaced[path] for path in cut)
    share = min(1.0, base_bytes(model, stack.model) / in_memory)
    return sum(replaced.values()) - smaller + round(share * (sum(rest.values()) + smaller))
