"""BitMoD: weights at 3 or 4 bits, and each group of neighbours in the one of four data types that fits it best.

"BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration" (arXiv:2411.11745). A float of b bits with a sign has two
codes for zero. The second one is spent on one special value v, which the group chooses:

    b = 3:  {0, +-1, +-2, +-4} and v in {3, -3 (extra resolution), 6, -6 (extra asymmetry)}
    b = 4:  {0, +-1, +-2, +-3, +-4, +-6, +-8, +-12} and v in {10, -10, 16, -16}

For each group w of 128 neighbours in a row of W, with the types D_1 .. D_4, values of which v_t is one,

    s_t = max |w| / max |D_t|;   w_t = s_t nearest(w / s_t, D_t);   t = argmin_t mean (w_t - w)^2
    S = max of all s_t in the row / 127;   s^ = S round(s_t / S), at least S            8 bits a scale
    w^ = s^ nearest(w / s^, D_t)                                          b + (2 + 8) / 128 + 32 / in bits a weight

No calibration text is needed. What stands on the layer (`lora`) is not the plugin's matter: put it behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from peftx import BoundSite, Claim, Evaluation, ModelView, Plugin, PluginConfig, Site, Targets, hookimpl
from peftx.errors import ArchitectureError, ModelError
from peftx.toolkits.compression import Quantized, QuantLinear, pack_bits, unpack_bits
from peftx.toolkits.compression.kernels import Kernel
from peftx.toolkits.compression.names import dtype_name

MAGNITUDES = {3: (1, 2, 4), 4: (1, 2, 3, 4, 6, 8, 12)}
SPECIAL = {3: (3, -3, 6, -6), 4: (10, -10, 16, -16)}
"""Of extra resolution, inside of the other values, and of extra asymmetry, beyond them."""


class BitmodConfig(PluginConfig):
    """Options of BitMoD; the defaults are the paper's."""

    targets: Targets = Field(Targets("all"), description="linear layers to pack")
    bits: Literal[3, 4] = Field(4, description="bits of a weight: 3 or 4")
    group_size: int = Field(128, ge=2, description="weights of a row that share a data type and a scale")
    int8_scales: bool = Field(True, description="keep scales in 8 bits; false: in float32")


def types(bits: int) -> Tensor:
    """[4, 2^bits] float32: the values of each type, rising."""
    signed = [sign * m for m in MAGNITUDES[bits] for sign in (-1, 1)]
    return torch.tensor([sorted((0, v, *signed)) for v in SPECIAL[bits]], dtype=torch.float32)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of the rising `values`, int64; in the middle of two the lower one."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def choose(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The type of each group [..., size] float32, int64 [...], and its scale, float32 [...]; 0 in a group of zeros."""
    top, scales, errors = groups.abs().amax(-1), [], []
    for values in types(bits).to(groups):
        scales.append(top / values.abs().max())
        s = scales[-1].unsqueeze(-1)
        errors.append((s * values[nearest(groups / s.clamp_min(1e-37), values)] - groups).square().mean(-1))
    kind = torch.stack(errors).argmin(0)
    return kind, torch.stack(scales).gather(0, kind[None])[0]


