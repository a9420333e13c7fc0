"""Matrix products on integers: the three that torch has, and where each may be used.

`torch._int_mm` multiplies int8 by int8 into int32, exactly. On CPU it takes every shape. On CUDA it asks for more
than 16 rows and for both weight dimensions divisible by 8; rows are padded here, weights are not. The weight must
come in as a transposed view of [out, in]: a contiguous [in, out] is several times slower on CPU.

`torch.ops.aten._weight_int4pack_mm_for_cpu` multiplies bfloat16 by grouped 4-bit weights. It also takes float32, but
is then slower than a dequantized product by orders of magnitude, so only bfloat16 is allowed.

Float32 by integers, on CPU, is what an embedding bag computes: a weighted sum of rows of bytes,

    x W^T = sum_k x_k u_k,   u_k the integers of input k, for all outputs,

which for a few rows x reads a quarter of what a product of floats reads. For more rows the same table comes back to
float32 a block of outputs at a time, small enough for the cache. (Tables of nibbles save no time: unpacking them takes
as long as reading bytes.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["int8-matmul", "int4-pack", "table", "dequantize", "emulate"]


__all__ = [
    "KernelLayout",
    "int4_matmul",
    "int4_pack",
    "int4_row_group",
    "int8_matmul",
    "int8_matmul_fits",
    "integer_linear",
    "table_fits",
    "table_matmul",
    "table_pack",
    "to_signed",
]

_CUDA_LEAST_ROWS = 17
# |x_q * w_q| <= 2^14, and the sum of `in_features` of them must stay inside int32.
_MOST_IN_FEATURES = (2**31 - 1) // 2**14
_INT4_GROUPS = (256, 128, 64, 32)
_INT4_INNER_TILES = 1  # the CPU kernel ignores it, the signature wants it
# Without it bags run, but not by vector instructions.
_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
_TABLE_WIDTH = 256  # most outputs in a row of a table
_BAG = 256  # inputs that one bag sums where a scale stands for all of them: float32 loses digits over more
_LEAST_BAG = 32  # in smaller groups a bag writes more than it reads
_BAG_ROWS = 16  # rows of x up to which bags beat blocks


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


def table_fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `table_matmul` takes x of `dtype` on `device`, and is fast there."""
    return _FBGEMM and device.type == "cpu" and dtype == torch.float32


