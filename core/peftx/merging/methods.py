"""How differences are combined, one tensor at a time. D_t is what adapter t adds to a weight, w_t its weight.

Sums (`cat`, `svd`, `linear`, `task-arithmetic`; "Editing Models with Task Arithmetic", arXiv:2212.04089):

    D = Σ_t w_t D_t

`ties` ("TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708), entry by entry after each D_t has
lost all but the `density` of largest magnitude:

    γ = sgn(Σ_t w_t D_t)      D = mean of the w_t D_t whose sign is γ, over those t alone

`dare` ("Language Models are Super Mario", arXiv:2311.03099): a sum of m_t ⊙ D_t / density, where each entry of m_t is 1
with probability `density`, else 0. `dare-ties` elects signs among these in the place of the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """What one does with the differences of a tensor."""

    trims: bool = False
    drops: bool = False
    elects: bool = False
    density: float | None = None
    """Share of entries that stay, where nobody says another; None of methods that keep all."""

    @property
    def sums(self) -> bool:
        """Is it linear in the differences, so that factors of low rank stay such."""
        return self.density is None


METHODS: dict[str, Method] = {
    "linear": Method(),
    "task-arithmetic": Method(),
    "cat": Method(),
    "svd": Method(),
    "ties": Method(trims=True, elects=True, density=0.2),
    "dare": Method(drops=True, density=0.1),
    "dare-ties": Method(drops=True, elects=True, density=0.1),
}
"""By name. The densities are the papers': the top 20 %, and a drop rate of 0.9."""


def combine(
    method: Method, differences: Sequence[tuple[float, Tensor, str]], *, density: float, seed: int
) -> Tensor:
    """D of one tensor.

    Args:
        differences: (w_t, D_t, key) of each adapter, all D_t of one shape. The key decides, with `seed`, what is
            dropped.
    """
    changed = []
    for weight, difference, key in differences:
        if method.trims:
            difference = trimmed(difference, density)
        if method.drops:
            difference = dropped(difference, density, f"{seed} {key}")
        changed.append(weight * difference)
    stacked = torch.stack(changed)
    return elected(stacked) if method.elects else stacked.sum(0)


def trimmed(difference: Tensor, density: float) -> Tensor:
    """The `density` of its entries that are largest in magnitude, one at least; and all that are as large as these."""
    keep = max(1, round(density * difference.numel()))
    magnitude = difference.abs()
    least = magnitude.flatten().kthvalue(difference.numel() - keep + 1).values
    return difference * (magnitude >= least)


def dropped(difference: Tensor, density: float, key: str) -> Tensor:
    """Each entry with probability `density`, over it; else 0. The draw hangs on the key alone, on every device."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    drawn = torch.rand(difference.shape, generator=torch.Generator().manual_seed(number))
    return difference * (drawn < density).to(difference.device) / density


def elected(differences: Tensor) -> Tensor:
    """[T, ...] -> [...]: the mean of those that have the sign of the sum; 0 where the sum is 0."""
    agree = differences.sign() == differences.sum(0).sign()
    return (differences * agree).sum(0) / agree.sum(0).clamp(min=1)
