"""What can be known about a plugin without importing it, and what `doctor` found out by importing it."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from peftx_spec.places import cache_folder

if TYPE_CHECKING:
    from peftx.composition.registry import Entry, Registry

BROKEN = "broken.json"
"""Where `doctor` notes which plugins fail."""
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Listed:
    """One line of `peftx list`."""

    name: str
    status: str
    """ok, broken, clash or disabled."""
    reason: str
    entry: Entry | None
    """None for a clash and for what is disabled."""


def listed(registry: Registry) -> list[Listed]:
    """Every plugin name that is installed, without importing one."""
    found = [Listed(name, "disabled", "PEFTX_DISABLE_PLUGINS", None) for name in sorted(registry.disabled)]
    found += [
        Listed(name, "clash", f"claimed by {' and '.join(owners)}", None)
        for name, owners in registry.clashes().items()
        if name not in registry.disabled
    ]
    verdicts = Verdicts.read()
    installed: dict[str, bool] = {}
    for entry in registry.entries():
        reason = _trouble(entry, installed) or verdicts.reason(entry)
        found.append(Listed(entry.name, "broken" if reason else "ok", reason, entry))
    return sorted(found, key=lambda one: one.name)


def module_file(entry: Entry) -> Path | None:
    """The file of the plugin's module; None where there is none. Nothing is imported."""
    name = entry.point.module.partition(".")[0]
    if name in _modules():
        return _modules()[name]
    found = PathFinder.find_spec(name)  # as on paths that are no folders
    return Path(found.origin) if found is not None and found.origin is not None else None


@cache
def _modules() -> dict[str, Path]:
    """Top-level modules and packages in the folders of the path: each folder is read once, where looking for every
    plugin in every other one's folder grows with the square."""
    found: dict[str, Path] = {}
    for folder in sys.path:
        with suppress(OSError), os.scandir(folder or ".") as files:
            for file in files:
                if file.name.startswith("peftx") or file.name.endswith(".py"):
                    path = Path(file.path)
                    name, path = (
                        (path.stem, path) if path.suffix == ".py" else (path.name, path / "__init__.py")
                    )
                    if name not in found and path.exists():
                        found[name] = path
    return found


def _trouble(entry: Entry, installed: dict[str, bool]) -> str:
    """Why the plugin cannot import, as far as that shows from outside; empty where nothing does."""
    from peftx.composition.origins import misfit
    from peftx.version import __version__

    if asked := misfit(entry.requires):
        return f"needs {asked}, and this is peftx {__version__}"
    if module_file(entry) is None:
        return f"its module {entry.point.module} is not there"
    for name in _requirements(entry):
        if name not in installed:
            installed[name] = _is_installed(name)
        if not installed[name]:
            return f"needs {name}, which is not installed"
    return ""


def _requirements(entry: Entry) -> list[str]:
    """Names of the distributions that the plugin always needs; peftx itself is here."""
    found = (_REQUIREMENT.match(line) for line in entry.requires if ";" not in line)
    return [match[0].lower() for match in found if match is not None and match[0].lower() != "peftx"]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def cache_file(name: str) -> Path | None:
    """A file of what can be made again; None where nothing is to be kept."""
    folder = cache_folder()
    return folder and folder / name


class Verdicts:
    """What failed to import when `doctor` last looked; a note counts only while the module's file is the same."""

    def __init__(self, notes: dict[str, dict[str, str]]) -> None:
        self.notes = notes

    @classmethod
    def read(cls) -> Verdicts:
        file = cache_file(BROKEN)
        try:
            notes = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
        except (OSError, ValueError):
            return cls({})  # no doctor was here, or its note is damaged: nothing is known
        return cls(notes if isinstance(notes, dict) else {})

    def reason(self, entry: Entry) -> str:
        note = self.notes.get(entry.name)
        return note["reason"] if note is not None and note["file"] == _stamp(entry) else ""

    @classmethod
    def write(cls, broken: dict[str, tuple[Entry, str]]) -> None:
        """Raises OSError where the cache cannot be written."""
        notes = {name: {"file": _stamp(entry), "reason": reason} for name, (entry, reason) in broken.items()}
        file = cache_file(BROKEN)
        if file is None or (not notes and not file.exists()):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(notes, indent=1), encoding="utf-8")


def _stamp(entry: Entry) -> str:
    """A file in the state that it has now."""
    file = module_file(entry)
    if file is None:
        return ""
    state = file.stat()
    return f"{file}:{state.st_size}:{state.st_mtime_ns}"
