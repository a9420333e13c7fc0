"""SignRound: which way each weight is rounded, and where its group is clipped, is trained block by block.

"Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (arXiv:2309.05516). For each group
of neighbours in a row of W, with b bits,

    s = (alpha max(W, 0) - beta min(W, 0)) / (2^b - 1);   z = round(-beta min(W, 0) / s)
    q = clamp(round(W / s + V) + z, 0, 2^b - 1);   W^ = s (q - z)           V = 0, alpha = beta = 1: to the nearest

    min over V in [-0.5, 0.5], alpha and beta in [0, 1] of ||block(X^; W^) - block(X; W)||^2

X is what the exact blocks before give, X^ what the rounded ones do; rounding passes gradients straight through. Each of
T steps moves every number by the rate, against the sign of its gradient. The rate falls from 1 / T to 0 in a line, so
that V can go from 0 to either end, and no further. The step of the lowest loss is kept; V is gone after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import peftx.toolkits.compression as packing
from peftx import BoundSite, Claim, Evaluation, ModelView, Plugin, PluginConfig, Site, Targets, hookimpl


class SignRoundConfig(PluginConfig):
    """Options of SignRound; the paper trains on 512 sequences of 2048 tokens."""

    targets: Targets = Field(Targets("all"), description="linear layers to pack, inside of blocks")
    bits: int = Field(4, ge=2, le=8, description="bits of a weight")
    group_size: int = Field(128, ge=1, description="weights that share a scale and a zero point")
    steps: int = Field(200, ge=0, description="of training in each block; 0: round to the nearest")
    learning_rate: float | None = Field(None, gt=0, description="of the first step; 1 / steps if left out")
    batch_size: int = Field(8, ge=1, description="calibration sequences in a step")
    clips: bool = Field(True, description="train alpha and beta too")


class Rounding(nn.Module):
    """Of one weight [out, in]: V [out, groups, size], alpha and beta [out, groups, 1], float32."""

    def __init__(self, weight: Tensor, bits: int, size: int) -> None:
        super().__init__()
        self.shape, self.bits, self.size = weight.shape, bits, min(size, weight.shape[1])
        padded = F.pad(weight.float(), (0, -weight.shape[1] % self.size))
        self.groups = padded.unflatten(1, (-1, self.size))
        self.low = self.groups.amin(2, keepdim=True).clamp_max(0)
        self.high = self.groups.amax(2, keepdim=True).clamp_min(0)
        self.V = nn.Parameter(torch.zeros_like(self.groups))
        self.alpha = nn.Parameter(torch.ones_like(self.low))
        self.beta = nn.Parameter(torch.ones_like(self.low))

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [out, groups, size], s and z [out, groups, 1]; differentiable."""
        top = 2**self.bits - 1
        s = (self.alpha * self.high - self.beta * self.low) / top
        s = torch.where(s > 0, s, torch.ones_like(s))  # a group of zeros, or one that is clipped to nothing
        z = nearest(-self.beta * self.low / s)
        return (nearest(self.groups / s + self.V) + z).clamp(0, top), s, z

    def forward(self) -> Tensor:
        """W^ [out, in]."""
        q, s, z = self.codes()
        return (s * (q - z)).flatten(1)[:, : self.shape[1]]

    def packed(self) -> packing.Quantized:
        q, s, z = self.codes()
        q, z = q.flatten(1)[:, : self.shape[1]].to(torch.uint8), z[..., 0].to(torch.uint8)
        return packing.Quantized(q=q, scale=s[..., 0], zero=z, bits=self.bits, group_size=self.size)


def nearest(x: Tensor) -> Tensor:
    """Rounded; the gradient passes as it comes."""
    return packing.straight_through(x, torch.round(x.detach()))


def called(block: nn.Module, call: tuple[Any, Any], weights: dict[str, Tensor]) -> Tensor:
    """The block's output [B, T, H] with these weights."""
    output = torch.func.functional_call(block, weights, *call)
    return output[0] if isinstance(output, tuple) else output


