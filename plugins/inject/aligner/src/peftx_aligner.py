"""Aligner: one set of tokens for all layers, which every layer's attention reads through a gate.

"Aligner: One Global Token is Worth Millions of Parameters When Aligning Large Language Models" (arXiv:2312.05503).
In layer l, head h, with the layer's own frozen projections W_k, W_v:

    K_p = P W_k,  V_p = P W_v                                      P: [N, d], trained, one for all layers
    o   = softmax(q K^T / sqrt(d_h)) V + g * softmax(q K_p^T / sqrt(d_h)) V_p

q, o: [tokens, d_h]; K_p, V_p: [N, d_h], without rotary embedding, seen by every token; the second softmax is over the N
tokens alone. g is a trained gate of the layer (or of each head) that starts at 0. With N = 1 that softmax is 1 and what
is added is g * V_p, whatever the query: in front of the output projection W_o a constant, which folds into its bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import AttentionEdit, Claim, Delta, ModelView, Plugin, PluginConfig, Site, Targets, hookimpl
from peftx.errors import ArchitectureError
from peftx.kernel.slots import Rows

PROJECTIONS = ("attention.k", "attention.v", "attention.o")


class AlignerConfig(PluginConfig):
    """Options of Aligner; the paper takes 1 and 10 tokens."""

    tokens: int = Field(1, ge=1, description="N, tokens that all layers share; one token folds into a bias")
    gate: Literal["layer", "head"] = Field("layer", description="one gate for each layer, or for each head")
    targets: Targets = Field(
        Targets("attention"), description="attentions that read the tokens, as in 'attention layers=2-31'"
    )


class Tokens(nn.Module):
    """P: [N, d]."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.randn(tokens, width))


@dataclass(frozen=True)
class Projection:
    """P -> [key-value heads, N, d_h] by a layer that is looked up at each call, since it may be replaced."""

    tokens: Tokens
    holder: nn.Module
    name: str
    rows: Rows | None
    heads: int

    @classmethod
    def of(cls, site: Site, tokens: Tokens, model: ModelView) -> Projection:
        parent, _, name = site.path.rpartition(".")
        heads = model.main.by_layer[site.layer].kv_heads
        return cls(tokens, model.module.get_submodule(parent), name, site.rows, heads)

    def __call__(self) -> Tensor:
        y = self.holder.get_submodule(self.name)(self.tokens.P[None])[0]  # a batch of one, as layers expect
        y = y if self.rows is None else self.rows.take(y)
        return y.unflatten(-1, (self.heads, -1)).transpose(0, 1)


class Shift(Delta):
    """N = 1: W_o (x + g * V_p).

    Args:
        value: gives V_p. gates: 1 or the number of heads. heads: query heads.
    """

    def __init__(self, *, value: Projection, gates: int, heads: int) -> None:
        super().__init__()
        self.value = value
        self.repeat = heads // value.heads
        self.g = nn.Parameter(torch.zeros(gates))

    def shift(self) -> Tensor:
        """g * V_p, a number for each input of W_o: [heads * d_h]."""
        V = self.value().squeeze(1).repeat_interleave(self.repeat, 0)  # [heads, d_h]
        return (self.g[:, None] * V).flatten()

    def pre(self, x: Tensor) -> Tensor:
        return x + self.shift().to(x.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        constant = weight @ self.shift().to(weight.dtype)  # [out]
        return weight, constant if bias is None else bias + constant


class Read(AttentionEdit):
    """Any N: the heads' output + g * softmax(q K_p^T / sqrt(d_h)) V_p.

    Args:
        key, value: give K_p and V_p. norm: what the layer does to each head's keys, if anything.
        gates: 1 or the number of heads. heads: query heads.
    """

    def __init__(
        self, *, key: Projection, value: Projection, norm: nn.Module | None, gates: int, heads: int
    ) -> None:
        super().__init__()
        self.key, self.value, self.norm = key, value, (norm,)  # in a tuple: the norm is the base's
        self.repeat = heads // key.heads
        self.g = nn.Parameter(torch.zeros(gates))

    def heads(self, out: Tensor, query: Tensor) -> Tensor:
        (norm,) = self.norm
        K = self.key() if norm is None else norm(self.key())
        K, V = (part.repeat_interleave(self.repeat, 0) for part in (K, self.value()))  # [heads, N, d_h]
        scores = query.float() @ K.float().transpose(-1, -2) * query.shape[-1] ** -0.5  # [B, heads, Q, N]
        read = (scores.softmax(-1).to(V.dtype) @ V).transpose(1, 2)  # [B, Q, heads, d_h]
        return out + (self.g[:, None] * read).to(out.dtype)


class Aligner(Plugin):
    """See the module."""

    Config = AlignerConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.EDITS_INPUTS}
    architectures = ("qwen3", "gpt_neox")
    refuses = {"mamba": "it has no attention"}
    exempt = {"merge_rounds_once": "V_p comes out of the layer's own W_v, which runs in the model's dtype"}
    config: AlignerConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        sites = self.config.targets.select(model.attention_sites(), layers=model.num_layers)
        tokens = model.keep("tokens", Tokens(self.config.tokens, model.hidden_size))
        found = {(s.role, s.layer): s for s in model.anatomy.sites if s.tower == model.main.name}
        for site in sites:
            self._check(model, site, found)
            k, v, o = (model.bound(found[role, site.layer]) for role in PROJECTIONS)
            heads = model.main.by_layer[site.layer].heads
            gates = 1 if self.config.gate == "layer" else heads
            value = Projection.of(v, tokens, model)
            if self.config.tokens == 1 and o.kind == "linear":
                o.attach(Shift(value=value, gates=gates, heads=heads))
                continue
            key, norm = Projection.of(k, tokens, model), found.get(("norm.k", site.layer))
            norm = None if norm is None else norm.module
            model.attend(site, Read(key=key, value=value, norm=norm, gates=gates, heads=heads))
            self.claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS}  # of this one: it does not fold

    @staticmethod
    def _check(model: ModelView, site: Site, found: dict[tuple[str, int | None], Site]) -> None:
        """Raises ArchitectureError where a layer lacks a projection, as where it takes the keys of another one."""

        def lacks(layer: int | None) -> list[str]:
            return [role for role in PROJECTIONS if (role, layer) not in found]

        if missing := lacks(site.layer):
            others = ",".join(str(i) for i in range(model.num_layers) if not lacks(i))
            raise ArchitectureError(
                f"aligner: layer {site.layer} of {model.config.model_type} has no {' and '.join(missing)} of its own",
                hint=f"targets: 'attention layers={others}'"
                if others
                else "Llama, Mistral, Qwen, GPT-2 and their kin have them",
            )
