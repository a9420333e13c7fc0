"""Attention without the causal mask: every token of a text sees the whole text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftx.errors import ArchitectureError, UnsupportedError
from peftx.kernel.attention import AttentionEdit
from peftx.kernel.calls import CallEdit

if TYPE_CHECKING:
    from peftx.kernel.call import Call
    from peftx.kernel.view import ModelView


class _BothWays(AttentionEdit):
    """Every query sees every key but pads, which are the keys that no query sees under the model's own mask.

    Args:
        call: what the model is called on. column: of the rows that see both ways, in calls that bring it; none: all.
    """

    def __init__(self, call: Call, column: str | None) -> None:
        super().__init__()
        self.call, self.column = call, column

    def replace(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Any
    ) -> Any:
        rows = query.new_ones(1) if self.column is None else self.call.batch.get(self.column)  # [1 or B]
        if rows is None:
            return attend(query, key, value, mask)
        if mask is None:
            mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
        seen = (
            mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        )  # [B, 1 or H, Q, K]
        both = rows.to(query.device).bool()[:, None, None, None]
        seen = torch.where(both, seen.any(-2, keepdim=True), seen)
        return attend(
            query, key, value, query.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(query.dtype).min)
        )


class _NoCache(CallEdit):
    """What came before is other once more follows, so no such call may go on from a cache."""

    def __init__(self, model: ModelView, option: str, column: str | None) -> None:
        super().__init__()
        self.call, self.owner, self.option, self.column = model.call, model.owner, option, column

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        both = self.column is None or self.column in self.call.batch
        if both and call.get("past_key_values") is not None:
            how = self.column or self.option
            raise UnsupportedError(
                f"{self.owner}: with {how} the states of a text depend on what follows, and a cache holds them as they "
                "were",
                hint=f"call the model without past_key_values (generate: use_cache=False), or without {how}",
            )
        return call


def both_ways(model: ModelView, option: str, *, column: str | None = None) -> None:
    """Let every token of a decoder see the whole text, and refuse caches.

    Args:
        option: the plugin's, that messages name. column: a column of the batch (`ModelView.column`), true for rows that
            see both ways; a call without it is the model's own. None: every call, all rows.

    Raises:
        ArchitectureError: layers whose attention has no mask of pairs of tokens.
    """
    sites, kind = model.attention_sites(), str(model.config._attn_implementation)
    if len(sites) < model.num_layers or not kind.endswith(("eager", "sdpa")):
        raise ArchitectureError(
            f"{model.owner}: {option} needs attention with a mask of pairs of tokens in each layer, and "
            f"{model.config.model_type} has '{kind}' in {len(sites)} of {model.num_layers}",
            hint=f"{option}=False, or a decoder of attention alone with attn_implementation='sdpa'",
        )
    for site in sites:
        site.attend(_BothWays(model.call, column))
    model.around(_NoCache(model, option, column))
