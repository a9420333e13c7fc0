"""A part of what autograd stores of activations for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Wide:
    """What is stored of an activation [..., I]."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape = x.detach(), x.shape
        self.J: Tensor | None = None

    def thin(self, J: Tensor) -> None:
        """Keep the numbers J of I alone."""
        self.x, self.J = self.x[..., J], J

    def unpack(self) -> Tensor:
        """[..., I], 0 outside J."""
        return self.x if self.J is None else self.x.new_zeros(self.shape).index_copy(-1, self.J, self.x)


@contextmanager
def storing(rows: int, width: int) -> Iterator[list[Wide]]:
    """Inside, what autograd stores with `width` numbers for each of so many rows goes into the list, to be thinned
    before the backward pass; parameters do not."""
    found: list[Wide] = []

    def pack(t: Tensor) -> Tensor | Wide:
        wide = t.is_floating_point() and t.shape[-1:] == (width,) and t.numel() == rows * width
        if not wide or isinstance(t, nn.Parameter):
            return t
        found.append(Wide(t))
        return found[-1]

    def unpack(stored: Tensor | Wide) -> Tensor:
        return stored.unpack() if isinstance(stored, Wide) else stored

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield found