class BitModLinear(QuantLinear):
    """A frozen linear layer. Buffers, all saved, with G groups in a row: qweight [out, ceil(in bits / 8)] uint8,
    codes of the group's type; kind [out, ceil(G / 4)] uint8, two bits a group; scale [out, 1] float32 and steps
    [out, G] uint8, or scale [out, G] float32 alone; bias [out].

    Args:
        options: in_features, out_features, bits, bias, dtype, device, as in `QuantLinear`.
    """

    kind: Tensor
    steps: Tensor | None

    def __init__(self, *, group_size: int, int8_scales: bool, **options: Any) -> None:
        super().__init__(group_size=min(group_size, options["in_features"]), **options)
        groups = self.scale.shape[1]
        self.register_buffer("kind", self.qweight.new_zeros(self.out_features, -(-groups // 4)))
        self.register_buffer("steps", self.qweight.new_zeros(self.scale.shape) if int8_scales else None)
        self.scale = self.scale[:, :1].clone() if int8_scales else self.scale

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor | None) -> BitModLinear:
        """Round weight [out, in], computed in float32."""
        w = F.pad(weight.float().contiguous(), (0, -weight.shape[1] % self.group_size))
        w = w.unflatten(1, (-1, self.group_size))
        kind, s = choose(w, self.bits)
        self.kind.copy_(pack_bits(kind.to(torch.uint8), 2))
        if self.steps is None:
            self.scale.copy_(s)
        else:
            self.scale.copy_(s.amax(1, keepdim=True) / 127)
            self.steps.copy_((s / self.scale.clamp_min(1e-37)).round().clamp(1, 127))
        x, q = w / self.scales().clamp_min(1e-37).unsqueeze(-1), torch.zeros_like(w, dtype=torch.uint8)
        for t, values in enumerate(types(self.bits).to(w)):
            q = torch.where((kind == t).unsqueeze(-1), nearest(x, values).to(torch.uint8), q)
        self.qweight.copy_(pack_bits(q.flatten(1)[:, : self.in_features].contiguous(), self.bits))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        return self

    def geometry(self) -> dict[str, Any]:
        own = {"bits": self.bits, "group_size": self.group_size, "int8_scales": self.steps is not None}
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return own | sizes | {"bias": self.bias is not None, "dtype": dtype_name(self.dtype)}

    def scales(self) -> Tensor:
        """s^ of every group, [out, G] float32."""
        return self.scale if self.steps is None else self.scale * self.steps

    def kinds(self) -> Tensor:
        """t of every group, [out, G] uint8."""
        return unpack_bits(self.kind, 2, size=self.scales().shape[1], signed=False)

    def quantized(self) -> Quantized:
        """W^ [out, in] float32, with scales of 1: the core's products and gradients go through it."""
        n, each = self.in_features, self.group_size
        q = unpack_bits(self.qweight, self.bits, size=n, signed=False)
        kind, s = (t.repeat_interleave(each, 1)[:, :n] for t in (self.kinds(), self.scales()))
        w = s * types(self.bits).to(s)[kind.int(), q.int()]
        return Quantized(q=w, scale=w.new_ones(len(w), 1), zero=None, bits=self.bits, group_size=None)

    def kernel_for(self, device: torch.device, dtype: torch.dtype) -> Kernel:
        """None of the kernels of integers."""
        return "dequantize"


class BitMoD(Plugin):
    """See the module."""

    Config = BitmodConfig
    claims = {Claim.QUANTIZES, Claim.FOLDS_PREVIOUS}
    config: BitmodConfig

    def linears(self, model: ModelView) -> list[BoundSite]:
        """The targets, fused ones whole."""
        sites = model.linears(self.config.targets, whole=True)
        if other := next((site for site in sites if site.kind not in ("linear", "quantized")), None):
            said = f"{other.path}.{other.parameter} holds {other.kind} ({other.role}), no linear layer"
            raise ArchitectureError(f"{model.owner}: {said}", hint=f"targets: 'all !{other.role}'")
        return sites

    def suits(self, model: ModelView) -> None:
        self.linears(model)

    def layer(self, site: Site, device: torch.device | str) -> BitModLinear:
        """The packed layer of a site, still empty."""
        return BitModLinear(
            bits=self.config.bits, group_size=self.config.group_size, int8_scales=self.config.int8_scales,
            in_features=site.in_features, out_features=site.out_features, bias=site.bias is not None,
            dtype=dtype_name(site.weight.dtype), device=device,
        )  # fmt: skip

    @hookimpl
    def compress(self, model: ModelView) -> None:
        sites = self.linears(model)
        if bad := next((site for site in sites if not bool(site.weight.isfinite().all())), None):
            said = f"{model.owner}: {bad.path} holds numbers that are not finite"
            raise ModelError(said, hint="repair the model, or leave the layer out of targets")
        for site in sites:
            site.replace(self.layer(site, site.weight.device).take(site.weight, site.bias))

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        return [(site, self.layer(site, "meta").nbytes_packed) for site in self.linears(model)]

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Bytes of the packed layers, bits of a weight (without biases), and the share of groups with extra asymmetry;
        0 before there are any."""
        layers = evaluation.add_packed(self)
        kinds = [float(k) for layer in layers for k in (layer.kinds() > 1).flatten()]
        evaluation.add("asymmetric", sum(kinds) / max(len(kinds), 1))
