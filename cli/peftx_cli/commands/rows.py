"""`data`: what the rows of a pipeline become, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftx_cli import options
from peftx_cli.recipe import Asked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peftx.previewing import Prepared, Preview
    from peftx_spec import Pipeline

Rows = Annotated[int, typer.Option("--rows", "-n", min=0, help="examples to show, from the first")]
Source = Annotated[
    str | None, typer.Option("--source", metavar="NAME", help="rows of data.sources, not those of data.train")
]
OfEval = Annotated[bool, typer.Option("--eval", help="the rows that are evaluated on")]
RowsFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE.jsonl", help="write the tokenized rows there, one a line"),
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        epilog=options.examples(
            "data pipeline.yaml --rows 5", "data --plugin superfiltering --data rows.jsonl"
        )
    )(data)


def data(
    spec: options.Spec = None,
    plugin: options.Plugins = None,
    model: options.Model = None,
    override: options.Overrides = None,
    data: options.Data = None,
    rows: Rows = 3,
    source: Source = None,
    eval: OfEval = False,
    output: RowsFile = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Show what rows become: tokens, which of them count in the loss, what was cut, dropped or packed. Trains nothing.

    Tokens that count in the loss are green on a terminal, and in brackets elsewhere.
    """
    from peftx.composition.registry import Registry
    from peftx.errors import UsageError
    from peftx_cli.recipe import read

    if eval and source is not None:
        raise UsageError("--eval and --source exclude each other", hint="--source names rows of data.sources")
    registry = Registry()
    asked = Asked(
        spec, plugin or (), model, data, overrides=override or (), trust_remote_code=trust_remote_code
    )
    recipe = read(asked, registry)
    if output is not None:
        _check_place(output, recipe.pipeline)
    from peftx.previewing import preview
    from peftx_cli.progress import reporter

    with reporter() as told:
        found = preview(
            recipe.pipeline,
            source="eval" if eval else source or "train",
            registry=registry,
            where=recipe.where,
            reporter=told,
            trust_remote_code=trust_remote_code,
        )
    if output is not None:
        _write(found, output)
    _show(found, rows, as_json=as_json)


def _check_place(output: Path, pipeline: Pipeline) -> None:
    """Raises PeftxError where rows would take the place of what is read, or nothing can be written."""
    from peftx.engines.files import make_place
    from peftx_spec.errors import FileError

    specs = (
        pipeline.data.train,
        pipeline.data.eval,
        pipeline.data.calibration,
        *pipeline.data.sources.values(),
    )
    read = [Path(spec.path) for spec in specs if spec and not spec.path.startswith(("peftx:", "hub:"))]
    if output.is_dir() or (output.exists() and any(p.exists() and output.samefile(p) for p in read)):
        kind = "is a folder" if output.is_dir() else "holds rows that the pipeline reads"
        raise FileError(f"--output: {output} {kind}", hint="name another file")
    make_place(output)


def _write(found: Preview, output: Path) -> None:
    from peftx.engines.files import write_parts

    def lines() -> Iterator[str]:
        import json

        for row in found.examples:
            yield json.dumps(row, ensure_ascii=False, default=str) + "\n"

    write_parts(output, lines())


def _show(found: Preview, rows: int, *, as_json: bool) -> None:
    from peftx.previewing import shown
    from peftx_cli import tokens
    from peftx_cli.render import out, print_json, print_table

    examples = shown(found, rows)
    if as_json:
        print_json({**found.to_json(), "shown": [example.to_json() for example in examples]})
        return
    print_table(f"rows of {found.file}", ("", "count", "why"), counts(found))
    out()
    lengths = [
        (name, f"{of.min:,}", f"{of.median:,}", f"{of.p95:,}", f"{of.max:,}", f"{of.total:,}")
        for name, of in found.lengths().items()
    ]
    print_table("tokens of an example", ("", "min", "median", "p95", "max", "all"), lengths)
    out(tokens.share(found))
    for example in examples:
        out()
        tokens.show(example, found)


def counts(found: Preview) -> list[tuple[str, str, str]]:
    """What became of the rows, each number with its reason."""
    table = [("read", f"{found.read:,}", f"format {_format(found)}")]
    if found.held_out:
        table.append(("held out", f"{found.held_out:,}", "evaluated on, and not trained on"))
    for step in found.of_file:
        table += _dropped(step)
    table.append(("kept", f"{found.kept:,}", ""))
    for number, step in enumerate(found.prepared):
        if number >= len(found.of_file):
            table += _dropped(step)
        became = f"{step.plugin}: {step.rows:,} rows became {step.left:,}"
        change = f", {step.format} became {step.gives}" if step.gives != step.format else ""
        table.append(("prepared", f"{step.left:,}", became + change))
    table.append(("examples", f"{len(found.examples):,}", found.packed))
    table.append(_cut(found))
    table += [(f"of class {name}", f"{count:,}", "") for name, count in found.classes.items()]
    return table


def _dropped(step: Prepared) -> list[tuple[str, str, str]]:
    return [("dropped", f"{count:,}", f"{step.plugin}: {reason}") for reason, count in step.dropped.items()]


def _format(found: Preview) -> str:
    return found.prepared[0].format if found.prepared else found.rows.format


def _cut(found: Preview) -> tuple[str, str, str]:
    limit = f"max_length is {found.max_length:,}"
    if found.cut is None:
        by = found.prepared[-1].plugin
        return "full", f"{found.full:,}", f"{limit}; what was longer, {by} has cut" if found.full else limit
    return "cut", f"{found.cut:,}", f"at the left: {limit}" if found.cut else limit
