"""`plan`, `validate` and `schema`: look at a pipeline without running it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftx_cli import explained, options
from peftx_cli.recipe import Asked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftx.composition.registry import Registry
    from peftx_spec import Pipeline, Plan, TouchedModule

MODULES_SHOWN = 40
All = Annotated[bool, typer.Option("--all", help=f"every touched module, not {MODULES_SHOWN} of them")]
SchemaOf = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="name of a plugin", autocompletion=options.plugin_names),
]
SchemaFile = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="write it here; else stdout")
]
SpecFile = Annotated[str, typer.Argument(metavar="SPEC", help="spec, a YAML file")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        epilog=options.examples(
            "plan pipeline.yaml --set lora.rank=16", "plan --plugin lora --model peftx:tiny"
        )
    )(plan)
    app.command(
        epilog=options.examples(
            "validate pipeline.yaml", "validate pipeline.yaml --set train.steps=50 --json"
        )
    )(validate)
    app.command(epilog=options.examples("schema lora", "schema -o peftx.schema.json"))(schema)


def plan(
    spec: options.Spec = None,
    plugin: options.Plugins = None,
    model: options.Model = None,
    override: options.Overrides = None,
    data: options.Data = None,
    eval: options.Eval = None,
    columns: options.Columns = None,
    split: options.Split = None,
    adapter: options.Adapter = None,
    calibration: options.Calibration = None,
    steps: options.Steps = None,
    output: options.Output = None,
    show_all: All = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Show what a run would do: stages, touched modules, parameters, bytes, conflicts. Loads no weights.

    Exits with 2 when a conflict stands in the way.
    """
    from peftx.composition.registry import Registry
    from peftx.planning import plan as planned
    from peftx_cli import ahead
    from peftx_cli.recipe import read
    from peftx_cli.render import out_json

    registry = Registry()
    asked = Asked(spec, plugin or (), model, data, eval, calibration, steps, output, override or (),
                  trust_remote_code=trust_remote_code, columns=columns, split=split, adapter=adapter)  # fmt: skip
    recipe = read(asked, registry)
    ahead.warn(recipe.pipeline)
    found = planned(
        recipe.pipeline, registry=registry, where=recipe.where, trust_remote_code=trust_remote_code
    )
    if as_json:
        out_json(found.to_json())
    else:
        _show(found, show_all=show_all)
    if not found.runnable:
        raise typer.Exit(2)


def _show(found: Plan, *, show_all: bool) -> None:
    from peftx.quantities import size
    from peftx_cli.render import out, print_table

    stages = [
        (s.name, ", ".join(s.plugins), ", ".join(s.reads), ", ".join(s.writes), s.detail)
        for s in found.stages
    ]
    print_table(f"stages on {found.model}", ("stage", "plugins", "reads", "writes", ""), stages)
    out()
    plugins = [
        (p.id, f"{p.modules:,}", f"{p.params:,}", size(p.bytes) if p.modules else "", p.detail)
        for p in found.plugins
    ]
    print_table("plugins", ("plugin", "modules", "parameters", "bytes", ""), plugins)
    modules = found.modules if show_all else _some(found)
    lines = [
        (m.path, m.role, "x".join(map(str, m.shape)), m.plugin, f"{m.params:,}", f"{m.bytes:,}")
        for m in modules
    ]
    out()
    if lines:
        print_table("touched modules", ("module", "role", "shape", "plugin", "parameters", "bytes"), lines)
    else:
        out("touched modules: none")
    if len(modules) < len(found.modules):
        out(f"... and {len(found.modules) - len(modules)} more; --all shows them")
    totals = found.totals
    out()
    print_table(
        "totals",
        ("", "parameters", "bytes"),
        [
            ("base", f"{totals.base_params:,}", size(totals.base_bytes)),
            ("added", f"{totals.added_params:,}", ""),
            ("trainable", f"{totals.trainable_params:,}", ""),
            ("at the end", "", size(totals.final_bytes)),
            ("tensors in the bundle", "", f"about {size(totals.bundle_bytes)}"),
        ],
    )
    for conflict in found.conflicts:
        out(f"\n{conflict.code}: {conflict.reason}")
        if conflict.remedy:
            out(f"  what would work: {conflict.remedy}")
        if more := explained.more(conflict.code):
            out(f"  more: {more}")


def _some(found: Plan) -> list[TouchedModule]:
    """As many modules as are shown, of every plugin the same share: the later ones' too."""
    share = MODULES_SHOWN // max(1, sum(plugin.modules > 0 for plugin in found.plugins)) or 1
    shown, seen = [], Counter[str]()
    for module in found.modules:
        seen[module.plugin] += 1
        if seen[module.plugin] <= share:
            shown.append(module)
    return shown


