"""Caches that hold some of the tokens, others in each layer and each row: for methods that leave keys and values out.

    columns of the text   0  1  2  3  4  5  6        masks and positions go by these, as with a full cache
    held by a layer       .  .  2  .  4  5  6        row 0
                          .  .  .  .  .  1  6        row 1, which keeps less: right-aligned, no token in front

The model is told the length of the text, and one mask for all layers. An edit of each layer's attention cuts that mask
down to what the layer holds. Keys keep the positions that they were rotated by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from peftx.errors import ArchitectureError, ConflictError, GenerationError, UnsupportedError
from peftx.kernel.attention import PREFIX, Attend, AttentionEdit
from peftx.kernel.calls import CallEdit
from peftx.kernel.carried import layers_of
from peftx.toolkits.decoding.text import check_writes

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack
    from peftx.kernel.view import ModelView
    from peftx.toolkits.decoding.generation import Generation

PIECE = 64
"""Queries whose attention weights are in memory at once."""


@final
class KeptLayer(DynamicLayer):
    """One layer of a cache that tokens may be left out of.

    Attributes:
        at: [B, held] int64, the column of each key in the text; -1: of no token (a pad, or a row that keeps less).
        weight: [B, held] float32, whatever a policy adds up for each key; 0 for a new one.
    """

    is_croppable = False  # what was left out does not come back
    at: Tensor
    weight: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch, new = len(key_states), key_states.shape[-2]
        at = torch.arange(self.length, self.length + new, device=key_states.device).expand(batch, -1)
        weight = torch.zeros(batch, new, device=key_states.device)
        if self.length:
            at, weight = torch.cat([self.at, at], 1), torch.cat([self.weight, weight], 1)
        self.at, self.weight = at, weight
        self.length += new
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def real(self) -> Tensor:
        """Which of the columns held are tokens: bool [B, held]."""
        return self.at >= 0

    def keep(self, kept: Tensor) -> None:
        """Hold these tokens, bool [B, held], and no others; memory of the others is given back."""
        kept = (kept & self.real).to(self.at.device)
        order = kept.long().argsort(dim=1, stable=True)[:, kept.shape[1] - int(kept.sum(1).max()) :]
        self.at = self.at.gather(1, order).masked_fill(~kept.gather(1, order), -1)
        self.weight = self.weight.gather(1, order)
        self.keys, self.values = (
            held.gather(2, order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]))
            for held in (self.keys, self.values)
        )

    def narrowed(self, mask: Tensor | None, keys: int) -> Tensor | None:
        """The model's mask [B or 1, 1 or H, Q, front + length] by the keys of a call, front + held; None: all seen.

        Args:
            keys: how many there are; those before the cache's own are of other plugins, and stay.
        """
        front, at = keys - self.at.shape[1], self.at[:, None, None]
        if mask is None:  # one query, or a text from its beginning
            return None if bool(self.real.all()) else F.pad(at >= 0, (front, 0), value=True)
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.expand(len(at), -1, -1, -1)
        own = mask[..., front:].gather(-1, at.clamp(min=0).expand(*mask.shape[:3], -1))
        return torch.cat([mask[..., :front], own.masked_fill(at < 0, low)], -1)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.length:
            self.keys, self.values, self.at, self.weight = map(
                change, (self.keys, self.values, self.at, self.weight)
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda rows: rows[indices.to(rows.device)])

    def reset(self) -> None:
        super().reset()
        self.length = 0


class Policy(Protocol):
    """What a method says: which tokens stay."""

    def look(
        self, layer: KeptLayer, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, reading: bool
    ) -> None:
        """See one layer's attention before it runs, and note in `layer.weight` what is to be known of its keys.

        Args:
            query: [B, H, Q, D]. key: [B, Hkv, front + held, D]. mask: of these, or None, as an `AttentionEdit` gets it.
            reading: is it the prompt.
        """

    def evict(self, layers: Sequence[KeptLayer], reading: bool) -> None:
        """Call `keep` on layers: behind the prompt (`reading`), and behind every call after it."""


@final
class _Cut(AttentionEdit):
    """The attention of a layer, over what it holds."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.layer: KeptLayer | None = None  # of a call that is watched
        self.reading = False

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Attend
    ) -> Tensor:
        if self.layer is not None:
            if self.reading:
                pads = ~seen(mask, query, key)[:, -self.layer.at.shape[1] :]
                self.layer.at = self.layer.at.masked_fill(pads, -1)
            mask = self.layer.narrowed(mask, key.shape[2])
            self.policy.look(self.layer, query, key, mask, scaling, self.reading)
        return attend(query, key, value, mask)


