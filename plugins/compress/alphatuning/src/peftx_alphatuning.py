"""AlphaTuning: weights become a few matrices of signs with scales, and of the scales the first ones train.

"AlphaTuning: Quantization-Aware Parameter-Efficient Adaptation of Large-Scale Pre-Trained Language Models"
(arXiv:2210.03858). Binary-coding quantization of W: [out, in] with q codes, for a row w of it (or each g neighbours):

    w ~ sum_i a_i b_i,   b_i in {-1, 1}^g;   i = 1 .. q
    start:  r_0 = w;   b_i = sign(r_i-1);   a_i = mean |r_i-1|;   r_i = r_i-1 - a_i b_i
    rounds: a = argmin ||w - B^T a||^2;   each weight gets the signs of the nearest of the 2^q sums +-a_1 .. +-a_q

The codes are for all tasks. A task has one number for each row: of the largest scales, what they change by,

    y = x W^ + bias + d (B_1 x);   a_1 + d is the task's scale, d = 0 at the start
    dL/dd = sum_j dL/dW_j B_1j, divided by g before the update

Everything else is frozen. No calibration text is needed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftx import (
    BoundSite,
    Claim,
    Delta,
    Evaluation,
    ModelView,
    Plugin,
    PluginConfig,
    Site,
    Stack,
    Targets,
    TrainStep,
    hookimpl,
)
from peftx.errors import ArchitectureError, ModelError
from peftx.kernel.parts import DeltaPart, ReplacedPart
from peftx.toolkits.compression import Quantized, QuantLinear
from peftx.toolkits.compression.kernels import Kernel
from peftx.toolkits.compression.names import dtype_name


class AlphatuningConfig(PluginConfig):
    """Options of AlphaTuning; the paper has 2 to 4 codes, and whole rows."""

    targets: Targets = Field(Targets("all"), description="linear layers to pack, and to tune")
    bits: int = Field(3, ge=1, le=4, description="q, codes of a weight: 1 to 4")
    group_size: int | None = Field(
        None, ge=2, description="g, weights of a row that share scales; whole rows if left out"
    )
    rounds: int = Field(15, ge=0, description="of least squares and new codes; 0: the greedy start alone")


def greedy(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The start, of w [..., g]: B [..., bits, g] of -1 and 1, a [..., bits]."""
    B, a, rest = [], [], w
    for _ in range(bits):
        B.append(torch.where(rest < 0, -1.0, 1.0).to(w))
        a.append(rest.abs().mean(-1))
        rest = rest - a[-1].unsqueeze(-1) * B[-1]
    return torch.stack(B, -2), torch.stack(a, -1)


