"""A comparison as one HTML page without anything from elsewhere; all of it can be read without a script."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftx.comparing.plots import colour, curves, pareto
from peftx.comparing.table import COSTS, Table, TableRow

LONGEST_REASON = 160
"""Characters in the table; all of it stands below."""

_STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2228; background: #fff; margin: 2rem auto; max-width: 84rem;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
.sub { color: #56626e; margin: 0 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
#rows { width: 100%; }
th, td { text-align: right; padding: .32rem .5rem; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2), td.said, #rows th:nth-child(5) { text-align: left; }
td.said { white-space: normal; min-width: 8rem; }
#rows thead th { white-space: normal; } tr.failed td.said { min-width: 15rem; }
#rows thead th { border-bottom: 2px solid #aab4be; vertical-align: bottom; font-weight: 600; }
#rows thead th[tabindex] { cursor: pointer; } #rows thead th[tabindex]:hover { color: #2f6db3; }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
tbody tr { border-bottom: 1px solid #e3e8ec; } tr.best { background: #eaf5ee; } tr.near { background: #f6fbf7; }
tr.failed { color: #8a3442; background: #fdf4f5; } td a { color: inherit; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .4rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; } svg { fill: #56626e; }
svg .words { font-weight: 600; } svg .front { stroke-dasharray: 4 3; }
svg .point line { stroke-width: 1.4; opacity: .55; } svg .point text, svg .line text { font-weight: 600; }
svg .line polyline { stroke-width: 1.5; }
details { border-top: 1px solid #e3e8ec; padding: .45rem 0; } summary { cursor: pointer; }
details table { margin: .4rem 0 .6rem; }
pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""

_SCRIPT = """
const body = document.querySelector('#rows tbody'), heads = [...document.querySelectorAll('#rows th[tabindex]')];
function sort(head) {
  const i = head.cellIndex, down = head.getAttribute('aria-sort') === 'ascending';
  heads.forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const value = row => { const text = row.cells[i].dataset.value; return text === '' ? null :
    isNaN(text) ? text : +text; };
  const rows = [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1); });
  body.append(...rows);
}
const open = () => { const at = location.hash && document.querySelector(location.hash); if (at) at.open = true; };
addEventListener('hashchange', open); open();
heads.forEach(head => { head.addEventListener('click', () => sort(head));
  head.addEventListener('keydown', e => {
    if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); sort(head); } }); });
"""


@dataclass(frozen=True)
class Column:
    """Of the table: what it is called, what it means, how a row's value is sorted and shown."""

    name: str
    words: str
    value: Callable[[TableRow], float | str | None]
    shown: Callable[[TableRow], str]


def count(value: float) -> str:
    """`1.2 M` numbers."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes, 1 kB = 1000 B."""
    return f"{count(value).replace(' k', ' kB').replace(' M', ' MB').replace(' G', ' GB')}" + (
        "" if value >= 1e3 else " B"
    )


def time(value: float) -> str:
    """Seconds, or thousandths."""
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{value * 1e3:.3g} ms"


UNITS: dict[str, Callable[[float], str]] = {
    "trained": count,
    "bundle_bytes": size,
    "memory_bytes": size,
    "train_seconds": time,
    "token_seconds": time,
}


def _cost(name: str) -> Column:
    def shown(row: TableRow) -> str:
        value = getattr(row, name)
        return "" if value is None else UNITS[name](value)

    return Column(COSTS[name], "", lambda row: getattr(row, name), shown)


def columns(table: Table) -> list[Column]:
    return [
        Column("row", "its number in the plots, and its name", lambda row: row.row, lambda row: ""),
        Column(table.metric, "mean over the seeds ± standard deviation", lambda row: row.value, quality),
        Column("95 % interval", "of the mean, by Student's t", lambda row: row.low, interval),
        Column("note", "what the numbers say", lambda row: row.note, remark),
        Column("learning rate", "chosen on validation rows", lambda row: row.learning_rate, rate),
        *(_cost(name) for name in COSTS),
    ]


def quality(row: TableRow) -> str:
    if row.value is None:
        return ""
    return f"{row.value:.4g}" + ("" if row.std is None else f" ± {row.std:.2g}")


def interval(row: TableRow) -> str:
    return "" if row.low is None or row.high is None else f"{row.low:.4g} to {row.high:.4g}"


def rate(row: TableRow) -> str:
    return "" if row.learning_rate is None else f"{row.learning_rate:g}" + (" edge" if row.edge else "")


def remark(row: TableRow) -> str:
    short = row.reason if len(row.reason) <= LONGEST_REASON else f"{row.reason[:LONGEST_REASON]}..."
    return f"failed: {short}" if row.status == "failed" else row.note


