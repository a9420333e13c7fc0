"""Rows of a fused matrix that belong to one role."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some of the `total` output features of a fused projection.

    With `heads` 0 they are `start:stop`. Else the matrix is laid out per head, `parts` blocks of equal size for each
    of `heads` heads, and the rows are block `part` of every head (`start:stop` is not used).
    """

    total: int
    start: int = 0
    stop: int = 0
    heads: int = 0
    parts: int = 1
    part: int = 0

    @property
    def size(self) -> int:
        return self.total // self.parts if self.heads else self.stop - self.start

    def take(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """The rows' slice of `tensor` along `dim` (size `total`): a view where it can be, else a copy."""
        dim %= tensor.ndim
        if not self.heads:
            return tensor.narrow(dim, self.start, self.stop - self.start)
        blocks = tensor.unflatten(dim, (self.heads, self.parts, -1))
        return blocks.select(dim + 1, self.part).flatten(dim, dim + 1)

    def put(self, tensor: Tensor, values: Tensor, dim: int = -1) -> Tensor:
        """A copy of `tensor` with the rows replaced by `values`; differentiable in both."""
        dim %= tensor.ndim
        if not self.heads:
            before = tensor.narrow(dim, 0, self.start)
            after = tensor.narrow(dim, self.stop, self.total - self.stop)
            return torch.cat((before, values, after), dim)
        blocks = list(tensor.unflatten(dim, (self.heads, self.parts, -1)).unbind(dim + 1))
        blocks[self.part] = values.unflatten(dim, (self.heads, -1))
        return torch.stack(blocks, dim + 1).flatten(dim, dim + 2)
