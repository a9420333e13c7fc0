"""Plots as inline SVG: quality against a cost with the front of the best, and losses over steps."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftx.comparing.table import Table, TableRow
from peftx.quantities import plain

COLOURS = (
    "#2f6db3",
    "#d1703c",
    "#3a8f5c",
    "#a2489a",
    "#b5912a",
    "#5a6b7b",
    "#c4425a",
    "#2a9d9b",
    "#7a5fc0",
    "#8a6a4f",
)
WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 12, 42
LOG_FROM = 30
"""The largest cost over the smallest from which on an axis is logarithmic."""
STEEP = 8
"""The same for qualities, such as perplexities."""
MOST_POINTS = 240
"""Of a curve; a longer one is drawn as means."""


@dataclass(frozen=True)
class Axis:
    """Values to pixels. `log` axes have a place for zero at their start."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: bool = False

    def at(self, value: float) -> float:
        if self.log and value <= 0:
            return self.start
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        start = self.start + (0.12 * (self.end - self.start) if self.zero else 0)
        share = 0.5 if high == low else (value - low) / (high - low)
        return start + share * (self.end - start)

    def clipped(self, value: float) -> float:
        """As `at`, and not beyond the ends."""
        return min(max(self.at(value), min(self.start, self.end)), max(self.start, self.end))

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            narrow = math.log10(self.high / self.low) < 2
            powers = range(first, last + 1, max(1, (last - first) // 5 + 1))
            found = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if narrow else (1,))]
            return ([0.0] if self.zero else []) + [tick for tick in found if self.low <= tick <= self.high]
        if self.high == self.low:
            return [self.low]
        raw = (self.high - self.low) / 4
        unit = 10 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def pareto(
    table: Table,
    cost: str,
    words: str,
    unit: Callable[[float], str],
    kept: Callable[[TableRow], bool] | None = None,
) -> str:
    """Quality against one cost, a point a row with its number in the table; empty where no row has the cost.

    kept: which rows there are points for; all that have a value unless given.
    """
    rows = [
        (number, row)
        for number, row in enumerate(table.rows)
        if _finite(row) and getattr(row, cost) is not None and (kept is None or kept(row))
    ]
    if not rows:
        return ""
    costs = [float(getattr(row, cost)) for _, row in rows]
    x = _cost_axis(costs)
    within = cost == "bundle_bytes" and any(row.base_within for _, row in rows)
    words += ", with the base where compressed" if within else ""
    y = _value_axis([row for _, row in rows])
    parts = [_frame(x, y, unit, words, table.metric)]
    front = _front(
        [(float(getattr(row, cost)), float(row.value or 0)) for _, row in rows], table.higher_is_better
    )
    parts.append(_stairs(front, x, y))
    for (number, row), at in zip(rows, costs, strict=True):
        parts.append(_point(number, row, x.at(at), y, f"{words} {unit(at)}", table.metric))
    return _svg(parts, f"{table.metric} against {words}")


def _finite(row: TableRow) -> bool:
    return row.value is not None and math.isfinite(row.value)


def _cost_axis(costs: Sequence[float]) -> Axis:
    positive = [cost for cost in costs if cost > 0]
    end = WIDTH - RIGHT - 14
    if positive and max(positive) / min(positive) > LOG_FROM:
        low, high = min(positive) / 1.6, max(positive) * 1.6
        return Axis(low, high, LEFT + 12, end, log=True, zero=len(positive) < len(costs))
    high, low = max(costs), min(costs)
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(max(0.0, low - pad), high + pad, LEFT, end)


