"""Means over seeds, and how far they can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Spread:
    """Of one number over seeds. `std`, `low` and `high` are None for a single value, and where one is infinite."""

    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Spread) -> bool:
        """Do the intervals touch; a value without one is a point."""
        return self._low <= other._high and other._low <= self._high

    @property
    def _low(self) -> float:
        return self.mean if self.low is None else self.low

    @property
    def _high(self) -> float:
        return self.mean if self.high is None else self.high


def t95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 1e-3."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    return _Z95 + (_Z95**3 + _Z95) / (4 * freedom)  # the first term of Cornish and Fisher


@dataclass(frozen=True)
class Scale:
    """Where the values of a metric lie. `by_log`: an interval is one of the logarithm."""

    least: float = -math.inf
    most: float = math.inf
    by_log: bool = False


ANYWHERE = Scale()
SHARE = Scale(least=0.0, most=1.0)
SCALES = {"perplexity": Scale(least=1.0, by_log=True), "accuracy": SHARE, "exact-match": SHARE}


def spread(values: Sequence[float], scale: Scale = ANYWHERE) -> Spread:
    """Mean m, standard deviation s (of n - 1) and the 95 % interval of the mean by Student's t, as far as it lies on
    the scale:

        m - r to m + r,   r = t s / sqrt(n);        by logarithms  m exp(-r/m) to m exp(r/m)

    since the error of log m is, to first order, that of m divided by m.
    """
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Spread(mean)
    std = statistics.stdev(values)
    reach = t95(len(values) - 1) * std / math.sqrt(len(values))
    low, high = mean - reach, mean + reach
    if scale.by_log:
        low, high = mean * math.exp(-reach / mean), mean * math.exp(reach / mean)
    return Spread(mean, std, min(mean, max(low, scale.least)), max(mean, min(high, scale.most)))
