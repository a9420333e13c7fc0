"""BitFit: only the bias terms train.

"BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models" (arXiv:2106.10199). Of
each linear map and each norm

    h = W x + b          y = g * normalized(x) + b

b trains, in place, and the classifier of a new task; all else is frozen. That is about a thousandth of BERT. The
paper's smaller form trains two of the eight biases of a layer, those of the query and of the MLP's first map
(`targets: attention.q mlp.up`).

A model without biases (Llama, T5) is refused, or with `add` gets a bias of zeros beside each linear map that has none:

    h = W x + b'         b' from 0; merged, W x + b'

So does a part of a fused matrix (GPT-2's q alone) for its own rows of the bias: h = W x + b + b', merged b + b'.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Targets, hookimpl
from peftx.errors import ArchitectureError
from peftx.kernel.anatomy.site import LINEAR_KINDS
from peftx.kernel.view import BoundSite


class BitfitConfig(PluginConfig):
    """Options of BitFit. The learning rate is larger than for full tuning (paper: 1e-4 to 1e-3)."""

    targets: Targets | None = Field(
        None,
        description="layers and norms whose biases train, as in the paper's 'attention.q mlp.up'; all if left out",
    )
    add: bool = Field(
        False, description="put a bias of zeros beside linear layers that have none, and train it"
    )


class AddedBias(Delta):
    """h = y + b'.

    Args:
        shape: of b', [out]; [experts, out] for stacked experts.
    """

    full_precision = True  # a step from 0 may be far below bfloat16's rounding of the next one

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bias.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = self.bias.to(weight.dtype)
        return weight, own if bias is None else bias + own


class Bitfit(Plugin):
    """See the module."""

    Config = BitfitConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE, Claim.MERGEABLE}
    architectures = ("opt",)
    config: BitfitConfig
    refuses = {"llama": "no layer has a bias", "t5": "no layer has a bias"}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        kinds, named = (*LINEAR_KINDS, "norm", "convolution"), self.config.targets is not None
        all_sites = [model.bound(site) for site in model.anatomy.sites if site.kind in kinds]
        sites = model.sites(self.config.targets, kinds=kinds) if self.config.targets else all_sites
        there = [site for site in sites if site.module._parameters.get(site.bias_name) is not None]
        bare = [site for site in sites if site not in there and (named or site.in_all)]
        if bare and not self.config.add and (named or not there):
            way_round = f", or '!{bare[0].role}' in targets" if named else ""
            raise ArchitectureError(
                f"bitfit: {len(bare)} of the layers have no bias, {bare[0].path} among them",
                hint=f"add: true for biases of zeros{way_round}",
            )
        for site in bare if self.config.add else ():
            if site.kind not in ("linear", "quantized") or site.read or site.called:
                raise ArchitectureError(
                    f"bitfit: {site.path} has no bias, and no place for one",
                    hint=f"leave it out of targets: '!{site.role}'",
                )
            site.attach(AddedBias(site.out_features))
        chosen = {(site.path, site.bias_name, site.role) for site in there}
        whole: dict[tuple[str, str], BoundSite] = {}
        for site in there:
            if all((site.path, site.bias_name, role) in chosen for role in site.fused):
                whole.setdefault((site.path, site.bias_name), site)
            else:
                site.attach(AddedBias(*site.batch, site.out_features))
        for site in whole.values():
            head = site.role.partition(".")[0] == "classifier"  # a new task's, which nobody trained yet
            site.train(*(() if head else (site.bias_name,)))
