"""Slots: where deltas stand on a model. See `carrier` for the mechanism, `delta` for what is attached."""

from __future__ import annotations

from peftx.kernel.slots.attaching import attach, bake, detach, enable, without_fast_path
from peftx.kernel.slots.carrier import base_class, is_map, kind_of, open_slot, packed, slot_of
from peftx.kernel.slots.delta import Delta, LowRank, add_low_rank, dropout_linear
from peftx.kernel.slots.folding import check_folds, fold_into, follow, merge, snapshot, unmerge
from peftx.kernel.slots.rows import Rows
from peftx.kernel.slots.state import Entry

__all__ = [
    "Delta",
    "Entry",
    "LowRank",
    "Rows",
    "add_low_rank",
    "attach",
    "bake",
    "base_class",
    "check_folds",
    "detach",
    "dropout_linear",
    "enable",
    "fold_into",
    "follow",
    "is_map",
    "kind_of",
    "merge",
    "open_slot",
    "packed",
    "slot_of",
    "snapshot",
    "unmerge",
    "without_fast_path",
]
