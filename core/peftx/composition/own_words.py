"""What a plugin's source says of itself: title, hooks and paper. It is read, not run.

The metadata of a distribution says these once, which is enough where it brings one plugin. Where it brings several,
each has them from its own class and docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftx.kernel.names import HOOKS

_PAPER = re.compile(r"arXiv:\s*(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})")


@dataclass(frozen=True)
class OwnWords:
    """Each is empty where the source does not say it."""

    title: str
    hooks: tuple[str, ...]
    paper: str


def own_words(file: Path, name: str, *, alone: bool) -> OwnWords:
    """What a class says of itself, in its docstring, or in its module's where it is `alone` there.

    Raises:
        SyntaxError, OSError: the file is no Python, or cannot be read.
    """
    tree = ast.parse(file.read_bytes(), file)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        return OwnWords("", (), "")
    docs = [ast.get_docstring(node) or "" for node in (classes[name], tree)]
    doc = next(filter(None, reversed(docs) if alone else docs), "")
    hooks = set(_hooks(classes, name))
    paper = _PAPER.search(doc)
    return OwnWords(
        title="".join(doc.splitlines()[:1]).strip().removesuffix("."),
        hooks=tuple(hook for hook in HOOKS if hook in hooks),
        paper=f"arXiv:{paper[1]}" if paper else "",
    )


def _hooks(classes: dict[str, ast.ClassDef], name: str) -> Iterator[str]:
    """The hooks that a class implements, itself or by a base that stands in the same file."""
    for node in classes[name].body:
        if isinstance(node, ast.FunctionDef) and any(map(_marks, node.decorator_list)):
            yield node.name
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _hooks(classes, base.id)


def _marks(decorator: ast.expr) -> bool:
    """Is it `hookimpl`, `peftx.hookimpl`, or one of these with arguments."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called).rpartition(".")[2] == "hookimpl"
