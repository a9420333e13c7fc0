"""What plugins share that put experts, prefixes and masks into a model."""

from __future__ import annotations

from peftx.toolkits.injecting.both_ways import see_both_ways
from peftx.toolkits.injecting.choices import of_each
from peftx.toolkits.injecting.differences import LowRankDifference, principal
from peftx.toolkits.injecting.kept import Kept
from peftx.toolkits.injecting.lent import lent
from peftx.toolkits.injecting.low_rank import LowRankDelta
from peftx.toolkits.injecting.prefixes import NetworkPrefix, columns, once_written
from peftx.toolkits.injecting.rates import at_rates
from peftx.toolkits.injecting.routing import Router, Side, check_experts, routings, side_of, watching
from peftx.toolkits.injecting.shares import check_each, check_share
from peftx.toolkits.injecting.stored import Wide, storing

__all__ = [
    "Kept",
    "LowRankDelta",
    "LowRankDifference",
    "NetworkPrefix",
    "Router",
    "Side",
    "Wide",
    "at_rates",
    "check_each",
    "check_experts",
    "check_share",
    "columns",
    "lent",
    "of_each",
    "once_written",
    "principal",
    "routings",
    "see_both_ways",
    "side_of",
    "storing",
    "watching",
]
