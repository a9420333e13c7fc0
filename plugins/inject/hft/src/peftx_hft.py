"""HFT: fine-tuning of a random half of the weight matrices, the other half frozen.

"HFT: Half Fine-Tuning for Large Language Models" (arXiv:2404.18466). With theta_0 the weights before this stage and M a
mask that is constant over each matrix:

    min L(theta)   subject to   (1 - M) * (theta - theta_0) = 0

M is drawn for each layer and category: 2 of the 4 attention matrices q, k, v, o; 1 of the 2 norms; of gate, up, down 2
in a random half of the layers and 1 in the other half. What stands outside the layers (embeddings, final norm, head)
trains whole. The next stage or task (`round`) draws again, so that what one stage learned is kept in the matrices that
the next one freezes. The weights are changed in place; nothing is added to the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field

from peftx import Claim, ModelView, Plugin, PluginConfig, Site, hookimpl
from peftx.errors import ConflictError, OptionError
from peftx.kernel.anatomy.site import LINEAR_KINDS

Unit = tuple[Site, ...]
"""What is drawn as one: a matrix with its bias, a norm, or a whole layer."""
KINDS = (*LINEAR_KINDS, "norm", "embedding", "convolution")


class HftConfig(PluginConfig):
    """Options of HFT. The learning rate is that of full tuning (paper: 2e-5, for preferences 5e-7)."""

    fraction: float = Field(0.5, ge=0, le=1, description="share of the matrices that train")
    level: Literal["category", "layer", "model"] = Field(
        "category",
        description="draw evenly in each category of each layer, or whole layers, or any matrices of the model",
    )
    outside: bool = Field(True, description="train embeddings, final norm and head too, all of them")
    round: int = Field(0, ge=0, description="which stage or task this is; each draws another half")


class Hft(Plugin):
    """See the module."""

    Config = HftConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.TAKES_WEIGHTS}
    architectures = ("mixtral", "gemma2")
    config: HftConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        inside, outside = _units(model)
        if not model.restoring:
            # Inside `inject` the global seed is made of the stack's seed and the plugin's id.
            generator = torch.Generator("cpu").manual_seed(torch.initial_seed() + self.config.round)
            chosen = self._draw(inside, generator) + (outside if self.config.outside else [])
            self.state["trained"] = [_name(site) for site in chosen]
        named = {_name(site): site for site in inside + outside}
        if not self.state["trained"]:
            raise OptionError(
                f"hft: fraction {self.config.fraction:g} of {len(inside)} matrices, and outside: "
                f"{str(self.config.outside).lower()}, train nothing",
                hint="a larger fraction",
            )
        for name in self.state["trained"]:
            site = named[name]
            if site.kind == "quantized":
                raise ConflictError(
                    f"hft: {site.path} is quantized, and integers do not train",
                    hint="put hft before the plugin that quantizes",
                )
            site.train(*([site.parameter] if site.kind in ("experts", "router") else []))

    def _draw(self, sites: list[Site], generator: torch.Generator) -> list[Site]:
        f = self.config.fraction
        match self.config.level:
            case "category":  # one draw for each category of a tower, over its layers
                groups = _grouped(sites, lambda s: (s.tower, s.role.split(".")[0]))
                layers = [_grouped(group, lambda s: s.layer) for group in groups]
                drawn = [draw([[(s,) for s in row] for row in rows], f, generator) for rows in layers]
            case "layer":
                groups = _grouped(sites, lambda s: s.tower)
                drawn = [
                    draw([[tuple(layer) for layer in _grouped(group, lambda s: s.layer)]], f, generator)
                    for group in groups
                ]
            case "model":
                drawn = [draw([[(s,) for s in sites]], f, generator)]
        return [site for units in drawn for unit in units for site in unit]


def draw(layers: list[list[Unit]], fraction: float, generator: torch.Generator) -> list[Unit]:
    """round(f n L) units, floor(f n) of the n in each of the L layers and one more in a random choice of them."""
    sizes = [math.floor(fraction * len(units) + 1e-9) for units in layers]
    spare = round(fraction * sum(map(len, layers))) - sum(sizes)
    open_layers = [i for i, units in enumerate(layers) if sizes[i] < len(units)]
    for i in torch.randperm(len(open_layers), generator=generator, device="cpu")[:spare].tolist():
        sizes[open_layers[i]] += 1
    return [
        units[i]
        for units, size in zip(layers, sizes, strict=True)
        for i in sorted(torch.randperm(len(units), generator=generator, device="cpu")[:size].tolist())
    ]


def _units(model: ModelView) -> tuple[list[Site], list[Site]]:
    """(inside the layers, outside), each parameter once: fused projections are one matrix, tied ones too."""
    inside: dict[int, Site] = {}
    outside: dict[int, Site] = {}
    for site in model.anatomy.sites:
        if site.kind in KINDS:
            parameter = site.module._parameters.get(site.parameter)
            where = outside if site.layer is None or site.kind == "embedding" else inside
            where.setdefault(id(site.module if parameter is None else parameter), model.bound(site))
    return list(inside.values()), list(outside.values())


def _name(site: Site) -> str:
    return f"{site.path}.{site.parameter}"


def _grouped(sites: list[Site], key: Callable[[Site], object]) -> list[list[Site]]:
    """Sites of equal keys, in order of first appearance."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return list(groups.values())
