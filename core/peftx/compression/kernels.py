"""Matrix products on integers: the two that torch has, and where each may be used.

`torch._int_mm` multiplies int8 by int8 into int32, exactly. On CPU it takes every shape. On CUDA it asks for more
than 16 rows and for both weight dimensions divisible by 8; rows are padded here, weights are not. The weight must
come in as a transposed view of [out, in]: a contiguous [in, out] is several times slower on CPU.

`torch.ops.aten._weight_int4pack_mm_for_cpu` multiplies bfloat16 by grouped 4-bit weights. It also takes float32, but
is then slower than a dequantized product by orders of magnitude, so only bfloat16 is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "KernelLayout",
    "int4_matmul",
    "int4_pack",
    "int4_row_group",
    "int8_matmul",
    "int8_matmul_fits",
    "integer_linear",
    "to_signed",
]

_CUDA_LEAST_ROWS = 17
# |x_q * w_q| <= 2^14, and the sum of `in_features` of them must stay inside int32.
_MOST_IN_FEATURES = (2**31 - 1) // 2**14
_INT4_GROUPS = (256, 128, 64, 32)
_INT4_INNER_TILES = 1  # the CPU kernel ignores it, the signature wants it


def int8_matmul_fits(device: torch.device, *, out_features: int, in_features: int) -> bool:
    """Whether `int8_matmul` takes a weight [out_features, in_features] on `device`."""
    if in_features > _MOST_IN_FEATURES:
        return False
    if device.type == "cuda":
        return in_features % 8 == 0 and out_features % 8 == 0
    return device.type == "cpu"


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] int8 times weight [out, in] int8 transposed: [rows, out] int32, exact."""
    rows = x.shape[0]
    if x.device.type == "cuda" and rows < _CUDA_LEAST_ROWS:
        x = F.pad(x, (0, 0, 0, _CUDA_LEAST_ROWS - rows))
    return torch._int_mm(x, weight.t())[:rows]


def to_signed(q: Tensor) -> Tensor:
    """int8 as it is; uint8 minus 128, which int8 holds."""
    return q if q.dtype == torch.int8 else (q ^ 0x80).view(torch.int8)


def integer_linear(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w_q: Tensor,
    w_sum: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
) -> Tensor:
    """s_x s_w sum_k (x_q - z_x)(w_q - z_w)  [rows, out] float32, the sum in integers.

    = s_x s_w [x_q w_q^T - z_x sum(w_q) - z_w (sum(x_q) - in z_x)]. What is unsigned is shifted by 128 together with
    its zero point, which leaves the differences as they are.

    Args:
        x_q: [rows, in] int8, or uint8 with `x_zero`; x_scale, x_zero: [rows, 1] or [].
        w_q: [out, in] int8 from `to_signed`; w_sum: [out] int32, its row sums; w_scale, w_zero: [out].
    """
    total = int8_matmul(to_signed(x_q), w_q)
    x_shift = None if x_zero is None else x_zero.int() - 128
    if x_shift is not None:
        total = total - x_shift * w_sum
    if w_zero is not None:
        x_sum = to_signed(x_q).sum(dim=-1, keepdim=True, dtype=torch.int32)
        x_sum = x_sum if x_shift is None else x_sum - x_q.shape[-1] * x_shift
        total = total - x_sum * (w_zero.int() - 128)
    return total.float() * x_scale.float() * w_scale.float()


def int4_row_group(*, out_features: int, in_features: int, group_size: int | None) -> int | None:
    """The group size to hand to the 4-bit kernel, None where the kernel refuses the shape.

    A weight with one scale per output channel runs with the largest group that divides it, the scale repeated.
    """
    if out_features % 16:
        return None
    if group_size is None:
        return next((group for group in _INT4_GROUPS if in_features % group == 0), None)
    return group_size if group_size in _INT4_GROUPS and in_features % group_size == 0 else None


def int4_pack(
    q: Tensor, scale: Tensor, zero: Tensor | None, *, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Bring a 4-bit weight that `int4_row_group` accepts into the kernel's own layout.

    Args:
        q: [out, in] int8 in [-8, 7] (symmetric) or uint8 in [0, 15].
        scale: [out, groups]; zero: [out, groups] uint8, None when symmetric.

    Returns:
        packed [out, in/2] uint8, and scales with offsets [in/group, out, 2] bfloat16. The kernel computes
        w = (u - 8) * s + c, so c = (8 - z) * s, and 0 for a symmetric weight stored as u = q + 8.
    """
    out_features, in_features = q.shape
    group = int4_row_group(out_features=out_features, in_features=in_features, group_size=group_size)
    unsigned = q.int() if zero is not None else q.int() + 8
    offset = torch.zeros_like(scale).float() if zero is None else (8 - zero.float()) * scale.float()
    both = torch.stack([scale.float(), offset], dim=-1).expand(
        -1, in_features // group, -1
    )  # [out, groups, 2]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, _INT4_INNER_TILES)
    return packed, both.transpose(0, 1).contiguous().to(torch.bfloat16)


def int4_matmul(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [rows, in] bfloat16 times what `int4_pack` made: [rows, out] bfloat16."""
    group = x.shape[-1] // scales.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, scales)


@dataclass(frozen=True, eq=False)
class KernelLayout:
    """A weight in the layout of a kernel, good while it stands on the same tensors in the same versions."""

    sources: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, sources: tuple[Tensor | None, ...], tensors: tuple[Tensor, ...]) -> KernelLayout:
        return cls(sources, tuple(map(_version, sources)), tensors)

    def serves(self, sources: tuple[Tensor | None, ...]) -> bool:
        same = all(mine is yours for mine, yours in zip(self.sources, sources, strict=True))
        return same and self.versions == tuple(map(_version, sources))


def _version(tensor: Tensor | None) -> int:
    # Inference tensors count no versions; outside inference mode they cannot be changed either.
    return 0 if tensor is None or tensor.is_inference() else tensor._version
