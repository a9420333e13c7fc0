"""DoRA: a trained length for each row of a weight, and a low-rank update of where the row points.

"DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), equations 5 and 6:

    V  = W + s B A                    W: [out, in], frozen; A: [r, in], B: [out, r]; s = alpha / r
    W' = m V / |V|                    m: [out], and |V| the lengths of V's rows, one for each output feature
    h  = W' x + b

m starts at |W|, A Kaiming-uniform and B at zero, so the model starts unchanged. Section 4.3: |V| follows V, but is held
constant in the backward pass, so dV = (m / |V|) dW' and no gradient goes through the length. Merged, W' costs nothing.

Unmerged, with the gain g = m / |V| - 1 of each output feature,

    u = y + s B A x,    h = u + g (u - b)        y = W x + b, what the layer gave

so a layer costs LoRA and one product with g. In evaluation g is kept until a number changes that it hangs on. W is all
that stands inside: the frozen layer, with the deltas of earlier plugins folded in.

An embedding is the layer whose x is 1 at a token v and 0 elsewhere: W = E^T, y = E[v] and A x = A[:, v]. Its deltas do
not fold, so W is the table alone there, and g acts on what stands inside too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftx import (
    Claim,
    Delta,
    ModelView,
    PeftFormat,
    Plugin,
    PluginConfig,
    Site,
    Targets,
    add_low_rank,
    dropout_linear,
    hookimpl,
)
from peftx.kernel.anatomy.site import LINEAR_KINDS
from peftx.kernel.slots import Entry, slot_of
from peftx.peft_format import Settings, by_value, most_common, targets_of
from peftx.toolkits.injecting import Kept, of_each


class DoraConfig(PluginConfig):
    """Options of DoRA; the defaults are the paper's for LLaMA on commonsense reasoning."""

    rank: int = Field(32, ge=1, description="r, the rank of the update")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; twice the rank if left out, so s = 2"
    )
    rank_stabilized: bool = Field(
        False, description="s = alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of zeroing an input of A while training")
    ranks: dict[str, PositiveInt] = Field(
        default_factory=dict, description="other ranks for some targets, as in {'attention.q': 4, 'mlp': 16}"
    )
    alphas: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="other alphas for some targets, as in {'attention.q': 32}"
    )
    targets: Targets = Field(
        Targets("attention.q,k,v mlp.up,down"),
        description="linear layers to adapt; 'embedding' too where it is named",
    )


Terms = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Gained(Delta, ABC):
    """Its gain hangs on the layer's weight: where nothing trains it is that of the last call.

    Args:
        module: the layer.
    """

    full_precision = True  # m is compared with |V|: bfloat16's rounding of it alone would move the start

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.layer = [module]  # in a list: no child of this one
        self.known = Kept()

    @abstractmethod
    def computed(self, dtype: torch.dtype) -> Any:
        """What a call needs."""

    def now(self, dtype: torch.dtype) -> Any:
        """The same, from the last call unless a tensor behind it has changed."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.known.forget()  # an optimizer that is none of torch's may write past every count
            return self.computed(dtype)
        layer = self.layer[0]
        behind = chain(layer._parameters.values(), layer._buffers.values(), self._parameters.values())
        return self.known.of(behind, partial(self.computed, dtype), about=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gained:
        self.known.forget()  # a cast or move leaves the parameters what they are, as objects
        return super()._apply(fn, recurse)


class DoraDelta(Gained):
    """h = u + g (u - b), u = y + s B A dropout(x).

    Args:
        site: where it will stand. rank: r. scale: s. dropout: p.
    """

    def __init__(self, site: Site, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site.module)
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(*site.batch, rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(*site.batch, site.out_features, rank))
        self.magnitude = nn.Parameter(torch.ones(*site.batch, site.out_features))  # m
        # Kaiming with a = sqrt(5).
        nn.init.uniform_(self.A, -(site.in_features**-0.5), site.in_features**-0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B, g, bias = self.terms(y.dtype)
        if self.dropout and self.training:
            u = torch.add(y, dropout_linear(x.to(y.dtype), A, self.dropout) @ B.t(), alpha=self.scale)
        else:
            u = add_low_rank(x, y, A, B, self.scale)
        return torch.addcmul(u, g, u if bias is None else u - bias)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        V = self.direction(weight)
        return V * (self.magnitude / lengths(V.detach())).to(V.dtype).unsqueeze(-1), bias  # m V / |V|

    def direction(self, weight: Tensor) -> Tensor:
        """V = W + s B A."""
        return weight + self.scale * (self.B @ self.A).to(weight.dtype)

    def terms(self, dtype: torch.dtype) -> Terms:
        """What a call needs; anew where earlier deltas are in it."""
        found: Terms = self.computed(dtype) if self.place()[1] else self.now(dtype)
        return found

    def computed(self, dtype: torch.dtype) -> Terms:
        """A, B, g = m / |V| - 1 and b. g is small, so half precision rounds it finely."""
        with torch.no_grad():
            weight, bias = self.inside()
            length = lengths(self.direction(weight))
        g = (self.magnitude / length - 1).to(dtype)
        return self.A.to(dtype), self.B.to(dtype), g, None if bias is None else bias.to(dtype)

    def inside(self) -> tuple[Tensor, Tensor | None]:
        """W [..., out, in] and b of the layer with the earlier deltas folded in, float32 at least."""
        (own, inner), layer = self.place(), self.layer[0]
        held = layer._parameters
        # A packed layer computes its weight, and its bias is a buffer.
        packed = own.parameter not in held
        weight, bias = (layer.weight, layer.bias) if packed else (held[own.parameter], held.get(own.bias))
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight = weight.mT if own.transposed else weight
        for entry in inner:
            weight, bias = entry.fold(weight, bias)
        if own.rows is not None:
            weight, bias = own.rows.take(weight, -2), None if bias is None else own.rows.take(bias)
        return weight, bias

    def place(self) -> tuple[Entry, list[Entry]]:
        """Its entry in the layer's slot, and those before it that act on the same weight."""
        links: list[Entry] = slot_of(self.layer[0]).links  # type: ignore[union-attr]
        at = [entry.edit for entry in links].index(self)
        inner = (e for e in links[:at] if e.active and e.parameter == links[at].parameter)
        return links[at], [e for e in inner if e.edit.can_fold()]


