"""NF4: frozen weights in 4-bit NormalFloat, whose constants are quantized once more; adapters train on top.

"QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314). The 16 values of the type are at equal shares of
a normal distribution, 0 among them, and are scaled to [-1, 1]. For each block of 64 neighbours of W, flat,

    a = max |w|;   i = argmin_i |w / a - NF4_i|                                        4 bits a weight
    m = mean of all a;   b = max |a - m| over 256 blocks;   a^ = m + b FP8[argmin_j |(a - m) / b - FP8_j|]
    w^ = NF4_i a^                                          4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight
    y = x W^ + bias, computed in the dtype of x; gradients go through W^ to x, and none to W^

What stands on the layer (`lora`, then this is QLoRA) is not the plugin's matter: put it behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from peftx import BoundSite, Claim, Evaluation, ModelView, Plugin, PluginConfig, Site, Targets, hookimpl
from peftx.errors import ArchitectureError, ModelError
from peftx.toolkits.compression import Quantized, QuantLinear, pack_bits, unpack_bits
from peftx.toolkits.compression.kernels import Kernel
from peftx.toolkits.compression.names import dtype_name

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The paper's appendix E."""
GROUP = 256
"""Blocks that share a constant of the second kind."""


class Nf4Config(PluginConfig):
    """Options of NF4; the defaults are the paper's."""

    targets: Targets = Field(Targets("all"), description="linear layers to pack")
    block_size: int = Field(64, ge=2, description="weights that share a constant")
    double_quant: bool = Field(True, description="keep these constants in 8 bits; false: in float32")


@cache
def _fp8() -> tuple[float, ...]:
    """[256] float32, rising: for i = 0..6 the middles of 2^i equal parts of [0.1, 1], times 10^(i - 6), of both signs;
    0 and 1. More digits near 1, more reach near 0 (the dynamic tree type of arXiv:2110.02861)."""
    with torch.device("cpu"):
        edges = [torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64) for i in range(7)]
        middles = torch.cat([(e[1:] + e[:-1]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(edges)])
        values = torch.cat((middles, -middles, torch.tensor([0.0, 1.0]))).sort()[0].float()
    return tuple(values.tolist())


def fp8() -> Tensor:
    """The same, [256] float32."""
    return torch.tensor(_fp8())


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of the rising `values` (int64); at most 256 of them."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def blocks(x: Tensor, size: int) -> Tensor:
    """[...] -> [blocks, size], flat, the last one filled up with zeros."""
    return F.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)


def scaled(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Largest magnitudes [B] of blocks, and what is left in [-1, 1], [B, size]; 0 in a block of zeros."""
    top = (parts := blocks(x, size)).abs().amax(1)
    return top, parts * (1 / top.clamp_min(1e-37))[:, None]


class NF4Linear(QuantLinear):
    """A frozen linear layer. Buffers, all saved; n weights in B blocks: qweight [ceil(n / 2)] uint8, flat; absmax [B]
    uint8 and scale [1 + ceil(B / 256)] float32 (m, then b of each group), or scale [B] float32 alone; bias [out].

    Args:
        options: in_features, out_features, bias, dtype, device, as in `QuantLinear`.
    """

    absmax: Tensor | None

    def __init__(self, *, block_size: int, double_quant: bool, **options: Any) -> None:
        super().__init__(bits=4, **options)
        self.block_size, n = block_size, self.in_features * self.out_features
        count = -(-n // block_size)
        self.qweight = self.qweight.new_zeros(-(-n // 2))
        self.scale = self.scale.new_zeros(1 - -count // GROUP if double_quant else count)
        self.register_buffer("absmax", self.qweight.new_zeros(count) if double_quant else None)

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor | None) -> NF4Linear:
        """Round weight [out, in] to the nearest, computed in float32."""
        a, rest = scaled(weight.float(), self.block_size)
        q = nearest(rest, torch.tensor(NF4).to(a)).to(torch.uint8).flatten()
        self.qweight.copy_(pack_bits(q[: weight.numel()], 4))
        if self.absmax is None:
            self.scale.copy_(a)
        else:
            b, rest = scaled(a - a.mean(), GROUP)
            self.scale.copy_(torch.cat((a.mean()[None], b)))
            self.absmax.copy_(nearest(rest, fp8().to(a)).flatten()[: len(a)])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        return self

    def geometry(self) -> dict[str, Any]:
        own = {"block_size": self.block_size, "double_quant": self.absmax is not None}
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return own | sizes | {"bias": self.bias is not None, "dtype": dtype_name(self.dtype)}

    def scales(self) -> Tensor:
        """a^ of every block, [B] float32."""
        if self.absmax is None:
            return self.scale
        rest = blocks(fp8().to(self.scale)[self.absmax.int()], GROUP)
        return (self.scale[0] + self.scale[1:, None] * rest).flatten()[: len(self.absmax)]

    def quantized(self) -> Quantized:
        """W^ [out, in] float32, with scales of 1: the core's products and gradients go through it."""
        shape = (self.out_features, self.in_features)
        q = unpack_bits(self.qweight, 4, size=shape[0] * shape[1], signed=False)
        parts = blocks(torch.tensor(NF4).to(self.scale)[q.int()], self.block_size) * self.scales()[:, None]
        w = parts.flatten()[: q.numel()].view(shape)
        return Quantized(q=w, scale=w.new_ones(shape[0], 1), zero=None, bits=4, group_size=None)

    def kernel_for(self, device: torch.device, dtype: torch.dtype) -> Kernel:
        """None of the kernels of integers."""
        return "dequantize"


class NF4Storage(Plugin):
    """See the module."""

    Config = Nf4Config
    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS}
    config: Nf4Config

    def linears(self, model: ModelView) -> list[BoundSite]:
        """The targets, fused ones whole."""
        sites = model.linears(self.config.targets, whole=True)
        if other := next((site for site in sites if site.kind not in ("linear", "quantized")), None):
            said = (
                f"{other.path}.{other.parameter} holds {other.kind} ({other.role}), which are no linear layer"
            )
            raise ArchitectureError(f"{model.owner}: {said}", hint=f"targets: 'all !{other.role}'")
        return sites

    def suits(self, model: ModelView) -> None:
        self.linears(model)

    def layer(self, site: Site, device: torch.device | str) -> NF4Linear:
        """The packed layer of a site, still empty."""
        return NF4Linear(
            block_size=self.config.block_size, double_quant=self.config.double_quant, bias=site.bias is not None,
            in_features=site.in_features, out_features=site.out_features, dtype=dtype_name(site.weight.dtype),
            device=device,
        )  # fmt: skip

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site in self.linears(model):
            if not bool(site.weight.isfinite().all()):
                raise ModelError(f"{model.owner}: {site.path} holds numbers that are not finite")
            site.replace(self.layer(site, site.weight.device).take(site.weight, site.bias))

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        return [(site, self.layer(site, "meta").nbytes_packed) for site in self.linears(model)]

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Bytes of the packed layers, as a bundle holds them, and bits of a weight (without biases); 0 before."""
        evaluation.add_packed(self)
