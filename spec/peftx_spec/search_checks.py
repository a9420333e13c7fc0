"""What no field of a search can see by itself, read off the raw data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

from peftx_spec.compare_checks import repeated
from peftx_spec.errors import nearest
from peftx_spec.overrides import entry_ids
from peftx_spec.problems import Path, describe
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.search import QUALITY, Cost
from peftx_spec.trainer_names import our_name
from peftx_spec.translate import Finding

MOST_STACKS = 100
"""Combinations of a stack's choices; all are looked at before anything runs."""

OF_TRAINING = {
    "seed": "'search.seed' is that of each trial",
    "num_train_epochs": "trials of a search count steps: 'steps: 200', or 'train.steps' in the space",
    "eval_steps": "'search.checks' says how often a trial is looked at",
}
SPAN = "a list of values, {log: [low, high]} or {range: [low, high]}"


def check_search(data: Data) -> Iterator[Finding]:
    """Everything in `search:` but its base."""
    search = mapping_of(data, "search")
    yield from repeated(("search", "seeds"), list_of(search, "seeds"), "the seed")
    objectives = list_of(search, "objectives")
    yield from repeated(("search", "objectives"), objectives, "the objective")
    if objectives and QUALITY not in objectives:
        message = f"'{QUALITY}' is not among the objectives"
        yield Finding(
            ("search", "objectives"), message, suggestion=f"add {QUALITY}: without it nothing is the best"
        )
    costs = get_args(Cost)
    for name in mapping_of(search, "limits"):
        if name not in costs:
            yield Finding(("search", "limits", name), f"'{name}' is no cost", at_key=True,
                          expected=f"one of {', '.join(costs)}", suggestion=nearest(name, costs))  # fmt: skip
    slots = list_of(search, "stack")
    count = math.prod(len(slot) if isinstance(slot, list) else 1 for slot in slots)
    if count > MOST_STACKS:
        message = f"the choices make {count:,} stacks, and at most {MOST_STACKS} are searched"
        yield Finding(("search", "stack"), message, at_key=True, suggestion="list fewer plugins")
    space = mapping_of(search, "space")
    if slots and count == 1 and not space:
        message = "there is nothing to choose: the stack is one, and 'space' is empty"
        remedy = "write 'space: {train.learning_rate: {log: [1e-4, 1e-1]}}', or run it with 'peftx apply'"
        yield Finding(("search", "stack"), message, at_key=True, suggestion=remedy)
    yield from _space(space, entries_of(slots))


def entries_of(slots: list[object]) -> list[object]:
    """All entries that a stack may have."""
    return [
        item for slot in slots for item in (slot if isinstance(slot, list) else [slot]) if item is not None
    ]


def _space(space: Data, entries: list[object]) -> Iterator[Finding]:
    known = [*entry_ids({"stack": entries}), "train"]
    for key, values in space.items():
        path: Path = ("search", "space", key)
        if isinstance(values, list):
            yield from repeated(path, values, f"'{key}':")
        elif not isinstance(values, dict):
            yield Finding(
                path, f"'{key}' has one value, and nothing to choose", expected=SPAN, got=describe(values)
            )
        head, _, option = key.partition(".")
        if head not in known:
            expected = f"<id>.<option>, with one of {', '.join(known)}"
            message = f"there is no '{head}' to vary in these stacks"
            yield Finding(path, message, at_key=True, expected=expected, suggestion=nearest(head, known))
        elif not option:
            yield Finding(path, f"'{key}' names no option", at_key=True, expected=f"{head}.<option>")
        elif head == "train" and our_name(option) in OF_TRAINING:
            yield Finding(
                path,
                f"'{key}' is not the space's to vary",
                at_key=True,
                suggestion=OF_TRAINING[our_name(option)],
            )
