"""Integer quantization and dense bit packing.

    symmetric    w ~ q * s            q in [-2^(b-1), 2^(b-1) - 1],  s = max|w| / (2^(b-1) - 1)
    asymmetric   w ~ (q - z) * s      q, z in [0, 2^b - 1],          s = (max(w, 0) - min(w, 0)) / (2^b - 1)

One scale (and zero) stands for `group_size` neighbours along the last dimension, or for the whole of it. The
number zero is always representable. Packed integers are one little-endian bit stream per row: value i takes the
bits [i*b, (i+1)*b) of its row, and a row takes ceil(n*b / 8) bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftx.errors import UnsupportedError

__all__ = [
    "Quantized",
    "check_bits",
    "dequantize",
    "from_integer",
    "integer_range",
    "pack_bits",
    "packed_width",
    "quantize",
    "to_integer",
    "unpack_bits",
]

_INTEGER_TYPES = (torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """A quantized tensor, not yet packed.

    q: [..., n] int8 (symmetric) or uint8 (asymmetric).
    scale: [..., groups] floating; groups = ceil(n / group_size), 1 without groups.
    zero: [..., groups] uint8, None when symmetric.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int | None

    @property
    def symmetric(self) -> bool:
        return self.zero is None


def check_bits(bits: int, what: str = "bits") -> None:
    """Raise `UnsupportedError` unless `bits` is one of 2..8."""
    if not 2 <= bits <= 8:
        raise UnsupportedError(f"{what}={bits} is outside 2..8")


def integer_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """The least and the greatest integer: (-8, 7) or (0, 15) for 4 bits."""
    check_bits(bits)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)


def to_integer(x: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int) -> Tensor:
    """clamp(round(x / s) + z): int8 when `zero` is None, else uint8. `scale` and `zero` broadcast against `x`."""
    low, high = integer_range(bits, symmetric=zero is None)
    q = torch.round(x.float() / scale.float())
    if zero is not None:
        q = q + zero
    return q.clamp_(low, high).to(torch.int8 if zero is None else torch.uint8)


