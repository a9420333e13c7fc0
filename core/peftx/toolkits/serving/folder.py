"""Bundles that clients have loaded out of one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftx.errors import FileError, PeftxError
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
        except PeftxError as error:
            error.message = self._from_here(error.message)
            error.hint = None if error.hint is None else self._from_here(error.hint)
            raise
        except OSError as error:
            raise FileError(f"'{path}' cannot be read: {error.strerror}") from error

    def _from_here(self, text: str) -> str:
        """Where the folder lies is not told to clients."""
        return text.replace(f"{self.root}/", "")

    def _inside(self, path: str) -> Path:
        try:
            found = (self.root / path).resolve()
            there = self.root in found.parents and found.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte, links in a circle
            there = False
        if not there:
            raise FileError(
                f"there is no bundle '{path}' in the folder of adapters", hint="a path from there on"
            )
        return found