def page(table: Table) -> str:
    """The whole page."""
    rows = "".join(_details(table, row, number) for number, row in enumerate(table.rows))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>peftx: methods compared</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>Methods compared by {_said(table.metric)}</h1>\n"
        f'<p class="sub">{_setting(table)}</p>\n<div class="wide">{_table(table)}</div>\n{_key(table)}\n'
        f"{_plots(table)}{_curves(table)}<h2>Each row, and how to repeat it</h2>\n{rows}\n"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _setting(table: Table) -> str:
    """What all rows have in common."""
    seeds = ", ".join(map(str, table.seeds))
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    return _said(
        f"{table.model}; {table.budget} a row; seed{'s' if len(table.seeds) > 1 else ''} {seeds}; "
        f"{'higher' if table.higher_is_better else 'lower'} is better. Rates are chosen on validation rows "
        f"({table.validation}), never on those that are measured. Run on "
        f"{'an accelerator' if table.device == 'accelerator' else 'the CPU'}, {table.threads} "
        f"thread{'s' if table.threads > 1 else ''} a job; {versions}."
    )


def _plots(table: Table) -> str:
    found = [pareto(table, name, words, UNITS[name]) for name, words in COSTS.items()]
    figures = "".join(f"<figure>{plot}</figure>" for plot in found if plot)
    if not figures:
        return ""
    way = "Up" if table.higher_is_better else "Down"
    words = (
        f"{way} and to the left is better. Dashed: the best that each cost buys. Bars: 95 % intervals. "
        "Each number is a row's."
    )
    return f'<h2>Quality against cost</h2>\n<p class="sub">{words}</p>\n<div class="plots">{figures}</div>\n'


def _curves(table: Table) -> str:
    found = curves(table)
    if not found:
        return ""
    return f'<h2>Learning curves</h2>\n<p class="sub">Training loss, the mean of the seeds.</p>\n{found}\n'


def _said(text: object) -> str:
    return html.escape(str(text), quote=True)


def _table(table: Table) -> str:
    known = columns(table)
    heads = "".join(
        f'<th scope="col" tabindex="0" title="{_said(column.words)}">{_said(column.name)}</th>'
        for column in known
    )  # fmt: skip
    numbers = {row.row: number for number, row in enumerate(table.rows)}
    rows = "".join(_line(row, numbers[row.row], known) for row in table.ordered)
    return f'<table id="rows"><thead><tr><th>#</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _line(row: TableRow, number: int, known: list[Column]) -> str:
    kind = {"best": "best", "failed": "failed", "": ""}.get(row.note, "near")
    dot = f'<span class="dot" style="background:{colour(number)}"></span>'
    cells = [f'<td data-value="{number + 1}">{number + 1}</td>']
    for index, column in enumerate(known):
        value = column.value(row)
        inside = (
            f'{dot}<a href="#row-{number + 1}">{_said(row.row)}</a>'
            if index == 0
            else _said(column.shown(row))
        )
        said = ' class="said"' if column.name == "note" else ""
        cells.append(f'<td{said} data-value="{"" if value is None else _said(value)}">{inside}</td>')
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _key(table: Table) -> str:
    failed = sum(row.status == "failed" for row in table.rows)
    noise = "its interval and the best one's overlap, so these seeds cannot tell the two apart."
    parts = [
        f"<b>best</b>: the best mean. <b>inside the noise of the best</b>: {noise}",
        "<b>edge</b>: the smallest or largest rate that was tried, so a better one may lie beyond.",
    ]
    if len(table.seeds) == 1:
        parts.append("With one seed there is no interval.")
    if failed:
        parts.append(f"{failed} of {len(table.rows)} rows failed; each says why.")
    return f'<p class="sub">{" ".join(parts)}</p>'


def _details(table: Table, row: TableRow, number: int) -> str:
    parts = [f"<p>{_said(row.place)}</p>"]
    if row.reason:
        parts.append(f"<p>{_said(row.reason)}</p>")
    if row.log:
        parts.append(f"<pre>{_said(row.log)}</pre>")
    if row.rates:
        cells = [(f"{tried.rate:g}" + (" (chosen)" if tried.rate == row.learning_rate else ""),
                  tried.reason or f"{tried.value:.5g}") for tried in row.rates]  # fmt: skip
        parts.append(_small(("learning rate", f"{table.metric} on validation rows"), cells))
    if row.seeds:
        names = list(dict.fromkeys(name for seed in row.seeds for name in seed.scores))
        seeds = [
            (str(seed.seed), *(_score(seed.scores.get(name)) for name in names), seed.reason)
            for seed in row.seeds
        ]
        parts.append(_small(("seed", *names, ""), seeds))
    if row.row in table.yaml:
        parts.append(f"<p>{_said(row.repeat)}</p><pre>{_said(table.yaml[row.row])}</pre>")
    dot = f'<span class="dot" style="background:{colour(number)}"></span>'
    head = f"{number + 1}. {dot}{_said(row.row)}" + (f" ({_said(row.note)})" if row.note else "")
    return f'<details id="row-{number + 1}"><summary>{head}</summary>{"".join(parts)}</details>\n'


def _score(score: dict[str, object] | None) -> str:
    if score is None:
        return ""
    value = score["value"]
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _small(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{_said(name)}</th>" for name in heads)
    lines = "".join(f"<tr>{''.join(f'<td>{_said(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
