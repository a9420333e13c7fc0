"""Whether a plugin's module would import, as far as its source shows: nothing of it is run.

Two things show: source that does not compile, and a module that is not installed, imported by a statement at the
margin, where neither `try` nor `if` can mean that it may be missing.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import decode_source, find_spec
from pathlib import Path

_IMPORT = re.compile(r"^(?:import[ \t]+([^#;\n]+)|from[ \t]+([\w.]+)[ \t]+import\b)", re.MULTILINE)
_FINDS = re.compile(r"\b(?:sys|site)\b.*\b(?:path|meta_path|path_hooks|modules|addsitedir)\b")
"""A line of a module that may change where imports look: what it imports is not judged."""


@dataclass(frozen=True)
class Glance:
    """What a source shows.

    Attributes:
        wrong: why it does not compile; empty where it does. line: where.
        imports: top-level packages that lines at the margin seem to import (those of a docstring too).
    """

    wrong: str
    line: int
    imports: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """Why a module cannot import. `missing`: the package that is not installed; empty where it is something else."""

    file: Path
    line: int
    cause: str
    missing: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.cause}"


def glance(file: Path) -> Glance:
    """Look at a source; a millisecond.

    Raises:
        OSError: it cannot be read.
    """
    told = file.stat()
    return _glance(file, (told.st_mtime_ns, told.st_size))


@lru_cache(maxsize=512)
def _glance(file: Path, state: tuple[int, int]) -> Glance:
    source = file.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those about the source are for the import to give
            compile(source, str(file), "exec", dont_inherit=True)
    except SyntaxError as error:
        return Glance(f"{type(error).__name__}: {error.msg}", error.lineno or 1, ())
    except ValueError as error:  # a null byte, before Python 3.12
        return Glance(f"{type(error).__name__}: {error}", 1, ())
    text = decode_source(source)
    found = () if _FINDS.search(text) else _IMPORT.findall(text)
    names = (one.split()[0] for some, other in found for one in (other or some).split(",") if one.strip())
    return Glance("", 0, tuple(dict.fromkeys(top for name in names if (top := name.partition(".")[0]))))


def is_there(name: str) -> bool:
    """Is a top-level module or package installed; it is not imported."""
    return name in sys.modules or name in sys.stdlib_module_names or find_spec(name) is not None


def fault(
    module: str,
    top: Path,
    *,
    look: Callable[[Path], Glance] = glance,
    there: Callable[[str], bool] = is_there,
) -> Fault | None:
    """What keeps a module from importing, as far as it shows; None where nothing does.

    Args:
        module: as an entry point names it. top: the file of its top-level module or package.
        look, there: `glance` and `is_there`, or what keeps their answers.
    """
    for file in sources(module, top):
        seen = look(file)
        if seen.wrong:
            return Fault(file, seen.line, seen.wrong)
        missing = {name for name in seen.imports if not there(name)}
        if missing and (said := _first(file, missing)):
            name, line = said
            return Fault(file, line, f"ModuleNotFoundError: No module named '{name}'", name)
    return None


def sources(module: str, top: Path) -> Iterator[Path]:
    """The Python files that run when `module` is imported, from its top-level package down."""
    file: Path | None = top
    for part in (*module.split(".")[1:], None):
        if file is None or file.suffix != ".py":
            return
        yield file
        inner = (file.parent / f"{part}" / "__init__.py", file.parent / f"{part}.py")
        file = next((one for one in inner if one.is_file()), None)


def top_file(module: str) -> Path | None:
    """The file of a module's top-level package; None where there is none."""
    spec = find_spec(module.partition(".")[0])
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin is not None else None


def source_file(module: str) -> Path | None:
    """The Python file of a module, which is not imported; None where there is none."""
    top = top_file(module)
    return None if top is None else next(reversed([*sources(module, top)]), None)


def _first(file: Path, names: set[str]) -> tuple[str, int] | None:
    """The first of these that a statement of the module itself imports, and its line."""
    for statement in ast.parse(file.read_bytes(), file).body:
        match statement:
            case ast.Import():
                tops = [alias.name.partition(".")[0] for alias in statement.names]
            case ast.ImportFrom(module=str(name), level=0):
                tops = [name.partition(".")[0]]
            case _:
                continue
        for top in tops:
            if top in names:
                return top, statement.lineno
    return None
