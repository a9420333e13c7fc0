"""`list` and `info`: the installed plugins. `list` reads metadata, looks at the sources, and imports no plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftx_cli import options

if TYPE_CHECKING:
    from peftx.composition.metadata import Entry
    from peftx.kernel.plugin import Plugin
    from peftx_cli.health import Listed

Hook = Annotated[str | None, typer.Option("--hook", metavar="HOOK", help="only plugins with this hook")]
Family = Annotated[str | None, typer.Option("--family", metavar="NAME", help="only plugins of this family")]
Fidelity = Annotated[
    str | None, typer.Option("--fidelity", metavar="MARK", help="only equal, equations or reconstruction")
]
Evidence = Annotated[
    str | None, typer.Option("--evidence", metavar="MARK", help="only shown, not-shown or not-measured")
]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="name of a plugin", autocompletion=options.plugin_names)
]
MetadataOnly = Annotated[
    bool, typer.Option("--metadata", help="do not import the plugin: no options, no claims")
]
Readme = Annotated[bool, typer.Option("--readme", help="print the plugin's README")]
Long = Annotated[
    bool, typer.Option("--long", "-l", help="marks, hooks, family and paper too; lines are wide")
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("list", epilog=options.examples("list --hook compress --json", "list --long"))(list_plugins)
    app.command(epilog=options.examples("info lora", "info lora --readme"))(info)


def list_plugins(
    hook: Hook = None,
    family: Family = None,
    fidelity: Fidelity = None,
    evidence: Evidence = None,
    long: Long = False,
    as_json: options.Json = False,
) -> None:
    """List the installed plugins, a line each; what is broken, claimed twice or disabled is listed as such."""
    from peftx.composition.registry import Registry
    from peftx_cli.health import listed
    from peftx_cli.render import out, plain_table, print_json

    found = listed(Registry())
    found = _filtered(found, hook=hook, family=family, fidelity=fidelity, evidence=evidence)
    if as_json:
        print_json([_line(one) for one in found])
        return
    if not found:
        out(
            "no plugin fits"
            if hook or family or fidelity or evidence
            else "no plugin is installed; 'make setup' in a checkout of peftx installs all"
        )
        return
    if long:
        columns = ("name", "fidelity", "evidence", "hooks", "family", "paper", "summary")
        out(plain_table("", columns, [_row(one) for one in found]))
    else:
        out("\n".join(_short(found)))
    bad = [one for one in found if one.status in ("broken", "clash")]
    for one in bad:
        out(f"{one.status}: {one.name}: {one.reason}")  # whole, as the lines above may be cut
    plugins = f"{len(found)} plugin{'s' * (len(found) != 1)}" + (
        f", {len(bad)} of them unusable: peftx doctor says more" if bad else ""
    )
    out(plugins if long else f"{plugins}; --long shows marks, hooks, family and paper")


def _short(found: list[Listed]) -> list[str]:
    """Name and summary, or what is wrong, cut to the terminal's width; 80 columns where there is none."""
    from shutil import get_terminal_size
    from textwrap import shorten

    width = get_terminal_size().columns
    names = max(len(one.name) for one in found)
    room = max(width - names - 2, 20)
    return [
        f"{one.name:<{names}}  {shorten(_row(one)[-1], room, placeholder='...')}".rstrip() for one in found
    ]


def _row(one: Listed) -> tuple[str, ...]:
    """A line of the table; what is wrong with a plugin stands where its summary would."""
    entry = one.entry
    trouble = "" if one.status == "ok" else f"{one.status}: {one.reason}"
    if entry is None:
        return (one.name, "", "", "", "", "", trouble)
    marks = (entry.fidelity, entry.evidence)
    return (one.name, *marks, " ".join(entry.hooks), entry.family, entry.paper, trouble or entry.summary)


def _filtered(
    found: list[Listed], *, hook: str | None, family: str | None, fidelity: str | None, evidence: str | None
) -> list[Listed]:
    """The plugins that fit.

    Raises:
        PeftxError: a hook, family or mark that does not exist.
    """
    from peftx.composition.metadata import MARKS

    if hook is not None:
        from peftx.kernel.names import HOOKS

        _known("hook", hook, HOOKS)
    families = sorted({one.entry.family for one in found if one.entry is not None and one.entry.family})
    _known("family", family, families)
    _known("mark of fidelity", fidelity, list(MARKS["fidelity"]))
    _known("mark of evidence", evidence, list(MARKS["evidence"]))
    if not (hook or family or fidelity or evidence):
        return found
    return [
        one
        for one in found
        if one.entry is not None
        and (hook is None or hook in one.entry.hooks)
        and (family is None or family == one.entry.family)
        and (fidelity is None or fidelity == one.entry.fidelity)
        and (evidence is None or evidence == one.entry.evidence)
    ]


