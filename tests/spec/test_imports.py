"""The spec is light: nothing of torch or the core, and nothing at all before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import peftx_spec

HEAVY = ("torch", "transformers", "datasets", "peftx", "numpy")
FILES = sorted(Path(peftx_spec.__file__).parent.glob("*.py"))


def loaded_after(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter that ran `code`."""
    script = f"import sys\nsys.path[:0] = {sys.path!r}\n{code}\nprint(*sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_import_loads_neither_pydantic_nor_yaml() -> None:
    assert not loaded_after("import peftx_spec") & {"pydantic", "yaml", *HEAVY}


def test_everything_works_without_torch_and_core() -> None:
    code = """
from peftx_spec import *

class Empty:
    names = staticmethod(list)
    hooks = staticmethod(frozenset)
    config = staticmethod(dict)
    install_hint = staticmethod(str)

none = Empty()
pipeline = load_pipeline("{peftx: 1, model: m}", catalogue=none)
dump(pipeline), json_schema(none), stages_of(pipeline, none)
resolved(pipeline, "."), Plan(model="m").to_json()
"""
    loaded = loaded_after(code)
    assert "pydantic" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("name", peftx_spec.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(peftx_spec, name) is not None
    assert name in dir(peftx_spec)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        peftx_spec.nothing  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_only_what_the_spec_may(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "pydantic", "pydantic_core", "yaml", "peftx_spec"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert {name.partition(".")[0] for name in names} <= allowed
