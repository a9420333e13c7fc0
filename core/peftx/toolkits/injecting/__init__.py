"""What plugins share that put experts, prefixes and masks into a model."""

from __future__ import annotations

from peftx.toolkits.injecting.routing import Router, Side, routings, side_of, watching

__all__ = ["Router", "Side", "routings", "side_of", "watching"]
