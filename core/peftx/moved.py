"""Names of version 0.1 that stand elsewhere now: an import of one gives the module in its place, and warns."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_FOLDERS = {
    "composition": ("conflicts", "registry"),
    "kernel": ("anatomy", "attention", "calls", "guard", "identity", "ledger", "members", "objective", "plugin",
               "slots", "virtual_tokens"),
    "engines": ("bundle", "data", "files", "models", "training"),
    "toolkits": ("compression", "decoding", "evaluation", "serving"),
}  # fmt: skip
MOVED = {f"peftx.{name}": f"peftx.{folder}.{name}" for folder, names in _FOLDERS.items() for name in names}


def new_name(old: str) -> str | None:
    """`peftx.engines.data.files` for `peftx.data.files`; None for what has not moved."""
    package, _, rest = old.removeprefix("peftx.").partition(".")
    found = MOVED.get(f"peftx.{package}") if old.startswith("peftx.") else None
    return f"{found}.{rest}" if found and rest else found


class _Signpost(MetaPathFinder, Loader):
    """Stands before all other finders: a package that has moved has a path, along which they would load its modules
    a second time."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if new_name(fullname) is None else ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        name = new_name(spec.name)
        assert name is not None
        module = importlib.import_module(name)
        spec.loader_state = module.__spec__  # which the import system puts this one over
        said = f"'{spec.name}' is '{name}' since peftx 0.2; most names that plugins need come from 'peftx' itself"
        warnings.warn(f"{said} (docs/migrating.md)", DeprecationWarning, stacklevel=2)
        return module

    def exec_module(self, module: ModuleType) -> None:
        signs, module.__spec__ = module.__spec__, None
        module.__spec__ = signs.loader_state if signs else None


def put_up() -> None:
    """Let imports of old names give the new modules."""
    if not any(isinstance(finder, _Signpost) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Signpost())
