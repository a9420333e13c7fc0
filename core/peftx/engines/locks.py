"""A lock of a file or folder, which threads, processes and containers respect, and which goes with the process that
holds it, however that ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    LOCKS_FOLDERS = False
else:
    LOCKS_FOLDERS = True


def lock(place: Path, *, wait: bool = True) -> Callable[[], None]:
    """Lock what is there; returns what unlocks it.

    Where the system locks no folder a file beside it stands for it.

    Raises:
        BlockingIOError: somebody else holds it, and `wait` is False. FileNotFoundError: it is gone.
    """
    if not LOCKS_FOLDERS:
        return _beside(place, wait=wait)
    handle = os.open(place, os.O_RDONLY if place.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(handle)
        raise
    return partial(os.close, handle)


def _beside(place: Path, *, wait: bool) -> Callable[[], None]:
    from filelock import FileLock, Timeout

    if not place.exists():
        raise FileNotFoundError(place)
    file = place.with_name(f".lock{place.name}")
    held = FileLock(file, timeout=-1 if wait else 0)
    try:
        held.acquire()
    except Timeout:
        raise BlockingIOError(f"{place} is locked") from None

    def unlock() -> None:
        held.release()
        with suppress(OSError):  # somebody waits for it, or was quicker
            file.unlink()

    return unlock
