"""The command line, from the program itself."""

from __future__ import annotations

import inspect
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from typer.main import get_command

from pages.blocks import blocks, commands
from peftx_cli.main import app

ROOT = Path(__file__).resolve().parents[2]
MOST = 2
"""Examples of a command that pages have."""


def all_commands() -> str:
    """A section a command: what it does, arguments and options, examples."""
    root: Any = get_command(app)
    head = ["### Options of all commands", "", _table(root.params, "option"), ""]
    return "\n".join([*head, *(_command(name, command) for name, command in root.commands.items())])


def _command(name: str, command: Any) -> str:
    arguments = [each for each in command.params if not each.opts[0].startswith("-")]
    options = [each for each in command.params if each.opts[0].startswith("-")]
    places = " ".join(each.metavar or each.name.upper() for each in arguments)
    lines = [f"### {name}", "", inspect.cleandoc(command.help or ""), "", "```text"]
    lines += [f"peftx {name} {places} [OPTIONS]".replace("  ", " "), "```", ""]
    for title, some in (("argument", arguments), ("option", options)):
        if some:
            lines += [_table(some, title), ""]
    return "\n".join([*lines, *_examples(name, command), ""])


def _table(parameters: list[Any], title: str) -> str:
    lines = [f"| {title} | takes | unless given | meaning |", "| --- | --- | --- | --- |"]
    for each in parameters:
        if getattr(each, "hidden", False):
            continue
        names = ", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts))
        if title == "argument":
            names = f"`{each.metavar or each.name.upper()}`"
        lines.append(f"| {names} | {_takes(each)} | {_default(each)} | {_cell(each.help or '')} |")
    return "\n".join(lines)


def _takes(parameter: Any) -> str:
    """The word that help shows, or the type's."""
    if getattr(parameter, "is_flag", False):
        return ""
    shown = (parameter.metavar or "").strip("[]") if parameter.opts[0].startswith("-") else ""
    named = getattr(parameter.type_descriptor.annotation, "__name__", "").removesuffix("]")
    word = shown or {"int": "integer", "float": "number", "str": "text", "Path": "path"}.get(named, "")
    return _cell(f"{word}, repeated" if parameter.multiple else word)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value in (None, False, (), []) or callable(value) else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _examples(name: str, command: Any) -> list[str]:
    """Those of the help, then of pages, whose tests run or read them."""
    own = re.findall(r"Example: (.*)", command.epilog or "")
    shown = _shown().get(name, [])[:MOST]
    lines = ["```console", *(f"$ {line}" for line in own), "```", ""]
    if shown:
        listed = ", ".join(f"[{title}](../{page})" for title, page in dict(shown).items())
        lines += [f"With what comes out: {listed}.", ""]
    return lines


@cache
def _shown() -> dict[str, list[tuple[str, str]]]:
    """Command -> title and place of the pages whose blocks call it and show what comes out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for page in sorted((ROOT / "docs").rglob("*.md")):
        title = re.search(r"^# (.*)$", page.read_text("utf-8"), re.MULTILINE)
        for block in blocks(page, ROOT):
            for _, line, output in commands(block) if block.language == "console" else ():
                words = shlex.split(line, comments=True)
                if (
                    words[:1] == ["peftx"]
                    and len(words) > 1
                    and any(text.strip() for text in output)
                    and title
                ):
                    entry = (title[1], page.relative_to(ROOT / "docs").as_posix())
                    if entry not in found.setdefault(words[1], []):
                        found[words[1]].append(entry)
    return found
