"""`push` and `pull`: bundles to the Hugging Face Hub and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftx_cli import failures, options

if TYPE_CHECKING:
    from peftx.sharing import Shared

Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="folder of a bundle")]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="owner/name; made where it is not there")]
Commit = Annotated[
    str, typer.Argument(metavar="REPO[@REVISION]", help="owner/name, and a branch, a tag or a commit")
]
Message = Annotated[str | None, typer.Option("--message", metavar="TEXT", help="of the commit")]
Public = Annotated[bool, typer.Option("--public", help="a repository that is made is for all to see")]
BundleOut = Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="folder of the bundle")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(epilog=options.examples("push peftx-out me/greeter", "push peftx-out me/greeter --public"))(
        push
    )
    commit = "pull me/greeter@4f2a90c1d3b5e6f708192a3b4c5d6e7f80912a3b -o greeter"
    app.command(epilog=options.examples("pull me/greeter -o greeter", commit))(pull)


def push(
    bundle: Bundle, repo: Repo, message: Message = None, public: Public = False, as_json: options.Json = False
) -> None:
    """Put a bundle on the Hugging Face Hub: its files and its model card, in one commit.

    Never the rows that it was trained on. A repository that is not there is made, a private one. The token is that of
    `hf auth login`, or HF_TOKEN.
    """
    import os

    from peftx.sharing import push as pushed

    _quiet()
    found = pushed(os.path.expanduser(bundle), repo, message=message, public=public)
    _tell(found, f"{found.path} is on the Hub", as_json=as_json)


def pull(repo: Commit, output: BundleOut, as_json: options.Json = False) -> None:
    """Fetch a bundle from the Hugging Face Hub: tensors, JSON, YAML and text, and nothing that runs.

    The revision becomes a commit, which the bundle's manifest.json names. `hub:REPO@REVISION` stands for a bundle in
    other commands too.
    """
    from peftx.sharing import pull as pulled

    _quiet()
    found = pulled(repo, output.expanduser())
    _tell(found, str(found.path), as_json=as_json)


def _quiet() -> None:
    """Bars of the Hub's library are for terminals, and not for who wants it quiet."""
    if failures.quiet() or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _tell(found: Shared, what: str, *, as_json: bool) -> None:
    from peftx.quantities import size
    from peftx_cli.render import out, print_json

    if as_json:
        print_json(
            {"repo": found.repo, "revision": found.revision, "commit": found.commit, "id": found.id,
             "output": str(found.path), "bytes": found.bytes}
        )  # fmt: skip
    else:
        out(f"{what} ({size(found.bytes)}): {found.id}")
