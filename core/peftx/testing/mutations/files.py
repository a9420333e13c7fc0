"""Bytes, and whole files: also what is no file, such as folders, links, pipes and devices."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftx.testing.mutations.scene import (
    HUGE,
    Scene,
    files_in,
    kind_of_change,
    unpickles,
)

_PIPE: Callable[[Path], Any] = getattr(os, "mkfifo", Path.touch)
"""Without pipes among the files, as on Windows, a file with nothing in it."""


@kind_of_change("flip bytes")
def _flip(scene: Scene) -> str | None:
    if (file := scene.file()) is None or not (raw := bytearray(file.read_bytes())):
        return None
    places = [scene.rng.randrange(len(raw)) for _ in range(scene.rng.choice((1, 1, 8)))]
    for place in places:
        raw[place] ^= 1 << scene.rng.randrange(8)
    file.write_bytes(raw)
    return f"{scene.name(file)}: bits at {places}"


@kind_of_change("insert bytes")
def _insert(scene: Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    raw, place = file.read_bytes(), scene.rng.choice((0, file.stat().st_size, -1))
    place = scene.rng.randrange(len(raw) + 1) if place < 0 else place
    extra = scene.rng.choice((b"\x00", b"\xff\xfe", b"\n", scene.rng.randbytes(64), b"}"))
    file.write_bytes(raw[:place] + extra + raw[place:])
    return f"{scene.name(file)}: {extra[:8]!r} put in at {place}"


@kind_of_change("delete bytes")
def _cut(scene: Scene) -> str | None:
    if (file := scene.file()) is None or not (raw := file.read_bytes()):
        return None
    place, count = scene.rng.randrange(len(raw)), scene.rng.choice((1, 8, 100))
    file.write_bytes(raw[:place] + raw[place + count :])
    return f"{scene.name(file)}: {count} bytes taken out at {place}"


@kind_of_change("truncate")
def _truncate(scene: Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    size = file.stat().st_size
    left = scene.rng.choice((size - 1, size // 2, 7, 8, 9, scene.rng.randrange(size + 1)))
    os.truncate(file, max(0, min(left, size)))
    return f"{scene.name(file)}: the first {left} bytes are left"


@kind_of_change("empty")
def _empty(scene: Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    file.write_bytes(b"")
    return scene.name(file)


def _instead(name: str, make: Callable[[Scene, Path], None]) -> None:
    """A kind that puts something else where a file was."""

    @kind_of_change(name)
    def change(scene: Scene) -> str | None:
        if (file := scene.file()) is None:
            return None
        make(scene, file)
        return scene.name(file)


def _to_outside(scene: Scene, file: Path) -> None:
    shutil.move(file, scene.outside / file.name)
    file.symlink_to(scene.outside / file.name)


def _to_inside(scene: Scene, file: Path) -> None:
    file.rename(file.with_name(f"real-{file.name}"))
    file.symlink_to(f"real-{file.name}")


def _to_another(scene: Scene, file: Path) -> None:
    others = [other for other in files_in(scene.folder) if other != file]
    file.unlink()
    file.symlink_to(scene.rng.choice(others or [file]))


def _remade(make: Callable[[Path], Any]) -> Callable[[Scene, Path], None]:
    def change(scene: Scene, file: Path) -> None:
        file.unlink()
        make(file)

    return change


_instead("directory", _remade(Path.mkdir))
_instead("symlink outside", _to_outside)
_instead("symlink inside", _to_inside)
_instead("symlink to another", _to_another)
_instead("symlink to itself", _remade(lambda file: file.symlink_to(file)))
_instead("symlink to nothing", _remade(lambda file: file.symlink_to("nothing")))
_instead("fifo", _remade(_PIPE))
_instead("device", _remade(lambda file: file.symlink_to("/dev/zero")))
_instead("huge", lambda scene, file: os.truncate(file, HUGE))
_instead("delete", lambda scene, file: file.unlink())


@kind_of_change("rename")
def _rename(scene: Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    new = scene.rng.choice((f"{file.name}.bak", file.name.upper(), f"x{file.name}", f"{file.stem}.bin"))
    file.rename(file.with_name(new))
    return f"{scene.name(file)} -> {new}"


@kind_of_change("duplicate")
def _duplicate(scene: Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    shutil.copyfile(file, file.with_name(f"copy-{file.name}"))
    return scene.name(file)


@kind_of_change("swap")
def _swap(scene: Scene) -> str | None:
    files = files_in(scene.folder)
    if len(files) < 2:
        return None
    one, two = scene.rng.sample(files, 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return f"{scene.name(one)} and {scene.name(two)}"


def _first_folder(folder: Path) -> Path:
    return next((p for p in sorted(folder.iterdir()) if p.is_dir()), folder)


@kind_of_change("strange file")
def _strange(scene: Scene) -> str | None:
    make: dict[str, Callable[[Path], Any]] = {
        "strange.safetensors": lambda file: file.write_bytes(b"no tensors"),
        "strange.json": lambda file: file.write_text("{", "utf-8"),
        "strange.py": lambda file: file.write_text(f"open({scene.canary()!r}, 'w')\n", "utf-8"),
        "pytorch_model.bin": lambda file: file.write_bytes(unpickles(scene)),
        "two\nlines": Path.touch,
        os.fsdecode(b"\xff\xfe"): Path.touch,
        "x" * 250: Path.touch,
        "pipe": _PIPE,
        "loop": lambda file: file.symlink_to("."),
        "zero": lambda file: file.symlink_to("/dev/zero"),
        "checkpoint-99": Path.mkdir,
        "checkpoint-x": lambda file: shutil.copytree(_first_folder(scene.folder), file),
    }
    name = scene.rng.choice(list(make))
    make[name](scene.folder / name)
    return repr(name[:20])


@kind_of_change("folder")
def _folder(scene: Scene) -> str | None:
    folder = scene.folder
    moved = scene.outside / "moved"
    folder.rename(moved)
    make: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "an empty folder": folder.mkdir,
        "a file": folder.touch,
        "a pipe": lambda: _PIPE(folder),
        "a link to itself": lambda: folder.symlink_to(folder),
        "/dev/zero": lambda: folder.symlink_to("/dev/zero"),
    }
    what = scene.rng.choice(list(make))
    make[what]()
    return f"is {what}"
