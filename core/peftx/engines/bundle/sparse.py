"""Tensors in fewer bytes, bit for bit: trained base parameters as what changed in them (a mask of 1 % makes a file of
2 %), pruned ones as a mask and what is left, masks as bits, float32 as half precision where that holds every value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

AT = "//at"
TO = "//to"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def smallest_exact(tensor: Tensor) -> Tensor:
    """`tensor` in float16 or bfloat16 if every value survives the round trip, else as it is."""
    if tensor.dtype != torch.float32:
        return tensor
    for dtype in (torch.float16, torch.bfloat16):
        small = tensor.to(dtype)
        if torch.equal(small.to(torch.float32), tensor):
            return small
    return tensor


def as_bits(mask: Tensor) -> Tensor:
    """A mask, bool, as uint8 [n / 8]; the first entry is the lowest bit of the first byte."""
    flat = mask.detach().reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def widened(stored: Tensor, dtype: str, shape: Sequence[int]) -> Tensor:
    """What was stored in fewer bits. Raises ValueError where it is not of this shape."""
    if dtype == "bool":
        count = math.prod(shape)
        if stored.dtype != torch.uint8 or stored.shape != (-(-count // 8),):
            raise ValueError(f"{list(stored.shape)} of {stored.dtype} for {count} bits")
        bits = stored[:, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device) & 1
        return bits.reshape(-1)[:count].bool().view(list(shape))
    if list(stored.shape) != list(shape) or not stored.is_floating_point():
        raise ValueError(f"{list(stored.shape)} of {stored.dtype} for {list(shape)} of {dtype}")
    return stored.to(getattr(torch, dtype))


def without_zeros(tensor: Tensor, *, pruned: bool = False) -> tuple[Tensor, Tensor] | None:
    """(mask, values) of what is not 0, where that is the shorter way to say it. -0.0 counts as a value. What is 0 all
    over has not begun to train, and is left as large as it will be; unless it is `pruned`, and will be no larger.

    Returns:
        mask: as `as_bits` gives it. values: [n], in the tensor's dtype, in its order.
    """
    if not tensor.is_floating_point() or tensor.is_meta:
        return None
    flat = tensor.detach().reshape(-1)
    there = (flat != 0) | flat.signbit()
    left = int(there.sum())
    if (not left and not pruned) or left * flat.element_size() + -(-len(flat) // 8) >= flat.nbytes:
        return None
    return as_bits(there), flat[there]


def with_zeros(mask: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse. Raises ValueError where the three do not go together."""
    there = widened(mask, "bool", [math.prod(shape)])
    if values.ndim != 1 or int(there.sum()) != len(values):
        raise ValueError(f"{list(values.shape)} values for {int(there.sum())} places")
    whole = values.new_zeros(there.shape)
    whole[there] = values
    return whole.view(list(shape))


def pack(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor] | None:
    """(places, values) where `new` differs from `old`, as bits; None where that takes more bytes than `new` itself.

    Returns:
        places: int32 or int64 [n], in the flat tensor. values: [n], in its dtype.
    """
    if new.shape != old.shape or new.dtype != old.dtype or new.is_meta or old.is_meta:
        return None
    bits = _BITS[new.element_size()]  # so that -0.0 is not 0.0, and NaN is itself
    flat, was = new.detach().reshape(-1), old.detach().to(new.device).reshape(-1)
    places = (flat.view(bits) != was.view(bits)).nonzero().squeeze(1)
    kind = torch.int32 if flat.numel() < 2**31 else torch.int64
    places = places.to(kind)
    if places.nbytes + places.numel() * flat.element_size() >= flat.nbytes:
        return None
    return places, flat[places.long()]


def packed_at_most(tensors: Sequence[Tensor], changed: int) -> int:
    """Bytes of trained tensors of one dtype in a bundle if at most so many of their numbers change, wherever."""
    place = torch.int32 if all(t.numel() < 2**31 for t in tensors) else torch.int64
    return min(sum(t.nbytes for t in tensors), changed * (place.itemsize + tensors[0].element_size()))


def pruned_about(tensors: Sequence[Tensor], left: int) -> int:
    """Bytes of pruned tensors in a bundle if so many of their numbers are left, wherever: masks and these. A little
    less where one is kept whole."""
    masks = sum(-(-t.numel() // 8) for t in tensors)
    size = max((t.element_size() for t in tensors), default=0)
    return min(sum(t.nbytes for t in tensors), masks + left * size)


@runtime_checkable
class KnowsChanges(Protocol):
    """A plugin that trains parameters of the base, and knows ahead that a bundle holds few of their numbers."""

    def changed_bytes(self) -> int:
        """Bytes at most of the base's numbers that it trains, in a bundle that does not hold its base; for
        `peftx plan`, on the meta device, after `inject`."""


def unpack(old: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The tensor that was packed against `old`. Raises ValueError where the two do not fit it."""
    flat = old.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    if places.shape != values.shape or values.dtype != flat.dtype or places.ndim != 1:
        raise ValueError(f"{len(places)} places, {len(values)} values of {values.dtype} for {flat.dtype}")
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < flat.numel():
        raise ValueError(f"a place beyond its {flat.numel()} values")
    flat[places.long().to(flat.device)] = values.to(flat.device)
    return flat.view(old.shape)
