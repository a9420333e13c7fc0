"""Read a folder in a process of its own and say how that ended: refused, read, or one of the ways it must not end.

A reading may refuse with a `PeftxError` that names the file, or give numbers. All else is a finding: another exception,
a hang, a question on the terminal, a look outside of the folder, foreign code run.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftx.errors import PeftxError, UnsupportedError
from peftx.testing.mutations import CANARY

_IN_OPEN = 0x20  # of linux/inotify.h
_MEMORY = 6 << 30
_LONG = 4000  # characters of a message


@dataclass(frozen=True)
class Reading:
    """What a folder gave: a digest of the numbers, and whether they are those of the folder's files, all of them."""

    digest: str
    faithful: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a reading ended. `word`: refused, read; or a finding: raw, nameless, unprintable, endless, hang, died, asked,
    outside, executed. `where`: the place of the error, the innermost of peftx first."""

    word: str
    detail: str = ""
    where: str = ""
    reading: Reading | None = None
    seconds: float = 0.0


class _Asked(BaseException):
    """Somebody called `input`."""


def attempt(
    read: Callable[[Path], Reading],
    folder: Path,
    outside: Path,
    *,
    seconds: float,
    names: frozenset[str] = frozenset(),
    closed: bool = True,
) -> Outcome:
    """Read a folder in a process of its own, which is killed when the time is up.

    Args:
        names: of files that a message may name beside those that are there now.
        closed: nothing outside of the folder may be opened.

    Raises:
        UnsupportedError: the system does not fork.
    """
    if not hasattr(os, "fork"):  # Windows
        raise UnsupportedError(
            "folders are read in a process of their own, and this system does not fork one",
            hint="run it on Linux or macOS, or in WSL",
        )
    started = time.monotonic()
    known = names | {p.name for p in folder.rglob("*")} if folder.is_dir() else names
    with _watching(outside) as opened:
        receive, give = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _in_child(read, folder, give)
        os.close(give)
        said = _receive(receive, started + seconds)
        if said is None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        took = time.monotonic() - started
        touched = opened()
    if (outside / CANARY).exists():
        return Outcome("executed", "code from the folder ran", seconds=took)
    if said is None:
        return Outcome("hang", f"no answer in {seconds:g} s", seconds=took)
    if not said:
        return Outcome(
            "died", f"the process ended with status {os.waitstatus_to_exitcode(status)}", seconds=took
        )
    report = json.loads(said)
    word, detail, where = report["word"], report["detail"], report["where"]
    reading = Reading(*report["reading"]) if word == "read" else None
    if closed and touched:
        word, detail = "outside", f"opened {sorted(touched)}; then: {word} {detail}"
    elif word == "refused":
        word = _judged(detail, folder, known)
    return Outcome(word, detail, where, reading, took)


def _judged(message: str, folder: Path, names: frozenset[str]) -> str:
    """A refusal is one only if the user learns from it what is broken."""
    try:
        message.encode()
    except UnicodeEncodeError:
        return "unprintable"
    if len(message) > _LONG:
        return "endless"
    named = str(folder) in message or any(name in message for name in names if "." in name)
    return "refused" if named else "nameless"


def _in_child(read: Callable[[Path], Reading], folder: Path, give: int) -> None:
    """Never returns."""
    import builtins
    import resource

    def ask(*_: object) -> str:
        raise _Asked

    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    builtins.input = ask
    statm = Path("/proc/self/statm")
    if statm.exists():  # what swallows a device must not take the machine with it
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, -1))
    torch.set_num_threads(1)  # here, before two threads at once look for the pool that the fork broke
    report: dict[str, Any] = {"word": "read", "detail": "", "where": ""}
    try:
        reading = read(folder)
        report["reading"] = [reading.digest, reading.faithful]
    except PeftxError as error:
        report |= {"word": "refused", "detail": str(error), "where": _where(error)}
    except BaseException as error:  # noqa: BLE001  whatever it is, it is the finding
        word = "asked" if isinstance(error, _Asked) else "raw"
        report |= {
            "word": word,
            "detail": f"{type(error).__name__}: {str(error)[:600]}",
            "where": _where(error),
        }
    data = json.dumps(report).encode()
    while data:
        data = data[os.write(give, data) :]
    os._exit(0)


def _where(error: BaseException) -> str:
    """The innermost line of peftx, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f
        for f in frames
        if re.search(r"/peftx(_\w+)?/|/peftx_\w+\.py$", f.filename) and f.filename != __file__
    ]
    lines = [f"{_short(frame.filename)}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:])]
    return " < ".join(dict.fromkeys(lines))


def _short(filename: str) -> str:
    for root in sorted(sys.path, key=len, reverse=True):
        if root and filename.startswith(f"{root}/"):
            return filename[len(root) + 1 :]
    return filename


def _receive(pipe: int, until: float) -> bytes | None:
    """All that comes out of a pipe, or None when the time is up."""
    parts: list[bytes] = []
    try:
        while True:
            left = until - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            if not (part := os.read(pipe, 1 << 16)):
                return b"".join(parts)
            parts.append(part)
    finally:
        os.close(pipe)


@contextlib.contextmanager
def _watching(folder: Path) -> Iterator[Callable[[], set[str]]]:
    """Which files of a folder are opened meanwhile, by anybody (Linux; elsewhere none is seen)."""
    if not sys.platform.startswith("linux"):
        yield set
        return
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    for place in (folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())):
        if watch < 0 or libc.inotify_add_watch(watch, os.fsencode(place), _IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), f"inotify does not watch {place}")

    def opened() -> set[str]:
        names: set[str] = set()
        try:
            raw = os.read(watch, 1 << 20)
        except BlockingIOError:
            return names
        while raw:
            length = struct.unpack("iIII", raw[:16])[3]
            names.add(os.fsdecode(raw[16 : 16 + length].rstrip(b"\0")))
            raw = raw[16 + length :]
        return names - {""}  # the folder itself: a look at what there is

    try:
        yield opened
    finally:
        os.close(watch)


def digest_of(*tensors: Tensor) -> str:
    """Of the bits."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
