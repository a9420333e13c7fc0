"""Linear layers with fewer rows or columns, for what prunes in whole blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