class SignRound(Plugin):
    """See the module."""

    Config = SignRoundConfig
    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS, Claim.NEEDS_CALIBRATION}
    example = {"steps": 2, "group_size": 16}
    refuses = {"t5": "calibration text feeds an encoder alone"}
    config: SignRoundConfig

    def linears(self, model: ModelView) -> list[BoundSite]:
        """The targets, fused ones whole."""
        return model.linears(self.config.targets, whole=True)

    def suits(self, model: ModelView) -> None:
        packing.text_blocks(model, self.linears(model))

    @hookimpl
    def compress(self, model: ModelView, calibration: packing.Calibration) -> None:
        config, blocks, sites = self.config, model.blocks("layer"), self.linears(model)
        exact: list[Tensor] = []  # what the exact blocks give; what enters the first block is exact
        self.state["errors"] = []  # of each block: rounded to the nearest, and as trained

        def on_block(layer: int, block: nn.Module, inputs: packing.BlockInputs) -> None:
            nonlocal exact
            calls, before = list(inputs), exact or [inputs.hidden(i) for i in range(len(inputs))]
            exact = [called(block, inputs.filled(i, x), {}) for i, x in enumerate(before)]
            own = [site for site in sites if site.layer == layer]
            roundings = {site: Rounding(site.weight, config.bits, config.group_size) for site in own}

            def loss(some: Iterable[int]) -> Tensor:
                weights = {}
                for site, rounding in roundings.items():
                    W = rounding().to(site.weight.dtype)
                    name = f"{site.path}.{site.parameter}".removeprefix(f"{blocks[layer].path}.")
                    weights[name] = W.mT if site.turned else W
                outputs = [(called(block, calls[i], weights).float(), exact[i].float()) for i in some]
                return torch.stack([F.mse_loss(y, y_exact) for y, y_exact in outputs]).mean()

            if roundings:
                self.state["errors"].append(self.train([*roundings.values()], loss, len(calls)))
            for site, rounding in roundings.items():
                make = packing.QuantLinear.from_quantized
                site.replace(make(rounding.packed(), bias=site.bias, dtype=site.weight.dtype))

        calibration.walk(model.module, [block.module for block in blocks], on_block)

    def train(
        self, roundings: list[Rounding], loss: Callable[[Iterable[int]], Tensor], texts: int
    ) -> list[float]:
        """Signed steps, on some of the texts each. What the step with the lowest loss began with stays, or the start
        where that is better on all of the texts. Returns the losses on all: of the start, and of what stays."""
        steps = self.config.steps
        moved = [(r.V, -0.5, 0.5) for r in roundings]
        moved += [(p, 0.0, 1.0) for r in roundings for p in (r.alpha, r.beta) if self.config.clips]
        numbers, first = [p for p, _, _ in moved], self.config.learning_rate or 1 / max(steps, 1)
        start = best = [p.clone() for p in numbers]
        lowest, before = torch.inf, float(loss(range(texts)))
        for step in range(steps):
            with torch.enable_grad():
                found = loss(torch.randperm(texts)[: self.config.batch_size].tolist())
                gradients = torch.autograd.grad(found, numbers, allow_unused=True)
            if (value := float(found.detach())) < lowest:
                lowest, best = value, [p.clone() for p in numbers]
            for (p, low, high), g in zip(moved, gradients, strict=True):
                if g is not None:  # a layer that no text comes to
                    p.sub_(first * (1 - step / steps) * g.sign()).clamp_(low, high)
        for chosen in (best, start):
            torch._foreach_copy_(numbers, chosen)
            if (after := float(loss(range(texts)))) <= before:
                break
        return [before, after]

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        for site in self.linears(model):
            n, bias = site.in_features, 0 if site.bias is None else site.bias.nbytes
            row = -(-n * self.config.bits // 8) + 5 * -(-n // self.config.group_size)
            yield site, site.out_features * row + bias

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Bytes of the packed layers, bits of a weight (without biases), and how much of the error of rounding to the
        nearest is left in a block, on the mean; 0 before there are any."""
        evaluation.add_packed(self)
        left = [after / before for before, after in self.state.get("errors", []) if before]
        evaluation.add("error_left", sum(left) / max(len(left), 1))
