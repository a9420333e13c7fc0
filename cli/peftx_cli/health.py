"""What can be known about a plugin without importing it, and what `doctor` found out by importing it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx_spec.places import cache_folder

if TYPE_CHECKING:
    from peftx.composition.importable import Fault, Glance
    from peftx.composition.metadata import Entry
    from peftx.composition.registry import Registry

BROKEN = "broken.json"
"""Where `doctor` notes which plugins fail."""
GLANCES = "sources.json"
"""Where `list` notes what a look at the plugins' sources showed."""
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
    glances = Glances.read()
    look = glances.faults()
    installed: dict[str, bool] = {}
    for entry in registry.entries():
        reason = _trouble(entry, installed, look) or verdicts.reason(entry)
        found.append(Listed(entry.name, "broken" if reason else "ok", reason, entry))
    glances.write()
    return sorted(found, key=lambda one: one.name)


def module_file(entry: Entry) -> Path | None:
    """The file of the plugin's module; None where there is none. Nothing is imported."""
    name = entry.point.module.partition(".")[0]
    if known := _modules(tuple(sys.path)).get(name):
        return known
    # By a finder, as of an editable install, or on a path that is no folder. What is loaded is not asked, as by
    # importlib's own `find_spec`: `__main__` has no spec there.
    specs = (finder.find_spec(name, None) for finder in sys.meta_path)
    found = next((spec for spec in specs if spec is not None), None)
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


@lru_cache(maxsize=1)
def _modules(folders: tuple[str, ...]) -> dict[str, Path]:
    """Top-level modules and packages in the folders of the path: each folder is read once, where looking for every
    plugin in every other one's folder grows with the square."""
    found: dict[str, Path] = {}
    for folder in folders:
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


def _trouble(entry: Entry, installed: dict[str, bool], look: Callable[[str, Path], Fault | None]) -> str:
    """Why the plugin cannot import, as far as that shows from outside; empty where nothing does."""
    from peftx.composition.origins import misfit
    from peftx.version import __version__

    if asked := misfit(entry.requires):
        return f"needs {asked}, and this is peftx {__version__}"
    if (file := module_file(entry)) is None:
        return f"its module {entry.point.module} is not there"
    for name in _requirements(entry):
        if name not in installed:
            installed[name] = _is_installed(name)
        if not installed[name]:
            return f"needs {name}, which is not installed"
    return str(look(entry.point.module, file) or "")


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


def _noted(name: str) -> dict[str, Any]:
    """What a file of the cache holds; nothing where it is not there or damaged."""
    file = cache_file(name)
    try:
        notes = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


class Glances:
    """What `glance` said of each source, kept for as long as the file is the same: a source is compiled for it, and
    hundreds of them in every `peftx list` would be felt."""

    def __init__(self, known: dict[str, dict[str, Any]]) -> None:
        self.known = known
        self.used: dict[str, dict[str, Any]] = {}

    @classmethod
    def read(cls) -> Glances:
        return cls(_noted(GLANCES))

    def faults(self) -> Callable[[str, Path], Fault | None]:
        """`importable.fault` of a module and its file, with what is known already."""
        from peftx.composition.importable import fault, is_there

        return partial(fault, look=self.look, there=cache(is_there))

    def look(self, file: Path) -> Glance:
        from peftx import __version__
        from peftx.composition.importable import Glance, glance

        state = f"{__version__} {sys.hexversion:x} {_state(file)}"  # another Python may compile what this one does not
        note = self.known.get(str(file))
        if note is None or note["state"] != state:
            note = {"state": state, "seen": asdict(glance(file))}
        self.used[str(file)] = note
        return Glance(**note["seen"])

    def write(self) -> None:
        """What was looked at; nothing is kept where the cache cannot be written, and the next look is as long."""
        file = cache_file(GLANCES)
        if file is None or self.used.items() <= self.known.items():
            return
        others = {
            name: note for name, note in self.known.items() if os.path.exists(name)
        }  # of other environments
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(others | self.used), encoding="utf-8")


class Verdicts:
    """What failed to import when `doctor` last looked; a note counts only while the module's file is the same."""

    def __init__(self, notes: dict[str, dict[str, str]]) -> None:
        self.notes = notes

    @classmethod
    def read(cls) -> Verdicts:
        return cls(_noted(BROKEN))

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
    """A plugin's file in the state that it has now."""
    file = module_file(entry)
    return "" if file is None else f"{file}:{_state(file)}"


def _state(file: Path) -> str:
    state = file.stat()
    return f"{state.st_size}:{state.st_mtime_ns}"
