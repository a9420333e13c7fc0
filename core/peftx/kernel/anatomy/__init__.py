"""One vocabulary for every architecture's internals: roles, sites, targets."""

from __future__ import annotations

from peftx.kernel.anatomy.anatomy import Anatomy, TowerFacts
from peftx.kernel.anatomy.site import Site
from peftx.kernel.anatomy.table import Fused, Stacked, Table, Tower
from peftx.kernel.targets import Targets

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
