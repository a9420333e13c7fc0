"""BitDelta: a fine-tuned model is its base, one sign for each weight, and one scale for each matrix.

"BitDelta: Your Fine-Tune May Only Be Worth One Bit" (arXiv:2402.10193). The whole model is fine-tuned here, or was
elsewhere (`finetuned`). Then, for each matrix of the blocks, with W_b of the base and W_f of the fine-tuned model,

    D = W_f - W_b [out, in];   S = sign(D), -1 where D = 0;   a = mean |D|     (argmin over a of ||D - a S||^2)
    y = W_b x + b + a (S x)

Embeddings, head, norms and biases keep the fine-tuned values as they are. Last the scales alone are distilled, with
signs and W_b as they are, so that on generic text x the logits come near those of the fine-tuned model:

    a* = argmin over all a of E_x ||z_f(x) - z_a(x)||^2         Adam, from a = mean |D|
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import (
    BoundSite,
    Claim,
    Delta,
    Evaluation,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    Targets,
    companion,
    hookimpl,
)
from peftx.errors import ArchitectureError, ConflictError
from peftx.kernel.parts import DeltaPart
from peftx.kernel.trained import Trained
from peftx.toolkits.compression import Calibration, adopt, differences


class BitDeltaConfig(PluginConfig):
    """Options of BitDelta; the paper distils on 800 sequences of 128 tokens of C4, four a step."""

    finetuned: str | None = Field(
        None, description="a model that is fine-tuned already: a folder, a hub id or a bundle"
    )
    targets: Targets = Field(Targets("all"), description="matrices whose difference is packed")
    steps: int = Field(200, ge=1, description="of distillation of the scales")
    learning_rate: float = Field(1e-4, gt=0, description="of Adam, for the scales")
    batch_size: int = Field(4, ge=1, description="calibration sequences in a step")


def pack(positive: Tensor) -> Tensor:
    """[...] bool -> [ceil(N / 8)] uint8, the first in the lowest bit."""
    octets = F.pad(positive.flatten().to(torch.uint8), (0, -positive.numel() % 8)).view(-1, 8)
    return (octets << torch.arange(8, device=octets.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


OCTETS = (torch.arange(256)[:, None] >> torch.arange(8) & 1) * 2 - 1
"""The eight signs of each byte."""


def unpack(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse: a matrix of -1 and 1."""
    signs = F.embedding(packed.int(), OCTETS.to(packed.device, dtype))  # a third of the time of shifting bits
    return signs.flatten()[: prod(shape)].view(*shape)


class SignDelta(Delta):
    """y + a (S x): float32 scale (one for each of stacked experts), uint8 packed [bytes]."""

    full_precision = True
    scale: Tensor
    packed: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)  # [..., out, in]
        self.register_buffer("scale", torch.zeros(self.shape[:-2]))
        self.register_buffer("packed", torch.zeros(-(-prod(self.shape) // 8), dtype=torch.uint8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale.to(y.dtype) * F.linear(x.to(y.dtype), unpack(self.packed, self.shape, y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        signs = unpack(self.packed, self.shape, weight.dtype)
        return weight + self.scale.to(weight.dtype)[..., None, None] * signs, bias


class BitDelta(Plugin):
    """See the module; `identity-at-start` without `finetuned`."""

    Config = BitDeltaConfig
    claims = {
        Claim.TRAINS_BASE,
        Claim.IDENTITY_AT_START,
        Claim.MERGEABLE,
        Claim.NEEDS_CALIBRATION,
        Claim.TAKES_WEIGHTS,
    }
    example = {"steps": 2}
    refuses = {"t5": "calibration text feeds an encoder alone"}
    exempt = {"llama-bfloat16": "rounding turns the signs of some small differences, each by two scales"}
    config: BitDeltaConfig
    places: Mapping[str, Trained] = {}

    def suits(self, model: ModelView) -> None:
        whole, reads = model.module, model.module.main_input_name
        if len(model.towers) > 1 or whole.base_model is whole or reads != "input_ids":
            said = (
                f"calibration text gives no logits of {type(whole).__name__}, on which scales are distilled"
            )
            raise ArchitectureError(f"{model.owner}: {said}", hint="a decoder, or an encoder with its head")

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        self.places = differences(model, self.matrices(model))
        if (source := self.config.finetuned) and not model.restoring and model.module.device.type != "meta":
            adopt(model, self.places, companion(stack, source), source)
            del stack.companions[source]

    @hookimpl
    def compress(self, model: ModelView, calibration: Calibration, stack: Stack) -> None:
        if not self.places:
            said = "there is no fine-tuned model yet, before `inject`"
            raise ConflictError(f"{model.owner}: {said}", hint="phase: after-training beside `use`")
        teacher, scales = companion(stack, "copy"), []
        places = {site: self.places[f"{site.path}.{site.parameter}"] for site in self.matrices(model)}
        try:
            for site, place in places.items():
                delta, D = site.attach(SignDelta(site.shape)), place.theta.float() - place.theta_0.float()
                D = D.mT if site.turned else D  # [..., out, in]
                delta.packed.copy_(pack(D > 0))
                scales.append(delta.scale.copy_(D.abs().mean((-2, -1))))
                place.rewind()
            stack.model.requires_grad_(False)  # what trains is settled behind every compression
            self.state["logit_error"] = self.distil(scales, calibration.batches, stack.model, teacher)
        except BaseException:  # Ctrl-C too
            for site, place in places.items():
                place.theta.copy_(teacher.get_parameter(f"{site.path}.{site.parameter}"))
            raise

    def restore(self, model: ModelView, stack: Stack) -> None:
        for site in self.matrices(model):
            site.attach(SignDelta(site.shape))

    def finished(self) -> Iterable[nn.Parameter]:
        return [place.theta for place in self.places.values()] if self.state else ()

    def matrices(self, model: ModelView) -> list[BoundSite]:
        return model.linears(self.config.targets, whole=True)

    def distil(self, scales: list[Tensor], batches: list[Any], *models: nn.Module) -> list[float]:
        """Train the scales, or leave them where that is better. Returns the logits' error before and after.

        Args:
            models: of z_a, and of z_f.
        """

        def error(batches: list[Any]) -> Tensor:
            pairs = ([model(**batch).logits.float() for model in models] for batch in batches)
            return torch.stack([F.mse_loss(z_a, z_f) for z_a, z_f in pairs]).mean()

        start, before, drawn = [a.clone() for a in scales], error(batches), itertools.cycle(batches)
        with torch.enable_grad():
            optimizer = torch.optim.Adam([a.requires_grad_() for a in scales], self.config.learning_rate)
            for _ in range(self.config.steps):
                optimizer.zero_grad()
                for _ in range(self.config.batch_size):
                    (error([next(drawn)]) / self.config.batch_size).backward()
                optimizer.step()
        after = error(batches)
        for a, old in zip(scales, start, strict=True):
            a.requires_grad_(False).grad = None
            a.copy_(a if after <= before else old)
        return [float(before), float(min(before, after))]

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Bytes of signs and scales, as a bundle holds them, and bits of a packed weight; 0 before there are any."""
        parts = evaluation.stack.ledger.of(evaluation.stack.id_of(self), DeltaPart)
        size = sum(tensor.nbytes for part in parts for tensor in part.tensors().values())
        evaluation.add("packed_bytes", size, unit="bytes")
        evaluation.add("bits_per_weight", 8 * size / max(sum(prod(p.module.shape) for p in parts), 1))
