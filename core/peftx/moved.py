"""Names of version 0.1 that stand elsewhere now: an import of one says where."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
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


class _Signpost(MetaPathFinder):
    """Stands behind all other finders, so it is asked only for what is not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MOVED:
            raise ModuleNotFoundError(
                f"'{fullname}' is '{MOVED[fullname]}' since peftx 0.2; most names that plugins need come from 'peftx' "
                "itself (docs/migrating.md)",
                name=fullname,
            )
        return None


def put_up() -> None:
    """Let imports of old names fail with the new one."""
    if not any(isinstance(finder, _Signpost) for finder in sys.meta_path):
        sys.meta_path.append(_Signpost())
