"""What pages of results are made of: units, tables that sort, and the frame without anything from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftx.comparing.plots import colour
from peftx.comparing.table import COSTS, TableRow
from peftx.quantities import count, measure, size, time

_STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2228; background: #fff; margin: 2rem auto; max-width: 84rem;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
.sub { color: #56626e; margin: 0 0 1rem; }
.wide { overflow-x: auto; margin-bottom: .6rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
#rows { width: 100%; }
th, td { text-align: right; padding: .32rem .5rem; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2), td.said, #rows th.said { text-align: left; }
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


UNITS: dict[str, Callable[[float], str]] = {
    "trained": count,
    "bundle_bytes": size,
    "shipped_bytes": size,
    "memory_bytes": size,
    "train_seconds": time,
    "token_seconds": time,
}


@dataclass(frozen=True)
class Column:
    """Of the table: what it is called, what it means, how a row's value is sorted and shown."""

    name: str
    words: str
    value: Callable[[TableRow], float | str | None]
    shown: Callable[[TableRow], str]


MEANT = {
    "bundle_bytes": "on disk",
    "shipped_bytes": "on disk, of all that must be there to run: the weights of a base that is not in the bundle too",
}
"""What the name of a cost leaves open."""


def cost(name: str) -> Column:
    return Column(
        COSTS[name], MEANT.get(name, ""), lambda row: getattr(row, name), lambda row: paid(row, name)
    )


def paid(row: TableRow, name: str) -> str:
    """A cost of a row; of a bundle's size, whether the base is in it; of memory, that the system does not tell."""
    value = getattr(row, name)
    if value is None:
        return "not measured" if name == "memory_bytes" and row.value is not None else ""
    return UNITS[name](value) + (" with the base" if name == "bundle_bytes" and row.base_within else "")


WITHIN = (
    "<b>with the base</b>: the stack compresses, so its bundle holds the whole model. One without is loaded on its "
    f"base, which <i>{COSTS['shipped_bytes']}</i> counts too."
)


def said(text: object) -> str:
    return html.escape(str(text), quote=True)


def dot(number: int) -> str:
    """The colour of a row's number."""
    return f'<span class="dot" style="background:{colour(number)}"></span>'


def whole_page(title: str, heading: str, body: str) -> str:
    """All of it can be read without a script."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{said(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{said(heading)}</h1>\n{body}\n"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def sortable(known: Sequence[Column], rows: Sequence[tuple[int, TableRow, str]]) -> str:
    """The table of (number in the plots, row, its class), with a link from each row's name to its details."""
    heads = "".join(
        f'<th{_wide(column)} scope="col" tabindex="0" title="{said(column.words)}">{said(column.name)}</th>'
        for column in known
    )
    lines = "".join(_line(number, row, kind, known) for number, row, kind in rows)
    return f'<table id="rows"><thead><tr><th>#</th>{heads}</tr></thead><tbody>{lines}</tbody></table>'


def _line(number: int, row: TableRow, kind: str, known: Sequence[Column]) -> str:
    cells = [f'<td data-value="{number + 1}">{number + 1}</td>']
    for index, column in enumerate(known):
        value = column.value(row)
        name = f'{dot(number)}<a href="#row-{number + 1}">{said(row.row)}</a>'
        shown = said(column.shown(row)) if index else name
        cells.append(f'<td{_wide(column)} data-value="{"" if value is None else said(value)}">{shown}</td>')
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _wide(column: Column) -> str:
    return ' class="said"' if column.name == "note" else ""


def score(score: dict[str, object] | None) -> str:
    if score is None:
        return ""
    value = score["value"]
    return measure(value, str(score["unit"])) if isinstance(value, int | float) else str(value)


def small(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{said(name)}</th>" for name in heads)
    lines = "".join(f"<tr>{''.join(f'<td>{said(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
