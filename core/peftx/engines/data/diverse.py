"""Rows that speak for all: facility location over unit vectors, greedily.

    f(A) = sum_i max(0, max_{j in A} s_ij)        s_ij = v_i v_j, A a set of rows

The greedy A is within 1 - 1/e of the best (f is monotone and submodular). A cosine is a product of unit vectors, so no
kernel of n x n numbers is ever held.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 256
"""Gains at once: bounds memory to n x 256."""
Picks = list[tuple[int, float]]
"""Places in the order in which they were chosen, each with its gain."""


def facility_location(v: Tensor, count: int, progress: Callable[[int, int], None] | None = None) -> Picks:
    """So many rows of `v` [n, d], of length 1, that gain f the most, one after the other; of equals the first. All of
    them where there are no more.

    Lazily: gains never grow, so those from before are bounds, and only the best is computed again until it stays best.

    Args:
        progress: called with (chosen, count).
    """
    v = v.double()
    count = min(count, len(v))
    covered, chosen = torch.zeros(len(v), dtype=v.dtype, device=v.device), Picks()

    def gains(rows: Tensor) -> Tensor:
        return (v @ rows.T - covered[:, None]).clamp(min=0).sum(0).round(decimals=9)

    bounds = torch.cat([gains(block) for block in v.split(BLOCK)])
    while len(chosen) < count:
        best = int(bounds.argmax())
        bounds[best] = gains(v[best : best + 1])[0]
        if int(bounds.argmax()) == best:
            chosen.append((best, float(bounds[best])))
            covered = torch.maximum(covered, v @ v[best])
            bounds[best] = -torch.inf
            if progress is not None:
                progress(len(chosen), count)
    return chosen
