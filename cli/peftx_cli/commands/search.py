"""`search`: the best stack and options for what they cost, from one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from peftx_cli import failures, options

if TYPE_CHECKING:
    from peftx.searching.going import Progress
    from peftx.searching.table import SearchTable
    from peftx_cli.progress import ClosingReporter, Interrupts

File = Annotated[str, typer.Argument(metavar="FILE", help="the search as YAML: docs/search.md")]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="DIR", help="folder of the results; else <FILE>-search"),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=0, help="trials side by side, in place of the file's; 0: one a core"),
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        epilog=options.examples("search search.yaml --output results", "search search.yaml --jobs 4 --json")
    )(search)


def search(
    file: File,
    output: Output = None,
    jobs: Jobs = None,
    ray: options.OnRay = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Search stacks and their options for the best that each cost buys: JSON, CSV, a page, and YAML of each such point.

    Points are chosen on rows that are held out of the training data. What has been run is not run again: the same
    command goes on after an interruption. Exits with 1 when no point keeps the limits.
    """
    from pathlib import Path

    from peftx.composition.registry import Registry
    from peftx.errors import MissingExtraError
    from peftx.searching.samplers import Samplers
    from peftx_spec.search_load import load_search

    registry = Registry()
    loaded = load_search(file, catalogue=registry, samplers=Samplers())
    folder = Path(output) if output is not None else Path(f"{Path(file).stem}-search")
    try:
        import optuna  # noqa: F401  what an installation without the extra lacks
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"searching needs {error.name}, which is not installed", hint="pip install 'peftx[search]'"
        ) from error
    from peftx.comparing.writing import to_json
    from peftx.searching.run import search as carry_out
    from peftx_cli.progress import Interrupts, reporter
    from peftx_cli.render import out, out_json

    with reporter() as told, Interrupts() as interrupts:
        told.stage("search", [])
        try:
            table = carry_out(
                loaded, folder, jobs=jobs, ray=ray, trust_remote_code=trust_remote_code, registry=registry,
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
    if not table.front:
        failures.say(
            "no point keeps the limits" if table.limits else "no trial came through", hint=_nearest(table)
        )
        raise typer.Exit(1)


def _tell(state: Progress, told: ClosingReporter, interrupts: Interrupts) -> None:
    interrupts.check()
    told.progress(state.done, state.total, {"running": str(state.running), "failed": str(state.failed)})


def _show(table: SearchTable) -> None:
    """The front, the best first; reasons of failed trials below, where they have room."""
    from peftx.comparing.page import quality
    from peftx.comparing.sheet import UNITS, paid
    from peftx.comparing.table import COSTS
    from peftx.searching.page import test_interval, tested
    from peftx_cli.render import out, print_table

    heads = ("front", f"{table.metric} (validation)", "(test)", "95 % interval", *COSTS.values())
    rows = [
        (
            row.row, quality(row), tested(row), test_interval(row),
            *(paid(row, name) for name in UNITS),
        )
        for row in table.front
    ]  # fmt: skip
    print_table(f"{table.model}, {table.budget} by {table.sampler}", heads, rows)
    for row in table.rows:
        if row.status == "failed":
            out(f"{row.row} failed: {row.reason}")


def _nearest(table: SearchTable) -> str:
    """What came closest to each limit."""
    from peftx.comparing.sheet import UNITS

    told = []
    for name, limit in table.limits.items():
        values = [value for row in table.rows if (value := getattr(row, name)) is not None]
        if values:
            told.append(
                f"{name}: the least was {UNITS[name](min(values))}, the limit is {UNITS[name](limit)}"
            )
    return "; ".join(told) or "the reasons stand in the table"