def table_pack(
    q: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int | None
) -> tuple[Tensor, ...]:
    """Lay a weight out as embedding tables, each of at most 256 outputs, one behind the other.

    Args:
        q: [out, in] int8 (symmetric) or uint8; scale: [out, groups]; zero: [out, groups] uint8, None when symmetric.

    Returns:
        table [blocks * in, outputs + 8] uint8: behind each row stand what the operator multiplies and adds to it,
        which is 1 and minus the middle of the range. indices [blocks * in] of its rows, and starts [blocks * bags] of
        the bags of one row of x, int32. scale [blocks, groups, outputs] float32 (without groups [blocks, outputs]), and
        of an asymmetric weight the zero point less the middle, of the same shape.
    """
    out_features, middle = len(q), 1 << bits - 1
    blocks = -(-out_features // _TABLE_WIDTH)
    width = -(-out_features // (16 * blocks)) * 16

    def blocked(t: Tensor) -> Tensor:  # [out, n] -> [blocks, n, width]
        return F.pad(t, (0, 0, 0, blocks * width - out_features)).view(blocks, width, -1).transpose(1, 2)

    rows = blocked(q if zero is not None else q.view(torch.uint8) + middle).flatten(0, 1)
    ends = torch.tensor([1.0, -middle], device=q.device).view(torch.uint8).expand(len(rows), -1)
    indices = torch.arange(len(rows), dtype=torch.int32, device=q.device)
    starts = indices.view(blocks, -1)[:, :: group_size or _BAG].reshape(-1).contiguous()
    sides = [blocked(s.float()) for s in ((scale,) if zero is None else (scale, zero.int() - middle))]
    sides = [(s[:, 0] if group_size is None else s).contiguous() for s in sides]
    return torch.cat((rows, ends), 1).contiguous(), indices, starts, *sides


def table_matmul(
    x: Tensor,
    table: Tensor,
    indices: Tensor,
    starts: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    group_size: int | None,
    out_features: int,
) -> Tensor:
    """x [rows, in] float32 times what `table_pack` made: [rows, out] float32."""
    if 0 < len(x) <= _BAG_ROWS and (group_size is None or group_size >= _LEAST_BAG):
        y = _bags(x, table, indices, starts, scale, shift, group_size)
        return y if y.shape[1] == out_features else y[:, :out_features].contiguous()
    tables = table.view(len(scale), x.shape[1], -1)
    y = x.new_empty(len(x), out_features)
    for block, part in enumerate(y.split(scale.shape[-1], dim=1)):
        weight = torch.ops.quantized.embedding_bag_byte_unpack(tables[block])  # [in, a block of outputs]
        if shift is not None:
            for rows, zero in _by_group(weight, shift[block], group_size):
                rows.sub_(zero)
        if group_size is not None:
            for rows, factor in _by_group(weight, scale[block], group_size):
                rows.mul_(factor)
        torch.mm(x, weight[:, : part.shape[1]], out=part)
        if group_size is None:
            part.mul_(scale[block, : part.shape[1]])
    return y


def _bags(
    x: Tensor,
    table: Tensor,
    indices: Tensor,
    starts: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group_size: int | None,
) -> Tensor:
    """The product [rows, outputs of all blocks] in one call: a bag for each row, each block and some inputs."""
    rows, inputs = x.shape
    blocks, width = len(scale), scale.shape[-1]
    if rows > 1:
        steps = len(table) * torch.arange(rows, dtype=torch.int32)
        starts = (steps[:, None] + starts).view(-1)
        indices = indices.repeat(rows)
    weights = torch.cat((x,) * blocks, 1).view(-1)  # [rows, blocks, in]
    y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table, indices, starts, per_sample_weights=weights
    ).view(rows, blocks, -1, width)
    if group_size is None:
        y = y.sum(2)
        if shift is not None:  # sum_k x_k (u_k - z) = sum_k x_k u_k - z sum_k x_k
            y -= x.sum(1)[:, None, None] * shift
        return y.mul_(scale).view(rows, -1)
    if shift is not None:
        sums = F.pad(x, (0, -inputs % group_size)).view(rows, 1, -1, group_size).sum(-1, keepdim=True)
        y -= sums * shift
    return y.mul_(scale).sum(2).view(rows, -1)


def _by_group(weight: Tensor, side: Tensor, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [in, n] group by group beside what belongs to a group [groups, n]; a short last group on its own."""
    if size is None:
        yield weight, side
        return
    whole = len(weight) // size
    yield weight[: whole * size].unflatten(0, (whole, size)), side[:whole, None]
    yield weight[whole * size :], side[whole:]


@dataclass(frozen=True, eq=False)
class KernelLayout:
    """A weight in the layout of a kernel, good while it stands on the same tensors in the same versions."""

    kernel: str
    sources: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, kernel: str, sources: tuple[Tensor | None, ...], tensors: tuple[Tensor, ...]) -> KernelLayout:
        return cls(kernel, sources, tuple(map(_version, sources)), tensors)

    def serves(self, kernel: str, sources: tuple[Tensor | None, ...]) -> bool:
        same = kernel == self.kernel and tuple(map(id, sources)) == tuple(map(id, self.sources))
        return same and self.versions == tuple(map(_version, sources))


def _version(tensor: Tensor | None) -> int:
    # Inference tensors count no versions; outside inference mode they cannot be changed either.
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int | None,
    integers: bool,
    keeps: bool,
) -> Kernel:
    """The kernel of a product of inputs [rows, in] of this device and dtype with packed weights [out, in].

    Args:
        integers: the inputs are rounded too. keeps: a copy of the weights in the kernel's layout may stay in memory.

    Returns:
        int8-matmul: integers; int4-pack: 4-bit weights with bfloat16 inputs on CPU; table: weights alone, with float32
        inputs on CPU; dequantize: float weights; emulate: activations rounded, the product in float32 (grouped weights,
        or a shape that int8 refuses).
    """
    if integers:
        fits = int8_matmul_fits(device, out_features=out_features, in_features=in_features)
        return "int8-matmul" if fits and group_size is None else "emulate"
    if bits == 4 and device.type == "cpu" and dtype == torch.bfloat16:
        group = int4_row_group(out_features=out_features, in_features=in_features, group_size=group_size)
        return "dequantize" if group is None else "int4-pack"
    return "table" if keeps and table_fits(device, dtype) else "dequantize"