def from_integer(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(q - z) * s, computed in float32. `scale` and `zero` broadcast against `q`."""
    x = q.float()
    if zero is not None:
        x = x - zero
    return (x * scale.float()).to(dtype)


def group_count(size: int, group_size: int | None) -> int:
    """How many groups a row of `size` values has; the last one may be short."""
    return 1 if group_size is None else -(-size // group_size)


def _grouped(x: Tensor, group_size: int | None) -> Tensor:
    """[..., n] -> [..., groups, group_size], zero-padded: zeros change neither a scale nor a zero point."""
    if group_size is None:
        return x.unsqueeze(-2)
    groups = group_count(x.shape[-1], group_size)
    missing = groups * group_size - x.shape[-1]
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (groups, group_size))


def _ungrouped(x: Tensor, size: int) -> Tensor:
    """The inverse of `_grouped`: [..., groups, group_size] -> [..., size]."""
    return x.flatten(-2)[..., :size]


def _search_scale(
    grouped: Tensor, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The min/max scale [..., groups] in `dtype`, and the zero point [..., groups] uint8 when asymmetric."""
    _, high = integer_range(bits, symmetric=symmetric)
    if symmetric:
        low_value, span = None, grouped.abs().amax(dim=-1).float()
    else:
        low_value = grouped.amin(dim=-1).float().clamp_max(0)
        span = grouped.amax(dim=-1).float().clamp_min(0) - low_value
    scale = span / high
    if not torch.isfinite(scale.to(dtype)).all():
        raise UnsupportedError(
            f"a tensor with NaN, infinite or (for {dtype}) too large values cannot be quantized"
        )
    # A group of zeros has span 0: any scale stores it exactly.
    scale = torch.where(span > 0, scale, torch.ones_like(scale)).clamp_min(torch.finfo(dtype).tiny).to(dtype)
    if low_value is None:
        return scale, None
    return scale, torch.round(-low_value / scale.float()).clamp(0, high).to(torch.uint8)


def quantize(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Quantized:
    """Round a floating tensor to integers, to the nearest.

    Args:
        weight: [..., out, in], or [..., n] in general; groups run along the last dimension.
        bits: 2..8.
        group_size: neighbours that share a scale; None = the whole row (one scale per output channel).
        symmetric: which of the module's two formulas.
        scale: [..., groups], or what broadcasts to it; None = from the largest magnitude.
        zero: the same shape, integers in [0, 2^bits - 1]; needed with `scale` when not symmetric.
        scale_dtype: what the scale is stored in; None = the dtype of `scale`, else of `weight`. The integers are
            computed against the scale as stored.

    Raises:
        UnsupportedError: integer input, bits outside 2..8, a group size below 1, values that are not finite.
    """
    check_bits(bits)
    if not weight.is_floating_point():
        raise UnsupportedError(f"quantize needs a floating tensor, got {weight.dtype}")
    if group_size is not None and group_size < 1:
        raise UnsupportedError(f"group_size={group_size} is below 1")
    if scale is None and zero is not None:
        raise UnsupportedError("a zero point was given without its scale")
    if scale is not None and symmetric != (zero is None):
        raise UnsupportedError("a given scale comes with a zero point when, and only when, symmetric=False")
    grouped = _grouped(weight.detach(), group_size)
    shape = grouped.shape[:-1]  # [..., groups]
    if scale is None:
        scale, zero = _search_scale(grouped, bits, symmetric, scale_dtype or weight.dtype)
    else:
        scale = scale.detach().to(scale_dtype or scale.dtype).expand(shape).contiguous()
        zero = None if zero is None else zero.to(torch.uint8).expand(shape).contiguous()
        if not bool((scale > 0).all()):
            raise UnsupportedError("a scale must be positive everywhere")
    q = to_integer(grouped, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1), bits=bits)
    q = _ungrouped(q, weight.shape[-1]).contiguous()
    return Quantized(q=q, scale=scale, zero=zero, bits=bits, group_size=group_size)


def dequantize(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """[..., n] in `dtype` (None = the scale's). Computed in float32, rounded once."""
    size = quantized.q.shape[-1]
    zero = None if quantized.zero is None else quantized.zero.unsqueeze(-1)
    grouped = _grouped(quantized.q, quantized.group_size)
    values = from_integer(grouped, quantized.scale.unsqueeze(-1), zero, dtype or quantized.scale.dtype)
    return _ungrouped(values, size)


def packed_width(size: int, bits: int) -> int:
    """Bytes that a row of `size` values of `bits` bits takes."""
    return -(-size * bits // 8)


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """[..., n] int8 or uint8 -> [..., ceil(n*bits/8)] uint8. Negative values keep their low `bits` bits.

    Raises:
        UnsupportedError: another dtype, or a value that `bits` bits cannot hold.
    """
    if q.dtype not in _INTEGER_TYPES:
        raise UnsupportedError(f"pack_bits needs int8 or uint8, got {q.dtype}")
    low, high = integer_range(bits, symmetric=q.dtype == torch.int8)
    if q.numel() and (int(q.min()) < low or int(q.max()) > high):
        raise UnsupportedError(
            f"values in [{int(q.min())}, {int(q.max())}] do not fit {bits} bits: [{low}, {high}]"
        )
    return pack_in_range(q, bits)


def pack_in_range(q: Tensor, bits: int) -> Tensor:
    """`pack_bits` without its check, for callers that have just clamped `q`."""
    size = q.shape[-1]
    mask = (1 << bits) - 1
    u = q.contiguous().view(torch.uint8) & mask
    if bits == 8:
        return u
    # Lanes that fill whole bytes: 4 bits 2 -> 1 byte, 2 bits 4 -> 1 byte, else 8 values -> `bits` bytes.
    lanes = 8 // bits if 8 % bits == 0 else 8
    missing = -size % lanes
    u = (F.pad(u, (0, missing)) if missing else u).unflatten(-1, (-1, lanes))
    if lanes * bits == 8:
        packed = u[..., 0].clone()
        for lane in range(1, lanes):
            packed |= u[..., lane] << (lane * bits)
        return packed
    word = torch.zeros(u.shape[:-1], dtype=torch.int64, device=u.device)  # 8 * 7 bits fit
    for lane in range(lanes):
        word |= u[..., lane].long() << (lane * bits)
    packed = torch.stack([(word >> (8 * byte)) & 0xFF for byte in range(bits)], dim=-1).to(torch.uint8)
    return packed.flatten(-2)[..., : packed_width(size, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, *, size: int, signed: bool) -> Tensor:
    """[..., ceil(size*bits/8)] uint8 -> [..., size] int8 (signed) or uint8: the inverse of `pack_bits`.

    Raises:
        UnsupportedError: a width that is not that of `size` values.
    """
    check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(size, bits):
        raise UnsupportedError(
            f"{size} values of {bits} bits take {packed_width(size, bits)} uint8 a row, "
            f"got {packed.shape[-1]} of {packed.dtype}"
        )
    mask = (1 << bits) - 1
    if bits == 8:
        u = packed
    elif 8 % bits == 0:
        lanes = 8 // bits
        u = torch.stack([(packed >> (lane * bits)) & mask for lane in range(lanes)], dim=-1).flatten(-2)[
            ..., :size
        ]
    else:
        missing = -packed.shape[-1] % bits
        octets = (F.pad(packed, (0, missing)) if missing else packed).unflatten(-1, (-1, bits)).long()
        word = torch.zeros(octets.shape[:-1], dtype=torch.int64, device=packed.device)
        for byte in range(bits):
            word |= octets[..., byte] << (8 * byte)
        lanes_of_word = [((word >> (lane * bits)) & mask).to(torch.uint8) for lane in range(8)]
        u = torch.stack(lanes_of_word, dim=-1).flatten(-2)[..., :size]
    if not signed:
        return u.contiguous()
    sign = 1 << (bits - 1)
    # (u ^ sign) - sign extends the sign: for 4 bits 15 -> 7 - 8 = -1. The byte wraps, which int8 reads rightly.
    return ((u ^ sign) - sign).contiguous().view(torch.int8)
