"""Put what `peftx compare` left among the results: a table, a plot, and which rows the base has seen.

    peftx compare benchmarks/leaderboards/predgen.yaml -o out
    python benchmarks/leaderboards/publish.py benchmarks/leaderboards/predgen.yaml out

leaves benchmarks/results/predgen.json, .md and .png. Seconds are left out: they are of whatever else the machine did.
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
    "rates",
    "seeds",
)
"""What is kept of a row; losses and logs are long, and costs are the machine's."""


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a method, in the order of the file."""
    lines = [
        f"| method | rate | trained | {found['metric']} | 95 % interval | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        spread = "" if row["std"] is None else f" ± {row['std']:.3f}"
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}" + ", edge" * row["edge"]
        cells = (
            row["row"],
            rate,
            f"{row['trained']:,}",
            f"{row['value']:.3f}{spread}",
            interval,
            row["note"],
        )
        lines.append("| " + " | ".join(cells).rstrip() + " |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Mean and standard deviation, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = found["rows"][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.4 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        axes.errorbar(row["value"], place, xerr=row["std"] or 0, color=f"C{place}", marker="o", capsize=3)
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
    axes.set_xlabel(f"{found['metric']}, {len(found['seeds'])} seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    spec: Annotated[Path, typer.Argument(help="the comparison")],
    folder: Annotated[Path, typer.Argument(help="what it left")],
    output: Annotated[Path, typer.Option("--output", "-o")] = RESULTS,
) -> None:
    """Write NAME.json, NAME.md and NAME.png for NAME.yaml."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    failed = [row["row"] for row in found["rows"] if row["status"] != "done"]
    if failed:
        sys.exit(f"rows that failed: {', '.join(failed)}; see {folder / 'index.html'}")
    pipeline = next(row.pipeline for row in load_compare(spec, catalogue=Registry()).rows if row.pipeline)
    train, test = (
        SOURCES[Path(part.path).stem] for part in (pipeline.data.train, pipeline.data.eval) if part
    )
    found["base"] = seen(pipeline.model.id, training=train, test=test)
    found["model"] = Path(found["model"]).name  # where a folder lies is this machine's
    for row in found["rows"]:
        row["seeds"] = [seed["value"] for seed in row["seeds"]]
    found["rows"] = [{name: row[name] for name in KEPT} for row in found["rows"]]
    name = spec.stem
    (output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    said = (
        f"`{spec.name}`: {found['budget']} a row; mean ± standard deviation over {len(found['seeds'])} seeds; each "
        f"rate the best of its grid on validation rows, {found['validation']}."
    )
    page = f"# {name}\n\n{said}\n\n{found['base']}\n\n{table(found)}\n\n![{found['metric']}]({name}.png)\n"
    (output / f"{name}.md").write_text(page, encoding="utf-8")
    draw(found, output / f"{name}.png")
    print(page)


if __name__ == "__main__":
    typer.run(main)
