"""What a trial is worth: its numbers, the limits that it keeps, and who is beaten by whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

STEP = 1.1


def coarse(value: float) -> float:
    """A cost as points are compared by it, in steps of a tenth: so none is on the front for a hundredth of a second."""
    return STEP ** round(math.log(value, STEP)) if value > 0 else 0.0


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Is one better in something and worse in nothing; less is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(
        a < b for a, b in zip(one, other, strict=True)
    )


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Those that none beats, by their places."""
    return [index for index, point in enumerate(points) if not any(beats(other, point) for other in points)]


def excess(costs: Mapping[str, float | None], limits: Mapping[str, float]) -> dict[str, float]:
    """By how much of each limit a point is beyond it; 0 or less where it keeps it."""
    return {name: float(costs[name] or 0) / limit - 1 for name, limit in limits.items()}
