"""Curves as SVG: axes, ticks, bands, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 26, 44
MOST_POINTS = 1000
"""Of a curve; of more, the lowest and the highest of each stretch are drawn, so that no spike is lost."""
SMOOTHED_FROM = 30
"""Points of a curve that gets a running mean over it."""
STYLE = """
:root { --ink: #1c2228; --paper: #fff; --line: #d5dbe0; --soft: #f3f5f7; --quiet: #5b6670; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --paper: #14181c; --line: #39424a; --soft: #1e242a;
  --quiet: #9aa5af; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
th { font-weight: 600; vertical-align: bottom; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: pre; }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto; border-radius: 4px; font-size: .85rem; }
td.text { white-space: pre-wrap; min-width: 12rem; }
p.quiet, small, td small { color: var(--quiet); }
figure { margin: .5rem 0 1.2rem; } svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--quiet); } .grid { stroke: var(--line); } .axis { stroke: var(--quiet); fill: none; }
.band { fill: var(--soft); } .band.odd { fill: var(--line); opacity: .6; } svg .phase { fill: var(--ink); }
.key span { margin-right: 1.2rem; } .key i { display: inline-block; width: .9rem; height: .2rem; margin-right: .4rem;
  vertical-align: middle; }
"""
"""Of a page that charts stand on, light and dark."""
COLOURS = ("#2563a8", "#c2571a", "#2a8a57", "#8a3ea0", "#7a6a1c", "#a02c4f")

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """Points (x, y), x rising; `smooth` draws a running mean over them."""

    name: str
    points: Sequence[Point]
    smooth: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a name: a phase, or one of several trainings. `end` belongs to it."""

    name: str
    begin: float
    end: float


def chart(curves: Sequence[Curve], *, x: str, y: str, title: str, bands: Sequence[Band] = ()) -> str:
    """One figure; empty text where there is nothing to draw.

    Args:
        x, y: what the axes are of. title: for those who do not see it.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    every = [point for curve in curves for point in curve.points]
    across = _scale([p[0] for p in every], LEFT, WIDTH - RIGHT)
    up = _scale([p[1] for p in every], HEIGHT - BOTTOM, TOP, margin=0.05)
    parts = [_band(band, across, number) for number, band in enumerate(bands)]
    parts += [_grid(across, up, x, y)]
    for curve, colour in zip(curves, _cycle(len(curves)), strict=True):
        smooth = curve.smooth and len(curve.points) >= SMOOTHED_FROM
        parts.append(_line(curve.points, across, up, colour, faint=smooth))
        if smooth:
            parts.append(_line(running_mean(curve.points), across, up, colour, faint=False))
    key = "".join(
        f'<span><i style="background:{colour}"></i>{escape(curve.name)}</span>'
        for curve, colour in zip(curves, _cycle(len(curves)), strict=True)
    )
    smoothed = any(c.smooth and len(c.points) >= SMOOTHED_FROM for c in curves)
    note = " <small>faint: each step; strong: running mean</small>" if smoothed else ""
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
        f'<figcaption class="key">{key}{note}</figcaption></figure>'
    )


def _cycle(count: int) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(count)]


@dataclass(frozen=True)
class _Scale:
    """Values `low` to `high` on pixels `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def _scale(values: Sequence[float], begin: float, end: float, *, margin: float = 0.0) -> _Scale:
    low, high = min(values), max(values)
    room = (high - low) * margin or (abs(high) * 0.1 or 1.0) * (high == low)
    return _Scale(low - room, high + room, begin, end)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about so many: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, count)
    if not rough > 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _grid(across: _Scale, up: _Scale, x: str, y: str) -> str:
    lines = []
    for value in ticks(up.low, up.high):
        at = up.at(value)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(across.low, across.high, 8):
        if value != int(value):  # there is no half of a step
            continue
        at = across.at(value)
        lines.append(
            f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        lines.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:,.0f}</text>'
        )
    corner = f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"
    lines.append(f'<path class="axis" d="{corner}"/>')
    lines.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    )
    lines.append(f'<text x="{LEFT}" y="14" text-anchor="middle">{escape(y)}</text>')
    return "".join(lines)


def _band(band: Band, across: _Scale, number: int) -> str:
    half = 0.5  # a step is as wide as one on the axis
    begin = max(across.begin, across.at(band.begin - half))
    end = min(across.end, across.at(band.end + half))
    kind = "band odd" if number % 2 else "band"
    return (
        f'<rect class="{kind}" x="{begin:.1f}" y="{TOP}" width="{max(0.0, end - begin):.1f}" '
        f'height="{HEIGHT - BOTTOM - TOP}"/>'
        f'<text class="phase" x="{(begin + end) / 2:.1f}" y="{TOP + 13}" text-anchor="middle">'
        f"{escape(band.name)}</text>"
    )


def _line(points: Sequence[Point], across: _Scale, up: _Scale, colour: str, *, faint: bool) -> str:
    drawn = [(across.at(px), up.at(py)) for px, py in thinned(points)]
    look = f'stroke="{colour}" opacity="{0.35 if faint else 1}" stroke-width="{1 if faint else 1.8}"'
    if len(drawn) == 1:
        return f'<circle cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="3" fill="{colour}"/>'
    return f'<polyline fill="none" {look} points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in drawn)}"/>'


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST_POINTS`, the ends and every stretch's lowest and highest among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    found = [points[0]]
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        found += sorted(ends)
    return [*found, points[-1]]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Mean over a tenth of the points, those around each one; at the ends over the same number on both sides."""
    sums = [0.0, *accumulate(y for _, y in points)]
    most, found = max(1, len(points) // 20), []
    for place, (px, _) in enumerate(points):
        half = min(most, place, len(points) - 1 - place)
        begin, end = place - half, place + half + 1
        found.append((px, (sums[end] - sums[begin]) / (end - begin)))
    return found
