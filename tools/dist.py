"""Builds wheels and sdists into dist/: the framework, every plugin folder, and the bundles of plugins.

    python tools/dist.py                    # what `make dist` runs
    python tools/dist.py lora prefixquant   # the framework and these plugins alone, and no bundle

One process, no build isolation, no network: each backend is called as PEP 517 says. A plugin is built from a copy of
its folder, to which the licence and the address of its source are added, so that the folders need not repeat them; the
sdist has both, so a wheel built from it is the same. Times in the archives are those of the last commit.

A bundle is a distribution without code that requires plugins: `peftx-all` all of this repository, `peftx-all-<family>`
all of a family that has three or more. They are written here from the plugins' keywords and stand nowhere in the tree.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "https://github.com/peftx/peftx"
SMALLEST = 3  # plugins of a family that has a bundle

BUNDLE = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "{description}"
readme = "README.md"
requires-python = ">=3.11"
license = "Apache-2.0"
license-files = ["LICENSE"]
dependencies = {dependencies}

[project.urls]
Source = "{source}"

[tool.hatch.build.targets.wheel]
bypass-selection = true # it has no module
"""


def framework_version() -> str:
    """The one version: of core/peftx/version.py, which is not imported, since what is installed may be another one."""
    text = (ROOT / "core/peftx/version.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        sys.exit('core/peftx/version.py: no line __version__ = "..."')
    return found[1]


def projects() -> dict[Path, dict[str, Any]]:
    """Every plugin folder with its `[project]`."""
    return {
        path.parent: tomllib.loads(path.read_text("utf-8"))["project"]
        for path in sorted(ROOT.glob("plugins/*/*/pyproject.toml"))
    }


def bundles(plugins: dict[Path, dict[str, Any]]) -> dict[str, tuple[str, list[str]]]:
    """Name of a bundle -> (its description, the distributions that it requires)."""
    families: dict[str, list[str]] = defaultdict(list)
    for project in plugins.values():
        for word in project["keywords"]:
            if word.startswith("family:"):
                families[word.removeprefix("family:")].append(project["name"])
    found = {"peftx-all": ("Every plugin of the peftx repository", [p["name"] for p in plugins.values()])}
    found |= {
        f"peftx-all-{family}": (f"Every plugin of the peftx repository of the family {family}", names)
        for family, names in sorted(families.items())
        if len(names) >= SMALLEST
    }
    return {name: (description, sorted(names)) for name, (description, names) in found.items()}


def stage_plugin(folder: Path, project: dict[str, Any], version: str, target: Path) -> None:
    """Copy a plugin's folder, and add the licence and the address of its source."""
    if project["version"] != version:
        sys.exit(
            f"{folder.relative_to(ROOT)}/pyproject.toml: version {project['version']}, and core/peftx/version.py says "
            f"{version}; run python tools/generate.py"
        )
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    file = target / "pyproject.toml"
    text = file.read_text("utf-8")
    line = f'Source = "{SOURCE}/tree/main/{folder.relative_to(ROOT).as_posix()}"\n'
    if "[project.urls]\n" in text:
        text = text.replace("[project.urls]\n", f"[project.urls]\n{line}")
    else:
        text += f"\n[project.urls]\n{line}"
    file.write_text(text, "utf-8")
    shutil.copy(ROOT / "LICENSE", target)  # flit takes it without being told


def stage_bundle(name: str, description: str, plugins: list[str], version: str, target: Path) -> None:
    """Write the folder of a distribution without code."""
    text = BUNDLE.format(
        name=name,
        version=version,
        description=description,
        dependencies=json.dumps([f"{plugin}~={version}" for plugin in plugins], indent=2),
        source=SOURCE,
    )
    target.mkdir()
    (target / "pyproject.toml").write_text(text, "utf-8")
    lines = [f"# {name}", "", f"{description}, {version}. It installs these and holds no code:", ""]
    (target / "README.md").write_text(
        "\n".join([*lines, *(f"- {plugin}" for plugin in plugins), ""]), "utf-8"
    )
    shutil.copy(ROOT / "LICENSE", target)


def build(folder: Path, output: Path) -> None:
    """One wheel and one sdist of a folder, by its own backend in this process."""
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    backend = importlib.import_module(project["build-system"]["build-backend"])
    os.chdir(folder)  # PEP 517: a backend is called in the project's folder
    try:
        backend.build_sdist(str(output))
        backend.build_wheel(str(output))
    except Exception as error:  # noqa: BLE001 - whatever a backend raises, the distribution must be named
        sys.exit(f"{project['project']['name']}: {type(error).__name__}: {error}")


def commit_time() -> str:
    """Seconds of the last commit, for times in archives; a source tree without git has those of 1980."""
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "315532800"


def build_all(output: Path, only: list[str]) -> int:
    """Build into a folder, of which older distributions of ours are removed; returns how many there are."""
    version = framework_version()
    plugins = projects()
    unknown = set(only) - {folder.name for folder in plugins}
    if unknown:
        sys.exit(f"no plugin folder is named {', '.join(sorted(unknown))}")
    os.environ.setdefault("SOURCE_DATE_EPOCH", commit_time())
    output.mkdir(parents=True, exist_ok=True)
    for old in [*output.glob("peftx*.whl"), *output.glob("peftx*.tar.gz")]:
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="peftx-dist-") as scratch:
        staged = [ROOT]
        for folder, project in plugins.items():
            if not only or folder.name in only:
                staged.append(Path(scratch, project["name"]))
                stage_plugin(folder, project, version, staged[-1])
        for name, (description, members) in {} if only else bundles(plugins).items():
            staged.append(Path(scratch, name))
            stage_bundle(name, description, members, version, staged[-1])
        for folder in staged:
            build(folder, output)
    return len(staged)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR", help="dist/ if left out")
    parser.add_argument("plugins", nargs="*", metavar="PLUGIN", help="all, and the bundles, if left out")
    arguments = parser.parse_args()
    started = time.monotonic()
    count = build_all(arguments.output.resolve(), arguments.plugins)
    print(f"{count} distributions, a wheel and an sdist each, in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
