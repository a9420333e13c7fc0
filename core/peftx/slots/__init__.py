"""Slots: where deltas stand on a model. See `carrier` for the mechanism, `delta` for what is attached."""

from __future__ import annotations

from peftx.slots.attaching import attach, bake, detach, enable, without_fast_path
from peftx.slots.carrier import base_class, is_map, kind_of, packed, slot_of
from peftx.slots.delta import Delta, LowRank, add_low_rank, dropout_linear
from peftx.slots.folding import follow, merge, snapshot, unmerge
from peftx.slots.rows import Rows
from peftx.slots.state import Entry

__all__ = [
    "Delta",
    "Entry",
    "LowRank",
    "Rows",
    "add_low_rank",
    "attach",
    "bake",
    "base_class",
    "detach",
    "dropout_linear",
    "enable",
    "follow",
    "is_map",
    "kind_of",
    "merge",
    "packed",
    "slot_of",
    "snapshot",
    "unmerge",
    "without_fast_path",
]
