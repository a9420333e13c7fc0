"""Put what `peftx compare` left among the results: a table, a plot, and which rows the base has seen.

    peftx compare benchmarks/leaderboards/predgen.yaml -o out
    python benchmarks/leaderboards/publish.py benchmarks/leaderboards/predgen.yaml out --title "PredGen on AG News"

leaves benchmarks/results/predgen.json, .md and .png; with `--page` .html too, the page that the comparison wrote. Its
seconds are those of processes side by side, and of whatever else the machine did.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peftx.composition.registry import Registry
from peftx_spec.compare_load import load_compare

sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:2]]
from bases import seen  # noqa: E402
from rows import SOURCES  # noqa: E402

RESULTS = Path(__file__).parents[1] / "results"
KEPT = (
    "row",
    "value",
    "std",
    "low",
    "high",
    "note",
    "learning_rate",
    "edge",
    "steps",
    "trained",
    "bundle_bytes",
    "memory_bytes",
    "train_seconds",
    "rates",
    "seeds",
)
"""What is kept of a row; losses and logs are long."""


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a method, the best first."""
    lines = [
        f"| method | {found['metric']} | 95 % interval | rate | trained | bundle | peak memory | training | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in by_value(found):
        spread = "" if row["std"] is None else f"\u00a0±\u00a0{row['std']:.3f}"
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}" + ", edge" * row["edge"]
        cells = (
            row["row"],
            f"{row['value']:.3f}{spread}",
            interval,
            rate,
            f"{row['trained']:,}",
            f"{row['bundle_bytes'] / 1e3:,.1f}\u00a0kB",
            f"{row['memory_bytes'] / 1e6:,.0f} MB",
            "" if row["train_seconds"] is None else f"{row['train_seconds']:.1f} s",
            row["note"],
        )
        lines.append("| " + " | ".join(cells).rstrip() + " |")
    return "\n".join(lines)


def by_value(found: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(found["rows"], key=lambda row: row["value"], reverse=found["higher_is_better"])


def draw(found: dict[str, Any], path: Path) -> None:
    """Mean and standard deviation, a line a method; and beside it against numbers trained, where the best of each size
    are joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = by_value(found)[::-1]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 1.2 + 0.32 * len(rows)), layout="constrained", sharex=False
    )
    for place, row in enumerate(rows):
        left.errorbar(row["value"], place, xerr=row["std"] or 0, color="#2f6db3", marker="o", capsize=3)
    left.set_yticks(range(len(rows)), [row["row"] for row in rows])
    left.set_xlabel(f"{found['metric']}, {len(found['seeds'])} seeds, ± standard deviation")
    left.grid(axis="x", alpha=0.3)
    sign = 1 if found["higher_is_better"] else -1
    front, best = [], None
    for row in sorted(rows, key=lambda row: (row["trained"], -sign * row["value"])):
        if best is None or sign * row["value"] > best:
            front.append(row)
            best = sign * row["value"]
    right.scatter([row["trained"] for row in rows], [row["value"] for row in rows], color="#9aa7b4", s=22)
    right.plot(
        [row["trained"] for row in front], [row["value"] for row in front], color="#2f6db3", marker="o"
    )
    for row in front:
        right.annotate(
            row["row"],
            (row["trained"], row["value"]),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
        )
    right.set_xscale("log")
    right.margins(x=0.15)
    right.set_xlabel("numbers trained")
    right.set_ylabel(found["metric"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    spec: Annotated[Path, typer.Argument(help="the comparison")],
    folder: Annotated[Path, typer.Argument(help="what it left")],
    title: Annotated[str, typer.Option("--title", help="of the page")],
    output: Annotated[Path, typer.Option("--output", "-o")] = RESULTS,
    page: Annotated[bool, typer.Option("--page", help="keep the page too")] = False,
    halted: Annotated[
        bool, typer.Option("--halted", help="jobs were halted for other work: tell no seconds, keep no page")
    ] = False,
) -> None:
    """Write NAME.json, NAME.md and NAME.png for NAME.yaml."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    failed = [row["row"] for row in found["rows"] if row["status"] != "done"]
    if failed:
        sys.exit(f"rows that failed: {', '.join(failed)}; see {folder / 'index.html'}")
    pipelines = [row.pipeline for row in load_compare(spec, catalogue=Registry()).rows if row.pipeline]
    pipeline = next(
        one for one in pipelines if one.data.train
    )  # a method that does not train has no such rows
    train, test = (
        SOURCES[Path(part.path).stem] for part in (pipeline.data.train, pipeline.data.eval) if part
    )
    found["base"] = seen(pipeline.model.id, training=train, test=test)
    found["model"] = Path(found["model"]).name  # where a folder lies is this machine's
    for row in found["rows"]:
        row["seeds"] = [seed["value"] for seed in row["seeds"]]
        row["train_seconds"] = None if halted else row["train_seconds"]
    found["rows"] = [{name: row[name] for name in KEPT} for row in found["rows"]]
    name = spec.stem
    (output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    said = (
        f"`{spec.name}`: {found['budget']} a row; mean ± standard deviation over {len(found['seeds'])} seeds; each "
        f"rate the best of its grid on validation rows, {found['validation']}."
    )
    if halted:
        said += " Jobs were halted for other work, so that no seconds are told."
    elif page:
        said += f" [Page with all plots]({name}.html)."
    text = f"# {title}\n\n{said}\n\n{found['base']}\n\n{table(found)}\n\n![{found['metric']}]({name}.png)\n"
    (output / f"{name}.md").write_text(text, encoding="utf-8")
    draw(found, output / f"{name}.png")
    if page and not halted:
        here = f"{Path(spec).resolve().parent}/"  # of this machine
        shown = (folder / "index.html").read_text(encoding="utf-8").replace(here, "")
        (output / f"{name}.html").write_text(shown, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
