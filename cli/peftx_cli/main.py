"""The entry point `peftx`: the commands, and what happens when one fails."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peftx_cli import failures, options
from peftx_cli.commands import (
    catalogue,
    compare,
    exchange,
    explain,
    health,
    hub,
    inspect,
    merging,
    report,
    rows,
    run,
    scaffold,
    search,
    use,
)


class Commands(TyperGroup):
    """Turns errors that the user can mend into a message and exit code 2, for every command alike."""

    def invoke(self, ctx: Any) -> Any:
        told = {name: bool(ctx.params.get(name)) for name in ("traceback", "quiet")}
        with failures.reported(**told):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None if os.environ.get("NO_COLOR") else "rich",  # help without one escape code
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tuning, compression and decoding research as plugins that stack on one model.",
    epilog=options.examples(
        "apply --plugin lora --plugin prefixquant", "generate peftx:tiny 'Once upon a time'"
    ),
)


def _version(value: bool) -> None:
    if value:
        import peftx

        typer.echo(f"peftx {peftx.__version__}")
        raise typer.Exit


@app.callback()
def root(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="show where in the code an error arose")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="print results and errors alone: no progress, no warnings")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Fine-tuning, compression and decoding research as plugins that stack on one model."""


for group in (
    run, compare, search, use, merging, exchange, hub, inspect, rows, report, catalogue, explain, health,
    scaffold,
):  # fmt: skip
    group.register(app)


def main() -> None:
    """Run the command line and exit: 0 done, 1 something is broken or crashed, 2 bad input, 130 interrupted."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # its warning after a fork would end up in our output
    failures.tell_warnings()
    app(prog_name="peftx")
