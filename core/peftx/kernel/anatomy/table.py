"""What a table of an architecture says: where its towers, layers and roles are; and the tables that there are."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Literal

GROUP = "peftx.anatomies"
Layout = Literal["concat", "interleaved"]


@dataclass(frozen=True)
class Fused:
    """Several roles stored as rows of one matrix.

    concat: all rows of the first role, then all of the second, ... (GPT-2 `c_attn`, Phi-3 `qkv_proj`); for q, k, v
    the sizes are those of the heads (GQA: fewer for k and v), else equal parts.
    interleaved: per head, `parts` blocks of `head_dim` rows (GPT-NeoX, BLOOM).
    """

    path: str
    roles: tuple[str, ...]
    layout: Layout = "concat"


@dataclass(frozen=True)
class Stacked:
    """Experts stored as one 3-D parameter [experts, out, in]; `roles` share its rows in equal parts.

    concat: all rows of the first role, then all of the second. interleaved: a row of the first, a row of the second,
    and so on (GPT-OSS).
    """

    path: str
    """Module that holds the parameter."""
    parameter: str
    roles: tuple[str, ...]
    layout: Layout = "concat"
    transposed: bool = False
    """Stored as [experts, in, out] (GPT-OSS, Llama 4), not as [experts, out, in]."""
    bias: str = ""
    """The parameter [experts, out] that is added, if there is one."""


@dataclass(frozen=True)
class Tower:
    """One run of equal layers: a decoder, an encoder, a vision or audio tower.

    Args:
        name: `decoder`, `encoder`, `vision`, `audio` or `text`.
        layers: path of the `ModuleList`.
        roles: role -> path relative to a layer; `?` at the end: not in every layer.
        fused: roles that share a matrix. stacked: experts.
        blocks: `attention`, `mlp`, ... -> module whose output joins the residual (or the block's own post-norm).
        around: role -> path outside the layers (embedding, norm.final, ...), relative to the model; `?`: optional.
        dispatch: `attention`, `cross_attention` -> module that calls the attention interface; `blocks`' if left out.
        apart: roles that `all` does not mean: what mixes or weighs a few streams, too small for a low rank.
        read: roles whose weight another module reads without calling theirs (Mamba's `dt_proj`): a delta there is
            folded into the weight that is read.
        called: those of `read` that are called after all, unless a fused kernel runs (Mamba's `x_proj`).
        config: path of the tower's own sub-config (`text_config`), empty for the model's own.
    """

    name: str
    layers: str
    roles: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    stacked: tuple[Stacked, ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)
    around: Mapping[str, str] = field(default_factory=dict)
    dispatch: Mapping[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    config: str = ""


@dataclass(frozen=True)
class Table:
    """One architecture. `around` of the model as a whole: `head`, projections between towers."""

    model_type: str
    towers: tuple[Tower, ...]
    around: Mapping[str, str] = field(default_factory=dict)
    same_as: tuple[str, ...] = ()
    """Other `model_type`s with the same layout."""


@cache
def tables() -> dict[str, Table]:
    """All tables by `model_type`: those that come with peftx, then those of entry points, which win."""
    package = importlib.import_module("peftx.architectures")  # by name: data, found as a stranger's is
    found = [
        importlib.import_module(f"{package.__name__}.{info.name}").TABLE
        for info in pkgutil.iter_modules(package.__path__)
    ]
    found += [point.load() for point in entry_points(group=GROUP)]
    return {name: table for table in found for name in (table.model_type, *table.same_as)}


def table_for(model_type: str) -> Table | None:
    """The table of an architecture, or None."""
    return tables().get(model_type)
