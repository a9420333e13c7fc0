"""The matrix as one HTML page without anything from elsewhere: a map of all pairs to zoom, filter and search."""

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

_STYLE = """
:root { --works: #2a9d6f; --refused: #e9b44c; --other-model: #b9c0c8; --failed: #d1495b; --none: #eef0f2;
  --ink: #1c2228; --paper: #fff; --line: #d5dade; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --paper: #14181c; --other-model: #4a525b;
  --none: #20262c; --line: #333b43; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1.5rem auto;
  max-width: 96rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; }
form { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; margin: .8rem 0; }
label { display: grid; font-size: .8rem; }
input, select, button { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: 4px; padding: .2rem .5rem; }
#map { position: relative; border: 1px solid var(--line); height: 70vh; overflow: auto; }
#map canvas { position: sticky; top: 0; left: 0; display: block; }
#why { min-height: 6rem; border-left: 3px solid var(--line); padding: .3rem .9rem; margin: .8rem 0; }
.key span { display: inline-block; width: .9rem; height: .9rem; border-radius: 2px; margin: 0 .35rem 0 1rem;
  vertical-align: -1px; }
.works { background: var(--works); } .refused { background: var(--refused); }
.other-model { background: var(--other-model); } .failed { background: var(--failed); }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid var(--line); padding: .2rem .6rem;
  text-align: left; vertical-align: top; overflow-wrap: anywhere; }
"""

