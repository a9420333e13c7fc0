"""A comparison as one HTML page without anything from elsewhere; all of it can be read without a script."""

from __future__ import annotations

from peftx.comparing.plots import curves, pareto
from peftx.comparing.sheet import UNITS, WITHIN, Column, cost, dot, said, score, small, sortable, whole_page
from peftx.comparing.table import COSTS, Other, Table, TableRow
from peftx.quantities import between, measure, plain

LONGEST_REASON = 160
"""Characters in the table; all of it stands below."""


def columns(table: Table) -> list[Column]:
    return [
        Column("row", "its number in the plots, and its name", lambda row: row.row, lambda row: ""),
        Column(table.metric, "mean over the seeds ± standard deviation", lambda row: row.value, quality),
        Column(
            "95 % interval",
            "of the mean, by Student's t; of perplexity's logarithm",
            lambda row: row.low,
            interval,
        ),
        Column("note", "what the numbers say", lambda row: row.note, remark),
        Column("learning rate", "chosen on validation rows", lambda row: row.learning_rate, rate),
        *map(cost, COSTS),
    ]


def quality(row: TableRow) -> str:
    if row.value is None:
        return ""
    return plain(row.value, 4) + ("" if row.std is None else f" ± {plain(row.std, 2)}")


def interval(row: TableRow) -> str:
    return between(row.low, row.high)


def rate(row: TableRow) -> str:
    return "" if row.learning_rate is None else f"{row.learning_rate:g}" + (" edge" if row.edge else "")


def remark(row: TableRow) -> str:
    short = row.reason if len(row.reason) <= LONGEST_REASON else f"{row.reason[:LONGEST_REASON]}..."
    return f"failed: {short}" if row.status == "failed" else row.note


def page(table: Table) -> str:
    """The whole page."""
    rows = "".join(_details(table, row, number) for number, row in enumerate(table.rows))
    body = (
        f'<p class="sub">{_setting(table)}</p>\n<div class="wide">{_table(table)}</div>\n{_key(table)}\n'
        f"{_others(table)}{_plots(table)}{_curves(table)}<h2>Each row, and how to repeat it</h2>\n{rows}"
    )
    return whole_page("peftx: methods compared", f"Methods compared by {table.metric}", body)


def _setting(table: Table) -> str:
    """What all rows have in common."""
    seeds = ", ".join(map(str, table.seeds))
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    return said(
        f"{table.model}; {table.budget} a row; seed{'s' if len(table.seeds) > 1 else ''} {seeds}; "
        f"{'higher' if table.higher_is_better else 'lower'} is better. Rates are chosen on validation rows "
        f"({table.validation}), never on those that are measured. Run on "
        f"{'an accelerator' if table.device == 'accelerator' else 'the CPU'}, {table.threads} "
        f"thread{'s' if table.threads > 1 else ''} a job; {versions}."
    )


def others(table: Table) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and lines of what else was measured, the best row first; no line where that is nothing."""
    names = list(dict.fromkeys(name for row in table.ordered for name in row.others))
    rows = [row for row in table.ordered if row.others] if names else []
    return ("", *names), [(row.row, *(_other(row.others.get(name)) for name in names)) for row in rows]


def _other(found: Other | None) -> str:
    if found is None:
        return ""
    if found.std is None:
        return measure(found.mean, found.unit)
    return f"{plain(found.mean)} ± {plain(found.std, 2)} {found.unit}".rstrip()


def _others(table: Table) -> str:
    heads, rows = others(table)
    if not rows:
        return ""
    words = "Mean over the seeds ± standard deviation; nothing is chosen by these."
    found = small(heads, rows)
    return f'<h2>What else was measured</h2>\n<p class="sub">{words}</p>\n<div class="wide">{found}</div>\n'


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


def _table(table: Table) -> str:
    numbers = {row.row: number for number, row in enumerate(table.rows)}
    kinds = {"best": "best", "failed": "failed", "": ""}
    rows = [(numbers[row.row], row, kinds.get(row.note, "near")) for row in table.ordered]
    return sortable(columns(table), rows)


def _key(table: Table) -> str:
    failed = sum(row.status == "failed" for row in table.rows)
    noise = "its interval and the best one's overlap, so these seeds cannot tell the two apart."
    parts = [
        f"<b>best</b>: the best mean. <b>inside the noise of the best</b>: {noise}",
        "<b>edge</b>: the smallest or largest rate that was tried, so a better one may lie beyond.",
    ]
    if len(table.seeds) == 1:
        parts.append("With one seed there is no interval.")
    if any(row.base_within for row in table.rows):
        parts.append(WITHIN)
    if failed:
        parts.append(f"{failed} of {len(table.rows)} rows failed; each says why.")
    return f'<p class="sub">{" ".join(parts)}</p>'


def _details(table: Table, row: TableRow, number: int) -> str:
    parts = [f"<p>{said(row.place)}</p>"]
    if row.reason:
        parts.append(f"<p>{said(row.reason)}</p>")
    if row.log:
        parts.append(f"<pre>{said(row.log)}</pre>")
    if row.rates:
        cells = [
            (
                f"{tried.rate:g}{' (chosen)' * (tried.rate == row.learning_rate)}",
                tried.reason or plain(tried.value or 0),
            )
            for tried in row.rates
        ]
        parts.append(small(("learning rate", f"{table.metric} on validation rows"), cells))
    if row.seeds:
        names = list(dict.fromkeys(name for seed in row.seeds for name in seed.scores))
        seeds = [
            (str(seed.seed), *(score(seed.scores.get(name)) for name in names), seed.reason)
            for seed in row.seeds
        ]
        parts.append(small(("seed", *names, ""), seeds))
    if row.row in table.yaml:
        parts.append(f"<p>{said(row.repeat)}</p><pre>{said(table.yaml[row.row])}</pre>")
    head = f"{number + 1}. {dot(number)}{said(row.row)}" + (f" ({said(row.note)})" if row.note else "")
    return f'<details id="row-{number + 1}"><summary>{head}</summary>{"".join(parts)}</details>\n'
