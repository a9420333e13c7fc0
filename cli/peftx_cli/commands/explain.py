"""`explain`: the page on an error, by the code that its message begins with."""

from __future__ import annotations

from typing import Annotated

import typer

from peftx_cli import explained, options

Code = Annotated[
    str | None,
    typer.Argument(
        metavar="[CODE]",
        help="as in error[conflict]; all codes if left out",
        autocompletion=lambda incomplete: [code for code in explained.codes() if code.startswith(incomplete)],
    ),
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(epilog=options.examples("explain conflict", "explain"))(explain)


def explain(code: Code = None) -> None:
    """Explain an error: what its code means, the usual causes, and the way out of each."""
    from peftx_cli.render import out_markdown, print_table

    if code is None:
        print_table("", ("code", "meaning"), [(each, explained.sentence(each)) for each in explained.codes()])
    else:
        out_markdown(explained.page(code))