def _known(what: str, name: str | None, names: tuple[str, ...] | list[str]) -> None:
    from peftx.errors import UsageError
    from peftx_spec.errors import nearest

    if name is not None and name not in names:
        raise UsageError(
            f"there is no {what} '{name}'",
            hint=nearest(name, names) or f"there are: {', '.join(names) or 'none'}",
        )


def _line(one: Listed) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": one.name, "status": one.status, "reason": one.reason}
    return shown | (_entry(one.entry) if one.entry is not None else {})


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "distribution": entry.distribution,
        "version": entry.version,
        "summary": entry.summary,
        "hooks": list(entry.hooks),
        "family": entry.family,
        "fidelity": entry.fidelity,
        "evidence": entry.evidence,
        "paper": entry.paper,
        "url": entry.url,
        "point": entry.point.value,
    }


def info(
    name: Name, metadata: MetadataOnly = False, readme: Readme = False, as_json: options.Json = False
) -> None:
    """Everything about one plugin: options, hooks, claims, paper, and what it does not go with."""
    from peftx.composition.registry import Registry
    from peftx_cli.health import module_file

    registry = Registry()
    entry = registry.describe(name)
    if readme:
        _print_readme(entry)
        return
    file = module_file(entry)
    about: dict[str, Any] = {"name": name} | _entry(entry) | {"file": None if file is None else str(file)}
    about["readme"] = None
    if file is not None:
        beside = file.parent.parent / "README.md"  # an editable install: src/module.py
        about["readme"] = str(beside) if beside.is_file() and file.parent.name == "src" else None
    if not metadata:
        about |= _class_facts(registry.outline(name))
    if as_json:
        from peftx_cli.render import print_json

        print_json(about)
        return
    _show(about)


def _class_facts(plugin: type[Plugin]) -> dict[str, Any]:
    """What only the class knows."""
    from peftx.composition.rules import rules
    from peftx.kernel.names import HOOKS
    from peftx.kernel.plugin import hooks_of

    return {
        "hooks": [hook for hook in HOOKS if hook in hooks_of(plugin)],
        "claims": sorted(plugin.claims),
        "conflicts": rules(plugin),
        "architectures": list(plugin.architectures),
        "options": option_rows(plugin),
    }


def option_rows(plugin: type[Plugin]) -> list[dict[str, str]]:
    """Name, type, default and meaning of each option."""
    from peftx.composition.options import kind_and_limits

    schemas = plugin.Config.model_json_schema().get("properties", {})
    return [
        {
            "option": name,
            "type": kind_and_limits(schemas[field.alias or name]),
            "default": "required"
            if field.is_required()
            else _text(field.get_default(call_default_factory=True)),
            "meaning": field.description or "",
        }
        for name, field in plugin.Config.model_fields.items()
    ]


def _text(value: object) -> str:
    return "none" if value is None else str(value) if not isinstance(value, bool) else str(value).lower()


def _show(about: dict[str, Any]) -> None:
    from peftx.composition.metadata import MARKS
    from peftx_cli.render import out, print_table

    out(f"{about['name']} {about['version']}: {about['summary']}")
    lines = [("hooks", ", ".join(about["hooks"])), ("family", about["family"])]
    lines += [
        (mark, ": ".join(filter(None, (about[mark], values.get(about[mark])))))
        for mark, values in MARKS.items()
    ]
    lines += [
        ("paper", " ".join(filter(None, (about["paper"], about["url"])))),
        ("package", about["distribution"]),
    ]
    lines += [
        ("file", about["file"] or ""),
        ("readme", about["readme"] or f"peftx info {about['name']} --readme"),
    ]
    if "claims" in about:
        lines.append(("claims", ", ".join(about["claims"]) or "none"))
    for label, text in lines:
        if text:
            out(f"  {label:<8} {text}")
    for number, rule in enumerate(about.get("conflicts", ())):
        out(f"  {'rules' if number == 0 else '':<8} {rule}")
    if about.get("options"):
        out()
        rows = [(o["option"], o["type"], o["default"], o["meaning"]) for o in about["options"]]
        print_table("options", ("option", "type", "default", "meaning"), rows)
    elif "options" in about:
        out("\nno options")


def _print_readme(entry: Entry) -> None:
    text = entry.readme
    if not text:
        from peftx.composition.origins import metadata_file
        from peftx_spec.errors import FileError

        raise FileError(
            f"{entry.distribution} brings no README: {metadata_file(entry.point)} ends with its headers",
            hint='readme = "README.md" in the [project] of its pyproject.toml',
        )
    from peftx_cli.render import out_markdown

    out_markdown(text)