def least_squares(w: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The best scales of these codes, made positive and falling; codes are turned, and put in order, with them."""
    gram, right = B @ B.mT, B @ w.unsqueeze(-1)
    a = (torch.linalg.pinv(gram.double(), hermitian=True) @ right.double()).squeeze(-1).to(w)
    order = a.abs().argsort(dim=-1, descending=True, stable=True)
    turned = B * torch.where(a < 0, -1.0, 1.0).to(w).unsqueeze(-1)
    return turned.gather(-2, order.unsqueeze(-1).expand_as(B)), a.abs().gather(-1, order)


def nearest(w: Tensor, a: Tensor) -> Tensor:
    """The codes [..., q, g] of the nearest sums of +-a [..., q]."""
    q = a.shape[-1]
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * q).view(-1, q).to(w)  # [2^q, q]
    levels, order = (a @ signs.mT).sort(dim=-1)
    at = torch.searchsorted(((levels[..., 1:] + levels[..., :-1]) / 2).contiguous(), w.contiguous())
    return signs[order.gather(-1, at)].mT


def fit(w: Tensor, bits: int, rounds: int) -> tuple[Tensor, Tensor]:
    """B [..., bits, g] and a [..., bits], falling, of w [..., g] float32."""
    B, a = greedy(w, bits)
    for _ in range(rounds):
        B, a = least_squares(w, B)
        B = nearest(w, a)
    return B, a


class CodedLinear(QuantLinear):
    """A frozen linear layer. Buffers, all saved, with G groups in a row: qweight [out, q, ceil(in / 8)] uint8, a bit a
    sign, the first in the lowest; scale [out, G, q] float32; bias [out].

    Args:
        bits: q. group_size: g, which divides `in_features`. options: in_features, out_features, bias, dtype, device, as
            in `QuantLinear`.
    """

    def __init__(self, *, bits: int, group_size: int, **options: Any) -> None:
        super().__init__(bits=max(bits, 2), group_size=group_size, **options)
        self.bits, rows = bits, (self.out_features, bits)
        self.scale = self.scale.new_ones(*self.scale.shape, bits)
        self.qweight = self.qweight.new_zeros(*rows, -(-self.in_features // 8))

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor | None, rounds: int) -> CodedLinear:
        """Fit codes and scales to weight [out, in], computed in float32."""
        B, a = fit(weight.float().unflatten(1, (-1, self.group_size)), self.bits, rounds)
        self.scale.copy_(a)
        octets = F.pad(B.transpose(1, 2).flatten(2) > 0, (0, -self.in_features % 8)).unflatten(-1, (-1, 8))
        places = torch.arange(8, device=weight.device, dtype=torch.uint8)
        self.qweight.copy_((octets.to(torch.uint8) << places).sum(-1, dtype=torch.uint8))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        return self

    def geometry(self) -> dict[str, Any]:
        own = {"bits": self.bits, "group_size": self.group_size}
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return own | sizes | {"bias": self.bias is not None, "dtype": dtype_name(self.dtype)}

    def code(self, i: int, dtype: torch.dtype) -> Tensor:
        """B_i [out, G, g] of -1 and 1, i from 0."""
        bits = (
            self.qweight[:, i, :, None] >> torch.arange(8, device=self.qweight.device, dtype=torch.uint8) & 1
        )
        signs = bits.flatten(1)[:, : self.in_features].to(dtype) * 2 - 1
        return signs.unflatten(1, (-1, self.group_size))

    def quantized(self) -> Quantized:
        """W^ [out, in] float32, with scales of 1: the core's products and gradients go through it."""
        parts = (self.scale[..., i, None] * self.code(i, self.scale.dtype) for i in range(self.bits))
        w = torch.stack([*parts]).sum(0).flatten(1)
        return Quantized(q=w, scale=w.new_ones(len(w), 1), zero=None, bits=4, group_size=None)

    def kernel_for(self, device: torch.device, dtype: torch.dtype) -> Kernel:
        """None of the kernels of integers."""
        return "dequantize"


class AlphaDelta(Delta):
    """y + d (B_1 x), d [out, G] float32: what a task adds to the first scales of a layer."""

    full_precision = True

    def __init__(self, layer: CodedLinear) -> None:
        super().__init__()
        self.layer = (layer,)  # no child
        self.d = nn.Parameter(torch.zeros(layer.scale.shape[:2], device=layer.scale.device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return y + self.product(x.to(y.dtype), self.d)
        return y + checkpoint(
            self.product, x.to(y.dtype), self.d, use_reentrant=False
        )  # signs are made anew, not kept

    def product(self, x: Tensor, d: Tensor) -> Tensor:
        signs = self.layer[0].code(0, x.dtype)
        if d.shape[1] == 1:
            return d[:, 0].to(x.dtype) * F.linear(x, signs[:, 0])
        return F.linear(x, (d[..., None].to(x.dtype) * signs).flatten(1))


class AlphaTuning(Plugin):
    """See the module."""

    Config = AlphatuningConfig
    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS, Claim.NEEDS_GRADIENTS}
    example = {"rounds": 2}
    config: AlphatuningConfig

    def linears(self, model: ModelView) -> list[BoundSite]:
        """The targets, fused ones whole."""
        sites = model.linears(self.config.targets, whole=True)
        for site in sites:
            if site.kind not in ("linear", "quantized") or site.read:
                said = (
                    f"{site.path}.{site.parameter} ({site.role}, {site.kind}) is not called as a linear layer"
                )
                raise ArchitectureError(f"{model.owner}: {said}", hint=f"targets: 'all !{site.role}'")
            if site.in_features % (self.config.group_size or site.in_features):
                said = f"rows of {site.path} have {site.in_features} weights, no multiple of {self.config.group_size}"
                raise ArchitectureError(
                    f"{model.owner}: {said}", hint="another group_size, or none: whole rows"
                )
        return sites

    def suits(self, model: ModelView) -> None:
        self.linears(model)

    def layer(self, site: Site, device: torch.device | str) -> CodedLinear:
        """The packed layer of a site, still empty."""
        return CodedLinear(
            bits=self.config.bits, group_size=self.config.group_size or site.in_features,
            in_features=site.in_features, out_features=site.out_features, bias=site.bias is not None,
            dtype=dtype_name(site.weight.dtype), device=device,
        )  # fmt: skip

    @hookimpl
    def compress(self, model: ModelView, stack: Stack) -> None:
        sites = self.linears(model)
        if bad := next((site for site in sites if not bool(site.weight.isfinite().all())), None):
            said = f"{model.owner}: {bad.path} holds numbers that are not finite"
            raise ModelError(said, hint="repair the model, or leave the layer out of targets")
        for site in sites:
            layer = self.layer(site, site.weight.device)
            site.replace(layer.take(site.weight, site.bias, self.config.rounds))
        self.restore(model, stack)

    def restore(self, model: ModelView, stack: Stack) -> None:
        """Let the first scales of the packed layers train."""
        for part in stack.ledger.of(model.owner, ReplacedPart):
            model.bound(Site("", part.key, part.module, "quantized")).attach(AlphaDelta(part.module))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        step.on_gradients(lambda _: self.normalize(step))
        return (yield)

    def normalize(self, step: TrainStep) -> None:
        """Divide gradients by the weights that a scale is for."""
        for part in step.stack.ledger.of(step.stack.id_of(self), DeltaPart):
            if part.module.d.grad is not None:
                part.module.d.grad /= part.module.layer[0].group_size

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        return [(site, self.layer(site, "meta").nbytes_packed) for site in self.linears(model)]

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Bytes of the packed layers, which all tasks share, bits of a weight (without biases), and bytes of the task;
        0 before there are any."""
        evaluation.add_packed(self)
        scales = evaluation.stack.ledger.of(evaluation.stack.id_of(self), DeltaPart)
        evaluation.add("task_bytes", sum(part.module.d.nbytes for part in scales), unit="bytes")
