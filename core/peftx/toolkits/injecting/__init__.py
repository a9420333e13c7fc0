"""What plugins share that put experts, prefixes and masks into a model."""

from __future__ import annotations

from peftx.toolkits.injecting.both_ways import both_ways
from peftx.toolkits.injecting.routing import Router, Side, routings, side_of, watching

__all__ = ["Router", "Side", "both_ways", "routings", "side_of", "watching"]
