"""A plugin's class without what its methods use: options, claims and hooks of a plugin, and no torch.

A plugin is one file that imports torch, and to check a spec only its `Config` and the head of its class are asked for.
So the file is read, and the statements that these two stand on are run: imports of light modules, `Literal`s, functions
that validators call. Where that is not enough (a base class that stands elsewhere, an option whose type comes from
torch), there is no outline, and the plugin is imported.
"""

from __future__ import annotations

import ast
import builtins
import os
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

from peftx.exported import WHERE
from peftx.kernel.names import HOOKS
from peftx.kernel.plugin import Plugin

PREFIX = "peftx_outline."
"""Of the modules in which outlines live: nothing imports them by name."""
LIGHT = (
    frozenset({"annotated_types", "pydantic", "pydantic_core", "typing_extensions"}) | sys.stdlib_module_names
)
"""Packages whose import costs nothing beside that of a plugin."""
OURS = frozenset(
    {
        "peftx.errors",
        "peftx.kernel.names",
        "peftx.kernel.phases",
        "peftx.kernel.plugin",
        "peftx.kernel.targets",
        "peftx.peft_format",
        "peftx.toolkits.options",
    }
)
"""Modules of peftx that do not import torch."""
_BUILTINS = frozenset(dir(builtins))
_CALLED = frozenset({"__init__", "__init_subclass__", "claimed"})
"""Methods of a plugin that run when one is made."""
_SINGLE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
"""Statements of which it is plain what they bind."""


def outline(module: str, name: str) -> type[Plugin] | None:
    """The class `name` of a module that is not imported, its hooks there but not to be called; None: import it."""
    spec = find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return outline_of(spec.origin, module, name)


def outline_of(file: str, module: str, name: str) -> type[Plugin] | None:
    """The same of a module that nothing finds by its name."""
    told = os.stat(file)
    return _outline(module, name, file, (told.st_mtime_ns, told.st_size))


@lru_cache(maxsize=512)  # of all that are installed: whoever asks for each one twice finds it the second time
def _outline(module: str, name: str, file: str, state: tuple[int, int]) -> type[Plugin] | None:
    with open(file, "rb") as source:
        tree = ast.parse(source.read(), file)
    try:
        wanted = _Slice(tree, name).statements
    except _Heavy:
        return None
    found = ModuleType(PREFIX + module)
    found.__file__ = file
    sys.modules[found.__name__] = found  # where pydantic looks up the names in annotations
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *wanted], []), file, "exec"), found.__dict__)
    cls = found.__dict__[name]
    return cls if isinstance(cls, type) and issubclass(cls, Plugin) else None


class _Heavy(Exception):
    """Something that the class stands on cannot be had without importing the module."""


