"""A KV cache whose rows are packed integers.

A row (one token, one head) is quantized the moment it arrives and never again, so filling the cache in one go or
token by token gives the same bits; attention always sees the dequantized row, in prefill as in decoding. The first
`prefix_rows` rows can stay in full precision.

    dynamic   one scale a row: s = max|k| / (2^(b-1) - 1), or with a zero point when `symmetric=False`
    static    one given scale a head
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from peftx.compression.activations import straight_through, token_scale
from peftx.compression.packing import check_bits, from_integer, pack_in_range, to_integer, unpack_bits
from peftx.errors import UnsupportedError

__all__ = ["KVFormat", "QuantizedKVLayer", "cache_nbytes", "make_cache"]

_WHOLE_ROW_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, kw_only=True, eq=False)
class KVFormat:
    """How one layer's keys and values are stored.

    Args:
        key_bits, value_bits: 2..8.
        symmetric: dynamic rows without (True) or with (False) a zero point. Static rows are symmetric.
        key_scale, value_scale: [heads], positive; None = dynamic.
        prefix_rows: how many of the first rows stay in full precision.

    Raises:
        UnsupportedError: bits outside 2..8, a negative count, a scale that is no vector or not positive, or static
            with `symmetric=False`.
    """

    key_bits: int = 8
    value_bits: int = 8
    symmetric: bool = True
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    prefix_rows: int = 0

    def __post_init__(self) -> None:
        check_bits(self.key_bits, "key_bits")
        check_bits(self.value_bits, "value_bits")
        if self.prefix_rows < 0:
            raise UnsupportedError(f"prefix_rows={self.prefix_rows} is negative")
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if scale is None:
                continue
            if not self.symmetric:
                raise UnsupportedError(
                    f"{name} is static, and static rows have no zero point: symmetric=False"
                )
            if scale.dim() != 1 or not bool((scale > 0).all()):
                raise UnsupportedError(f"{name} must be [heads] and positive, got shape {tuple(scale.shape)}")


class _Rows:
    """The rows of one side (keys or values): packed [B, H, T, bytes], its scales, and the rows kept whole."""

    def __init__(
        self, *, bits: int, symmetric: bool, head_scale: Tensor | None, prefix_rows: int, like: Tensor
    ):
        """`like` [B, H, any, D] gives batch, heads, head size, dtype and device."""
        batch, heads, _, size = like.shape
        if head_scale is not None and head_scale.shape[0] != heads:
            raise UnsupportedError(
                f"a static scale for {head_scale.shape[0]} heads met a layer with {heads} KV heads"
            )
        self.bits, self.symmetric, self.prefix_rows, self.size = bits, symmetric, prefix_rows, size
        self.dtype = like.dtype
        self.head_scale = None if head_scale is None else head_scale.to(like.device).view(1, heads, 1, 1)
        self.whole = like.new_empty(batch, heads, 0, size)
        empty = torch.empty(
            batch, heads, 0, size, dtype=torch.int8 if symmetric else torch.uint8, device=like.device
        )
        self.packed = pack_in_range(empty, bits)
        self.scale = like.new_empty(batch, heads, 0, 1) if head_scale is None else None
        self.zero = None if symmetric else empty[..., :1]

    def __len__(self) -> int:
        return self.whole.shape[2] + self.packed.shape[2]

    def append(self, x: Tensor) -> Tensor:
        """Store x [B, H, new, D]; returns it as it will be read."""
        kept = min(max(self.prefix_rows - self.whole.shape[2], 0), x.shape[2])
        head, tail = x[:, :, :kept], x[:, :, kept:]
        self.whole = torch.cat([self.whole, head.detach()], dim=2)
        if tail.shape[2] == 0:
            return head
        rows = tail.detach()
        scale, zero = self.head_scale, None
        if scale is None:
            # Quantized against the scale as stored: rounded to the cache's own dtype.
            scale, zero = token_scale(rows, bits=self.bits, symmetric=self.symmetric)
            scale = scale.to(self.dtype).clamp_min_(torch.finfo(self.dtype).tiny)
            self.scale = torch.cat([self.scale, scale], dim=2)
        if zero is not None:
            self.zero = torch.cat([self.zero, zero], dim=2)
        q = to_integer(rows, scale, zero, bits=self.bits)
        self.packed = torch.cat([self.packed, pack_in_range(q, self.bits)], dim=2)
        stored = from_integer(q, scale, zero, x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            stored = straight_through(tail, stored)
        return torch.cat([head, stored], dim=2) if kept else stored

    def read(self) -> Tensor:
        """All rows, dequantized: [B, H, T, D]."""
        if self.packed.shape[2] == 0:
            return self.whole
        q = unpack_bits(self.packed, self.bits, size=self.size, signed=self.symmetric)
        scale = self.scale if self.head_scale is None else self.head_scale
        stored = from_integer(q, scale, self.zero, self.dtype)
        return torch.cat([self.whole, stored], dim=2) if self.whole.shape[2] else stored

    def crop(self, length: int) -> None:
        """Keep the first `length` rows."""
        whole = self.whole.shape[2]
        self.whole = self.whole[:, :, :length]
        self._each_packed(lambda t: t[:, :, : max(length - whole, 0)])

    def map_batch(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, which acts on the batch dimension or the device, to all storage."""
        self.whole = fn(self.whole)
        self._each_packed(fn)

    def _each_packed(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.packed = fn(self.packed)
        self.scale = None if self.scale is None else fn(self.scale)
        self.zero = None if self.zero is None else fn(self.zero)

    @property
    def nbytes(self) -> int:
        held = (self.whole, self.packed, self.scale, self.zero, self.head_scale)
        return sum(t.nbytes for t in held if t is not None)


class QuantizedKVLayer(CacheLayerMixin):
    """One layer of a `transformers` cache in the storage of a `KVFormat`. Grows without a maximum."""

    is_sliding = False
    is_croppable = True

    def __init__(self, *, format: KVFormat) -> None:
        super().__init__()
        self.format = format
        self._rows: tuple[_Rows, _Rows] | None = None  # keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes, dtype and device from the first rows [B, H, T, D]."""
        fmt = self.format
        self.dtype, self.device = key_states.dtype, key_states.device
        keys = _Rows(
            bits=fmt.key_bits,
            symmetric=fmt.symmetric,
            head_scale=fmt.key_scale,
            prefix_rows=fmt.prefix_rows,
            like=key_states,
        )
        values = _Rows(
            bits=fmt.value_bits,
            symmetric=fmt.symmetric,
            head_scale=fmt.value_scale,
            prefix_rows=fmt.prefix_rows,
            like=value_states,
        )
        self._rows = (keys, values)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new rows [B, H, new, D]; returns all rows as stored, [B, H, T + new, D].

        The new rows carry the gradient of their originals (straight through); earlier ones carry none.
        """
        if self.get_seq_length() == 0:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._stored()
        past_keys, past_values = keys.read(), values.read()
        new_keys, new_values = keys.append(key_states), values.append(value_states)
        if past_keys.shape[2] == 0:
            return new_keys, new_values
        return torch.cat([past_keys, new_keys], dim=2), torch.cat([past_values, new_values], dim=2)

    def read(self) -> tuple[Tensor, Tensor]:
        """All stored rows, dequantized: two of [B, H, T, D].

        Raises:
            UnsupportedError: nothing was stored yet.
        """
        keys, values = self._stored()
        return keys.read(), values.read()

    def _stored(self) -> tuple[_Rows, _Rows]:
        if self._rows is None:
            raise UnsupportedError("an empty cache layer has no rows to read")
        return self._rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self._rows is None else len(self._rows[0])

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes that keys, values and scales take."""
        return sum(rows.nbytes for rows in self._rows or ())

    def reset(self) -> None:
        self._rows = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` rows; the argument is negative or 0, as everywhere in transformers."""
        if tokens_to_remove > 0:
            raise UnsupportedError(
                f"crop({tokens_to_remove}): a positive count is refused",
                hint="crop(-n) drops the last n rows",
            )
        for rows in self._rows or ():
            rows.crop(max(len(rows) + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for rows in self._rows or ():
            rows.map_batch(fn)


def make_cache(config: PreTrainedConfig, formats: KVFormat | Sequence[KVFormat | None]) -> Cache:
    """A cache for `model(..., past_key_values=...)` and `generate`; make a new one for each sequence batch.

    Layers of recurrent state (Mamba, convolutions) and layers that reuse another's keys keep the transformers class:
    they store no rows. Layers with a sliding window keep all rows, which the mask hides: right, but not bounded by
    the window.

    Args:
        config: the model's config.
        formats: one for every layer, or a list with one entry a layer, None = transformers' own full precision.

    Raises:
        UnsupportedError: a list of another length, or a layer type whose rows cannot be stored this way.
    """
    layer_types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    chosen = [formats] * len(layer_types) if isinstance(formats, KVFormat) else list(formats)
    if len(chosen) != len(layer_types):
        raise UnsupportedError(f"{len(chosen)} formats for {len(layer_types)} layers")
    layers = []
    for index, (kind, kwargs, fmt) in enumerate(zip(layer_types, arguments, chosen, strict=True)):
        plain = DYNAMIC_LAYER_TYPE_MAPPING[kind]
        if fmt is None or kind == "dummy" or plain is LinearAttentionLayer:
            layers.append(plain(**kwargs))
        elif kind in _WHOLE_ROW_TYPES:
            layers.append(QuantizedKVLayer(format=fmt))
        else:
            raise UnsupportedError(
                f"layer {index} is of type {kind!r}, whose cache cannot be quantized",
                hint="give it the format None",
            )
    return Cache(layers=layers)


def cache_nbytes(cache: Cache) -> int:
    """Bytes of all rows in a cache of quantized and plain dynamic layers; layers without rows count nothing."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, QuantizedKVLayer):
            total += layer.nbytes
        elif isinstance(layer, CacheLayerMixin) and layer.is_initialized and layer.keys is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total
