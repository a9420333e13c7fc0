"""No file needs, in a circle, one that needs it: whether it imports at its top, for type hints or in a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"peftx": "core/peftx", "peftx_cli": "cli/peftx_cli", "peftx_spec": "spec/peftx_spec"}


def files() -> dict[str, Path]:
    """Dotted name -> file; a package is its `__init__`, which says what is public and hides no circle of files."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts)] = file
    return found


def needs(file: Path, known: Mapping[str, object]) -> Iterator[str]:
    """The files that it imports from, anywhere in it; all imports of the repository are absolute."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import, which this test does not follow"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if name in known)
            if node.module in known:
                yield node.module


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One, first and last the same; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_of_files() -> None:
    known = files()
    assert len(known) > 300, f"{len(known)} files were found"
    graph = {name: {other for other in needs(file, known) if other != name} for name, file in known.items()}
    assert not (found := circle(graph)), " -> ".join(found)


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
