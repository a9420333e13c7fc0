"""Files of tensors: checked before they are read, and read at once where they are small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from peftx.engines.files import MOST_JSON, naming, require_plain, sha256
from peftx.errors import BundleError

if TYPE_CHECKING:
    from torch import Tensor

READ_WHOLE = 64 * 2**20
"""Bytes of a tensor file that is read at once, in half the time of one that is mapped to memory tensor by tensor."""


def check_tensors(file: Path, *, links: bool = False) -> None:
    """Raises BundleError unless `file` is a safetensors file as long as its header says; the tensors are not read."""
    require_plain(file, links=links)
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= min(MOST_JSON, size - 8):
            raise BundleError(
                f"'{file}' is no safetensors file: its header has {length:,} bytes, the file {size:,}"
            )
        try:
            header = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            wanted = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise BundleError(
                f"'{file}' is no safetensors file: {type(error).__name__} in its header"
            ) from error
    if wanted != size:
        raise BundleError(f"'{file}' is not whole: it has {size:,} bytes, and its header tells of {wanted:,}")


def differs(file: Path, digest: str) -> bool:
    """Is a file of ours another one than was written. A size that cannot be is seen without reading all of it."""
    try:
        check_tensors(file) if file.suffix == ".safetensors" else require_plain(file, most=MOST_JSON)
    except BundleError:
        return True
    return sha256(file) != digest


def read_tensors(file: Path, *, links: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises BundleError, which names it, for anything that is no such file."""
    from safetensors.torch import load_file

    check_tensors(file, links=links)
    small = file.stat().st_size <= READ_WHOLE
    try:
        return load_file(file, backend="pread" if small else "mmap")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BundleError(f"'{file}' is no whole safetensors file: {error}") from error


def tensor_names(file: Path) -> list[str]:
    """Of a safetensors file. Raises BundleError, which names it, for anything that is no such file."""
    check_tensors(file)
    with naming(file), safe_open(file, framework="pt") as found:
        return list(found.keys())
