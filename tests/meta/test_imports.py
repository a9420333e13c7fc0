"""Imports run one way: cli → core → spec; plugins import `peftx` and declared packages; nothing imports a plugin.

Read from the source with `ast`, so imports inside functions and under TYPE_CHECKING count too, no module is run, and
no list of plugins is needed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STANDARD = sys.stdlib_module_names
SPEC_MAY = {"peftx_spec", "pydantic", "pydantic_core", "yaml", "typing_extensions"}
PLUGIN_MODULE = re.compile(r"peftx_(?!spec\b|cli\b)\w+")
HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "peft", "fastapi", "safetensors.torch")


@dataclass(frozen=True)
class Import:
    """One imported dotted name (`from a.b import c` is `a.b.c`) and its line."""

    name: str
    line: int

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


PLUGIN_MODULES = {path.stem for path in ROOT.glob("plugins/*/*/src/peftx_*")}
SIBLINGS = {module.replace("_", "-") for module in PLUGIN_MODULES}


def imports(source: str) -> list[Import]:
    """Every absolute import, and every text constant that is exactly the name of a plugin's module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [Import(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in PLUGIN_MODULES:
            found.append(Import(node.value, node.lineno))
    return found


def requirement_name(requirement: str) -> str:
    """`peftx-lora>=0.1` → `peftx-lora`, in the normal form of distribution names."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


# --------------------------------------------------------------------------------------------- one rule each package
def spec_violations(source: str) -> list[str]:
    return [
        f"{found.line}: imports {found.name}; spec/ has the standard library, pydantic and yaml only"
        for found in imports(source)
        if found.top not in STANDARD | SPEC_MAY
    ]


def core_violations(source: str) -> list[str]:
    return [
        f"{found.line}: imports {found.name}; the core knows neither the command line nor any plugin"
        for found in imports(source)
        if found.top in {"peftx_cli", "typer", "rich", "click"} or PLUGIN_MODULE.fullmatch(found.top)
    ]


def cli_violations(source: str) -> list[str]:
    return [
        f"{found.line}: imports {found.name}; plugins are found by their entry points"
        for found in imports(source)
        if PLUGIN_MODULE.fullmatch(found.top)
    ]


def plugin_violations(source: str, *, own: str, declared: set[str], known: dict[str, list[str]]) -> list[str]:
    """`own`: the plugin's module; `declared`: distributions it may use; `known`: import name → distributions."""
    found = []
    for one in imports(source):
        if one.top in {"peftx_spec", "peftx_cli"}:
            found.append(f"{one.line}: imports {one.name}; what a plugin needs is exported by peftx")
        elif one.top == "peftx":
            if any(part.startswith("_") and not part.startswith("__") for part in one.name.split(".")):
                found.append(f"{one.line}: imports {one.name}, which is private to peftx")
        elif PLUGIN_MODULE.fullmatch(one.top):
            if one.top != own and one.top.replace("_", "-") not in declared:
                found.append(
                    f"{one.line}: imports {one.top}, but {one.top.replace('_', '-')} is no dependency"
                )
        elif one.top not in STANDARD:
            distributions = {name.lower().replace("_", "-") for name in known.get(one.top, [one.top])}
            if not distributions & declared:
                found.append(f"{one.line}: imports {one.top}, which no dependency brings")
    return found


# ------------------------------------------------------------------------------------------------- the rules hold
@pytest.mark.parametrize(
    ("folder", "rule"),
    [
        ("spec/peftx_spec", spec_violations),
        ("core/peftx", core_violations),
        ("cli/peftx_cli", cli_violations),
    ],
    ids=["spec", "core", "cli"],
)
def test_package_imports(folder: str, rule: type) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} has no Python file: this test looks in the wrong place"
    report = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in rule(path.read_text("utf-8"))]
    assert not report, "\n" + "\n".join(report)


def test_plugin_imports() -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    shared = {requirement_name(line) for line in root["dependencies"]}
    extras = root["optional-dependencies"]
    testing = {requirement_name(line) for line in (*extras["test"], *extras["serve"])}  # a plugin may serve
    known = dict(packages_distributions())
    report = []
    for pyproject in sorted(ROOT.glob("plugins/*/*/pyproject.toml")):
        project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
        own = project["name"].replace("-", "_")
        declared = shared | {requirement_name(line) for line in project["dependencies"]}
        for path in sorted(pyproject.parent.rglob("*.py")):
            # tests may stand a plugin beside its siblings of this repository
            in_tests = "tests" in path.relative_to(pyproject.parent).parts
            allowed = declared | testing | SIBLINGS if in_tests else declared
            lines = plugin_violations(path.read_text("utf-8"), own=own, declared=allowed, known=known)
            report += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not report, "\n" + "\n".join(report)


@pytest.mark.parametrize("package", ["peftx_spec", "peftx", "peftx_cli.main"])
def test_importing_is_light(package: str) -> None:
    """`peftx --help` and `peftx list` have a third of a second; torch alone takes one."""
    code = f"import sys, {package}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"import {package} pulls in {done.stdout}"


# ------------------------------------------------------------------------------------------ the rules see a violation
@pytest.mark.parametrize(
    "line", ["import torch", "from peftx.errors import PluginError", "import typer", "import peftx_lora"]
)
def test_spec_rule(line: str) -> None:
    assert spec_violations(f"def f():\n    {line}\n")[0].startswith("2: imports")
    assert (
        spec_violations("import json\nimport yaml\nfrom pydantic import Field\nfrom . import errors\n") == []
    )


@pytest.mark.parametrize(
    "line",
    ["import peftx_cli.main", "import rich", "from peftx_lora import Lora", "import_module('peftx_lora')"],
)
def test_core_and_cli_rules(line: str) -> None:
    assert core_violations(line)
    assert bool(cli_violations(line)) == ("lora" in line)
    assert core_violations("import torch\nfrom peftx_spec.errors import nearest\n'see peftx_lora'\n") == []
    assert (
        cli_violations("import typer\nimport peftx\nfrom peftx_spec import errors\nimport peftx_cli.main\n")
        == []
    )


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("from peftx import Plugin, hookimpl", True),
        ("from peftx.kernel.slots import Delta", True),
        ("from peftx import __version__", True),
        ("import torch.nn.functional as F", True),
        ("import math", True),
        ("from peftx_lora import Lora", True),
        ("from peftx_own.parts import Part", True),
        ("from peftx._private import x", False),
        ("from peftx.kernel.slots import _swap", False),
        ("import peftx_spec.errors", False),
        ("from peftx_cli import main", False),
        ("import peftx_dora", False),
        ("import scipy.linalg", False),
    ],
)
def test_plugin_rule(line: str, allowed: bool) -> None:
    declared, known = {"torch", "peftx", "peftx-lora"}, {"torch": ["torch"], "scipy": ["scipy"]}
    assert (plugin_violations(line, own="peftx_own", declared=declared, known=known) == []) == allowed