_SCRIPT = """
const D = JSON.parse(document.getElementById('data').textContent), N = D.plugins.length;
const $ = (id) => document.getElementById(id), map = $('map'), canvas = $('canvas'), g = canvas.getContext('2d');
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
let shown = [], size = 0, chosen = null;
const cellAt = (i, j) => D.cells[i * N + j];
const add = (to, tag, text) => { const e = document.createElement(tag); e.textContent = text; to.append(e); return e; };
function filter() {
  const hook = $('hook').value, family = $('family').value, word = $('word').value.trim().toLowerCase();
  const fits = (i) => (!hook || D.hooks[i] === hook) && (!family || D.families[i] === family);
  shown = [...Array(N).keys()].filter(fits);
  const rows = shown.filter((i) => D.plugins[i].toLowerCase().includes(word));
  shown = { rows: rows.length ? rows : [], columns: shown };
  $('count').textContent = shown.rows.length + ' x ' + shown.columns.length + ' of ' + N + ' plugins';
  layout();
}
const LEFT = 150, TOP = 150;
function layout() {
  const least = Math.max(2, Math.min(18, (map.clientWidth - LEFT) / shown.columns.length));
  size = least * Number($('zoom').value);
  $('space').style.width = LEFT + size * shown.columns.length + 'px';
  $('space').style.height = TOP + size * shown.rows.length + 'px';
  draw();
}
function draw() {
  const w = map.clientWidth, h = map.clientHeight, dpr = window.devicePixelRatio || 1;
  canvas.width = w * dpr; canvas.height = h * dpr; canvas.style.width = w + 'px'; canvas.style.height = h + 'px';
  g.setTransform(dpr, 0, 0, dpr, 0, 0); g.clearRect(0, 0, w, h);
  const x0 = map.scrollLeft, y0 = map.scrollTop, gap = size > 5 ? 1 : 0;
  const colours = { w: css('works'), r: css('refused'), o: css('other-model'), f: css('failed'), ' ': css('none') };
  const first = (v) => Math.max(0, Math.floor(v / size)), last = (v, n) => Math.min(n, Math.ceil(v / size));
  for (let r = first(y0); r < last(y0 + h - TOP, shown.rows.length); r++)
    for (let c = first(x0); c < last(x0 + w - LEFT, shown.columns.length); c++) {
      const cell = cellAt(shown.rows[r], shown.columns[c]);
      g.fillStyle = colours[cell ? cell[0] : ' '];
      g.fillRect(LEFT + c * size - x0, TOP + r * size - y0, size - gap, size - gap);
      if (chosen && chosen[0] === shown.rows[r] && chosen[1] === shown.columns[c]) {
        g.strokeStyle = css('ink'); g.lineWidth = 2;
        g.strokeRect(LEFT + c * size - x0, TOP + r * size - y0, size, size);
      }
    }
  g.fillStyle = css('paper'); g.fillRect(0, 0, w, TOP); g.fillRect(0, 0, LEFT, h);
  g.fillStyle = css('ink'); g.font = '11px system-ui, sans-serif'; g.textBaseline = 'middle';
  const every = Math.max(1, Math.ceil(12 / size));
  g.textAlign = 'right';
  for (let r = first(y0); r < last(y0 + h - TOP, shown.rows.length); r++)
    if (r % every === 0) { const y = TOP + (r + .5) * size - y0;
      if (y > TOP) g.fillText(D.plugins[shown.rows[r]].slice(0, 24), LEFT - 6, y); }
  g.textAlign = 'left';
  for (let c = first(x0); c < last(x0 + w - LEFT, shown.columns.length); c++)
    if (c % every === 0) { const x = LEFT + (c + .5) * size - x0;
      if (x > LEFT) { g.save(); g.translate(x, TOP - 6); g.rotate(-Math.PI / 2);
        g.fillText(D.plugins[shown.columns[c]].slice(0, 24), 0, 0); g.restore(); } }
  if (!shown.rows.length) { g.textAlign = 'left'; g.fillText('no plugin fits', LEFT, TOP + 20); }
}
function at(event) {
  const box = canvas.getBoundingClientRect();
  const x = event.clientX - box.left - LEFT, y = event.clientY - box.top - TOP;
  if (x < 0 || y < 0) return null;
  const i = shown.rows[Math.floor((y + map.scrollTop) / size)];
  const j = shown.columns[Math.floor((x + map.scrollLeft) / size)];
  return i === undefined || j === undefined ? null : [i, j];
}
function show(pair) {
  const why = $('why'); why.textContent = '';
  const names = D.plugins[pair[0]] + ', then ' + D.plugins[pair[1]], cell = cellAt(...pair);
  if (!cell) { add(why, 'b', names + ': not tried'); return; }
  add(why, 'b', names + ': ' + D.words[cell[0]]);
  if (cell[1] !== null) add(why, 'div', D.reasons[cell[1]]);
  if (cell[2].length) add(why, 'div', 'claims: ' + cell[2].join(', '));
  if (cell[3].length) add(why, 'div', 'this order works: ' + cell[3].join(', '));
  if (cell[4] !== null) add(why, 'div', 'trained, saved, loaded bit for bit and run on a tiny ' + cell[5]
    + ', in the stack ' + D.stacks[cell[4]]);
}
canvas.addEventListener('click', (e) => { const p = at(e); if (p) { chosen = p; show(p); draw(); } });
canvas.addEventListener('mousemove', (e) => { const p = at(e); canvas.title = p
  ? D.plugins[p[0]] + ', then ' + D.plugins[p[1]] : ''; });
canvas.tabIndex = 0;
canvas.addEventListener('keydown', (e) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
  if (!step) return;
  e.preventDefault();
  const move = (list, now, by) => list[Math.max(0, Math.min(list.length - 1, list.indexOf(now) + by))];
  chosen = chosen ? [move(shown.rows, chosen[0], step[0]), move(shown.columns, chosen[1], step[1])]
    : [shown.rows[0], shown.columns[0]];
  show(chosen); draw();
});
map.addEventListener('scroll', draw); window.addEventListener('resize', layout);
for (const id of ['hook', 'family', 'word', 'zoom']) $(id).addEventListener('input', id === 'zoom' ? layout : filter);
filter();
"""


