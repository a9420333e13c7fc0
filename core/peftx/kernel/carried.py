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
        layer.peftx_carried, layer.peftx_fill = name, fill
        layer.is_compileable = True  # as the rest of a static cache: else its empty places were read
        cache.layers.append(layer)
    values = values[..., None] if values.ndim == 2 else values  # [B, T, k]
    if soft := rows_of(cache) - layer.get_seq_length() - values.shape[1]:
        values = insert(values, values.new_full((len(values), soft, values.shape[2]), fill), at)
    values = values[:, None]  # [B, 1, R, k]
    layer.update(values, values[..., :0])


def pass_over(cache: Cache, layer: int, x: Tensor) -> None:
    """As many rows as x [B, T, d] has tokens for a layer that nobody reads; like those it has, if it has any."""
    known = cache.layers[layer] if layer < len(cache.layers) else None
    shape = [len(x), 1, x.shape[1], 1], [len(x), 1, x.shape[1], 0]
    if known is not None and known.keys is not None:  # of rows that left the batch, or a static cache
        for form, held in zip(shape, (known.keys, known.values), strict=True):
            form[1], form[3] = held.shape[1], held.shape[3]
    cache.update(x.new_zeros(shape[0]), x.new_zeros(shape[1]), layer)
