"""What stacks of plugins showed, kept over runs for as long as what they ran is the same."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import peftx
from peftx.composition.registry import Registry
from peftx.engines.files import write_text


@dataclass(frozen=True)
class Group:
    """A stack that was lived through: `fault` are those of its plugins that fail together, none too many; empty where
    all is well. `reason` is of the fault; `refused`: said when the stack is built, before anything is paid for."""

    arch: str
    names: tuple[str, ...]
    fault: tuple[str, ...] = ()
    reason: str = ""
    refused: bool = False


class Shown:
    """Groups by what they ran.

    Args:
        file: JSON, a group a line, that grows at every `keep`; None keeps nothing. A line that cannot be read, as one
            that a kill cut, counts for nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._groups: dict[str, Group] = {}
        if file is not None and file.exists():
            lines = file.read_text(encoding="utf-8").splitlines()
            self._groups = {
                key: group for key, group in map(_read, lines) if key == _key(group.arch, group.names)
            }
            if len(self._groups) < len(lines) / 2:
                write_text(file, "".join(map(_line, self._groups.values())))

    def of(self, arch: str) -> list[Group]:
        """What still holds of an architecture."""
        return [group for group in self._groups.values() if group.arch == arch]

    def known(self, arch: str, names: tuple[str, ...]) -> Group | None:
        return self._groups.get(_key(arch, names))

    def keep(self, group: Group) -> None:
        """Remember it."""
        self._groups[_key(group.arch, group.names)] = group
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_line(group))


def _line(group: Group) -> str:
    return json.dumps({"key": _key(group.arch, group.names), **asdict(group)}) + "\n"


def _read(line: str) -> tuple[str, Group]:
    try:
        found = json.loads(line)
        return found["key"], Group(
            found["arch"], tuple(found["names"]), tuple(found["fault"]), found["reason"], found["refused"]
        )
    except (ValueError, KeyError, TypeError):
        return "", Group("", ())


@cache
def _key(arch: str, names: tuple[str, ...]) -> str:
    """Of everything that the stack runs; 'gone' where a plugin is, which no file has."""
    modules = [_module(name) for name in names]
    if not all(modules):
        return "gone"
    return hashlib.sha256("\n".join((_core(), arch, *names, *modules)).encode()).hexdigest()[:24]


@cache
def _core() -> str:
    total = hashlib.sha256(f"{version('torch')} {version('transformers')}".encode())
    folder = Path(peftx.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        if not {"checks", "mutations"} & set(file.parts) and not file.stem.endswith("_page"):
            total.update(file.read_bytes())
    return total.hexdigest()


@cache
def _module(name: str) -> str:
    """Of a plugin's module file."""
    registry = Registry()
    if name not in registry.names():
        return ""
    return hashlib.sha256(Path(inspect.getfile(registry.load(name))).read_bytes()).hexdigest()
