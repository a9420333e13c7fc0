"""A search as one HTML page: the front, each cost against quality, all points, and the YAML of those on the front."""

from __future__ import annotations

from peftx.comparing.page import interval, quality, remark
from peftx.comparing.plots import pareto
from peftx.comparing.sheet import UNITS, WITHIN, Column, cost, dot, said, score, small, sortable, whole_page
from peftx.comparing.table import COSTS, TableRow
from peftx.searching.table import PointRow, SearchTable


def page(table: SearchTable) -> str:
    """The whole page."""
    front = [_details(table, row, number) for number, row in enumerate(table.rows) if row in table.front]
    others = [_details(table, row, number) for number, row in enumerate(table.rows) if row not in table.front]
    numbers = {row.row: number for number, row in enumerate(table.rows)}
    kinds = {"front": "best", "failed": "failed", "": ""}
    rows = [(numbers[row.row], row, kinds.get(row.note, "")) for row in ordered(table)]
    rest = f"<h2>All other points</h2>\n{''.join(others)}" if others else ""
    body = (
        f'<p class="sub">{_setting(table)}</p>\n<div class="wide">{sortable(columns(table), rows)}</div>\n'
        f'<p class="sub">{_key(table)}</p>\n{_plots(table)}'
        f"<h2>The front, and how to repeat it</h2>\n{''.join(front)}{rest}{_left_out(table)}"
    )
    return whole_page("peftx: search", f"Stacks searched by {table.metric}", body)


def ordered(table: SearchTable) -> list[TableRow]:
    """The front first, then the rest, each with the best first."""
    return sorted(table.ordered, key=lambda row: row.note != "front")


def columns(table: SearchTable) -> list[Column]:
    return [
        Column("point", "its number in the plots, and its name", lambda row: row.row, lambda row: ""),
        Column(f"{table.metric} (validation)", "what points are chosen by", lambda row: row.value, quality),
        Column(
            f"{table.metric} (test)",
            "of the front alone: mean over the seeds ± standard deviation",
            _test,
            tested,
        ),
        Column(
            "95 % interval",
            "of the test's mean, by Student's t; of perplexity's logarithm",
            _test_low,
            test_interval,
        ),
        Column("note", "what the numbers say", lambda row: row.note, remark),
        *map(cost, COSTS),
    ]


def _test(row: TableRow) -> float | None:
    return row.test_value if isinstance(row, PointRow) else None


def _test_low(row: TableRow) -> float | None:
    return row.test_low if isinstance(row, PointRow) else None


def tested(row: TableRow) -> str:
    return quality(_as_tested(row))


def test_interval(row: TableRow) -> str:
    return interval(_as_tested(row))


def _as_tested(row: TableRow) -> TableRow:
    assert isinstance(row, PointRow)
    return TableRow(row.row, row.method, row.place, row.status, value=row.test_value, std=row.test_std,
                    low=row.test_low, high=row.test_high)  # fmt: skip


def _setting(table: SearchTable) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    limits = ", ".join(f"{COSTS[name]} at most {UNITS[name](limit)}" for name, limit in table.limits.items())
    way = "higher" if table.higher_is_better else "lower"
    device = "an accelerator" if table.device == "accelerator" else "the CPU"
    return said(
        f"{table.model}; {table.budget} by {table.sampler}; {way} is better. "
        f"Points are chosen on validation rows ({table.validation}) by {', '.join(table.objectives)}"
        f"{'; limits: ' + limits if limits else ''}. Run on {device}, {table.threads} "
        f"thread{'s' if table.threads > 1 else ''} a job; {versions}."
    )


def _key(table: SearchTable) -> str:
    seeds = ", ".join(map(str, table.seeds))
    trained = f"on all training rows with seed{'s' if len(table.seeds) > 1 else ''} {seeds}"
    noise = "Costs count in steps of a tenth."
    parts = [
        f"<b>front</b>: no other point is better in one of what is searched by and worse in none. {noise}",
        f"Test figures are those of the front alone, trained {trained}; nothing was chosen by them.",
    ]
    if any(row.base_within for row in table.rows):
        parts.append(WITHIN)
    if not table.front:
        parts.append("<b>No point keeps the limits.</b>")
    return " ".join(parts)


def _plots(table: SearchTable) -> str:
    found = [pareto(table, name, words, UNITS[name], kept=_kept) for name, words in COSTS.items()]
    figures = "".join(f"<figure>{plot}</figure>" for plot in found if plot)
    if not figures:
        return ""
    way = "Up" if table.higher_is_better else "Down"
    words = (
        f"On validation rows, of the points that keep the limits. {way} and to the left is better. Dashed: the best "
        "that each cost buys. Each number is a point's."
    )
    return f'<h2>Quality against cost</h2>\n<p class="sub">{words}</p>\n<div class="plots">{figures}</div>\n'


def _kept(row: TableRow) -> bool:
    return row.status == "done"


def _details(table: SearchTable, row: TableRow, number: int) -> str:
    assert isinstance(row, PointRow)
    parts = [
        f"<p>{said(row.place)}; trial{'s' if len(row.trials) > 1 else ''} {', '.join(map(str, row.trials))}</p>"
    ]
    if row.reason:
        parts.append(f"<p>{said(row.reason)}</p>")
    if row.seeds:
        names = list(dict.fromkeys(name for seed in row.seeds for name in seed.scores))
        lines = [
            (str(seed.seed), *(score(seed.scores.get(name)) for name in names), seed.reason)
            for seed in row.seeds
        ]
        parts.append(small(("seed", *names, ""), lines))
    if row.row in table.yaml:
        parts.append(f"<p>{said(row.repeat)}</p><pre>{said(table.yaml[row.row])}</pre>")
    head = f"{number + 1}. {dot(number)}{said(row.row)}" + (f" ({said(row.note)})" if row.note else "")
    return f'<details id="row-{number + 1}"><summary>{head}</summary>{"".join(parts)}</details>\n'


def _left_out(table: SearchTable) -> str:
    """What was never run, and why."""
    if not (table.dropped or table.refused):
        return ""
    stacks = small(("stack", "why it cannot be built"), list(table.dropped.items())) if table.dropped else ""
    reasons = list(dict.fromkeys(table.refused))
    points = small(("why",), [(reason,) for reason in reasons]) if reasons else ""
    told = (
        f"<p>{len(table.refused)} points were drawn and refused before they ran.</p>" if table.refused else ""
    )
    return f"<h2>Never run</h2>\n{stacks}{told}{points}\n"
