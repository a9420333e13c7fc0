"""Caches: taking rejected rows out again, and the length of states."""

from __future__ import annotations

import copy
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from peftx.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Exact classes: a subclass may keep its rows elsewhere (the quantized layers do) and inherit `is_croppable = True`.
_GATHERABLE = (DynamicLayer, DummyLayer)
_REWINDABLE = (
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


class Undo(Enum):
    """How rows leave a cache."""

    ANY_ROWS = "any rows"  # keys and values are [B, H, rows, D]: any subset can be kept
    LAST_ROWS = "last rows"  # the last rows only, and only while the cache records its past


def undo_kind(cache: Cache) -> Undo:
    """What can be taken out of `cache`, judged by its layers' classes.

    Raises:
        UnsupportedError: a layer from which nothing can be taken (static, quantized, a class of the user's own).
    """
    kinds = {type(layer) for layer in cache.layers}
    if cache.layer_class_to_replicate is not None:  # layers are made on first use
        kinds.add(cache.layer_class_to_replicate)
    unknown = sorted(kind.__name__ for kind in kinds if kind not in _GATHERABLE + _REWINDABLE)
    if unknown or cache.offloading:
        what = ", ".join(unknown) if unknown else "an offloaded cache"
        raise UnsupportedError(
            f"drafts cannot be verified with {what}: rejected rows cannot be taken out again",
            hint="use the default dynamic cache (no `cache_implementation`)",
        )
    return Undo.ANY_ROWS if all(kind in _GATHERABLE for kind in kinds) else Undo.LAST_ROWS


def keep_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Keep exactly `rows` ([n] int64) of an `ANY_ROWS` cache, in that order."""
    for layer in cache.layers:
        if layer.keys is not None:  # layers that share another's keys hold none
            layer.keys = layer.keys.index_select(-2, rows.to(layer.keys.device))
            layer.values = layer.values.index_select(-2, rows.to(layer.values.device))


def fork_cache(cache: Cache) -> Cache:
    """A cache that can grow and shrink without touching the original.

    Dynamic layers share their tensors with the original (they grow by concatenation, never in place, so this costs
    nothing and keeps gradients); every other kind is deep-copied.
    """
    if any(type(layer) not in _GATHERABLE for layer in cache.layers):
        return copy.deepcopy(cache)
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


class StateCache(DynamicCache):  # type: ignore[misc]
    """A cache of states alone (Mamba), with the length that transformers' own does not know.

    Attributes:
        tokens: that the states stand behind; who calls the model counts them.
    """

    tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def skip(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A forward pre-hook for `generate` over one text, which hands these models the whole of it at first: only what
        is behind the states is read, and counted. Nothing of one text is masked."""
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:
            ids = ids[:, self.tokens :]
        self.tokens += ids.shape[1]
        return args, kwargs | {"input_ids": ids, "attention_mask": None}


def empty_cache(config: PreTrainedConfig) -> DynamicCache:
    """For a causal model; it says its length, whatever the model keeps."""
    cache = DynamicCache(config=config)
    states_alone = bool(cache.layers) and all(type(layer) is LinearAttentionLayer for layer in cache.layers)
    return StateCache(config=config) if states_alone else cache
