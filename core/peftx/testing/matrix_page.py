"""The matrix as one HTML page without anything from elsewhere: a heat map by hook, each cell with its reason."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from typing import Any

from peftx.testing.matrix import Cell, Matrix

WORDS = {
    "works": "works",
    "refused": "refused before anything is built",
    "other-model": "not for this model",
    "failed": "failed",
}
SIGNS = {"works": "", "refused": "×", "other-model": "–", "failed": "!"}

_STYLE = """
:root { --works: #2a9d6f; --refused: #e9b44c; --other: #b9c0c8; --failed: #d1495b; --ink: #1c2228; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --paper: #14181c; --other: #4a525b; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 1px; margin: 1rem 0; }
th { font-weight: 400; font-size: .75rem; text-align: right; padding: 0 .4rem; white-space: nowrap; }
thead th { height: 9.5rem; vertical-align: bottom; padding: 0; text-align: left; }
thead th span { writing-mode: vertical-rl; transform: rotate(180deg); padding: .3rem 0; }
tr.first th, tr.first td { border-top: 3px solid var(--paper); }
td { width: 1.25rem; min-width: 1.25rem; height: 1.25rem; text-align: center; font-size: .7rem; line-height: 1;
  color: #1c2228; cursor: pointer; border-radius: 2px; padding: 0; }
td.left, th.left { border-left: 3px solid var(--paper); }
td:focus, td:hover { outline: 2px solid var(--ink); }
.works { background: var(--works); } .refused { background: var(--refused); }
.other-model { background: var(--other); } .failed { background: var(--failed); color: #fff; }
#why { min-height: 5.5rem; border-left: 3px solid var(--other); padding: .3rem .9rem; }
.key span { display: inline-block; width: .9rem; height: .9rem; border-radius: 2px; margin: 0 .35rem 0 1rem;
  vertical-align: -1px; }
"""

_SCRIPT = """
const data = (id) => JSON.parse(document.getElementById(id).textContent);
const cells = data('cells'), words = data('words');
const why = document.getElementById('why');
function show(td) {
  const c = cells[+td.dataset.i]; why.textContent = '';
  const head = document.createElement('b'); head.textContent = c.first + ', then ' + c.second + ': ' + words[c.outcome];
  why.append(head);
  const line = (text) => { const p = document.createElement('div'); p.textContent = text; why.append(p); };
  if (c.reason) line(c.reason);
  if (c.claims.length) line('claims: ' + c.claims.join(', '));
  if (c.order.length) line('this order works: ' + c.order.join(', '));
  const done = 'trained, saved, loaded bit for bit, generated, on a tiny ';
  if (c.outcome === 'works') line(done + c.arch + ' (' + c.seconds.toFixed(1) + ' s)');
}
document.querySelectorAll('td[data-i]').forEach(td => {
  td.addEventListener('mouseenter', () => show(td)); td.addEventListener('focus', () => show(td)); });
"""


def to_json(matrix: Matrix) -> str:
    """Plugins, their hooks, and every cell."""
    return json.dumps(
        {
            "plugins": matrix.plugins,
            "hooks": matrix.hooks,
            "counts": {name: matrix.count(name) for name in WORDS},  # type: ignore[arg-type]
            "cells": [asdict(cell) for cell in matrix.cells],
        },
        indent=1,
    )


def page(matrix: Matrix) -> str:
    """The whole page."""
    at = {(cell.first, cell.second): (index, cell) for index, cell in enumerate(matrix.cells)}
    left = {name for name in matrix.plugins if _begins(matrix, name)}
    heads = "".join(
        f'<th scope="col" class="{"left" if name in left else ""}"><span>{html.escape(name)}</span></th>'
        for name in matrix.plugins
    )
    rows = []
    for first in matrix.plugins:
        cells = "".join(_cell(at.get((first, second)), second in left) for second in matrix.plugins)
        hook = f"{matrix.hooks[first]}: " if first in left else ""
        name = f'<th scope="row"><small>{html.escape(hook)}</small>{html.escape(first)}</th>'
        rows.append(f'<tr class="{"first" if first in left else ""}">{name}{cells}</tr>')
    key = "".join(
        f'<span class="{name}"></span>{word} ({matrix.count(name)})'  # type: ignore[arg-type]
        for name, word in WORDS.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>peftx: which plugins go together</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>Which plugins go together</h1>\n"
        "<p>The row's plugin stands first in the stack, the column's second. Every pair was built on a tiny model, "
        "trained for some steps, saved, loaded and run; or refused by its claims. Point at a cell for its reason.</p>\n"
        f'<p class="key">{key}</p>\n'
        '<div id="why" aria-live="polite">The reason of the cell under the pointer stands here.</div>\n'
        f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
        f'<script type="application/json" id="cells">{_embedded([asdict(cell) for cell in matrix.cells])}</script>\n'
        f'<script type="application/json" id="words">{_embedded(WORDS)}</script>\n'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _begins(matrix: Matrix, name: str) -> bool:
    """Is it the first plugin of its hook."""
    return next(other for other in matrix.plugins if matrix.hooks[other] == matrix.hooks[name]) == name


def _cell(found: tuple[int, Cell] | None, left: bool) -> str:
    edge = " left" if left else ""
    if found is None:
        return f'<td class="{edge.strip()}"></td>'
    index, cell = found
    title = html.escape(
        f"{cell.first}, {cell.second}: {WORDS[cell.outcome]}. {cell.reason}".strip(), quote=True
    )
    return f'<td tabindex="0" class="{cell.outcome}{edge}" data-i="{index}" title="{title}">{SIGNS[cell.outcome]}</td>'


def _embedded(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value).replace("<", "\\u003c")
