"""The folder of a comparison or of a search, and how many jobs its machine runs at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftx.engines.locks import lock
from peftx.engines.machine import cores
from peftx.errors import BundleError


def side_by_side(jobs: int, *, ray: bool = False) -> tuple[int, int]:
    """Processes at once, and threads of each, no more than `OMP_NUM_THREADS` allows. `jobs` 0: one a core, or one alone
    on an accelerator. ray: threads are what `OMP_NUM_THREADS` says, or one; `jobs` stays, for the cluster to fill."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    allowed = int(said) if said.isdecimal() else 0
    if ray:
        return jobs, allowed or 1
    at_once = jobs or (1 if has_accelerator() else cores())
    threads = max(1, cores() // at_once)
    return at_once, min(threads, allowed or threads)


def check_place(folder: Path, ours: frozenset[str], noun: str) -> None:
    """Raises BundleError where `folder` is a file, or holds what is not ours. `noun`: `comparison`."""
    if folder.is_file():
        raise BundleError(f"output '{folder}' is a file", hint="choose another folder")
    if not folder.is_dir():
        return
    strange = [entry.name for entry in folder.iterdir() if entry.name not in ours and entry.name[:1] != "."]
    if strange:
        raise BundleError(
            f"output '{folder}' exists and is no {noun}: it holds {strange[0]}",
            hint="choose another folder, or empty it",
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process, however it ends."""
    file = folder / ".lock"
    file.touch()
    try:
        unlock = lock(file, wait=False)
    except BlockingIOError:
        raise BundleError(
            f"another process is at work in '{folder}'", hint="wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        unlock()


def has_accelerator() -> bool:
    import torch

    return bool(torch.accelerator.is_available())
