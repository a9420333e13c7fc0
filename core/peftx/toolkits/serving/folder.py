"""Bundles that clients have loaded out of one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftx.errors import FileError
from peftx.toolkits.serving.server import Server


class AdapterFolder:
    """A loader for `build_app(loader=)`: clients name a bundle by its path from the folder on.

    Args:
        root: the folder. serve: (name, a bundle's folder) -> what is served from then on.
    """

    def __init__(self, root: str | Path, serve: Callable[[str, str], Server]) -> None:
        self.root, self.serve = Path(root).expanduser().resolve(), serve

    def __call__(self, name: str, path: str) -> Server:
        """Raises PeftxError: the path leads out of the folder, or to no bundle that can be served."""
        found = self._inside(path)
        try:
            return self.serve(name, str(found))
        except OSError as error:
            raise FileError(f"'{path}' cannot be read: {error.strerror}") from error

    def _inside(self, path: str) -> Path:
        try:
            found = (self.root / path).resolve()
            there = found.is_relative_to(self.root) and found.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte, links in a circle
            there = False
        if not there:
            raise FileError(
                f"there is no bundle '{path}' in the folder of adapters", hint="a path from there on"
            )
        return found
