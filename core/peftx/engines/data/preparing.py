"""The `prepare_data` hooks of a stack."""

from __future__ import annotations

from collections.abc import Iterable

from peftx.engines.data.places import left_by
from peftx.engines.data.training_data import TrainingData, told
from peftx.errors import DataError
from peftx.kernel.stack import Stack


def prepare(stack: Stack, data: TrainingData, ids: Iterable[str] | None = None) -> TrainingData:
    """See `peftx.Stack.prepare`. What each plugin made of the rows stands in `stack.history`."""
    for member in stack.implementers("prepare_data", ids):
        given, before = (data.train, data.eval), len(data.dropped)
        stack.call(member, "prepare_data", data=data, stack=stack)
        for made, rows in zip((data.train, data.eval), given, strict=True):
            if made is not None and rows is not None:
                left_by(made, rows, member.id)
        mine = data.dropped[before:]
        if given[0] is not None and data.train is not None:
            stack.history.prepared(
                member.id, rows=len(given[0]), left=len(data.train), reasons=[one.reason for one in mine]
            )
        if data.train is not None and len(data.train) == 0:
            raise DataError(
                f"'{member.id}': no rows are left to train on",
                hint=f"it dropped {told(mine)}" if mine else "it got none, or dropped them all",
            )
    return data
