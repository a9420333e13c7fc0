"""Writes what is derived: from the plugins the catalogue, option tables and marks in their READMEs; from
`core/peftx/version.py` the version that each plugin, its requirement of peftx, the scaffold and CITATION.cff name.

python tools/generate.py            # write
python tools/generate.py --check    # exit 1 if something differs from what is committed
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def plugin_folders() -> list[Path]:
    return sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))


def project_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def mark(project: dict[str, Any], kind: str) -> str:
    """The value of fidelity or of evidence."""
    from peftx.composition.metadata import keyword_values

    return ", ".join(keyword_values(project["keywords"], kind))


def readme(folder: Path, registry: Any) -> tuple[Path, str]:
    """A plugin's README with its option table and the words of its marks renewed."""
    from pages import streams

    from peftx.composition.metadata import MARKS
    from peftx.composition.options import options_table

    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    table = options_table(registry.config(folder.name))
    pattern = re.compile(r"(^## Options\n\n).*?(?=^## )", re.MULTILINE | re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{path}: no '## Options'")
    text = pattern.sub(lambda match: f"{match[1]}{table}\n\n", text)
    project = project_of(folder)
    for kind in MARKS:
        name = kind.capitalize()
        begin = f"**{name}: {mark(project, kind)}.**"
        text = re.sub(rf"^\*\*{name}: [\w-]+\.\*\*", begin, text, flags=re.MULTILINE)
    return path, streams.told(folder.name, text)


def catalogue() -> str:
    """All plugins of this repository in a table by hook."""
    from peftx.composition.metadata import MARKS

    lines = [
        "# Catalogue",
        "",
        "The plugins of this repository, written by `tools/generate.py` from their metadata. Anyone can publish more.",
        "Those of `search` are samplers of [`peftx search`](search.md), and stand in no stack.",
        "",
        'Each has two marks, which do not depend on each other; its README begins "What we measured" with the proof of',
        "both, and a test reads it.",
        "",
        "| mark | | |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {kind if place == 0 else ''} | {value} | {meaning} |"
        for kind, values in MARKS.items()
        for place, (value, meaning) in enumerate(values.items())
    ]
    lines.append("")
    by_hook: dict[str, list[Path]] = {}
    for folder in plugin_folders():
        by_hook.setdefault(folder.parent.name, []).append(folder)
    for hook, folders in by_hook.items():
        lines += [
            f"## {hook}",
            "",
            f"| plugin | what | paper | {' | '.join(MARKS)} |",
            "| --- | --- | --- | --- | --- |",
        ]
        for folder in folders:
            project = project_of(folder)
            arxiv = next((w for w in project["keywords"] if w.startswith("arXiv:")), "")
            link = f"[{arxiv}](https://arxiv.org/abs/{arxiv.removeprefix('arXiv:')})" if arxiv else ""
            place = folder.relative_to(ROOT).as_posix()
            marks = " | ".join(mark(project, kind) for kind in MARKS)
            lines.append(
                f"| [{folder.name}](../{place}/README.md) | {project['description']} | {link} | {marks} |"
            )
        lines.append("")
    return "\n".join(lines)


def versioned(version: str) -> dict[Path, str]:
    """The files that name the version, or the range of versions that a plugin runs on."""
    own, range_ = rf'\g<1>"{version}"', f'"{plugin_requirement(version)}"'
    found = {}
    for folder in plugin_folders():
        path = folder / "pyproject.toml"
        found[path] = re.sub(r'^(version = )".*"$', own, path.read_text("utf-8"), count=1, flags=re.MULTILINE)
    template = ROOT / "cli/peftx_cli/templates/pyproject.toml.tmpl"  # its own version is the author's
    found[template] = template.read_text("utf-8")
    found = {path: re.sub(r'"peftx>=[\d.]+,<[\d.]+"', range_, text) for path, text in found.items()}
    citation = ROOT / "CITATION.cff"
    text = citation.read_text("utf-8")
    return found | {citation: re.sub(r"^version: .*$", f"version: {version}", text, flags=re.MULTILINE)}


def plugin_requirement(version: str) -> str:
    """What a plugin asks for: below 1.0 a minor release may change an interface, from then on a major one."""
    major, minor = map(int, version.split(".")[:2])
    return f"peftx>={major}.{minor},<{f'0.{minor + 1}' if major == 0 else major + 1}"


def derived() -> dict[Path, str]:
    """Every derived file and what it must hold."""
    from importlib.metadata import entry_points

    from peftx import __version__
    from peftx.composition.registry import Registry
    from peftx.kernel.names import GROUP
    from peftx.searching.samplers import Samplers

    names = {folder.name for folder in plugin_folders()}
    registry = Registry([point for point in entry_points(group=GROUP) if point.name in names], disabled=())
    readmes = dict(
        readme(folder, Samplers() if folder.parent.name == "search" else registry)
        for folder in plugin_folders()
    )
    return {ROOT / "docs/catalogue.md": catalogue()} | readmes | versioned(__version__)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    from peftx.errors import RegistryError

    try:
        files = derived()
    except RegistryError as error:
        sys.exit(f"{error}\n  of a folder that is not installed yet: make setup")
    stale = [p for p, text in files.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if check and stale:
        print(
            "stale: " + ", ".join(str(p.relative_to(ROOT)) for p in stale) + "; run python tools/generate.py"
        )
        return 1
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
