"""Values that go with the cache: a plugin's, one layer more beside those of keys and values.

So beams, drafts and shared prefixes do to them what they do to keys and values. See `Call.carry`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from peftx.kernel.soft_rows import insert


def rows_of(cache: Cache) -> int:
    return int(cache.get_seq_length())


def layers_of(cache: Cache | None) -> list[Any]:
    return [] if cache is None or isinstance(cache, EncoderDecoderCache) else cache.layers


def has_rows(cache: Cache) -> bool:
    """Not Mamba's, which is states alone."""
    return any(isinstance(layer, CacheLayerMixin) for layer in layers_of(cache))


def carried_in(cache: Cache | None, name: str) -> DynamicLayer | None:
    return next((layer for layer in layers_of(cache) if vars(layer).get("peftx_carried") == name), None)


def carry_on(cache: Cache, name: str, values: Tensor, fill: int, at: int | Tensor) -> None:
    """Put the values of a call's tokens into the cache; `at`: where the soft tokens stand that came in with them."""
    layer = carried_in(cache, name)
    if layer is None:
        layer = DynamicLayer()
        layer.peftx_carried = name
        layer.is_compileable = True  # as the rest of a static cache: else its empty places were read
        cache.layers.append(layer)
    values = values[..., None] if values.ndim == 2 else values  # [B, T, k]
    if soft := rows_of(cache) - layer.get_seq_length() - values.shape[1]:
        values = insert(values, values.new_full((len(values), soft, values.shape[2]), fill), at)
    values = values[:, None]  # [B, 1, R, k]
    layer.update(values, values[..., :0])
