"""Numbers as people read them: sizes, counts, times and measures in the tables of commands and on pages."""

from __future__ import annotations

import math

ELSEWHERE = "", " k", " M", " G", " T"
OF_BYTES = " B", " kB", " MB", " GB", " TB"


def size(value: float) -> str:
    """Bytes: `4.65 MB`, 1 kB = 1000 B."""
    return _scaled(value, OF_BYTES)


def count(value: float) -> str:
    """`221.95 k` of anything, where there is no room for all digits."""
    return _scaled(value, ELSEWHERE)


def time(value: float) -> str:
    """Seconds, or thousandths of one."""
    return f"{plain(value, 3)} s" if value >= 1 or value == 0 else f"{plain(value * 1e3, 3)} ms"


def plain(value: float, digits: int = 5) -> str:
    """Whole and large numbers in full, others with so many digits; infinite ones as a word."""
    if math.isfinite(value) and (value == int(value) or abs(value) >= 10 ** (digits - 1)):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def measure(value: float, unit: str, digits: int = 5) -> str:
    """A value with its unit; bytes as a size."""
    return size(value) if unit == "bytes" else f"{plain(value, digits)} {unit}".rstrip()


def between(low: float | None, high: float | None, digits: int = 4) -> str:
    """An interval; empty where there is none."""
    return "" if low is None or high is None else f"{plain(low, digits)} to {plain(high, digits)}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if round(value, 2) < 1000:
            return f"{round(value, 2):g}{unit}"
        value /= 1000
    return f"{round(value, 2):,}{largest}"
