"""Linear layers with fewer rows or columns, for what prunes in whole blocks or dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftx.kernel.slots import packed
from peftx.toolkits.compression.names import dtype_name, float_dtype


class NarrowLinear(nn.Linear):
    """A frozen linear layer of another size than the model's class has there: weight [out, in], bias [out].

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`. dtype: its name, as in "float32".
    """

    def __init__(self, *, dtype: str, **options: Any) -> None:
        super().__init__(**options, dtype=float_dtype(dtype, "dtype"))
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """The values follow."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> NarrowLinear:
        """A layer of these values, in their dtype if none is given."""
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
        new = cls(**sizes, dtype=dtype_name(dtype or weight.dtype), device=weight.device)
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
        return new

    def geometry(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return sizes | {"bias": self.bias is not None, "dtype": dtype_name(self.weight.dtype)}


@packed
class Narrow(nn.Module):
    """A frozen linear layer without some rows or columns, which others see with zeros. Buffers: W, b [rows of W]; where
    some are left out `rows`, `columns`: which W has.

    Args:
        in_features, out_features: as seen from outside. shape: of W. bias: is there b. dtype: by name.
    """

    W: Tensor
    b: Tensor | None
    rows: Tensor | None
    columns: Tensor | None

    def __init__(
        self, *, in_features: int, out_features: int, shape: Sequence[int], bias: bool, dtype: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, kind = in_features, out_features, float_dtype(dtype, "dtype")
        self.register_buffer("W", torch.zeros(*shape, dtype=kind))
        self.register_buffer("b", torch.zeros(shape[0], dtype=kind) if bias else None)
        for name, n, of in zip(("rows", "columns"), shape, (out_features, in_features), strict=True):
            self.register_buffer(name, torch.arange(n) if n < of else None)

    def geometry(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        rest = {"bias": self.b is not None, "dtype": dtype_name(self.W.dtype)}
        return sizes | {"shape": list(self.W.shape)} | rest

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(F.linear(x if self.columns is None else x[..., self.columns], self.W, self.b))

    def spread(self, y: Tensor) -> Tensor:
        """[..., rows of W] -> [..., out], with zeros."""
        if self.rows is None:
            return y
        return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.rows, y)

    @property
    def weight(self) -> Tensor:
        """[out, in], with zeros."""
        W = self.spread(self.W.mT).mT
        if self.columns is None:
            return W
        return W.new_zeros(len(W), self.in_features).index_copy(1, self.columns, W)

    @property
    def bias(self) -> Tensor | None:
        return None if self.b is None else self.spread(self.b)
