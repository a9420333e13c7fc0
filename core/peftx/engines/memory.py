"""What PyTorch says where memory is full: it has no class of its own for it on a CPU."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Was there too little memory, of the CPU or of an accelerator."""
    from accelerate.utils.memory import should_reduce_batch_size  # takes a while to import

    known = isinstance(error, Exception) and should_reduce_batch_size(error)
    return known or isinstance(error, MemoryError)
