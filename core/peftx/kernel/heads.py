"""Heads of plugins: what reads the last hidden states and answers in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftx.kernel.soft_rows import without

Pool = Callable[[Tensor, Tensor], Tensor]
"""(hidden [B, T, d], mask [B, T]) -> [B, d], or [B, T, d] for an answer a token."""


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens."""
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def last_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last real token, wherever the pads are."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return hidden[torch.arange(len(mask), device=mask.device), (mask.long() * places).argmax(1)]


def first_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first real token, which an encoder reads as the summary."""
    return hidden[torch.arange(len(mask), device=mask.device), mask.long().argmax(1)]


def each_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """Every token."""
    return hidden


class Head(nn.Module):
    """o = A pool(dropout(h)) + b over the last hidden states h.

    Args:
        width: d. out: numbers in an answer. last: the module that gives h. place: of soft tokens among those with a
            mask, as `place_of` gives it. pool: of `mean_of`, `last_of`, `first_of`, `each_of`, or one of your own.
            dropout: of h, while training. bias: is there b.
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        last: nn.Module,
        place: Callable[[Tensor], int | Tensor],
        pool: Pool = mean_of,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias=bias)
        self.pool, self.dropout, self.place = pool, dropout, place
        self.last = (last,)  # in a tuple: it is no child of this one

    def start_from(self, rows: Tensor) -> None:
        """Take these for A, [out, d], as the states of the classes' texts; b is 0."""
        with torch.no_grad():
            self.linear.weight.copy_(rows)
            if self.linear.bias is not None:
                self.linear.bias.zero_()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """h [B, T, d], which tokens are real [B, T] -> [B, out], or [B, T, out]."""
        hidden = F.dropout(hidden.to(self.linear.weight.dtype), self.dropout, self.training)
        out: Tensor = self.linear(self.pool(hidden, mask))
        return out

    @contextmanager
    def reading(self) -> Iterator[list[Tensor]]:
        """Inside, every forward pass of the model adds its h to the list: [B, T + P, d] with P soft tokens."""
        seen: list[Tensor] = []
        handle = self.last[0].register_forward_hook(lambda module, inputs, h: seen.append(h))
        try:
            yield seen
        finally:
            handle.remove()

    def read(self, forward: Callable[[], Any], mask: Tensor) -> tuple[Tensor, Any]:
        """The answers of a forward pass over texts with this mask [B, T], soft tokens left out, and what the model
        returned."""
        with self.reading() as seen:
            outputs = forward()
        hidden = seen[-1]
        soft = hidden.shape[1] - mask.shape[1]
        return self(without(hidden, soft, self.place(mask)) if soft else hidden, mask), outputs
