"""(IA)^3: trained vectors scale keys, values and the inner activations of the MLP.

"Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (arXiv:2205.05638), section
3.3:

    softmax(Q (l_k * K)^T / sqrt(d_k)) (l_v * V)        l_k: [d_k], l_v: [d_v]
    (l_ff * gamma(W_1 x)) W_2                           l_ff: [d_ff]

* is elementwise, on the last dimension. All vectors start at one, so the model starts unchanged. l_k and l_v are gains
on the outputs of the maps that make keys and values, in cross attention too, l_ff one on the input of the MLP's last
map. Merged,

    W' = diag(l) W, b' = l * b      and      W' = W diag(l), b' = b

the vectors cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, PeftFormat, Plugin, PluginConfig, Targets, hookimpl
from peftx.errors import AdapterError, OptionError
from peftx.peft_format import Settings, targets_of


class Ia3Config(PluginConfig):
    """Options of (IA)^3; the defaults are the paper's."""

    targets: Targets | None = Field(
        None,
        description="linear layers whose output to scale; keys and values of every attention if left out",
    )
    inputs: Targets | None = Field(
        Targets("mlp.down"), description="linear layers whose input to scale; none if null"
    )


class ScaleOutput(Delta):
    """l * (W x + b).

    Args:
        features: out. batch: leading dimensions of stacked experts' weights.
    """

    before = False  # what comes out of the layer is scaled
    full_precision = True  # a step of l is below bfloat16's rounding of the ones that it starts from

    def __init__(self, features: int, *, batch: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(*batch, features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y * self.l).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.l.to(weight.dtype)
        return weight * scale.unsqueeze(-1), None if bias is None else bias * scale  # diag(l) W, l * b


class ScaleInput(Delta):
    """W (l * x) + b.

    Args:
        features: in.
    """

    before = True
    full_precision = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(features))

    def pre(self, x: Tensor) -> Tensor:
        return (x * self.l).to(x.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.l.to(weight.dtype), bias  # W diag(l)


def options_of(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says; a vector of inputs is a row in the file, one of outputs a column."""
    settings["feedforward_modules"], settings["init_ia3_weights"]  # the tensors say it
    shapes = settings.adapted("ia3_l")
    outputs = [path for path, shape in shapes.items() if shape[-1] == 1]
    inputs = [path for path in shapes if path not in outputs]
    if not outputs:
        raise AdapterError(
            "ia3: the adapter scales inputs alone, and the plugin keys and values at least",
            hint="load it with PEFT, and merge it into the base: PeftModel.merge_and_unload",
        )
    return {"targets": targets_of(outputs), "inputs": targets_of(inputs) if inputs else None}


class Ia3(Plugin):
    """See the module."""

    Config = Ia3Config
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.EDITS_INPUTS}
    config: Ia3Config
    peft = (
        PeftFormat(
            "IA3",
            tensors={"l": "ia3_l"},
            divided={"l": 0},
            neutral={"l": lambda weight: weight.new_ones(len(weight), 1)},
            options=options_of,
            settings=lambda config: {},
            write=lambda delta, own: {"l": own["l"][None] if delta.before else own["l"][:, None]},
            of_deltas=lambda deltas: {
                "feedforward_modules": [path for path, delta in deltas.items() if delta.before]
            },
        ),
    )

    def claimed(self) -> frozenset[Claim]:
        return self.claims - {Claim.EDITS_INPUTS} if self.config.inputs is None else self.claims

    @hookimpl
    def inject(self, model: ModelView) -> None:
        crossed = any(tower.cross_attention for tower in model.towers.values())
        every = "attention.k,v cross_attention.k,v" if crossed else "attention.k,v"
        outputs = model.linears(every if self.config.targets is None else self.config.targets)
        inputs = model.linears(self.config.inputs) if self.config.inputs is not None else []
        both = {site.key for site in outputs} & {site.key for site in inputs}
        if both:
            raise OptionError(
                f"ia3: {min(both)} is in targets and in inputs, and a layer is scaled on one side",
                hint="leave it out of one of them",
            )
        for site in outputs:
            site.attach(ScaleOutput(site.out_features, batch=site.batch))
        for site in inputs:
            site.attach(ScaleInput(site.in_features))