def _value_axis(rows: Sequence[TableRow]) -> Axis:
    """By the deviations: the interval of two seeds would leave nothing of the rest."""
    values = [float(row.value or 0) for row in rows]
    if min(values) > 0 and max(values) / min(values) > STEEP:
        return Axis(min(values) / 1.3, max(values) * 1.3, HEIGHT - BOTTOM, TOP, log=True)
    ends = [float(row.value or 0) + sign * (row.std or 0.0) for row in rows for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    pad = 0.12 * (high - low) or 0.05 * abs(high) or 0.5
    return Axis(low - pad, high + pad, HEIGHT - BOTTOM, TOP)


def _front(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The points that none beats: cheaper and not worse, or better and not dearer. By cost."""
    sign = 1 if higher else -1
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not found or sign * value > sign * found[-1][1]:
            found.append((cost, value))
    return found


def _stairs(front: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """The best that each cost buys: level to the next point, then up to it."""
    path = ""
    for cost, value in front:
        path += f"H{x.at(cost):.1f}V{y.at(value):.1f}" if path else f"M{x.at(cost):.1f},{y.at(value):.1f}"
    return f'<path class="front" fill="none" stroke="#8b97a3" d="{path}H{WIDTH - RIGHT}"/>'


def _point(number: int, row: TableRow, px: float, y: Axis, told: str, metric: str) -> str:
    py = y.at(float(row.value or 0))
    title = html.escape(f"{row.row}: {metric} {plain(row.value or 0, 4)}, {told}")
    whisker = ""
    if row.low is not None and row.high is not None:
        low, high = y.clipped(row.low), y.clipped(row.high)
        whisker = (
            f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour(number)}"/>'
        )
    left = px > WIDTH - RIGHT - 34
    anchor = f'x="{px - 8:.1f}" text-anchor="end"' if left else f'x="{px + 8:.1f}"'
    return (
        f'<g class="point"><title>{title}</title>{whisker}'
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" fill="{colour(number)}"/>'
        f'<text {anchor} y="{py + 4:.1f}" fill="{colour(number)}">{number + 1}</text></g>'
    )


def curves(table: Table) -> str:
    """Loss over steps, the mean of the seeds, a line a row; empty where nothing was trained."""
    lines = [(number, row, _mean_losses(row)) for number, row in enumerate(table.rows)]
    lines = [(number, row, points) for number, row, points in lines if points]
    if not lines:
        return ""
    steps = [step for _, _, points in lines for step, _ in points]
    losses = [loss for _, _, points in lines for _, loss in points]
    width, height = 860, 320
    x = Axis(min(steps), max(steps), LEFT, width - RIGHT - 20)
    pad = 0.05 * (max(losses) - min(losses)) or 0.1
    y = Axis(min(losses) - pad, max(losses) + pad, height - BOTTOM, TOP)
    parts = [_frame(x, y, _plain, "step", "loss", width=width, height=height)]
    for number, row, points in lines:
        path = " ".join(f"{x.at(step):.1f},{y.at(loss):.1f}" for step, loss in points)
        (step, loss), fill = points[-1], colour(number)
        parts.append(
            f'<g class="line"><title>{html.escape(row.row)}</title>'
            f'<polyline fill="none" points="{path}" stroke="{fill}"/>'
            f'<text x="{x.at(step) + 5:.1f}" y="{y.at(loss) + 4:.1f}" fill="{fill}">{number + 1}</text></g>'
        )
    return _svg(parts, "loss over steps", width=width, height=height)


def _mean_losses(row: TableRow) -> list[tuple[int, float]]:
    """(step, mean over the seeds); of long curves means of neighbours."""
    by_step: dict[int, list[float]] = {}
    for seed in row.seeds:
        for step, loss in seed.losses:
            by_step.setdefault(step, []).append(loss)
    points = [(step, sum(losses) / len(losses)) for step, losses in sorted(by_step.items())]
    size = -(-len(points) // MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def _plain(value: float) -> str:
    return plain(value, 4)


def _frame(
    x: Axis, y: Axis, unit: Callable[[float], str], x_words: str, y_words: str, *, width: int = WIDTH,
    height: int = HEIGHT,
) -> str:  # fmt: skip
    bottom = height - BOTTOM
    parts = [f'<path class="axis" fill="none" stroke="#8b97a3" d="M{LEFT},{TOP}V{bottom}H{width - RIGHT}"/>']
    for tick in x.ticks():
        at, told = x.at(tick), html.escape(unit(tick))
        parts.append(
            f'<path class="tick" stroke="#8b97a3" d="M{at:.1f},{bottom}v4"/>'
            f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{told}</text>'
        )
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(
            f'<path class="grid" stroke="#edf0f3" d="M{LEFT},{at:.1f}H{width - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_plain(tick)}</text>'
        )
    scale, y_scale = (" (log)" if axis.log else "" for axis in (x, y))
    middle = (LEFT + width - RIGHT) / 2
    parts.append(f'<text class="words" x="{middle:.0f}" y="{height - 6}" text-anchor="middle">'
                 f"{html.escape(x_words)}{scale}</text>")  # fmt: skip
    up = (TOP + bottom) / 2
    parts.append(f'<text class="words" transform="translate(12 {up:.0f}) rotate(-90)" text-anchor="middle">'
                 f"{html.escape(y_words)}{y_scale}</text>")  # fmt: skip
    return "".join(parts)


def _svg(parts: Sequence[str], words: str, *, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(words, quote=True)}">{"".join(parts)}</svg>'
    )
