"""Which base a stack stands on: told from a few values of each tensor, without reading the weights.

Of each tensor the first and the last values count. Two trainings of one architecture never agree there, and
memory-mapped weights stay on the disk: values spread over a tensor would page in all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftx.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENDS = 32
"""Values at each end of a tensor."""


@dataclass(frozen=True)
class _Seen:
    """One tensor of the base as it was."""

    tensor: Tensor
    version: int
    """torch's count of changes in place."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    ends: Tensor
    """At most 2 * ENDS values, on the CPU, in the tensor's dtype."""


class Identity:
    """A base model as it is now. `None` of a model on the meta device: see `of`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._seen = {
            name: _Seen(t, t._version, tuple(t.shape), t.dtype, _ends(t)) for name, t in tensors.items()
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Identity | None:
        """Of the parameters of a model that carries no plugin; None where one has no values."""
        return None if any(t.is_meta for t in tensors.values()) else cls(tensors)

    def digest(self, dtypes: Mapping[str, torch.dtype] | None = None) -> str:
        """sha256 over names, shapes, dtypes and values; of the same model cast to other `dtypes`, where given."""
        described, values = [], []
        for name, seen in self._seen.items():
            dtype = (dtypes or {}).get(name, seen.dtype)
            described.append((name, list(seen.shape), str(dtype)))
            values.append(seen.ends.to(dtype).float())
        digest = hashlib.sha256(json.dumps(described).encode())
        if values:
            digest.update(torch.cat(values).numpy().tobytes())
        return digest.hexdigest()

    def changed(self, tensors: Mapping[str, Tensor], *, left_out: Collection[str]) -> list[str]:
        """Names of tensors that are gone, new, or no longer what they were, `left_out` aside; a cast is no change."""
        names = [*self._seen, *(name for name in tensors if name not in self._seen)]
        return [n for n in names if n not in left_out and not self._same(n, tensors.get(n))]

    def _same(self, name: str, now: Tensor | None) -> bool:
        was = self._seen.get(name)
        if was is None or now is None or tuple(now.shape) != was.shape:
            return False
        if now is was.tensor and now._version != was.version:
            return False
        return torch.equal(_ends(now), was.ends.to(now.dtype))


def _ends(tensor: Tensor) -> Tensor:
    own, size = tensor.detach(), tensor.numel()
    if size <= 2 * ENDS or not own.is_contiguous():
        flat = own.reshape(-1)
        own = flat if size <= 2 * ENDS else torch.cat((flat[:ENDS], flat[-ENDS:]))
    else:  # both ends as one view: this runs for every tensor of every model
        own = own.as_strided((2, ENDS), (size - ENDS, 1), own.storage_offset())
    return own.clone().flatten().cpu()


def fingerprint(model: PreTrainedModel) -> str:
    """How bundles of version 0.1 know their base: a hash of its tensors' names, shapes and dtypes, and of 64
    values of each, evenly spaced.

    Two checkpoints that differ in one unsampled value have the same fingerprint; two trainings never do.

    Raises:
        ArchitectureError: a model on the meta device has no values.
    """
    digest = hashlib.sha256()
    described, samples = [], []
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ArchitectureError(f"{name} is on the meta device: a fingerprint needs the weights")
        described.append((name, list(tensor.shape), str(tensor.dtype)))
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        samples.append(flat[: 64 * step : step].float())
    digest.update(json.dumps(described).encode())
    if samples:
        digest.update(torch.cat([s.cpu() for s in samples]).numpy().tobytes())
    return digest.hexdigest()
