"""Finds plugins through entry points, by name, importing only what is asked for.

`names`, `entries` and `describe` read distribution metadata alone (milliseconds for hundreds of plugins), `outline`
reads what a plugin's file says of its options and claims, both without torch; `load` imports one plugin's module.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from peftx.composition.metadata import Entry, keyword_values, words_of
from peftx.composition.origins import error_place, misfit, name_place, requirement_place
from peftx.errors import RegistryError, nearest
from peftx.kernel.names import DISABLE_VARIABLE, GROUP, HOOKS
from peftx.version import __version__

if TYPE_CHECKING:
    from peftx.kernel.plugin import Plugin, PluginConfig


class Registry:
    """The installed plugins. Implements `peftx_spec`'s `Catalogue`.

    Args:
        points: entry points to use; those of the environment if left out.
        disabled: names that count as not there; `PEFTX_DISABLE_PLUGINS=a,b` if left out.
    """

    def __init__(
        self, points: Iterable[EntryPoint] | None = None, *, disabled: Iterable[str] | None = None
    ) -> None:
        self._found = _scan(GROUP, _state()) if points is None else _Points(tuple(points))
        names = os.environ.get(DISABLE_VARIABLE, "").split(",") if disabled is None else disabled
        self.disabled = frozenset(name.strip() for name in names if name.strip())

    @property
    def _by_name(self) -> dict[str, list[EntryPoint]]:
        return self._found.by_name

    def names(self) -> list[str]:
        """All installed names, sorted; disabled ones left out."""
        return [name for name in self._by_name if name not in self.disabled]

    def modules(self) -> Iterator[tuple[str, str]]:
        """Name of a plugin and of the module that it is in, of all."""
        for name, points in self._by_name.items():
            yield from ((name, point.value.partition(":")[0]) for point in points)

    def install_hint(self, name: str) -> str:
        """No name of a package: until peftx is on PyPI, anybody may register one of these there."""
        return f"install '{name}' from where its author publishes it (those of peftx: 'make setup' in a checkout)"

    def point(self, name: str) -> EntryPoint:
        """The entry point of `name`.

        Raises:
            RegistryError: unknown, disabled, or claimed by two distributions.
        """
        if name in self.disabled:
            raise RegistryError(
                f"plugin '{name}' is disabled by {DISABLE_VARIABLE}",
                hint=f"remove it from {DISABLE_VARIABLE}",
            )
        points = self._by_name.get(name)
        if not points:
            # A misspelt name is not one to install: whoever likes may have a package of that name.
            listed = f"peftx list has those that are installed; else {self.install_hint(name)}"
            raise RegistryError(
                f"no plugin named '{name}' is installed", hint=nearest(name, self.names()) or listed
            )
        if len(points) > 1:
            owners = " and ".join(f"'{_distribution(p)}' ({name_place(p)})" for p in points)
            raise RegistryError(
                f"the name '{name}' is claimed by two distributions: {owners}",
                hint="uninstall one of them: "
                + " or ".join(f"pip uninstall {_distribution(p)}" for p in points),
            )
        return points[0]

    def describe(self, name: str) -> Entry:
        """Metadata of one plugin, without importing it."""
        point = self.point(name)
        if point.dist is None:
            return Entry(name, "", "", "", (), "", "", "", "", point)
        metadata = point.dist.metadata  # parsed anew at each access
        words = words_of(metadata.get_all("Keywords"))
        entry = Entry(
            name=name,
            distribution=metadata["Name"],
            version=metadata["Version"],
            summary="".join(metadata.get_all("Summary") or ()),
            hooks=tuple(word for word in words if word in HOOKS),  # the main one stands first
            paper=next((w for w in words if w.lower().startswith("arxiv:")), ""),
            family="".join(keyword_values(words, "family")[:1]),
            fidelity="".join(keyword_values(words, "fidelity")[:1]),
            evidence="".join(keyword_values(words, "evidence")[:1]),
            point=point,
            keywords=tuple(words),
            requires=tuple(metadata.get_all("Requires-Dist") or ()),
        )
        beside = self._found.by_distribution[point.dist]
        return entry if len(beside) == 1 else _own(entry, beside)

    def entries(self) -> list[Entry]:
        """Metadata of all plugins whose name is claimed once."""
        return [self.describe(name) for name in self.names() if len(self._by_name[name]) == 1]

    def clashes(self) -> dict[str, list[str]]:
        """Names claimed more than once, with the distributions that claim them."""
        return {n: [_distribution(p) for p in ps] for n, ps in self._by_name.items() if len(ps) > 1}

    def load(self, name: str) -> type[Plugin]:
        """Import one plugin's class.

        Raises:
            RegistryError: as `point`, and when it is for another version of peftx, its module does not import or is no
                plugin; names the reason, the file and the line.
        """
        from peftx.kernel.plugin import Plugin

        point = self._fitting_point(name)
        try:
            found = point.load()
        except (
            Exception
        ) as error:  # whatever a stranger's module raises: reported with its reason, never skipped
            missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
            said = f"{error_place(point, error)}: {type(error).__name__}: {error}"
            raise _broken(point, said, missing) from error
        if not (isinstance(found, type) and issubclass(found, Plugin)):
            raise RegistryError(
                f"plugin '{name}': {point.value} is no subclass of peftx.Plugin: {name_place(point)}"
            )
        return found

    def _fitting_point(self, name: str) -> EntryPoint:
        """As `point`, of a plugin that is for this version of peftx."""
        point = self.point(name)
        if name not in self._found.fitting and point.dist is not None:
            if asked := misfit(point.dist.requires or ()):
                raise RegistryError(
                    f"plugin '{name}' ({_distribution(point)} {point.dist.version}) needs {asked}, and this is peftx "
                    f"{__version__}: {requirement_place(point, asked)}",
                    hint=f"pip install --upgrade {_distribution(point)}, or pip install '{asked}'",
                )
            self._found.fitting.add(name)
        return point

    def outline(self, name: str) -> type[Plugin]:
        """One plugin's class for its options, claims and hooks, which is not to be put on a model: without importing
        what its methods use, wherever that can be.

        Raises:
            RegistryError: as `load`; what the source shows to be wrong without an import, as `importable` has it, too.
        """
        from peftx.composition.importable import fault, top_file
        from peftx.composition.outline import outline

        point = self._fitting_point(name)
        if point.module in sys.modules:
            return self.load(name)
        file = top_file(point.module)
        if file is not None and (seen := fault(point.module, file)):
            raise _broken(point, str(seen), seen.missing)
        found = None
        with suppress(Exception):  # the import fails as well then, and says why
            found = outline(point.module, point.attr)
        return found or self.load(name)

    def adapter(self, folder: str) -> list[dict[str, Any]]:
        """The stack that an adapter of HF PEFT is, as a spec says it.

        Raises:
            PeftxError: no adapter, or none that the installed plugins compute.
        """
        from peftx.composition.adapters import entries, read_adapter

        return [{"use": e.use, "with": e.options} for e in entries(read_adapter(folder), self)]

    def config(self, name: str) -> type[PluginConfig]:
        return self.outline(name).Config

    def hooks(self, name: str) -> frozenset[str]:
        from peftx.kernel.plugin import hooks_of

        return hooks_of(self.outline(name))

    def compresses_own(self, name: str) -> bool:
        from peftx.kernel.plugin import compresses_own

        return compresses_own(self.outline(name))

    def name_of(self, plugin: type[Plugin]) -> str | None:
        """The entry-point name of a plugin class; None for a class that no distribution publishes."""
        return next((n for n, points in self._by_name.items() if any(_is(p, plugin) for p in points)), None)


def installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group. They are looked for anew when the path, or what lies on it, has changed."""
    return _scan(group, _state()).points


