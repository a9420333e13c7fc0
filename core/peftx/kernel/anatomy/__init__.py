"""One vocabulary for every architecture's internals: roles, sites, targets.

Its tables are had without torch, so the names that others import from here are looked up when they are asked for.
"""

from __future__ import annotations

from importlib import import_module

_WHERE = {
    **dict.fromkeys(("Anatomy", "TowerFacts"), "anatomy"),
    **dict.fromkeys(("Fused", "Stacked", "Table", "Tower"), "table"),
    "Site": "site",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
