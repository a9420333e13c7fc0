"""`compare`: methods beside each other, from one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from peftx_cli import failures, options

if TYPE_CHECKING:
    from peftx.comparing.run import State
    from peftx.comparing.table import Table, TableRow
    from peftx_cli.progress import ClosingReporter, Interrupts

File = Annotated[str, typer.Argument(metavar="FILE", help="the comparison as YAML: docs/compare.md")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="DIR", help="folder of the results; else <FILE>-compare"),
]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs", "-j", min=0, help="processes side by side; 0: one a core, or one on an accelerator"
    ),
]
Retry = Annotated[bool, typer.Option("--retry", help="run again what has failed")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        epilog=options.examples(
            "compare compare.yaml --jobs 2 --output results", "compare compare.yaml --retry --json"
        )
    )(compare)


def compare(
    file: File,
    output: Output = None,
    jobs: Jobs = 0,
    retry: Retry = False,
    ray: options.OnRay = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Train methods on the same rows with the same budget, and put them in one table: JSON, CSV and a page.

    Each method's learning rate is chosen on rows that are held out of the training data. What has been run is not run
    again: the same command goes on after an interruption. Exits with 1 when a row failed.
    """
    from pathlib import Path

    from peftx.composition.registry import Registry
    from peftx_spec.compare_load import load_compare

    registry = Registry()
    loaded = load_compare(file, catalogue=registry)
    folder = Path(output) if output is not None else Path(f"{Path(file).stem}-compare")

    from peftx.comparing.run import compare as carry_out
    from peftx.comparing.writing import to_json
    from peftx_cli.progress import Interrupts, reporter
    from peftx_cli.render import out, out_json

    with reporter() as told, Interrupts() as interrupts:
        told.stage("compare", [])
        try:
            table = carry_out(
                loaded, folder, jobs=jobs, retry=retry, ray=ray, trust_remote_code=trust_remote_code, registry=registry,
                progress=lambda state: _tell(state, told, interrupts),
            )  # fmt: skip
        except KeyboardInterrupt as error:
            failures.say("interrupted", hint="what is done is kept: the same command goes on")
            raise typer.Exit(failures.INTERRUPTED) from error
    if as_json:
        out_json(to_json(table))
    else:
        _show(table)
        out(f"{folder / 'index.html'}, results.json, results.csv, repeat/")
    if any(row.status == "failed" for row in table.rows):
        raise typer.Exit(1)


def _tell(state: State, told: ClosingReporter, interrupts: Interrupts) -> None:
    interrupts.check()
    told.progress(state.done, state.total, {"running": str(state.running), "failed": str(state.failed)})


def _show(table: Table) -> None:
    """The table, the best first; what else was measured and reasons of failed rows below, where they have room."""
    from peftx.comparing.page import others
    from peftx.comparing.table import COSTS
    from peftx_cli.render import out, print_table

    heads = ("", table.metric, "95 % interval", "", "rate", *COSTS.values())
    rows = [_line(row) for row in table.ordered]
    print_table(f"{table.model}, {table.budget} a row", heads, rows)
    names, more = others(table)
    if more:
        print_table("what else was measured", names, more)
    for row in table.rows:
        if row.status == "failed":
            out(f"{row.row} failed: {row.reason}")


def _line(row: TableRow) -> tuple[str, ...]:
    from peftx.comparing.page import interval, quality, rate
    from peftx.comparing.sheet import UNITS, paid

    costs = (paid(row, name) for name in UNITS)
    return (row.row, quality(row), interval(row), row.note, rate(row), *costs)
