"""Hydragen: exact attention for batches whose sequences share a prefix.

"Hydragen: High-Throughput LLM Inference with Shared Prefixes" (arXiv:2402.05099). The softmax over a union of keys is
a weighted mean of the softmaxes over its parts:

    part i     o_i = softmax(s q K_i^T) V_i        L_i = log sum_j exp(s q k_ij)         [s: 1 / sqrt(d)]
    merge      o = sum_i exp(L_i - m) o_i / sum_i exp(L_i - m)                           [m = max_i L_i]

so each part may be computed in its own way. Keys that b sequences share are held and read once, and the queries of the
b sequences become rows of one matrix product with them:

    queries    [b, h, 1, d] -> [1, h_kv, b h / h_kv, d]           keys of the prefix  [1, h_kv, n_p, d]

Levels: the common head of all prompts; each prompt's rest, for all of its samples; each sequence's own tokens, whose
positions begin where the shared ones end. Everything else in the model is as it was.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from peftx import AttentionEdit, Claim, Generation, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.errors import ArchitectureError, GenerationError, UnsupportedError
from peftx.kernel.attention import Attend


class HydragenConfig(PluginConfig):
    """Options of Hydragen; the paper has none."""

    min_prefix: int = Field(16, ge=1, description="tokens from which on a head or a prompt is shared")


class Part(NamedTuple):
    """Attention over some of the keys: o [B, H, M, D] and L [B, H, M]."""

    out: Tensor
    lse: Tensor


class Level(NamedTuple):
    """What groups of sequences share in one layer: keys and values [N, H, K, D]; what is no pad [N, K], or None."""

    keys: Tensor
    values: Tensor
    real: Tensor | None


def attend_part(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Part:
    """Attention over one part of the keys.

    Args:
        query: [B, H, M, D]. key, value: [N, H, K, D], K >= 1, N divides B; sequence b reads row b // (B / N).
        mask: additive and finite, [N, 1, 1, K], or [N, 1, M, K] where N = B.
    """
    batch, heads, rows, size = query.shape
    groups, each = len(key), batch // len(key)
    folded = query.reshape(groups, each, heads, rows, size).transpose(1, 2).reshape(groups, heads, -1, size)
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        bias = None if mask is None else mask.expand(groups, 1, each * rows, key.shape[2])
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the public one keeps L to itself
        out, lse = fused(folded, key, value, attn_mask=bias, scale=scale)
    else:
        scores = (folded @ key.transpose(-1, -2)).float() * scale + (0 if mask is None else mask)
        lse = torch.logsumexp(scores, dim=-1)
        out = (scores - lse[..., None]).exp().to(value.dtype) @ value
    out, lse = (part.unflatten(2, (each, rows)).transpose(1, 2).flatten(0, 1) for part in (out, lse))
    return Part(out, lse)


def merge(parts: Sequence[Part]) -> Tensor:
    """o = sum_i exp(L_i - m) o_i / sum_i exp(L_i - m): [B, H, M, D]."""
    weights = torch.stack([part.lse for part in parts]).softmax(0)[..., None]  # [parts, B, H, M, 1]
    return (weights * torch.stack([part.out for part in parts])).sum(0).to(parts[0].out.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` lets through, else the lowest finite number: a row of infinities would have no L."""
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(dtype).min)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@final
class SharedAttention(AttentionEdit):
    """Attention over the levels and the cache's own keys; without levels the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[Level] = []
        self.keys = 0  # of the last call without levels; more than were cached
        self.learned = 0  # if another plugin puts so many in front

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Attend
    ) -> Tensor:
        if not self.levels:
            self.keys = key.shape[2]
            return attend(query, key, value, mask)
        batch, heads, length, size = query.shape
        groups = heads // key.shape[1]
        if mask is None if length > 1 else mask is not None and mask.dim() != 4:
            raise UnsupportedError("hydragen: this attention makes no 4-D masks", hint="use sdpa or eager")
        if mask is not None:  # [B, 1, L, learned + shared + own] -> the columns of `key`, for a group's heads
            mask = torch.cat([mask[..., : self.learned], mask[..., self.learned - key.shape[2] :]], dim=-1)
            mask = additive(mask, query.dtype).repeat(1, 1, groups, 1)
        query = query.reshape(batch, key.shape[1], groups * length, size)
        parts = [attend_part(query, key, value, scaling, mask)]
        for level in self.levels:
            pads = None if level.real is None else additive(level.real[:, None, None], query.dtype)
            parts.append(attend_part(query, level.keys, level.values, scaling, pads))
        return merge(parts).view(batch, heads, length, -1).transpose(1, 2)


@final
class OwnLayer(DynamicLayer):
    """One layer of a cache whose first `shared` columns stand in levels."""

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.shared = shared

    def get_seq_length(self) -> int:
        return self.shared + super().get_seq_length()


def as_in_a_batch(layer: CacheLayerMixin, pads: Tensor) -> CacheLayerMixin:
    """What another plugin noted in a cache of its own kind about the head, [1, H, K, D], for rows that begin with so
    many pads, [B]: the first K columns of a plain batch."""
    at = torch.arange(layer.keys.shape[2], device=pads.device) - pads[:, None]  # [B, K]
    real, twin = (at >= 0)[:, None, :, None], copy.copy(layer)
    twin.keys, twin.values = (
        part[0][:, at.clamp(min=0)].transpose(0, 1) * real for part in (layer.keys, layer.values)
    )
    return twin


def take_apart(rows: list[list[int]], least: int) -> tuple[int, list[int]]:
    """What rows of tokens share.

    Returns:
        Length of the head of all rows, which leaves each row a token (0 if it is shorter than `least`); and the first
        row of each group of equal rows, if the groups have one size and share `least` tokens beyond the head.
    """
    starts = [0, *(i + 1 for i, (before, row) in enumerate(pairwise(rows)) if row != before)]
    size = len(rows) // len(starts)
    most = min(map(len, rows)) - 1
    head = next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)
    head = head if head >= least and len(rows) > 1 else 0
    equal = size > 1 and starts == list(range(0, len(rows), size))
    return head, starts if equal and most - head >= least else []


class Hydragen(Plugin):
    """See the module."""

    Config = HydragenConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.LOSSLESS_DECODING, Claim.EXACT_CACHE,
        Claim.REPLACES_ATTENTION,
    }  # fmt: skip
    refuses = {"bert": "an encoder writes no text", "t5": "its encoder is not a prefix"}
    config: HydragenConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        sites, module = model.attention_sites(), model.module
        config = model.config.get_text_config(decoder=True)
        layers = {type(layer) for layer in DynamicCache(config=config).layers}
        refused = {
            "is no decoder that writes text": model.config.is_encoder_decoder or not module.can_generate(),
            "has sliding windows or states": layers != {DynamicLayer},
            "keeps latents in its cache": config.to_dict().get("kv_lora_rank") is not None,
            "caps its scores": config.to_dict().get("attn_logit_softcapping") is not None,
            "takes no positions": "position_ids" not in inspect.signature(module.forward).parameters,
        }
        if found := [reason for reason, wrong in refused.items() if wrong]:
            raise ArchitectureError(f"hydragen: {type(module).__name__} {' and '.join(found)}")
        self.stack, self.owner = stack, model.owner
        takes = inspect.signature(module.forward).parameters
        self.little = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # none is read
        self.edits = [SharedAttention() for _ in sites]
        for site, edit in zip(sites, self.edits, strict=True):
            model.attend(site, edit)

    @hookimpl
    def decode(self, request: Generation) -> Tensor | None:
        if self.stack.standing[self.owner].disabled:  # the edits are off, so nothing can be shared
            return None
        config, mask = request.generation_config, request.attention_mask
        if request.past_key_values is not None or config.cache_implementation or config.use_cache is False:
            raise UnsupportedError(
                "hydragen keeps the cache itself", hint="leave out cache and cache options"
            )
        if names := ", ".join(request.model_kwargs):
            raise UnsupportedError(f"hydragen does not support {names}", hint="it takes text only")
        if mask is None:
            mask = request.prepare().model_kwargs.get("attention_mask")  # as `generate` decides it
        real = torch.ones_like(request.input_ids) if mask is None else mask.long()
        if not bool((real.diff(dim=1) >= 0).all() and real[:, -1].all()):
            raise GenerationError("hydragen: padding must be on the left and leave a token")
        try:
            self.prefill(request, real)
            ids = request.run_default()
            if request.past_key_values is not None:
                self.report(request, request.past_key_values, ids.shape[1] - 1)
            return ids
        finally:
            request.attention_mask, request.past_key_values = mask, None
            for edit in self.edits:
                edit.levels = []

    def prefill(self, request: Generation, real: Tensor) -> None:
        """Fill the levels, and give the request an empty cache behind them; `real` [B, T]: no pads.

        The request's mask is put in the order of the cache: the head, pads, the rest. The ids stay, since `generate`
        feeds only their last columns, and the tokens of masked columns do not matter.
        """
        ids, config = request.input_ids, request.generation_config
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        rows = [row[own.bool()].tolist() for row, own in zip(ids, real, strict=True) for _ in range(copies)]
        head, starts = take_apart(rows, self.config.min_prefix)
        order = torch.cat([real.new_ones(len(ids), head), real[:, : ids.shape[1] - head]], dim=1)
        pads, notes = (1 - real).sum(1), []
        if head:
            notes = self.share(request, ids.new_tensor(rows[:1])[:, :head], order[:1, :head], self.cache(0))
        if starts:
            first = ids.new_tensor(starts) // copies
            behind = self.cache(head, [as_in_a_batch(layer, pads[first]) for layer in notes])
            notes = self.share(request, ids[first, head:-1], order[first, :-1], behind)
            for layer in notes:
                layer.batch_repeat_interleave(len(rows) // len(starts))
        elif head:
            notes = [as_in_a_batch(layer, pads.repeat_interleave(copies)) for layer in notes]
        if head or starts:
            request.past_key_values = self.cache(ids.shape[1] - 1 if starts else head, notes)
            request.attention_mask = order

    def cache(self, shared: int, notes: Sequence[CacheLayerMixin] = ()) -> Cache:
        """An empty one behind `shared` columns. Notes: layers that other plugins keep behind the model's own."""
        return Cache(layers=[*(OwnLayer(shared) for _ in self.edits), *notes])

    def share(self, request: Generation, ids: Tensor, mask: Tensor, cache: Cache) -> list[CacheLayerMixin]:
        """Run `ids` [N, K] with an empty cache behind shared columns; their keys and values become a level.

        The whole model runs, since other plugins stand around it.

        Args:
            mask: [N, shared + K].

        Returns:
            The notes of other plugins in the cache.
        """
        shared = cache.get_seq_length()
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]  # the first token after the head is at n_p
        request.add("model_calls", 1)
        request.model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, **self.little
        )
        if soft := cache.get_seq_length() - mask.shape[1]:
            raise UnsupportedError(
                f"hydragen: {soft} soft tokens stand before the text", hint="tune a prefix"
            )
        real = None if bool(mask.all()) else mask[:, shared:].bool()
        for edit, layer in zip(self.edits, cache.layers, strict=False):  # the model's own come first
            edit.learned = edit.learned if edit.levels else edit.keys - ids.shape[1]
            edit.levels.append(Level(layer.keys, layer.values, real))
        return cache.layers[len(self.edits) :]

    def report(self, request: Generation, cache: Cache, columns: int) -> None:
        """Count shared tokens, bytes of keys and values, and those of a cache of `columns` for every sequence."""
        own = [layer.keys for layer in cache.layers[: len(self.edits)]]
        levels = [level.keys for edit in self.edits for level in edit.levels]
        request.add("shared_tokens", cache.get_seq_length() - own[0].shape[2])
        request.add("kv_bytes", sum(keys.nbytes for keys in own + levels) * 2)
        request.add("kv_bytes_plain", len(own[0]) * columns * own[0][0, :, 0].nbytes * len(own) * 2)