@final
class Evictor(CallEdit):
    """What a plugin with a policy puts on a model, in `inject`: `model.around(Evictor(model, policy))`.

    Nothing changes but inside `during` (a request) or `watching` (calls of one's own). Layers that keep states pass.

    Args:
        model: the plugin's view. policy: which tokens stay.

    Raises:
        ArchitectureError: no decoder that writes text, or a cache that tokens cannot be left out of.
    """

    def __init__(self, model: ModelView, policy: Policy) -> None:
        super().__init__()
        config, module = model.config.get_text_config(decoder=True), model.module
        check_writes(model)
        sites = model.attention_sites()
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        attention = (model.config._attn_implementation or "eager").removeprefix(PREFIX)
        refused = {
            "has sliding windows, or layers that read another's keys, in its cache": not kinds
            <= {DynamicLayer, LinearAttentionLayer},
            "caps its scores": config.to_dict().get("attn_logit_softcapping") is not None,
            f"computes attention by {attention}, which makes no masks of a layer's own": attention
            not in ("sdpa", "eager"),
        }
        if found := [reason for reason, wrong in refused.items() if wrong]:
            said = f"{model.owner}: {type(module).__name__} {' and '.join(found)}"
            raise ArchitectureError(said, hint="take a decoder of full attention, with sdpa or eager")
        self.owner, self.config, self.call = model.owner, config, model.call
        self.edits: dict[int, _Cut] = {}  # no children of this one: they stand on their layers
        for site in sites:
            assert site.layer is not None
            self.edits[site.layer] = _Cut(policy)
            site.attend(self.edits[site.layer])
        self.policy = policy
        self.cache: Cache | None = None
        self.left = 0  # tokens of the prompt that are not read

    # -- a plugin's side -------------------------------------------------------------------------------------------
    def check(self, stack: Stack) -> None:
        """For `Plugin.check`. Raises ConflictError beside edits of attention's probabilities: these find tokens by
        their columns, and the layers hold some of them."""
        if any(isinstance(m, AttentionEdit) and m.edits_probabilities() for m in stack.model.modules()):
            said = f"{self.owner}: another plugin edits attention's probabilities, by columns that are left out here"
            raise ConflictError(said, hint="keep one of them")

    @contextmanager
    def during(self, request: Generation) -> Iterator[None]:
        """A request whose cache is the policy's; its `stats` get `kv_bytes`, what keys and values took at last, and
        `kv_bytes_plain`, what they would have.

        Raises:
            UnsupportedError: a cache of the request's own, or none. GenerationError: pads on the right.
        """
        config = request.generation_config
        refused = {
            "a cache of its own": request.past_key_values is not None or config.cache_implementation,
            "use_cache=False": config.use_cache is False,
            "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        }
        if found := [what for what, wrong in refused.items() if wrong]:
            said = f"{self.owner} keeps the cache itself, and the request asks for {' and '.join(found)}"
            raise UnsupportedError(said, hint="leave the option out")
        mask = request.attention_mask
        if mask is None:  # as `generate` decides it
            mask = request.prepare().model_kwargs.get("attention_mask")
        if mask is not None and not bool((mask.long().diff(dim=1) >= 0).all() and mask[:, -1].all()):
            raise GenerationError(f"{self.owner}: padding must be on the left and leave a token")
        with self.watching(request.input_ids.shape[1]) as cache:
            request.past_key_values = cache
            try:
                yield
                held, plain = held_bytes(cache)
                request.add("kv_bytes", held)
                request.add("kv_bytes_plain", plain)
            finally:
                request.past_key_values = None

    @contextmanager
    def watching(self, prompt: int) -> Iterator[Cache]:
        """A cache; calls of the model with it are watched. Its first `prompt` tokens are the prompt."""
        layers = DynamicCache(config=self.config).layers
        layers = [KeptLayer() if at in self.edits else layer for at, layer in enumerate(layers)]
        self.cache, self.left = Cache(layers=layers), prompt
        try:
            yield self.cache
        finally:
            self.cache = None

    # -- the model's side ------------------------------------------------------------------------------------------
    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        given = call.get("past_key_values")
        if given is not None and given is self.cache:
            for at, edit in self.edits.items():
                edit.layer, edit.reading = layers_of(given)[at], self.left > 0
        return call

    def after(self, output: Any) -> None:
        watched = [edit for edit in self.edits.values() if edit.layer is not None]
        for edit in watched:
            edit.layer = None
        if not watched or output is None:
            return
        assert self.cache is not None
        assert self.call.shape is not None
        reading, self.left = self.left > 0, max(0, self.left - self.call.shape[1])
        if not self.left:
            self.policy.evict([layer for layer in self.cache.layers if type(layer) is KeptLayer], reading)


def seen(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Which keys the last query sees: bool [B, K]."""
    if mask is None:
        return torch.ones(len(query), key.shape[2], dtype=torch.bool, device=query.device)
    last = mask[:, 0, -1].expand(len(query), -1)
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


def looked_at(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """How much each key is looked at: attention weights, mean over heads, summed over queries that are tokens.

    Args:
        query: [B, H, Q, D]. key: [B, Hkv, K, D]. mask: [B or 1, 1 or H, Q, K]; None: query i of the last Q keys sees
            those up to its own.

    Returns:
        [B, K] float32. All weights are never in memory, those of a few queries are.
    """
    length, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(length, keys, dtype=torch.bool, device=key.device).tril(keys - length)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
    tokens = seen(mask, query, key)[:, -length:, None]  # [B, Q, 1]: a pad is no query
    grouped, key = query.unflatten(1, (key.shape[1], -1)), key[:, :, None].mT  # [B, Hkv, H / Hkv, Q, D]
    found = torch.zeros(len(query), keys, device=key.device)
    for begin in range(0, length, PIECE):
        some = slice(begin, begin + PIECE)
        scores = (grouped[..., some, :] @ key).flatten(1, 2).float() * scaling  # [B, H, q, K]
        weights = (scores + mask[:, :, some]).softmax(-1).mean(1)  # [B, q, K]
        found += (weights * tokens[:, some]).sum(1)
    return found


def held_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of keys and values that the layers hold, and that they would hold with nothing left out."""
    layers = [layer for layer in cache.layers if type(layer) is KeptLayer and layer.length]
    held = [(layer.keys.nbytes + layer.values.nbytes, layer) for layer in layers]
    return sum(n for n, _ in held), sum(n // layer.at.shape[1] * layer.length for n, layer in held)
