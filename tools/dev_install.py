"""Make `.venv`: the pinned third-party set, then peftx and every plugin folder as editable installs.

    python3 tools/dev_install.py                  # what `make setup` runs; a second run finds nothing to do
    python3 tools/dev_install.py --extra docs     # also the packages of that extra, from then on
    python3 tools/dev_install.py --force          # rebuild the environment from nothing

Needs Python 3.11 and its own pip, nothing else. Requirements are read from the pyproject files, their versions from
constraints.txt. Editable wheels are built in one process and installed by one pip call: with build isolation pip
would make one environment for each plugin, a second or two apiece. What was installed is kept in `.venv/.peftx-stamp`,
so only what changed is done again, and a plugin whose folder is gone is uninstalled.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036 - a bare `python3` may be older than what pyproject.toml asks for
    sys.exit(f"peftx needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}")

import tomllib

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".peftx-stamp"
LOG = VENV / "dev-install.log"
DEFAULT_EXTRAS = ("serve", "worker", "compressed", "eval", "gguf", "ray", "search", "test")
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]

FINDER = "__peftx_editable_finder"
FINDER_SOURCE = '''"""Where the modules of a checkout's plugins are: written by tools/dev_install.py."""

import sys

MODULES = {}


class PluginFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in MODULES:
            return None
        from importlib.util import spec_from_file_location  # five milliseconds, which no other start is to pay

        return spec_from_file_location(name, MODULES[name])


