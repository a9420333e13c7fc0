"""The gradient of a quantized product."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from peftx.toolkits.compression.activations import in_range
from peftx.toolkits.compression.packing import Quantized, dequantize


class Layer(Protocol):
    """What the gradient needs of a layer: `QuantLinear` has it."""

    input_scale: Tensor | None
    input_zero: Tensor | None
    act_bits: int

    def product(self, x: Tensor) -> Tensor: ...

    def quantized(self) -> Quantized: ...


class QuantMatmul(torch.autograd.Function):
    """The product with a gradient to its input only; no float weight outlives the call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Layer) -> Tensor:
        ctx.module = module
        if module.input_scale is not None:  # only a given scale can clip
            ctx.save_for_backward(in_range(x, module.input_scale, module.input_zero, bits=module.act_bits))
        return module.product(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad_x = grad @ dequantize(ctx.module.quantized(), grad.dtype)
        for passes in ctx.saved_tensors:
            grad_x = grad_x * passes
        return grad_x, None
