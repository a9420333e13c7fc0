"""The `prepare_data` hooks of a stack."""

from __future__ import annotations

from collections.abc import Iterable

from peftx.engines.data.places import left_by
from peftx.engines.data.training_data import TrainingData, told
from peftx.errors import DataError
from peftx.kernel.stack import Stack


def prepare(stack: Stack, data: TrainingData, ids: Iterable[str] | None = None) -> TrainingData:
    """See `peftx.Stack.prepare`."""
    for member in stack.implementers("prepare_data", ids):
        given = data.train, data.eval
        stack.call(member, "prepare_data", data=data, stack=stack)
        for made, rows in zip((data.train, data.eval), given, strict=True):
            if made is not None and rows is not None:
                left_by(made, rows, member.id)
        if data.train is not None and len(data.train) == 0:
            mine = [one for one in data.dropped if one.by == member.id]
            raise DataError(
                f"'{member.id}': no rows are left to train on",
                hint=f"it dropped {told(mine)}" if mine else "it got none, or dropped them all",
            )
    return data