def to_json(matrix: Matrix) -> str:
    """Plugins, their hooks and families, every cell, and what fails together."""
    return json.dumps(
        {
            "plugins": matrix.plugins,
            "hooks": matrix.hooks,
            "families": matrix.families,
            "counts": {name: matrix.count(name) for name in WORDS},  # type: ignore[arg-type]
            "together": [asdict(group) for group in matrix.together],
            "cells": [asdict(cell) for cell in matrix.cells],
        },
        indent=1,
    )


def page(matrix: Matrix) -> str:
    """The whole page."""
    key = "".join(
        f'<span class="{name}"></span>{word} ({matrix.count(name):,})'  # type: ignore[arg-type]
        for name, word in WORDS.items()
    )
    options = {
        "hook": sorted(set(matrix.hooks.values()) - {""}),
        "family": sorted(set(matrix.families.values()) - {""}),
    }
    selects = "".join(
        f'<label>{name}<select id="{name}"><option value="">all</option>'
        + "".join(f"<option>{html.escape(value)}</option>" for value in values)
        + "</select></label>"
        for name, values in options.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>peftx: which plugins go together</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>Which plugins go together</h1>\n"
        "<p>The row's plugin stands first in the stack, the column's second. Every pair stood in a stack that was "
        "built on a tiny model, trained for some steps, saved, loaded and run; or is refused by its claims. Click a "
        "cell, or move with the arrow keys, for its reason.</p>\n"
        f'<p class="key">{key}</p>\n<form onsubmit="return false">{selects}'
        '<label>rows with<input id="word" type="search" placeholder="part of a name"></label>'
        '<label>zoom<input id="zoom" type="range" min="1" max="8" step="0.5" value="1"></label>'
        '<output id="count"></output></form>\n'
        '<div id="map"><canvas id="canvas" aria-label="map of all pairs"></canvas>'
        '<div id="space" style="position:absolute;top:0;left:0;pointer-events:none"></div></div>\n'
        '<div id="why" aria-live="polite">The reason of the chosen cell stands here.</div>\n'
        f"{_listed(matrix)}"
        f'<script type="application/json" id="data">{_embedded(_compact(matrix))}</script>\n'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _listed(matrix: Matrix) -> str:
    """What failed, and what was refused of more than two, to be read without a script too."""
    failed = [cell for cell in matrix.cells if cell.outcome == "failed"]
    rows = [(", ".join((cell.first, cell.second)), cell.reason) for cell in failed]
    rows += [(", ".join(group.fault), group.reason) for group in matrix.failing]
    refused = [(", ".join(group.fault), group.reason) for group in matrix.together if group.refused]
    return _table("What fails", rows) + _table("Refused together, though every two of them work", refused)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = "".join(
        f"<tr><td>{html.escape(names)}</td><td>{html.escape(reason)}</td></tr>" for names, reason in rows
    )
    return f"<h2>{title}</h2>\n<table><tr><th>stack</th><th>reason</th></tr>{lines}</table>\n"


def _compact(matrix: Matrix) -> dict[str, Any]:
    """Cells by row and column, each [letter, reason, claims, order, stack, model]; texts stand once."""
    reasons: dict[str, int] = {}
    stacks: dict[str, int] = {}

    def short(cell: Cell | None) -> list[Any] | None:
        if cell is None:
            return None
        reason = reasons.setdefault(cell.reason, len(reasons)) if cell.reason else None
        stack = stacks.setdefault(", ".join(cell.stack), len(stacks)) if cell.stack else None
        return [cell.outcome[0], reason, cell.claims, cell.order, stack, cell.arch]

    at = {(cell.first, cell.second): cell for cell in matrix.cells}
    cells = [short(at.get((first, second))) for first in matrix.plugins for second in matrix.plugins]
    return {
        "plugins": matrix.plugins,
        "hooks": [matrix.hooks[name] for name in matrix.plugins],
        "families": [matrix.families.get(name, "") for name in matrix.plugins],
        "words": {name[0]: word for name, word in WORDS.items()},
        "cells": cells,
        "reasons": list(reasons),
        "stacks": list(stacks),
    }


def _embedded(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
