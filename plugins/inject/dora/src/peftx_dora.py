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
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
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
from peftx.errors import AdapterError
from peftx.kernel.slots import Entry, slot_of
from peftx.peft_format import Settings, most_common, targets_of


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
    targets: Targets = Field(Targets("attention.q,k,v mlp.up,down"), description="linear layers to adapt")


Terms = tuple[Tensor, Tensor, Tensor, Tensor | None]


class DoraDelta(Delta):
    """h = u + g (u - b), u = y + s B A dropout(x).

    Args:
        site: where it will stand. rank: r. scale: s. dropout: p.
    """

    full_precision = True  # m is compared with |V|: bfloat16's rounding of it alone would move the start

    def __init__(self, site: Site, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.layer = [site.module]  # in a list: no child of this one
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(*site.batch, rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(*site.batch, site.out_features, rank))
        self.magnitude = nn.Parameter(torch.ones(*site.batch, site.out_features))  # m
        # Kaiming with a = sqrt(5).
        nn.init.uniform_(self.A, -(site.in_features**-0.5), site.in_features**-0.5)
        self.known: Any = None

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
        """What a call needs; where nothing trains, from the last call unless a tensor behind it has changed."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.place()[1]:
            self.known = None  # also for writes past torch's count of changes, as some optimizers make them
            return self.computed(dtype)
        layer = self.layer[0]
        behind = [*layer._parameters.values(), *layer._buffers.values(), *self._parameters.values()]
        key = dtype, [(id(t), 0 if t is None or t.is_inference() else t._version) for t in behind]
        if self.known is None or self.known[0] != key:
            self.known = key, behind, self.computed(dtype)  # `behind` lives on, so that no id comes again
        return self.known[-1]  # type: ignore[no-any-return]

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoraDelta:
        self.known = None  # a cast or move leaves the parameters what they are, as objects
        return super()._apply(fn, recurse)


def lengths(V: Tensor) -> Tensor:
    """|V| of each row, no length being zero: [..., out]."""
    return torch.linalg.vector_norm(V, dim=-1).clamp_min(torch.finfo(V.dtype).tiny)  # type: ignore[no-any-return]


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    settings["r"], settings["init_lora_weights"], settings["use_dora"]  # the tensors say the rank
    shapes = settings.adapted("lora_A.weight")
    ranks = {path: shape[0] for path, shape in shapes.items()}
    rank = most_common(ranks)
    usual, stable = settings.get("lora_alpha", 8), bool(settings["use_rslora"])
    settings["rank_pattern"]
    for path, own in ranks.items():
        found = settings.pattern("alpha_pattern", path)
        alpha = usual if found is None else found
        if (own, alpha) != (rank, usual):
            raise AdapterError(
                f"dora: the adapter has rank {own} and alpha {alpha} on {path}, {rank} and {usual} elsewhere, and the "
                "plugin one of each",
                hint="load it with PEFT, and merge it into the base: PeftModel.merge_and_unload",
            )
    return {
        "rank": rank,
        "alpha": float(usual),
        "rank_stabilized": stable,
        "dropout": settings.get("lora_dropout", 0.0),
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
            tensors={"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
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
        for site in model.linears(config.targets):
            site.check_rank(config.rank)
            delta = site.attach(DoraDelta(site, rank=config.rank, scale=self.scale(), dropout=config.dropout))
            if not model.restoring:
                delta.magnitude.data.copy_(lengths(delta.inside()[0]))  # m = |W|

    def scale(self) -> float:
        """s."""
        rank, alpha = self.config.rank, self.config.alpha
        over = math.sqrt(rank) if self.config.rank_stabilized else rank
        return (2.0 * rank if alpha is None else alpha) / over
