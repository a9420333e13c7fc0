"""The `compress` hooks of a stack, each whole or undone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftx.errors import ConflictError, StackError, UsageError
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.kernel.members import Member
from peftx.kernel.parts import DeltaPart
from peftx.kernel.plugin import Claim, compresses_own
from peftx.kernel.seeds import seeded
from peftx.kernel.slots import base_class
from peftx.kernel.stack import Stack
from peftx.toolkits.compression.calibration import Calibration


def compress(
    stack: Stack,
    calibration: Callable[[], Calibration],
    ids: Iterable[str] | None,
    *,
    keep: bool,
) -> None:
    """See `peftx.Stack.compress`.

    Args:
        calibration: makes the batches, once it is known that anything compresses.
    """
    todo = [m for m in stack.implementers("compress", ids) if not stack.standing[m.id].compressed]
    if not todo:
        raise StackError("no plugin of this stack compresses", hint="add one, for example prefixquant")
    batches = calibration()
    for member in todo:
        if member.claims(Claim.NEEDS_CALIBRATION):
            if not batches.batches:
                raise UsageError(
                    f"'{member.id}' needs calibration data", hint='stack.compress("calibration.txt")'
                )
            batches.require(member.plugin.least_tokens, by=member.id)
    for member in todo:
        if member.claims(Claim.QUANTIZES):
            _check_bare(stack, member)
        _compress_one(stack, member, batches)
        if not keep:
            stack.ledger.release(member.id)
        stack.standing[member.id].compressed = True
        stack.anatomy = Anatomy(stack.model)
    stack.settle()


def _compress_one(stack: Stack, member: Member, batches: Calibration) -> None:
    restore, state = stack.ledger.snapshot(), copy.deepcopy(member.plugin.state)
    standing = copy.deepcopy(stack.standing)
    try:
        if member.claims(Claim.FOLDS_PREVIOUS):
            for other in stack.members[: stack.members.index(member)]:
                if not stack.ledger.of(other.id, DeltaPart):
                    continue
                if other.claims(Claim.MERGEABLE):
                    stack.merge(other.id, keep=False)
                elif compresses_own(other.plugin):
                    raise ConflictError(
                        f"'{member.id}' starts from the smaller layers of '{other.id}', which has not compressed yet",
                        hint=f"compress(data, ['{other.id}', '{member.id}'])",
                    )
        with torch.no_grad(), seeded(stack.seed, member.id):
            stack.model.eval()
            stack.call(member, "compress", model=stack.view(member.id), calibration=batches, stack=stack)
    except BaseException:
        restore()
        stack.standing, member.plugin.state = standing, state
        stack.anatomy = Anatomy(stack.model)
        stack.settle()
        raise


def _check_bare(stack: Stack, member: Member) -> None:
    """Raises ConflictError where a plugin that comes later stands already on layers that this one may replace."""
    for other in stack.members[stack.members.index(member) + 1 :]:
        standing = stack.ledger.of(other.id, DeltaPart)
        if any(issubclass(base_class(part.place), nn.Linear | Conv1D) for part in standing):
            raise ConflictError(
                f"'{other.id}' comes after '{member.id}' and stands already on layers that it replaces",
                hint=f"Stack(..., inject=False), then compress(data, ['{member.id}']), then inject()",
            )
