"""PrefixKV: one budget for keys and values, of which each layer gets what its attention needs.

"PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation"
(arXiv:2412.03409). When a prompt of n tokens is read by L layers:

    importance   I_l[j] = sum_i mean_h A_l[h, i, j]                       [A: attention weights of the prompt's queries]
    priority     c_l[k] = sum of the k largest I_l / sum of all           [the "prefix": the k most important tokens]
    sizes        k_l(p) = min(n, #{k: c_l[k] < p} + s + 1), with the largest p for which  sum_l k_l(p) <= r L n
                 by binary search                                         [r: the budget; s: first tokens, always kept]
    kept         the first s tokens, the last one, and of the others those of the largest I_l, in their order
    decoding     a layer holds k_l / n of all tokens: of what is more the entry at place k_l - w goes, so that first
                 tokens and the newest stay                               [w: recent]
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from peftx import Claim, Generation, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.errors import OptionError
from peftx.kernel.positions import free_positions
from peftx.toolkits.decoding.evicting import Evictor, KeptLayer, looked_at

UNSEEN = 1e-9
"""Share of a layer's importance that is spread over all its tokens: a token that nobody looks at still has its place in
the order, and every budget can be met."""


class PrefixKVConfig(PluginConfig):
    """Options of PrefixKV; the paper tries budgets of 0.1 to 0.9."""

    budget: float = Field(
        0.5, gt=0, le=1, description="r: keys and values that are kept, a share of all, over all layers"
    )
    sinks: int = Field(4, ge=0, description="s: first tokens that every layer keeps, beside the last one")
    recent: int = Field(
        25, ge=1, description="w: entries behind the place from which a layer drops while text is written"
    )


def sizes_of(importance: Tensor, real: Tensor, budget: float, least: int) -> Tensor:
    """How many tokens each layer keeps of each row: the sum over layers is the budget's whole part, unless `least`
    tokens a layer are more.

    Args:
        importance: [L, B, K] float. real: which of the K columns are tokens, bool [B, K], one a row at least.

    Returns:
        [L, B] int64.
    """
    n = real.sum(1)  # [B]
    whole = importance.double().masked_fill(~real, 0)
    shares = whole / whole.sum(-1, keepdim=True) + UNSEEN * real / n[:, None]
    c = shares.sort(-1, descending=True).values.cumsum(-1)  # [L, B, K]

    def sizes(p: Tensor) -> Tensor:
        below = torch.searchsorted(c, p[None, :, None].expand(len(c), -1, 1).contiguous())[..., 0]
        return torch.minimum(below + least, n)

    total = (budget * len(c) * n.double() + 1e-6).long()  # 0.3 * 10 is a little less than 3
    low, high = torch.zeros_like(c[0, :, 0]), torch.full_like(c[0, :, 0], 2.0)
    for _ in range(60):  # to the last bit of p
        p = (low + high) / 2
        fits = sizes(p).sum(0) <= total
        low, high = torch.where(fits, p, low), torch.where(fits, high, p)
    found, more = sizes(low), sizes(high) - sizes(low)
    return found + more * (more.cumsum(0) <= total - found.sum(0))  # layers alike have the same c: some grow


def chosen(importance: Tensor, real: Tensor, size: Tensor, sinks: int) -> Tensor:
    """Which tokens of a layer stay, bool [B, K].

    Args:
        importance: [B, K]. real: bool [B, K]. size: [B].
    """
    place = real.cumsum(1)  # from 1
    always = (place <= sinks) | (place == place[:, -1:])
    score = importance.masked_fill(always, torch.inf).masked_fill(~real, -torch.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
    return real & (rank < size[:, None])


class Prefixes:
    """The policy; `share` and `place`, [L, B], are of the text that is being written: k_l / n, and where a layer
    drops."""

    def __init__(self, config: PrefixKVConfig) -> None:
        self.config = config

    def look(
        self, layer: KeptLayer, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, reading: bool
    ) -> None:
        if reading:
            layer.weight += looked_at(query, key, mask, scaling)[:, -layer.weight.shape[1] :]

    def sizes(self, importance: Tensor, real: Tensor) -> Tensor:
        return sizes_of(importance, real, self.config.budget, self.config.sinks + 1)

    def evict(self, layers: Sequence[KeptLayer], reading: bool) -> None:
        layers = [layer for layer in layers if bool(layer.weight.any())]  # one that was skipped holds nothing
        if reading:
            first, config = layers[0], self.config
            real = first.real
            importance = torch.stack([layer.weight.to(real.device) for layer in layers])
            sizes = self.sizes(importance, real)
            self.share = sizes / real.sum(1)
            self.place = torch.where(sizes > config.recent, sizes - config.recent, sizes // 2)
            self.tokens = real.sum(1) - first.length  # of a text of so many columns, less these
            for weight, size, layer in zip(importance, sizes, layers, strict=True):
                if bool((size < real.sum(1)).any()):
                    layer.keep(chosen(weight, real, size, config.sinks).to(layer.at.device))
            return
        for share, place, layer in zip(self.share, self.place, layers, strict=True):
            real = layer.real
            allowed = share * (self.tokens + layer.length)
            excess = (real.sum(1) - allowed.to(real.device) + 1e-6).long().clamp(min=0)[:, None]  # whole ones
            if bool(excess.any()):
                rank, at = real.cumsum(1) - 1, place.to(real.device)[:, None]
                layer.keep(~((rank >= at) & (rank < at + excess)))


class PrefixKV(Plugin):
    """See the module."""

    Config = PrefixKVConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.REPLACES_ATTENTION, Claim.EVICTS}
    architectures = ("qwen3_next",)
    refuses = {"bert": "an encoder writes no text", "t5": "its encoder's keys are the cache"}
    config: PrefixKVConfig

    def suits(self, model: ModelView) -> None:
        room = free_positions(model.module)
        if room is not None and self.config.budget * room < 1:
            said = (
                f"{model.owner}: a budget of {self.config.budget:g} of the {room} tokens that the model reads"
            )
            raise OptionError(
                f"{said} is less than one token", hint=f"a budget of {1 / room + 5e-5:.4f} or more"
            )

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        self.stack, self.owner = stack, model.owner
        self.policy = Prefixes(self.config)
        self.evictor = model.around(Evictor(model, self.policy))

    def check(self, stack: Stack) -> None:
        self.evictor.check(stack)

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Generator[None, Any, Any]:
        if self.stack.standing[self.owner].disabled:
            return (yield)
        with self.evictor.during(request):
            return (yield)