def validate(spec: SpecFile, override: options.Overrides = None, as_json: options.Json = False) -> None:
    """Check a pipeline, a comparison or a search: every mistake at once, with its place. Exits with 2 where one is.

    Loads no model; what only its parts tell, 'peftx plan' finds.
    """
    from dataclasses import asdict

    from peftx.composition.registry import Registry
    from peftx_cli import ahead
    from peftx_cli.render import out, print_json
    from peftx_spec import PeftxError, Problem, SpecError, stages_of

    registry = Registry()
    try:
        if (found := _of_many(spec, override or (), registry)) is not None:
            noun, rows = found
            if as_json:
                print_json({"valid": True, "problems": [], noun: rows})
            else:
                out(f"ok: a {noun} of {len(rows)}: {', '.join(rows)}")
                for row in filter(rows.get, rows):
                    out(f"{row} will fail: {rows[row]}")
            return
        pipeline = _checked(spec, override or (), registry)
    except PeftxError as error:
        if not as_json:
            raise
        whole = [Problem(error.message, spec, 1, 1, suggestion=error.hint or "", code=error.code)]
        problems = error.problems if isinstance(error, SpecError) else whole
        print_json({"valid": False, "problems": [asdict(problem) for problem in problems]})
        raise typer.Exit(2) from error
    ahead.warn(pipeline)
    stages = [stage.kind for stage in stages_of(pipeline, registry)]
    if as_json:
        print_json(
            {"valid": True, "problems": [], "plugins": [e.use for e in pipeline.stack], "stages": stages}
        )
    else:
        count = len(pipeline.stack)
        out(f"ok: {count} plugin{'s' * (count != 1)}, {len(stages)} stages ({', '.join(stages)})")


def _of_many(spec: str, overrides: Sequence[str], registry: Registry) -> tuple[str, dict[str, str]] | None:
    """Which of the two a file is that has many pipelines, and its rows or stacks, each with why it cannot be or
    nothing. None of a pipeline.

    Raises:
        SpecError: all that is wrong in it. OptionError: overrides, which are a pipeline's.
    """
    from peftx.errors import OptionError
    from peftx_spec.checks import OTHER_FILES
    from peftx_spec.loader import read_tolerantly

    document, _ = read_tolerantly(spec)
    data = document.data if isinstance(document.data, dict) else {}
    if not OTHER_FILES.keys() & data.keys() or {"stack", "model"} & data.keys():
        return None
    if overrides:
        raise OptionError("--set changes a pipeline, and this file has several", hint="write it in the file")
    if "compare" in data:
        from peftx_spec.compare_load import load_compare

        rows = load_compare(spec, catalogue=registry).rows
        return OTHER_FILES["compare"], {
            row.name: row.reason or _conflict(row.pipeline, registry) for row in rows
        }
    from peftx.searching.samplers import Samplers
    from peftx_spec.search_load import load_search

    found = load_search(spec, catalogue=registry, samplers=Samplers())
    return OTHER_FILES["search"], {candidate.name: "" for candidate in found.candidates}


def _conflict(pipeline: Pipeline | None, registry: Registry) -> str:
    """Why plugins of a row do not go together by their claims, and what would; nothing where they do."""
    from peftx.composition.conflicts import find_conflicts
    from peftx.kernel.members import Member

    stack = pipeline.stack if pipeline is not None else ()
    members = [Member(e.id, registry.outline(e.use)(**e.options), phase=e.phase) for e in stack]
    return next((f"{found.reason} ({found.remedy})" for found in find_conflicts(members)), "")


def _checked(spec: str, overrides: Sequence[str], registry: Registry) -> Pipeline:
    """The pipeline after every check that needs no model.

    Raises:
        SpecError: all that is wrong in the spec and its data. ConflictError: plugins that do not go together.
    """
    from peftx_cli import ahead
    from peftx_spec import load_spec, resolved

    folder = Path(spec).parent
    more = partial(ahead.further, registry=registry, folder=folder)
    loaded = load_spec(spec, catalogue=registry, overrides=overrides, more=more)
    pipeline = resolved(loaded.pipeline, folder)
    ahead.check(loaded, pipeline, registry)
    if pipeline.stack:
        from peftx.composition.conflicts import check

        check(ahead.members_of(loaded, pipeline, registry))
    return pipeline


def schema(name: SchemaOf = None, output: SchemaFile = None) -> None:
    """Print the JSON Schema of one plugin's options; without a name that of pipelines, with the options of all.

    Imports no plugin whose options its source shows.
    """
    import json

    from peftx.composition.registry import Registry
    from peftx.errors import FileError
    from peftx_cli.render import out, out_json
    from peftx_spec import json_schema, options_schema

    registry = Registry()
    found = json_schema(_loadable(registry)) if name is None else options_schema(registry, name)
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    if output is None:
        out_json(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot write {output}: {error.strerror}") from error
    out(str(output))


def _loadable(registry: Registry) -> Registry:
    """The registry without what does not import; a warning names each."""
    from peftx.composition.registry import Registry
    from peftx.errors import RegistryError
    from peftx_cli.failures import warn

    broken = set()
    for name in registry.names():
        try:
            registry.outline(name)
        except RegistryError as error:
            warn(f"left out: {error.message}")
            broken.add(name)
    return Registry(disabled=registry.disabled | broken) if broken else registry
