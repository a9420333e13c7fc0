"""Writing folders so that they are there whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError

from peftx.engines.locks import lock
from peftx.errors import BundleError, PeftxError, nearest

_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_HERE = -100  # AT_FDCWD
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_files(folder: Path) -> Iterator[Path]:
    """All files below a folder that we wrote, which holds nothing but files and folders.

    Raises:
        BundleError: a link, which may lead out of it, or a pipe or device, which may never end; names it.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from plain_files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
        else:
            kind = "a symbolic link" if entry.is_symlink() else "no plain file"
            raise BundleError(f"'{entry.path}' is {kind}", hint="copy the files themselves (cp -L)")


def require_plain(file: Path, *, most: int | None = None, links: bool = False) -> None:
    """Raises BundleError unless `file` is a plain file of at most `most` bytes.

    Args:
        links: a symbolic link to such a file will do (the hub's cache is made of them).
    """
    try:
        found = file.stat() if links else file.lstat()
    except OSError as error:
        raise BundleError(f"'{file}' cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no plain file"
        raise BundleError(f"'{file}' is {kind}")
    if most is not None and found.st_size > most:
        raise BundleError(f"'{file}' has {found.st_size:,} bytes, and at most {most:,} are read")


MOST_JSON = 64 * 2**20
"""Bytes of a JSON file of ours: a manifest of a thousand plugins has two megabytes."""


def read_json(file: Path, *, links: bool = False) -> Any:
    """What a JSON file holds. Raises BundleError, which names it, for anything that is no such file."""
    require_plain(file, most=MOST_JSON, links=links)
    try:
        return json.loads(file.read_bytes(), object_pairs_hook=_once, parse_constant=_no_number)
    # Not UTF-8, not JSON, or a number of thousands of digits.
    except (ValueError, RecursionError, MemoryError) as error:
        raise BundleError(f"'{file}' is corrupted: {type(error).__name__}: {str(error)[:300]}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_number(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)  # Infinity stands in configurations


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Whatever fails while a file or folder is read says which one it is.

    Raises:
        BundleError: in place of what other libraries raise on damaged content. PeftxError: with the name put before.
    """
    try:
        yield
    except PeftxError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"'{path}': {error.message}", hint=error.hint) from error
    except Exception as error:  # libraries raise what they like: KeyError, TypeError, Rust's own
        said = " ".join(str(error).split())[:300]
        raise BundleError(f"'{path}' is damaged or cannot be read: {type(error).__name__}: {said}") from error


def _exchange(one: Path, two: Path) -> bool:
    """Swap two folders in one atomic step, where the system can (Linux)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # the last on Windows, which takes no None
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE) == 0


def aside(path: Path) -> Path:
    """Where the old folder stands for a moment on systems without an atomic exchange."""
    return path.parent / f".{path.name}.replaced"


def make_place(target: Path) -> None:
    """The folder that `target` will stand in, before anything takes time.

    Raises:
        BundleError: it cannot be made, or nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=target.parent):
            pass  # permissions do not tell all: a disk may be read-only, or its quota used up
    except OSError as error:
        raise BundleError(
            f"output '{target}': nothing can be written in {target.parent}: {error.strerror}",
            hint="choose another folder",
        ) from error


@contextmanager
def telling_what_was_not_written(path: Path) -> Iterator[None]:
    """Turn the system's error into one that says what was not written.

    Raises:
        BundleError: the disk, or the user's share of it, is full; the place cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = ", the old one is intact" if os.path.lexists(path) else ""
        if _is_full(error):
            raise BundleError(
                f"the disk is full: '{path}' was not written{kept}",
                hint="free some space, or give another folder",
            ) from error
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            raise BundleError(
                f"'{path}' was not written: {error.strerror}{kept}", hint="give another folder"
            ) from error
        raise


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

    Where `path` is a symbolic link, the folder that it leads to is replaced, and the link stays.

    Args:
        marker: a file that an existing folder must hold to be replaced.

    Raises:
        BundleError: `path` is something else, cannot be written, or the disk is full.
    """
    try:
        path = path.resolve()
    except (OSError, RuntimeError) as error:
        raise BundleError(f"'{path}' leads nowhere: {error}", hint="choose another folder") from error
    if os.path.lexists(path) and not path.is_dir():
        raise BundleError(
            f"'{path}' exists and is no folder, so it is not overwritten", hint="choose another folder"
        )
    if path.exists() and not (path / marker).exists() and any(path.iterdir()):
        raise BundleError(
            f"'{path}' exists and holds no {marker}, so it is not overwritten",
            hint="choose another folder, or empty it",
        )
    with telling_what_was_not_written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging(path) as new:
            yield new
            mode = new.stat().st_mode & 0o666  # safetensors writes for the owner alone, whatever the umask
            for file in plain_files(new):
                file.chmod(mode)
                with file.open("r+b") as handle:  # Windows flushes what may be written alone
                    os.fsync(handle.fileno())
            _put(new, path)


def _put(new: Path, path: Path) -> None:
    """`new` to where `path` is, whether or not somebody else put something there meanwhile."""
    try:
        new.rename(path)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not _exchange(new, path):
        old = aside(path)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, of this call alone; what is left there at the end is removed, and so is what calls
    left that were killed. Who writes holds a lock on the folder, which threads, processes and containers respect."""
    for stale in path.parent.glob(f".{path.name}.writing-*"):
        _remove_unless_locked(stale)
    new, unlock = _locked_folder(path)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        unlock()


def _locked_folder(path: Path) -> tuple[Path, Callable[[], None]]:
    """A new folder beside `path`, and what gives up its lock. Until it is locked another call may take it
    for one that was left behind, and remove it: then there is another one."""
    while True:
        new = path.parent / f".{path.name}.writing-{secrets.token_hex(6)}"
        new.mkdir()
        try:
            unlock = lock(new)
        except FileNotFoundError:
            continue
        if new.exists():
            return new, unlock
        unlock()


def _remove_unless_locked(folder: Path) -> None:
    try:
        unlock = lock(folder, wait=False)
    except OSError:
        return  # somebody is writing there, or was quicker
    shutil.rmtree(folder, ignore_errors=True)
    unlock()


def keep_within(folder: Path, pattern: str, *, most: int) -> None:
    """Remove what was used longest ago of the files in a folder of the cache, until they have at most so many bytes."""
    used = 0
    for file in sorted(folder.glob(pattern), key=lambda one: one.stat().st_mtime, reverse=True):
        used += file.stat().st_size
        if used > most:
            file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_parts(path, (text,))


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """The same, of a text that comes piece by piece."""
    beside = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        with telling_what_was_not_written(path):
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(parts)
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_there(folder: Path, marker: str) -> None:
    """That a bundle lies in a folder, by the file that marks one; nothing heavy is imported for it. What a save that
    was killed between its two renames left aside is put back.

    Raises:
        BundleError: there is none.
    """
    if not folder.exists() and aside(folder.absolute()).exists():
        aside(folder.absolute()).rename(folder)
    if not folder.is_dir():
        near = [p.name for p in folder.absolute().parent.glob("*") if (p / marker).exists()]
        raise BundleError(f"no bundle at '{folder}'", hint=nearest(folder.name, near) or None)
    if not (folder / marker).exists():
        raise BundleError(f"'{folder}' is no bundle: {marker} is missing", hint="stack.save(path) writes one")


def checkpoints(output: Path) -> Path:
    """Where a run keeps its checkpoints until its bundle is written: beside the bundle, which holds no strange file."""
    return output.parent / f"{output.name}.checkpoints"


def dropped_rows(output: Path) -> Path:
    """Where rows stand that plugins took from a run's training data."""
    return output.parent / f"{output.name}.dropped.jsonl"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
