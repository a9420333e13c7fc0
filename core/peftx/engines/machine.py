"""What the machine has and what this process took of it, on systems that tell it in different ways."""

from __future__ import annotations

import os
import sys

import psutil


def cores() -> int:
    """Of a CPU, that this process may use; where the system does not say which, all."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that a process can still get without swapping."""
    return int(psutil.virtual_memory().available)


def peak_memory() -> int | None:
    """Bytes at most that this process held in memory since it began; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows, which counts it itself
        told = psutil.Process().memory_info()._asdict()
        return int(told["peak_wset"]) if "peak_wset" in told else None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Was there too little memory, of the CPU or of an accelerator: PyTorch has no class of its own for it on a CPU."""
    from accelerate.utils.memory import should_reduce_batch_size  # takes a while to import

    known = isinstance(error, Exception) and should_reduce_batch_size(error)
    return known or isinstance(error, MemoryError)
