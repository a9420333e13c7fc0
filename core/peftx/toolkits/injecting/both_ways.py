"""Attention both ways: tokens of a decoder see the whole text, as those of an encoder do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftx.errors import ArchitectureError, UnsupportedError
from peftx.kernel.attention import Attend, AttentionEdit
from peftx.kernel.call import Call
from peftx.kernel.calls import CallEdit

if TYPE_CHECKING:
    from peftx.kernel.view import ModelView


def see_both_ways(model: ModelView, option: str, *, column: str | None = None) -> None:
    """Drop the causal mask: every token sees every other of its text, and no such call goes on from a cache.

    Args:
        option: the plugin's own that asks for it, for messages.
        column: of the batch, declared by the plugin, with 1 for rows that are read both ways: those with 0, and calls
            without it, are read as ever. None: all are read both ways.

    Raises:
        ArchitectureError: layers without attention, or one that takes no mask of pairs of tokens.
    """
    sites, kind = model.attention_sites(), str(model.config._attn_implementation)
    if len(sites) < model.num_layers or not kind.endswith(("eager", "sdpa")):
        raise ArchitectureError(
            f"{model.owner}: {option} needs attention with a mask of pairs of tokens in each layer, and "
            f"{model.config.model_type} has '{kind}' in {len(sites)} of {model.num_layers}",
            hint=f"{option}=False, or a decoder of attention alone with attn_implementation='sdpa'",
        )
    for site in sites:
        site.attend(BothWays(model.call, column))
    model.around(NoCache(model.call, model.owner, option, column))


class BothWays(AttentionEdit):
    """Every query sees every key but pads, which are the keys that no query sees under the model's own mask."""

    def __init__(self, call: Call, column: str | None) -> None:
        super().__init__()
        self.call, self.column = call, column

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Attend
    ) -> Tensor:
        flag = None if self.column is None else self.call.batch.get(self.column)  # [B]
        if self.column is not None and flag is None:
            return attend(query, key, value, mask)
        Q, K = query.shape[2], key.shape[2]
        if mask is None:
            mask = query.new_ones(Q, K, dtype=torch.bool)[None, None]
            mask = mask.tril() if Q > 1 else mask  # one token sees all that other plugins put in front
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        whole = seen.any(-2, keepdim=True)  # [B or 1, 1 or H, 1, K]
        if flag is not None:
            whole = torch.where(flag.to(query.device).bool()[:, None, None, None], whole, seen)
        sees = query.new_zeros(1, 1, Q, K).masked_fill(~whole, torch.finfo(query.dtype).min)
        return attend(query, key, value, sees)


class NoCache(CallEdit):
    """What came before is other once more follows, so no call that reads both ways may go on from a cache."""

    def __init__(self, call: Call, owner: str, option: str, column: str | None) -> None:
        super().__init__()
        self.call, self.owner, self.option, self.column = call, owner, option, column

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        reads = self.column is None or self.column in self.call.batch
        if not reads or call.get("past_key_values") is None:
            return call
        way = f"{self.option}=False" if self.column is None else f"no {self.column}"
        raise UnsupportedError(
            f"{self.owner}: {self.column or self.option}, the states of a text depend on what follows, and a cache "
            "holds them as they were",
            hint=f"call the model without past_key_values (generate: use_cache=False), or with {way}",
        )