sys.meta_path.append(PluginFinder)
'''


# ------------------------------------------------------------------------------------------- what there should be
def plugin_folders() -> list[Path]:
    return sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))


def plugin_modules() -> dict[str, str]:
    """Name of a module or package -> its file, from the root."""
    files = [*ROOT.glob("plugins/*/*/src/*.py"), *ROOT.glob("plugins/*/*/src/*/__init__.py")]
    return {
        file.parent.name if file.name == "__init__.py" else file.stem: str(file.relative_to(ROOT))
        for file in sorted(files)
    }


def read_pyproject(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        sys.exit(f"{folder / 'pyproject.toml'}: not valid TOML: {error}")


def is_ours(requirement: str) -> bool:
    """True for peftx itself and the plugins of this repository's naming: they are never fetched."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")
    return name == "peftx" or name.startswith("peftx-")


def third_party(root: dict[str, Any], plugins: list[dict[str, Any]], extras: list[str]) -> list[str]:
    """Every requirement that comes from outside: run time, chosen extras, build backends, plugins' own."""
    known = root["project"]["optional-dependencies"]
    for extra in extras:
        if extra not in known:
            sys.exit(f"pyproject.toml has no extra {extra!r}; there are: {', '.join(sorted(known))}")
    wanted = [*root["project"]["dependencies"], *(line for extra in extras for line in known[extra])]
    for project in [root, *plugins]:
        wanted += project["build-system"]["requires"]
    for project in plugins:
        wanted += [line for line in project["project"].get("dependencies", ()) if not is_ours(line)]
    return sorted(set(wanted))


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def desired(extras: list[str]) -> tuple[dict[str, Any], list[str], dict[str, Path]]:
    """(the stamp that a finished install has, the third-party requirements, {distribution: its folder})."""
    root = read_pyproject(ROOT)
    plugins = {folder: read_pyproject(folder) for folder in plugin_folders()}
    requirements = third_party(root, list(plugins.values()), extras)

    # Tool tables (ruff, pytest, ...) are left out: a change there asks for no reinstall.
    packages = {"peftx": digest(root["project"], root["build-system"], root["tool"]["hatch"])}
    folders = {"peftx": ROOT}
    for folder, project in plugins.items():
        name = project["project"]["name"]
        if name in folders:
            sys.exit(f"two folders claim the distribution {name!r}: {folders[name]} and {folder}")
        packages[name] = digest(project, str(folder.relative_to(ROOT)))
        folders[name] = folder
    stamp = {
        "root": str(ROOT),  # an environment that was moved has wrong paths in its scripts
        "python": sys.version.split()[0],
        "extras": extras,
        "third_party": digest(requirements, (ROOT / "constraints.txt").read_text("utf-8")),
        "packages": packages,
        "modules": plugin_modules(),
    }
    return stamp, requirements, folders


# -------------------------------------------------------------------------------------------------- how it is made
def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def run(command: list[str], *, failed: str) -> None:
    """Run quietly; the output goes to the log, and its end to the screen if the command fails."""
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    if done.returncode != 0:
        output = LOG.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
        print("\n".join(output[-40:]), file=sys.stderr)
        sys.exit(f"[setup] {failed} (exit code {done.returncode}); the whole output is in {LOG}")


def write_stamp(stamp: dict[str, Any]) -> None:
    beside = STAMP.with_suffix(".new")
    beside.write_text(json.dumps(stamp, indent=1), "utf-8")
    beside.replace(STAMP)


def create_venv() -> None:
    if Path(sys.prefix).resolve() == VENV:
        base = sys._base_executable  # type: ignore[attr-defined]
        sys.exit(
            f"[setup] {VENV} is to be made anew, and this is its own Python; deactivate, or: PYTHON={base} make setup"
        )
    say(f"creating {VENV.relative_to(ROOT)} with Python {sys.version.split()[0]}")
    if VENV.exists():
        shutil.rmtree(VENV)
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        sys.exit("[setup] `python3 -m venv` failed; on Debian and Ubuntu it needs the package python3-venv")


def install_editables(folders: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory(prefix="peftx-wheels-") as wheels:
        build = [str(PYTHON), str(Path(__file__).resolve()), "--build-into", wheels]
        run([*build, *map(str, folders.values())], failed="an editable wheel could not be built")
        files = sorted(map(str, Path(wheels).glob("*.whl")))
        pip = [*PIP, "install", "-q", "--no-index", "--no-deps", "--force-reinstall", *files]
        run(pip, failed="pip could not install the editable wheels")


def gather_paths(modules: dict[str, str]) -> None:
    """Take the plugins' folders off `sys.path`, and have a finder look up their modules by name.

    Each editable wheel puts a folder on the path by a `.pth` file. What lies behind site-packages, or is not there at
    all (every training asks for nine packages that are not), would be looked for in all of them: 22 ms of CPU a
    training at 130 plugins.
    """
    ask = [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    places = json.dumps({name: str(ROOT / path) for name, path in modules.items()}, indent=1)
    (site / f"{FINDER}.py").write_text(FINDER_SOURCE.replace("{}", places), "utf-8")
    (site / f"{FINDER}.pth").write_text(f"import {FINDER}\n", "utf-8")
    for file in site.glob("peftx_*.pth"):
        if Path(file.read_text("utf-8").strip()).is_relative_to(ROOT / "plugins"):
            file.unlink()


def build_editables(target: Path, folders: list[Path]) -> None:
    """Runs inside the environment: one wheel for each folder, all in this process."""
    for folder in folders:
        os.chdir(folder)  # PEP 517: a backend is called in the project's folder
        backend = importlib.import_module(read_pyproject(folder)["build-system"]["build-backend"])
        try:
            backend.build_editable(str(target))
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, the folder must be named
            sys.exit(f"{folder}: {type(error).__name__}: {error}")


def install(extras: list[str], *, force: bool) -> None:
    started = time.monotonic()
    found: dict[str, Any] = {}
    if STAMP.exists() and PYTHON.exists() and not force:
        found = json.loads(STAMP.read_text("utf-8"))
    extras = sorted({*DEFAULT_EXTRAS, *extras, *found.get("extras", ())})
    wanted, requirements, folders = desired(extras)
    if found == wanted:
        return

    if (found.get("root"), found.get("python")) != (wanted["root"], wanted["python"]):
        create_venv()
        found = {
            "root": wanted["root"],
            "python": wanted["python"],
            "extras": [],
            "third_party": "",
            "packages": {},
        }
        write_stamp(found)

    if found["third_party"] != wanted["third_party"]:
        say(f"installing {len(requirements)} requirements and what they need (minutes the first time)")
        pip = [*PIP, "install", "-q", "-c", "constraints.txt", *requirements]
        run(pip, failed="pip could not install the third-party packages")
        found |= {"third_party": wanted["third_party"], "extras": extras}
        write_stamp(found)

    gone = sorted(found["packages"].keys() - wanted["packages"].keys())
    if gone:
        say(f"uninstalling {', '.join(gone)}: the folder is gone")
        run([*PIP, "uninstall", "-q", "-y", *gone], failed="pip could not uninstall")
    old = {name: found["packages"].get(name) for name in wanted["packages"]}
    changed = {name: folder for name, folder in folders.items() if old[name] != wanted["packages"][name]}
    if changed:
        # Marked first, so that a run that is killed half-way knows what it may have installed.
        write_stamp(found | {"packages": {name: old[name] if name not in changed else "" for name in old}})
        say(f"installing {len(changed)} of {len(folders)} packages of this repository, editable")
        install_editables(changed)
    if changed or found.get("modules") != wanted["modules"]:
        gather_paths(wanted["modules"])
    run([*PIP, "check"], failed="the installed packages do not fit together")
    write_stamp(wanted)
    say(f"{len(folders)} packages ready in {time.monotonic() - started:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--extra", action="append", default=[], metavar="NAME", help="an extra of pyproject.toml"
    )
    parser.add_argument("--force", action="store_true", help="rebuild .venv from nothing")
    parser.add_argument("--build-into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build_into is not None:
        build_editables(arguments.build_into, arguments.folders)
    elif arguments.folders:
        parser.error(f"unexpected argument: {arguments.folders[0]}")
    else:
        install(arguments.extra, force=arguments.force)


if __name__ == "__main__":
    main()
