"""Keys and values of prompts that were served before, for prompts that begin alike."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from peftx.kernel.calls import takes
from peftx.toolkits.decoding.cache import StateCache, Undo, fork_cache, keep_rows, undo_kind

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class PrefixCache:
    """The last few token sequences with their caches; the least recently used one goes first.

    A plugin may give the server one of its own by `server.scheduler.begin_from`: `take` is asked before a prompt is
    read, `keep` and `keep_row` are told of what was read and written.

    Args:
        model: a causal language model. entries: sequences that are kept.
    """

    def __init__(self, model: PreTrainedModel, *, entries: int) -> None:
        self._config = model.config
        self._entries = entries
        self._kept: OrderedDict[tuple[int, ...], Cache] = OrderedDict()
        self.hits = 0
        self.reused_tokens = 0

    def take(self, ids: list[int]) -> Cache:
        """A cache of the longest known beginning of `ids`, short of the last token; empty where none is known."""
        best, length = None, 0
        for known in self._kept:
            common = alike(known, ids)
            if common > length:
                best, length = known, common
        length = min(length, len(ids) - 1)
        if best is None or length == 0:
            return DynamicCache(config=self._config)
        self._kept.move_to_end(best)
        cache = fork_cache(self._kept[best])
        keep_rows(cache, torch.arange(length))
        self.hits += 1
        self.reused_tokens += length
        return cache

    def keep_row(self, ids: list[int], cache: Cache, row: int) -> None:
        """Remember one row of a cache, of which `ids` are the last columns."""
        if undo_kind(cache) is not Undo.ANY_ROWS:
            return
        own = DynamicCache(config=self._config)
        for index, layer in enumerate(cache.layers):
            if layer.keys is None:  # it reads another layer's
                continue
            keys, values = (kept[row : row + 1, :, -len(ids) :] for kept in (layer.keys, layer.values))
            if index < len(own.layers):
                own.update(keys, values, index)
            else:  # what a plugin has to go with tokens
                own.layers.append(copy.copy(layer))
                own.layers[-1].keys, own.layers[-1].values = keys, values
        self.keep(ids, own)

    def keep(self, ids: list[int], cache: Cache) -> None:
        """Remember a cache that holds the first rows of `ids`; one whose rows cannot be taken out is left."""
        rows = int(cache.get_seq_length())
        if rows == 0 or rows > len(ids) or undo_kind(cache) is not Undo.ANY_ROWS:
            return
        key = tuple(ids[:rows])
        for known in [known for known in self._kept if alike(known, ids) == len(known) < rows]:
            del self._kept[known]  # the longer one begins with it
        self._kept[key] = cache
        while len(self._kept) > self._entries:
            self._kept.popitem(last=False)


def alike(one: Sequence[int], two: Sequence[int]) -> int:
    """Tokens at the start that are the same."""
    pairs = enumerate(zip(one, two, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))


@torch.no_grad()
def read(model: PreTrainedModel, ids: Sequence[int], cache: Cache) -> Tensor:
    """Have a causal model read tokens behind those of a cache, one text's; the logits behind the last, [V]."""
    tokens = torch.tensor([list(ids)], device=model.device)
    seen = torch.ones(1, int(cache.get_seq_length()) + len(ids), dtype=torch.long, device=model.device)
    little = {"logits_to_keep": 1} if "logits_to_keep" in takes(model) else {}  # the others are not looked at
    more: dict[str, Any] = {"attention_mask": seen, "past_key_values": cache}
    if isinstance(cache, StateCache):
        more = {"cache_params": cache}
        cache.tokens += len(ids)
    logits: Tensor = model(input_ids=tokens, use_cache=True, **more, **little).logits[0, -1]
    return logits
