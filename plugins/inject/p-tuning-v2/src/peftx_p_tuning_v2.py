"""P-Tuning v2: trained keys and values in front of the attention of every layer.

"P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks" (arXiv:2110.07602).
In layer i every query sees l more rows:

    K' = [P_K^i ; K],  V' = [P_V^i ; V]        P_K^i, P_V^i: [heads, l, head size], trained; K, V as in the base

No query belongs to a prompt, so hidden states keep the caller's length, and real tokens keep their positions. The
prompts are trained as they are, or (with `projection` = h) come out of a small network that shares its first layer:

    [P_K^i ; P_V^i] = U_i tanh(D e + d) + u_i  e: [l, width], D: [h, width], U_i: [2 * heads * head size, h]

Dropout acts on the prompts. The backbone is frozen; a classifier's head trains with `head`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import Cache

from peftx import (
    AttentionEdit,
    CallEdit,
    Claim,
    ModelView,
    Plugin,
    PluginConfig,
    Site,
    Stack,
    Targets,
    hookimpl,
)
from peftx.errors import PeftxError
from peftx.kernel.parts import AttentionPart, BasePart

INIT_STD = 0.02
"""Standard deviation of first values: what BERT and RoBERTa give new weights."""


class PTuningV2Config(PluginConfig):
    """Options of P-Tuning v2; the paper takes fewer than 20 rows for classification, about 100 for sequence tagging."""

    length: int = Field(20, ge=1, description="l, rows in front of each layer's keys and values")
    projection: int | None = Field(
        None,
        ge=1,
        description="h, width of the network that makes the prompts (paper: 512); none: trained as they are",
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="probability of zeroing a number of the prompts while training"
    )
    targets: Targets = Field(
        Targets("attention"),
        description="attentions that get prompts, as in 'attention layers=-2,-1' or 'attention cross_attention'",
    )
    head: bool = Field(False, description="train the classification head too, all of it")


class Rows(nn.Module):
    """Prompts of one layer, trained as they are: [2 (keys, values), heads, l, head size], or where values have another
    size than keys (DeepSeek-V3) the two side by side: [heads, l, both sizes]."""

    def __init__(self, heads: int, size: int, length: int, value_size: int | None = None) -> None:
        super().__init__()
        *parts, width = form(heads, size, value_size)
        self.rows = nn.Parameter(torch.empty(*parts, length, width).normal_(std=INIT_STD))

    def forward(self) -> Tensor:
        return self.rows


class Trunk(nn.Module):
    """What the projected prompts of all layers share: tanh(D e + d), [l, h]."""

    def __init__(self, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.e = nn.Parameter(torch.empty(length, width).normal_(std=INIT_STD))
        self.down = nn.Linear(width, hidden)
        _start(self.down)

    def forward(self) -> Tensor:
        return self.down(self.e).tanh()


class ProjectedRows(nn.Module):
    """Prompts of one layer out of the trunk: U_i tanh(D e + d) + u_i, in the form of `Rows`."""

    keeps = False
    kept: Tensor | None = None
    """See `OncePerCache`."""

    def __init__(
        self, heads: int, size: int, hidden: int, trunk: Trunk, value_size: int | None = None
    ) -> None:
        super().__init__()
        self.shape = form(heads, size, value_size)
        self.up = nn.Linear(hidden, math.prod(self.shape))
        self.trunk = (trunk,)  # in a tuple: the plugin owns it, not this layer
        _start(self.up)

    def forward(self) -> Tensor:
        if not self.keeps or self.training or torch.is_grad_enabled():
            self.kept = None
            return self.compute()
        if self.kept is None:
            self.kept = self.compute()
        return self.kept

    def compute(self) -> Tensor:
        flat = self.up(self.trunk[0]())  # [l, keys and values of all heads]
        return flat.unflatten(-1, self.shape).movedim(0, -2)


def form(heads: int, size: int, value_size: int | None) -> tuple[int, ...]:
    """Of one row of prompts, in all heads."""
    return (2, heads, size) if value_size in (None, size) else (heads, size + value_size)


class OncePerCache(CallEdit):
    """The network runs once for each cache, not for each token: what a cache holds was computed with these rows, so
    whoever changes the network starts another one. (`Tensor._version` would not do: a fused optimizer leaves it.)
    """

    def __init__(self, prompts: Sequence[ProjectedRows]) -> None:
        super().__init__()
        self.prompts = tuple(prompts)
        self.cache: Callable[[], Cache | None] = _no_cache

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        cache = call.get("past_key_values")
        same = cache is not None and cache is self.cache() and int(cache.get_seq_length()) > 0  # not reset
        self.cache = weakref.ref(cache) if isinstance(cache, Cache) else _no_cache
        for prompt in self.prompts:
            prompt.keeps = True
            if not same:
                prompt.kept = None
        return call

    def after(self, output: Any) -> None:
        for prompt in self.prompts:
            prompt.keeps = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": _no_cache}  # a copy has seen none


class Prefix(AttentionEdit):
    """K' = [P_K ; K], V' = [P_V ; V] in one layer.

    Args:
        prompt: gives P_K and P_V in the form of `Rows`. dropout: p.
    """

    def __init__(self, prompt: Rows | ProjectedRows, dropout: float) -> None:
        super().__init__()
        self.prompt = prompt
        self.dropout = dropout

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.prompt().to(key)
        shape = *rows.shape[:-3], len(key), *rows.shape[-3:]  # [..., B, heads, l, size]
        rows = rows.unsqueeze(-4).expand(shape)
        rows = F.dropout(rows, self.dropout, self.training)  # other zeros in each row of the batch
        apart = rows.dim() == 5
        front = rows.unbind(0) if apart else rows.split((key.shape[-1], value.shape[-1]), -1)
        return torch.cat((front[0], key), 2), torch.cat((front[1], value), 2)


class PTuningV2(Plugin):
    """See the module."""

    Config = PTuningV2Config
    claims = {Claim.BESIDE_WEIGHTS}
    architectures = ("deepseek_v3", "gemma4")
    refuses = {"mamba": "it has no attention", "bloom": "its attention is not looked up by name"}
    config: PTuningV2Config

    @hookimpl
    def inject(self, model: ModelView) -> None:
        sites = self._sites(model)
        length, hidden = self.config.length, self.config.projection
        trunk = None
        if hidden is not None:
            trunk = model.keep("trunk", Trunk(length, model.hidden_size, hidden))
        prompts = []
        for site in sites:
            sizes = model.towers[site.tower].by_layer[site.layer]
            heads, size, other = sizes.kv_heads, sizes.head_dim, sizes.value_dim
            prompt = (
                Rows(heads, size, length, other)
                if trunk is None
                else ProjectedRows(heads, size, hidden, trunk, other)
            )
            edit = Prefix(prompt, self.config.dropout)
            # Of the trunk's dtype and device also where the attention is quantized and has no parameter to go by.
            model.attend(site, edit.to(device=model.module.device, dtype=model.module.dtype))
            prompts.append(prompt)
        if projected := [prompt for prompt in prompts if isinstance(prompt, ProjectedRows)]:
            model.around(OncePerCache(projected))
        if self.config.head:
            for site in model.linears("classifier"):
                site.train()

    def _sites(self, model: ModelView) -> list[Site]:
        """The attentions of all towers that the targets select."""
        found = []
        for tower in model.towers.values():
            found += model.attention_sites(tower=tower.name)
            if tower.cross_attention:
                found += model.attention_sites(tower=tower.name, role="cross_attention")
        depth = max(tower.layers for tower in model.towers.values())
        return self.config.targets.select(found, layers=depth)


@torch.no_grad()
def copy_projected(source: Stack, target: Stack, *, id: str = "p-tuning-v2") -> None:
    """Write the prompts that `source` computes (and its head, if that trained) into `target`, whose plugin has no
    `projection`: the same function of the input with nothing to compute.

    Raises:
        PeftxError: the two differ in length, targets, head or model, or `target` has a projection.
    """
    pairs = [stack.ledger.of(id, AttentionPart) for stack in (source, target)]
    values = {part.key: part.module.prompt() for part in pairs[0]}
    tables = {part.key: part.module.prompt for part in pairs[1]}
    plain = all(
        isinstance(table, Rows) and table.rows.shape == values[key].shape for key, table in tables.items()
    )
    heads = [
        {name: t for part in stack.ledger.of(id, BasePart) for name, t in part.tensors().items()}
        for stack in (source, target)
    ]
    if values.keys() != tables.keys() or heads[0].keys() != heads[1].keys() or not plain:
        raise PeftxError(
            f"{id}: the prompts of the two stacks do not match",
            hint="the same model, length, targets and head, and no projection in the second",
        )
    for key, table in tables.items():
        table.rows.copy_(values[key])
    for name, tensor in heads[1].items():
        tensor.copy_(heads[0][name])


def _no_cache() -> None:
    return None


def _start(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=INIT_STD)
    nn.init.zeros_(linear.bias)
