"""`new`: the folder of a new plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftx_cli import options

Slug = Annotated[str, typer.Argument(metavar="SLUG", help="name: lower-case words joined by hyphens")]
Hook = Annotated[
    str, typer.Option("--hook", metavar="HOOK", help="main hook: prepare_data, inject, train_step, ...")
]
Arxiv = Annotated[str | None, typer.Option("--arxiv", metavar="ID", help="of the paper: 2106.09685")]
Title = Annotated[str | None, typer.Option("--title", metavar="TEXT", help="what it does, in one line")]
Family = Annotated[
    str | None, typer.Option("--family", metavar="NAME", help="as in low-rank, quantization, pruning")
]
Folder = Annotated[
    Path | None, typer.Option("--dir", metavar="DIR", help="where; plugins/<hook>/<slug> if left out")
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        epilog=options.examples(
            "new my-method", 'new two-words --hook inject --arxiv 2106.09685 --title "Two words: a gain"'
        )
    )(new)


def new(
    slug: Slug,
    hook: Hook = "inject",
    arxiv: Arxiv = None,
    title: Title = None,
    family: Family = None,
    directory: Folder = None,
) -> None:
    """Write a complete plugin folder that works, passes its own tests, and is yours to change."""
    from peftx.composition.registry import Registry
    from peftx.errors import RegistryError
    from peftx_cli.render import out
    from peftx_cli.scaffold import write

    if slug in Registry().names():
        raise RegistryError(
            f"a plugin '{slug}' is installed already", hint="two of one name clash: choose another one"
        )
    folder = directory if directory is not None else Path("plugins") / hook / slug
    files = write(folder, slug=slug, hook=hook, arxiv=arxiv, title=title, family=family)
    for file in files:
        out(str(file))
    out(f"\nto try it:  pip install -e {folder}\n            peftx check {slug}")
