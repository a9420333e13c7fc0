"""Rows of soft tokens between those of a caller's text: where they stand in tensors, masks and caches.

Pads on the left stay in front of them, so in a batch each row may have them elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from peftx.errors import ArchitectureError, UnsupportedError


def pads_before(mask: Tensor | None) -> int | Tensor:
    """Pads in front of each row, [B]; 0 where there are none."""
    if mask is None or bool(mask[:, 0].all()):
        return 0
    return (mask.cumsum(1) == 0).sum(1)


def beside_soft_tokens(values: Tensor, mask: Tensor, length: int, fill: float = 1) -> Tensor:
    """What belongs to the caller's tokens, [B, T], as layers see it: with `fill` for `length` soft tokens, which stand
    behind the pads in front.

    Args:
        mask: [B, T], 0 for pads.
    """
    if not length:
        return values
    return insert(values, values.new_full((len(values), length), fill), pads_before(mask))


def with_soft_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """A mask of the caller's tokens as one of these and the soft tokens, which stand behind the pads in front."""
    return None if mask is None else beside_soft_tokens(mask, mask, length)


def insert(tensor: Tensor, rows: Tensor, at: int | Tensor) -> Tensor:
    """[B, T, ...] and [B, P, ...] -> [B, T + P, ...]: the new rows from column `at` on, [B] where these differ."""
    if isinstance(at, int):
        return torch.cat((tensor[:, :at], rows, tensor[:, at:]), 1)
    T, P = tensor.shape[1], rows.shape[1]
    column, at = torch.arange(T + P, device=tensor.device), at[:, None]
    index = torch.where(
        column < at, column, torch.where(column < at + P, T + column - at, column - P)
    )  # [B, T + P]
    return take(torch.cat((tensor, rows), 1), index)


def without(tensor: Tensor, length: int, at: int | Tensor) -> Tensor:
    """The inverse of `insert`: [B, T + P, ...] -> [B, T, ...]."""
    if isinstance(at, int):
        return torch.cat((tensor[:, :at], tensor[:, at + length :]), 1) if at else tensor[:, length:]
    column = torch.arange(tensor.shape[1] - length, device=tensor.device)
    return take(tensor, torch.where(column < at[:, None], column, column + length))


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """[B, N, ...], [B, T] -> [B, T, ...]."""
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], index]


def flat_mask(mask: Any, past: int, new: int, cache: Any) -> Tensor | None:
    """The mask as [B, past + new], 1 where a token is no pad.

    With a static cache `generate` prepares [B, 1, new, cache] itself, for each kind of layer; where a layer attends to
    everything, the last query sees every token that is no pad.

    Raises:
        ArchitectureError: any other mask; the rows have no place in it.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] <= past + new):
        return mask  # nearly always, so first
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, StaticLayer)]
    if isinstance(mask, dict) and layers:
        mask = mask.get("full_attention", mask)
        if mask is None:
            return None
    form = tuple(mask.shape) if isinstance(mask, Tensor) else ()
    if len(form) == 2 and not layers:  # with them it is BLOOM's, which is as wide as the cache
        return mask
    if len(form) == 4 and form[1] == 1 and any(not layer.is_sliding for layer in layers):
        seen = mask[:, 0, :, : past + new]  # [B, new, past + new]
        if seen.is_floating_point():
            seen = seen == 0
        kept = seen[:, -1]
        if torch.equal(seen, torch.ones_like(seen).tril(past) & kept[:, None]):
            return kept.long()
    if layers:
        raise ArchitectureError(
            "the soft tokens have no place in the mask that `generate` prepared for this static cache",
            hint="leave cache_implementation out: the dynamic cache takes every mask, window and chunk",
        )
    raise ArchitectureError("soft tokens need a 2-D attention mask", hint="[rows, tokens], 1 for a token")


def is_tree(mask: Any, columns: int, cache: Any) -> bool:
    """Is it a mask of the caller's own, [B, 1, new, columns], which says of each new token what it sees: of drafts.
    With a static cache it is `generate`'s, see `flat_mask`."""
    fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[3] == columns
    return fits and not any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ()))


def columns_seen(mask: Tensor) -> Tensor:
    """int64 [B, columns], of [B, 1, new, columns]: 1 where a new token sees the column, which a pad's is for none."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    return seen[:, 0].any(1).long()


def make_room(cache: Any, length: int, window: int | None) -> None:
    """A static cache is as long as the caller's text; before its first use it can still grow by the soft tokens.

    Args:
        window: of the layers that keep no more than that.

    Raises:
        UnsupportedError: it holds its tensors already, and was not made for so many rows.
    """
    for layer in getattr(cache, "layers", ()):
        if not isinstance(layer, StaticLayer) or getattr(layer, "peftx_rows", 0) >= length:
            continue
        if layer.is_initialized:
            raise UnsupportedError(
                f"a static cache that was filled or initialised before has no room for {length} soft tokens",
                hint="hand over a new one, and leave prefill_chunk_size out",
            )
        longer = layer.max_cache_len + length - getattr(layer, "peftx_rows", 0)
        layer.max_cache_len = min(longer, window) if layer.is_sliding and window else longer
        layer.peftx_rows = length


def check_past(mask: Tensor | None, positions: Tensor | None, past: int, new: int) -> None:
    """A caller who takes the cache's length for that of the text counts the soft tokens among its own."""
    covered = mask.shape[-1] if mask is not None and mask.ndim == 2 else past + new
    last = past + new - 1
    # Not at each step of decoding where it would wait for a GPU.
    if positions is not None and (new > 1 or positions.device.type == "cpu"):
        last = int(positions.max())
    if covered != past + new or last >= past + new:
        raise UnsupportedError(
            f"{past} tokens of the text are in the cache and {new} are new, but the mask covers {covered} and the last "
            f"position is {last}: the soft tokens in the cache were taken for text",
            hint="a `generate` cannot go on with the cache of an earlier one under soft tokens",
        )
