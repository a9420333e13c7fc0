"""Which plugins' tests a run has, so that hundreds of plugins take no longer than some: what changed, and a draw.

    PEFTX_PLUGINS=100 pytest        # `make test`; all where there are no more, or without the variable: `make test-all`

The draw is of the commit: the same again for it, another one for the next, and every plugin's turn comes. Tests marked
`dear` run in such a run where one of the paths that they are about changed.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "PEFTX_PLUGINS"
RECENT = 20
"""Commits whose changes are tested whatever is drawn."""


def drawn(folders: Iterable[str], most: int, *, changed: Iterable[str] = (), seed: str = "") -> set[str]:
    """At most so many of the folders; those that changed come first."""
    first = set(changed)

    def place(folder: str) -> tuple[bool, str]:
        return folder not in first, hashlib.sha256(f"{seed} {folder}".encode()).hexdigest()

    return set(sorted(folders, key=place)[:most])


def folders(root: Path = ROOT) -> list[str]:
    """`plugins/<hook>/<name>` of all that have a distribution of their own."""
    return sorted(
        file.parent.relative_to(root).as_posix() for file in root.glob("plugins/*/*/pyproject.toml")
    )


def changed(root: Path = ROOT) -> set[str]:
    """Folders of plugins with changes that are not committed, or of the last commits; none where git cannot tell."""
    return {"/".join(path.split("/")[:3]) for path in touched(root, "plugins")}


def touched(root: Path = ROOT, *under: str) -> set[str]:
    """Files that changed: not committed, or in the last commits; none where git cannot tell."""
    latest = _git(root, "log", f"-{RECENT}", "--format=", "--name-only", "--", *under)
    open_ones = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *under)
    return {*latest, *(line[3:].rpartition(" -> ")[2].strip('"') for line in open_ones)} - {""}


def concerns(about: Sequence[str], touched: Iterable[str]) -> bool:
    """Is one of the files `about` which a test is: files, and folders that end in a slash."""
    return any(path.startswith(tuple(about)) for path in touched)


def seed(root: Path = ROOT) -> str:
    """The commit; empty where git cannot tell."""
    return "".join(_git(root, "rev-parse", "HEAD"))


def _git(root: Path, *words: str) -> Sequence[str]:
    try:
        found = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return found.stdout.splitlines()
