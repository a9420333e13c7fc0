"""Trained base parameters as what changed in them: a mask of 1 % makes a file of 2 %, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

AT = "//at"
TO = "//to"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def unpack(old: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The tensor that was packed against `old`. Raises ValueError where the two do not fit it."""
    flat = old.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    if places.shape != values.shape or values.dtype != flat.dtype or places.ndim != 1:
        raise ValueError(f"{len(places)} places, {len(values)} values of {values.dtype} for {flat.dtype}")
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < flat.numel():
        raise ValueError(f"a place beyond its {flat.numel()} values")
    flat[places.long().to(flat.device)] = values.to(flat.device)
    return flat.view(old.shape)
