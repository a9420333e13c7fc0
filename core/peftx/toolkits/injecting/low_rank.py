"""Low-rank updates by their factors alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from peftx.kernel.slots import Delta, LowRank, add_low_rank


class LowRankDelta(Delta, ABC):
    """y + s B A x, with the A, B and s that `low_rank` of a subclass gives."""

    @abstractmethod
    def low_rank(self) -> LowRank:
        """A [..., r, in], B [..., out, r] and s, as they are now."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(x, y, *self.low_rank())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A, with the product in the more exact dtype of W and B."""
        A, B, s = self.low_rank()
        dtype = torch.promote_types(weight.dtype, B.dtype)
        return weight + s * (B.to(dtype) @ A.to(dtype)).to(weight.dtype), bias
