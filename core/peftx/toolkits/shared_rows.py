"""Rows of prompt and answer, as trainers of other libraries have them, laid out so that those with one prompt share it.

    s = [x_1 .. x_|x|-1 ; x_|x| y_1 ; ... ; x_|x| y_G]

A trainer scores a token by the output before it, so the prompt's last token stands before each answer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SharedRows(NamedTuple):
    """B rows of prompt and answer, of which those with one prompt stand in one of R rows, s."""

    ids: Tensor
    """[R, W], pads at the end."""
    segments: Tensor
    """[R, W]: 1 on the prompt, 2, 3, ... on its answers behind it, 0 on pads."""
    keep: int
    """Tokens at the end of a row among which all answers are."""
    row: Tensor
    """[B] of each answer."""
    start: Tensor
    """[B] its first token among those of `keep`."""
    real: Tensor
    """[B, A] which of its tokens are no pads."""

    def apart(self, values: Tensor) -> Tensor:
        """[R, keep] of tokens -> of those of the answers [B, A], 0 on pads."""
        places = self.start[:, None] + torch.arange(self.real.shape[1], device=values.device)
        return values[self.row[:, None], places.clamp(max=self.keep - 1)].masked_fill(~self.real, 0)


def shared_rows(ids: Tensor, mask: Tensor, answer: int) -> SharedRows | None:
    """ids, mask: [B, P + A], prompts padded left and A = `answer` columns of answers padded right, as TRL has them.

    None where rows that share prompts would hold no fewer tokens, pads included.
    """
    real = mask.bool()
    prompts, answers = (
        [tuple(one[told].tolist()) for one, told in zip(ids[:, part], real[:, part], strict=True)]
        for part in (slice(None, -answer), slice(-answer, None))
    )
    numbers = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    rows, segments = [list(x[:-1]) for x in numbers], [[1] * (len(x) - 1) for x in numbers]
    row, start = [numbers[x] for x in prompts], []
    for n, x, y in zip(row, prompts, answers, strict=True):
        start.append(len(rows[n]) + 1)
        segments[n] += [max(segments[n], default=1) + 1] * (1 + len(y))
        rows[n] += [x[-1], *y]
    width, shortest = max(map(len, rows)), min(map(len, numbers)) - 1
    if len(rows) * width >= ids.numel() or max(map(len, numbers)) == 1:
        return None
    s, numbers_of = (
        torch.tensor([[*one, *[0] * (width - len(one))] for one in every], device=ids.device)
        for every in (rows, segments)
    )
    first = torch.tensor(start, device=ids.device) - shortest - 1
    at = torch.tensor(row, device=ids.device)
    return SharedRows(s, numbers_of, width - shortest - 1, at, first, real[:, -answer:])
