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

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import AttentionEdit, Claim, ModelView, Plugin, PluginConfig, Stack, Targets, hookimpl
from peftx.errors import StackError
from peftx.kernel.anatomy.anatomy import Heads
from peftx.kernel.call import Call
from peftx.kernel.parts import AttentionPart, BasePart
from peftx.toolkits.injecting import once_written

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
    size than keys (DeepSeek-V3) the two side by side: [heads, l, both sizes].

    Args:
        shape: of `shape_of`. length: l.
    """

    def __init__(self, shape: tuple[int, ...], length: int) -> None:
        super().__init__()
        *heads, size = shape
        self.rows = nn.Parameter(torch.empty(*heads, length, size).normal_(std=INIT_STD))

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
    """Prompts of one layer out of the trunk: U_i tanh(D e + d) + u_i, in the form of `Rows`.

    Args:
        shape: of `shape_of`. hidden: h. trunk: of all layers. call: of the model. name: of the rows in a cache.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int, trunk: Trunk, call: Call, name: str) -> None:
        super().__init__()
        self.shape, self.call, self.name = shape, call, name
        self.up = nn.Linear(hidden, math.prod(shape))
        self.trunk = (trunk,)  # in a tuple: the plugin owns it, not this layer
        _start(self.up)

    def forward(self) -> Tensor:
        """In decoding the network runs once for each cache, and not for each token: what a cache holds was computed
        with these rows, so whoever changes the network starts another one."""
        return once_written(self.call, self.name, self.compute)

    def compute(self) -> Tensor:
        flat = self.up(self.trunk[0]())  # [l, keys and values of all heads]
        return flat.unflatten(-1, self.shape).movedim(0, -2)


class Prefix(AttentionEdit):
    """K' = [P_K ; K], V' = [P_V ; V] in one layer.

    Args:
        prompt: gives P_K and P_V in the form of `Rows`. dropout: p.
    """

    def __init__(self, prompt: Rows | ProjectedRows, dropout: float) -> None:
        super().__init__()
        self.prompt, self.dropout = prompt, dropout

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.prompt().to(key)
        shape = *rows.shape[:-3], len(key), *rows.shape[-3:]  # [..., B, heads, l, size]
        rows = rows.unsqueeze(-4).expand(shape)
        rows = F.dropout(rows, self.dropout, self.training)  # other zeros in each row of the batch
        sizes = key.shape[-1], value.shape[-1]
        P_K, P_V = rows.unbind(0) if rows.dim() == 5 else rows.split(sizes, -1)
        return torch.cat((P_K, key), 2), torch.cat((P_V, value), 2)


class PTuningV2(Plugin):
    """See the module."""

    Config = PTuningV2Config
    claims = {Claim.BESIDE_WEIGHTS, Claim.PREFIX_CACHE}
    architectures = ("deepseek_v3", "gemma4")
    refuses = {"mamba": "it has no attention", "bloom": "its attention is not looked up by name"}
    config: PTuningV2Config

    @hookimpl
    def inject(self, model: ModelView) -> None:
        length, hidden = self.config.length, self.config.projection
        if hidden is not None:
            trunk = model.keep("trunk", Trunk(length, model.hidden_size, hidden))
        depth = max(tower.layers for tower in model.towers.values())
        for site in self.config.targets.select(model.attentions(), layers=depth):
            shape, name = shape_of(model.heads_of(site)), f"{model.owner}.{site.path}"
            if hidden is None:
                prompt = Rows(shape, length)
            else:
                prompt = ProjectedRows(shape, hidden, trunk, model.call, name)
            site.attend(Prefix(prompt, self.config.dropout))
        if self.config.head:
            for site in model.linears("classifier"):
                site.train()


def shape_of(n: Heads) -> tuple[int, ...]:
    """Of one row of prompts, in all heads: keys and values apart, or side by side where their sizes differ."""
    if n.value_dim == n.head_dim:
        return (2, n.kv_heads, n.head_dim)
    return (n.kv_heads, n.head_dim + n.value_dim)


@torch.no_grad()
def copy_projected(source: Stack, target: Stack, *, id: str = "p-tuning-v2") -> None:
    """Write the prompts that `source` computes (and its head, if that trained) into `target`, whose plugin has no
    `projection`: the same function of the input with nothing to compute.

    Raises:
        PeftxError: the two differ in length, targets, head or model, or `target` has a projection.
    """
    written = {f"{p.key}.prompt.rows": p.module.prompt() for p in source.ledger.of(id, AttentionPart)}
    for head in source.ledger.of(id, BasePart):
        written |= head.tensors()
    tensors = target.ledger.tensors(id)
    if {name: t.shape for name, t in written.items()} != {name: t.shape for name, t in tensors.items()}:
        raise StackError(
            f"{id}: the prompts of the two stacks do not match",
            hint="the same model, length, targets and head, and no projection in the second",
        )
    for name, tensor in tensors.items():
        tensor.copy_(written[name])


def _start(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=INIT_STD)
    nn.init.zeros_(linear.bias)