class _Slice:
    """The statements of a module on which one class stands, in the module's order."""

    def __init__(self, tree: ast.Module, name: str) -> None:
        self.places = {bound: statement for statement in _top(tree.body) for bound in _binds(statement)}
        if not any(isinstance(s, ast.ImportFrom) and s.module == "__future__" for s in tree.body):
            raise _Heavy  # annotations are evaluated
        self.taken: dict[ast.stmt, set[str]] = {}
        plugin = self.places.get(name)
        if not isinstance(plugin, ast.ClassDef):
            raise _Heavy
        self.taken[plugin] = {name}
        reduced = self._reduced(plugin)
        known = {bound for statement in self.taken for bound in _binds(statement)}
        if any(_changes(statement, known) for statement in _top(tree.body) if statement not in self.taken):
            raise _Heavy
        self.statements = [
            reduced if statement is plugin else _only(statement, self.taken[statement])
            for statement in _top(tree.body)
            if statement in self.taken
        ]

    def _reduced(self, plugin: ast.ClassDef) -> ast.ClassDef:
        """The plugin's class without what needs more than light modules and is not for `Plugin` to read."""
        for node in (*plugin.bases, *plugin.keywords, *plugin.decorator_list):
            self._take(_free(node))
        own = {bound for inner in plugin.body for bound in _binds(inner)}
        body: list[ast.stmt] = []
        for inner in plugin.body:
            if isinstance(inner, ast.FunctionDef):
                decorators = [one for one in inner.decorator_list if self._try(_free(one), own)]
                inner = ast.copy_location(
                    ast.FunctionDef(**{**dict(ast.iter_fields(inner)), "decorator_list": decorators}), inner
                )
                names = [
                    n
                    for node in (*inner.args.defaults, *filter(None, inner.args.kw_defaults))
                    for n in _free(node)
                ]
                if inner.name in _CALLED:
                    bound = {arg.arg for arg in ast.walk(inner.args) if isinstance(arg, ast.arg)}
                    names += _free(ast.Module(inner.body, []), bound)
            else:
                value = inner.value if isinstance(inner, ast.Assign | ast.AnnAssign) else inner
                names = [] if value is None else [*_free(value)]
            if self._try(names, own):
                body.append(inner)
            elif not isinstance(inner, _SINGLE) or any(
                hasattr(Plugin, bound) or bound in HOOKS for bound in _binds(inner)
            ):
                raise _Heavy
        fields = dict(ast.iter_fields(plugin)) | {"body": body or [ast.copy_location(ast.Pass(), plugin)]}
        return ast.copy_location(ast.ClassDef(**fields), plugin)

    def _try(self, names: Iterable[str], own: set[str]) -> bool:
        """Can all of these be had."""
        before = {statement: set(names) for statement, names in self.taken.items()}
        try:
            self._take(name for name in names if name not in own)
        except _Heavy:
            self.taken = before
            return False
        return True

    def _take(self, names: Iterable[str]) -> None:
        for name in names:
            statement = self.places.get(name)
            if statement is None:
                if name in _BUILTINS:
                    continue
                raise _Heavy
            taken = self.taken.setdefault(statement, set())
            if name in taken:
                continue
            taken.add(name)
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                self._take(_free(statement))
            elif not _light(statement, name):
                raise _Heavy


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if TYPE_CHECKING:` left out."""
    return (s for s in body if not (isinstance(s, ast.If) and ast.unparse(s.test).endswith("TYPE_CHECKING")))


def _binds(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement gives a value."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield statement.name
    else:
        yield from (
            node.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        )


def _free(node: ast.AST, bound: Iterable[str] = ()) -> Iterator[str]:
    """Names that are read and not bound inside."""
    inner = list(ast.walk(node))
    bound = set(bound) | {n.id for n in inner if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {n.arg for n in inner if isinstance(n, ast.arg)}
    bound |= {n.name for n in inner if isinstance(n, ast.FunctionDef | ast.ExceptHandler) and n.name}
    return (n.id for n in inner if isinstance(n, ast.Name) and n.id not in bound)


def _changes(statement: ast.stmt, names: set[str]) -> bool:
    """Can a statement change what stands behind these names: by a call, or by an attribute or item of one of them."""
    if isinstance(
        statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
    ):
        return False
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    inner = list(ast.walk(statement))
    stored = any(
        isinstance(n, ast.Attribute | ast.Subscript) and not isinstance(n.ctx, ast.Load) for n in inner
    ) or any(isinstance(n, ast.Expr) for n in inner)
    return stored and any(isinstance(n, ast.Name) and n.id in names for n in inner)


def _light(statement: ast.Import | ast.ImportFrom, name: str) -> bool:
    """Does an import bring `name` without torch."""
    if isinstance(statement, ast.Import):
        return all(alias.name.partition(".")[0] in LIGHT for alias in statement.names)
    if statement.level or statement.module is None:
        return False
    if statement.module == "peftx":
        original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        return WHERE.get(original) in OURS
    return statement.module in OURS or statement.module.partition(".")[0] in LIGHT


def _only(statement: ast.stmt, names: set[str]) -> ast.stmt:
    """Of an import, what is needed of it."""
    if not isinstance(statement, ast.ImportFrom):
        return statement
    kept = [alias for alias in statement.names if (alias.asname or alias.name) in names]
    return ast.copy_location(ast.ImportFrom(statement.module, kept, statement.level), statement)
