"""What a mutation works on, and the list of all kinds."""

from __future__ import annotations

import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CANARY = "executed"
"""A file beside the folder that code from the folder would make."""
HUGE = 1 << 40
LARGE = 1 << 26  # more is not hashed here
MARK = "@@here@@"


def is_regular(path: Path) -> bool:
    """A file with bytes of its own that ends: no link, pipe or device, and of a size that can be read."""
    try:
        about = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(about.st_mode) and about.st_size <= LARGE


def files_in(folder: Path, *endings: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if is_regular(p) and (not endings or p.suffix in endings))


def pick(folder: Path, rng: random.Random, *endings: str) -> Path | None:
    found = files_in(folder, *endings)
    return rng.choice(found) if found else None


@dataclass
class Scene:
    """What a mutation works on. `outside` lies beside the folder, and nothing in it is to be opened."""

    folder: Path
    outside: Path
    rng: random.Random

    def file(self, *endings: str) -> Path | None:
        return pick(self.folder, self.rng, *endings)

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def canary(self) -> str:
        return str(self.outside / CANARY)


Change = Callable[[Scene], str | None]
KINDS: dict[str, Change] = {}
"""Every kind of mutation; a change says what it did, or None where the folder has no place for it."""


def kind_of_change(name: str) -> Callable[[Change], Change]:
    def keep(change: Change) -> Change:
        KINDS[name] = change
        return change

    return keep


def mutate(folder: Path, outside: Path, kind: str, rng: random.Random) -> str | None:
    """Make one change of a kind; what it was, or None if nothing in the folder can be changed so."""
    outside.mkdir(exist_ok=True)
    return KINDS[kind](Scene(folder, outside, rng))


def unpickles(scene: Scene) -> bytes:
    """A pickle that leaves a trace when it is read."""
    return f"cposix\nsystem\n(S'touch {scene.canary()}'\ntR.".encode()
