"""One vocabulary for every architecture's internals: roles, sites, targets."""

from __future__ import annotations

from peftx.anatomy.anatomy import Anatomy, TowerFacts
from peftx.anatomy.site import Site
from peftx.anatomy.table import Fused, Stacked, Table, Tower
from peftx.anatomy.targets import Targets

__all__ = [
    "Anatomy",
    "Fused",
    "Site",
    "Stacked",
    "Table",
    "Targets",
    "Tower",
    "TowerFacts",
]