class _Points:
    """Entry points, and what was found out about them: both hold as long as nothing on the path changes, so every
    registry of a process reads one of these."""

    def __init__(self, points: tuple[EntryPoint, ...]) -> None:
        self.points = points
        self.fitting: set[str] = set()
        """Names of plugins that are for this version of peftx."""

    @cached_property
    def by_name(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in self.points:
            others = found.setdefault(point.name, [])
            if all((o.value, _distribution(o)) != (point.value, _distribution(point)) for o in others):
                others.append(point)
        return dict(sorted(found.items()))

    @cached_property
    def by_distribution(self) -> dict[object, list[EntryPoint]]:
        found: dict[object, list[EntryPoint]] = {}
        for point in self.points:
            found.setdefault(point.dist, []).append(point)
        return found


@lru_cache(maxsize=8)
def _scan(group: str, state: tuple[tuple[str, int], ...]) -> _Points:
    return _Points(tuple(entry_points(group=group)))


def _state() -> tuple[tuple[str, int], ...]:
    return tuple((place, _changed(place)) for place in sys.path)


def _changed(place: str) -> int:
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


def _is(point: EntryPoint, plugin: type[Plugin]) -> bool:
    """Does the entry point lead to this class. Nothing is imported: the class is there, and so is its package."""
    module, _, attribute = point.value.partition(":")  # `point.module` parses anew at each access
    found: object = sys.modules.get(module.strip())
    for name in attribute.partition("[")[0].strip().split("."):
        found = getattr(found, name, None)
    return found is plugin


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown"


def _broken(point: EntryPoint, said: str, missing: str) -> RegistryError:
    """Of a plugin that does not import. `said`: file, line and cause; `missing`: a module that is not there, or ""."""
    way = f"pip install --upgrade {_distribution(point)}"
    if missing and missing.partition(".")[0] != point.module.partition(".")[0]:
        way = f"install the package that has the module '{missing}'"
    return RegistryError(
        f"plugin '{point.name}' ({_distribution(point)}, {point.value}) does not import: {said}",
        hint=f"{way}, or disable the plugin: {DISABLE_VARIABLE}={point.name}",
    )


def _own(entry: Entry, beside: list[EntryPoint]) -> Entry:
    """The entry of a plugin whose distribution brings others: title, hooks and paper are what its source says. A mark,
    a family or a paper of the distribution holds for all where it is the only one."""
    from peftx.composition.importable import source_file
    from peftx.composition.own_words import OwnWords, own_words

    def only(kind: str) -> str:
        values = keyword_values(entry.keywords, kind)
        return values[0] if len(values) == 1 else ""

    file, words = source_file(entry.point.module), OwnWords("", (), "")
    if file is not None:
        alone = sum(point.module == entry.point.module for point in beside) == 1
        with suppress(SyntaxError, OSError):  # `importable` says what is wrong with the file
            words = own_words(file, entry.point.attr, alone=alone)
    return replace(
        entry,
        summary=words.title or entry.summary,
        hooks=words.hooks or entry.hooks,
        paper=words.paper or (f"arXiv:{only('arXiv')}" if only("arXiv") else ""),
        family=only("family"),
        fidelity=only("fidelity"),
        evidence=only("evidence"),
    )
