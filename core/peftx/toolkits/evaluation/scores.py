"""A measured number with its 95 % confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from peftx.errors import DataError
from peftx.quantities import between, plain

_Z95: Final = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_DRAWN = 1 << 16
"""Units that `bootstrap_ratio` holds at a time."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One named number.

    Attributes:
        name: what was measured.
        value: the measurement; may be infinite, never NaN.
        low, high: its 95 % interval; both None where none is known.
        count: how many things were measured (tokens, rows); None where that has no meaning.
        unit: of `value`, `low` and `high`; empty for a pure number.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise DataError("a score needs a name")
        if (self.low is None) != (self.high is None):
            raise DataError(
                f"score {self.name!r}: an interval needs both ends, got {self.low} and {self.high}"
            )
        if any(end is not None and math.isnan(end) for end in (self.value, self.low, self.high)):
            raise DataError(f"score {self.name!r} is not a number: {self.value} [{self.low}, {self.high}]")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise DataError(f"score {self.name!r}: {self.value} lies outside [{self.low}, {self.high}]")

    def __str__(self) -> str:
        """`perplexity 8.97 (95 %: 8.7 to 9.24, 1,204 counted)`."""
        return f"{self.name} {self.number}" + (f" ({self.detail})" if self.detail else "")

    @property
    def number(self) -> str:
        """The value and its unit; bytes are told one by one here, and as a size on pages."""
        return f"{plain(self.value)} {self.unit}".rstrip()

    @property
    def detail(self) -> str:
        """Interval and count, as far as there are such."""
        interval = between(self.low, self.high)
        interval = interval and f"95 %: {interval}"
        return ", ".join(filter(None, (interval, "" if self.count is None else f"{self.count:,} counted")))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of Wilson for a proportion; it stays within [0, 1] and holds at 0 and at n.

    (p + z^2/2n  +-  z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n),   p = successes / trials
    """
    if not 0 <= successes <= trials or trials == 0:
        raise DataError(f"{successes} of {trials} is no proportion")
    p, z2 = successes / trials, _Z95 * _Z95
    middle = p + z2 / (2 * trials)
    spread = _Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    scale = 1 + z2 / trials
    # At p = 0 and 1 one end equals p exactly; rounding must not push it past.
    return min(p, max(0.0, (middle - spread) / scale)), max(p, min(1.0, (middle + spread) / scale))


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of sum(numerators) / sum(denominators).

    Whole units (documents, windows) are drawn with replacement, so tokens of one unit stay together. None for
    fewer than two units: nothing is known about their spread. With few units it is too narrow.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if len(top) != len(bottom) or len(top) == 0:
        raise DataError(f"{len(top)} numerators and {len(bottom)} denominators")
    if len(top) < 2:
        return None
    value = float(top.sum() / bottom.sum())
    if not math.isfinite(value):
        return None
    random = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    at_once = max(1, _DRAWN // len(top))
    for start in range(0, resamples, at_once):
        some = ratios[start : start + at_once]
        drawn = random.integers(len(top), size=(len(some), len(top)))
        some[:] = top[drawn].sum(1) / bottom[drawn].sum(1)
    low, high = (float(np.quantile(ratios, share)) for share in (0.025, 0.975))
    return min(low, value), max(high, value)