class DoraEmbedding(Gained):
    """e = u + g u, u = y + s B A[:, v] for token v.

    Args:
        module: the embedding. shape: [vocabulary, width] of its table. rank: r. scale: s. times: what the model
            multiplies rows by.
    """

    def __init__(
        self, module: nn.Module, shape: Sequence[int], *, rank: int, scale: float, times: float
    ) -> None:
        super().__init__(module)
        self.scale, self.times = scale, times
        self.embedding_A = nn.Parameter(torch.zeros(rank, shape[0]))
        self.embedding_B = nn.Parameter(torch.randn(shape[1], rank))
        self.magnitude = nn.Parameter(torch.ones(shape[1]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B, g = self.embedding_A.to(y.dtype), self.embedding_B.to(y.dtype), self.now(y.dtype)
        u = torch.add(y, F.embedding(x, A.t()) @ B.t(), alpha=self.scale * self.times)
        return torch.addcmul(u, g, u)

    def computed(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            length = self.lengths()
        return (self.magnitude / length - 1).to(dtype)

    def lengths(self) -> Tensor:
        """|V|, V = E^T + s B A: [width]."""
        E = self.layer[0].weight
        V = E.to(torch.promote_types(E.dtype, torch.float32)).t()
        return lengths(V + self.scale * (self.embedding_B @ self.embedding_A).to(V.dtype))


def lengths(V: Tensor) -> Tensor:
    """|V| of each row, no length being zero: [..., out]."""
    return torch.linalg.vector_norm(V, dim=-1).clamp_min(torch.finfo(V.dtype).tiny)  # type: ignore[no-any-return]


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    for name in ("r", "rank_pattern", "init_lora_weights", "use_dora"):  # the tensors say the rank, and m
        settings[name]
    shapes = settings.adapted("lora_A.weight", "lora_embedding_A")
    ranks = {path: shape[0] for path, shape in shapes.items()}
    usual = settings.get("lora_alpha", 8)
    alphas = {path: float(settings.pattern("alpha_pattern", path, usual)) for path in ranks}
    rank, alpha = most_common(ranks), most_common(alphas)
    return {
        "rank": rank,
        "alpha": alpha,
        "rank_stabilized": bool(settings["use_rslora"]),
        "dropout": settings.get("lora_dropout", 0.0),
        "ranks": by_value(ranks, rank),
        "alphas": by_value(alphas, alpha),
        "targets": targets_of(ranks),
    }


class Dora(Plugin):
    """See the module."""

    Config = DoraConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}
    architectures = ("mixtral",)
    example = {"rank": 2, "targets": "all"}  # Mixtral has no mlp.up
    config: DoraConfig
    peft = (
        PeftFormat(
            "LORA",
            tensors={
                "A": "lora_A.weight",
                "B": "lora_B.weight",
                "embedding_A": "lora_embedding_A",
                "embedding_B": "lora_embedding_B",
                "magnitude": "lora_magnitude_vector",
            },
            divided={"B": 0, "magnitude": 0},
            neutral={"magnitude": lambda weight: weight.norm(dim=-1)},
            options=options_of,
            settings=lambda config: {"use_dora": True, "lora_dropout": config.dropout},
            when=lambda settings: bool(settings["use_dora"]),
        ),
    )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        config = self.config
        kinds = (*LINEAR_KINDS, "embedding")
        sites = {site.key: site for site in model.sites(config.targets, kinds=kinds)}
        each = partial(of_each, model, sites, owner=model.owner, targets=config.targets)
        ranks = each(config.rank, config.ranks, option="ranks")
        alphas = each(config.alpha, config.alphas, option="alphas")
        for key, site in sites.items():
            rank = ranks[key]
            site.check_rank(rank)
            scale = self.scale(rank, alphas[key])
            if site.kind == "embedding":
                times = float(getattr(site.module, "embed_scale", 1.0))  # as Gemma's scales what it looks up
                table = DoraEmbedding(site.module, site.shape, rank=rank, scale=scale, times=times)
                site.attach(table)
                if not model.restoring:
                    table.magnitude.data.copy_(table.lengths())
                continue
            delta = site.attach(DoraDelta(site, rank=rank, scale=scale, dropout=config.dropout))
            if not model.restoring:
                delta.magnitude.data.copy_(lengths(delta.inside()[0]))  # m = |W|

    def scale(self, rank: int, alpha: float | None) -> float:
        """s for a rank."""
        alpha = 2.0 * rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.config.rank_stabilized else rank)
