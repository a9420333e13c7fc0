"""`report`: one run as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftx_cli import options

Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="folder of a bundle")]
PageFile = Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="the page")]
Open = Annotated[bool, typer.Option("--open", help="show it in the browser")]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", min=0, help="prompts to go on with, by the base and by the stack; 0 loads neither"
    ),
]
Base = Annotated[
    str | None, typer.Option("--model", "-m", metavar="ID", help="the bundle's base, if it lies elsewhere")
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        epilog=options.examples("report peftx-out -o report.html --samples 3", "report peftx-out --open")
    )(report)


def report(
    bundle: Bundle,
    output: PageFile = Path("report.html"),
    samples: Samples = 0,
    open_it: Open = False,
    model: Base = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write one HTML page of a run: spec, plan, curves, metrics, sizes, samples, versions. It needs nothing else."""
    import os

    from peftx_cli.stacks import check_bundle

    _check_place(output)
    check_bundle(bundle)
    from peftx.engines.files import make_place, write_text
    from peftx.pages import page, told
    from peftx.pages import samples as written
    from peftx.sharing import located
    from peftx_cli.progress import reporter
    from peftx_cli.render import out

    folder = located(os.path.expanduser(bundle))
    found = told(folder, trust_remote_code=trust_remote_code)
    make_place(output)
    texts = None
    if samples:
        with reporter() as shown:
            shown.stage("samples", [])
            texts = written(found, samples, model=model, device=device, trust_remote_code=trust_remote_code)
    write_text(output, page(found, texts))
    out(str(output))
    if open_it:
        import webbrowser

        webbrowser.open(output.absolute().as_uri())


def _check_place(output: Path) -> None:
    """Raises PeftxError where the page would be a strange file in a bundle, which then would not load."""
    from peftx_spec.errors import FileError

    if output.is_dir():
        raise FileError(f"--output: {output} is a folder", hint="name a file, such as report.html")
    inside = [parent for parent in output.absolute().parents if (parent / "manifest.json").exists()]
    if inside:
        raise FileError(
            f"--output: {output} would stand in the bundle {inside[0]}, which holds no strange file",
            hint="-o ../report.html",
        )
