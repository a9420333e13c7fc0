"""Writing folders so that they are there whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from peftx.errors import BundleError

_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_HERE = -100  # AT_FDCWD


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchange(one: Path, two: Path) -> bool:
    """Swap two folders in one atomic step, where the system can (Linux)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE) == 0


def aside(path: Path) -> Path:
    """Where the old folder stands for a moment on systems without an atomic exchange."""
    return path.parent / f".{path.name}.replaced"


@contextmanager
def telling_of_a_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's error into one that says what was not written.

    Raises:
        BundleError: the disk, or the user's share of it, is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise BundleError(
            f"the disk is full: '{path}' was not written"
            + (", the old one is intact" if path.exists() else ""),
            hint="free some space, or give another folder",
        ) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(
        f"(os error {number})" in str(error) for number in numbers
    )  # safetensors keeps the number in its text


@contextmanager
def replacing(path: Path, *, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes `path`'s place, on failure `path` is as it was.

    Args:
        marker: a file that an existing folder must hold to be replaced.

    Raises:
        BundleError: `path` is something else, or the disk is full.
    """
    path = path.absolute()
    if path.exists() and not (path / marker).exists() and (path.is_file() or any(path.iterdir())):
        raise BundleError(
            f"'{path}' exists and holds no {marker}, so it is not overwritten",
            hint="choose another folder, or empty it",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.writing-*"):
        if not _alive(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale, ignore_errors=True)  # left by a process that was killed
    new = path.parent / f".{path.name}.writing-{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    try:
        with telling_of_a_full_disk(path):
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if not path.exists():
                new.rename(path)
            elif not _exchange(new, path):
                old = aside(path)
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                new.rename(path)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with telling_of_a_full_disk(path):
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
