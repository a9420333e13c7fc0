"""`QuantLinear`: a linear layer whose weight is packed integers.

    weight-only   y = x W^T + b,                        W = (q - z_w) * s_w
    W*A*          y = s_x s_w (x_q - z_x)(q - z_w)^T + b,   the product in integers

It trains what stands on top of it: the gradient to the input is grad_y W with W dequantized for the moment, and
rounding passes gradients straight through (zero where a static scale clips).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftx.errors import UnsupportedError
from peftx.kernel.slots import packed
from peftx.toolkits.compression.activations import token_scale
from peftx.toolkits.compression.autograd import QuantMatmul
from peftx.toolkits.compression.kernels import (
    Kernel,
    KernelLayout,
    choose,
    int4_matmul,
    int4_pack,
    integer_linear,
    table_matmul,
    table_pack,
    to_signed,
)
from peftx.toolkits.compression.names import check_choice, dtype_name, float_dtype
from peftx.toolkits.compression.packing import (
    Quantized,
    check_bits,
    dequantize,
    from_integer,
    group_count,
    pack_in_range,
    packed_width,
    quantize,
    to_integer,
    unpack_bits,
)

__all__ = ["Activation", "Kernel", "QuantLinear"]

Activation = Literal["dynamic-token", "static-tensor"]


@packed
class QuantLinear(nn.Module):
    """A frozen linear layer in packed storage.

    Buffers, all saved:
        qweight: [out, ceil(in*bits/8)] uint8; for 8 bits [out, in] int8 (symmetric) or uint8.
        scale: [out, groups] in `scale_dtype`.
        zero: [out, groups] uint8, only when `symmetric=False`.
        bias: [out], only when `bias=True`.
        input_scale: [] float32, only for "static-tensor"; input_zero: [] uint8, then only when `act_symmetric=False`.
    Scales keep their dtype when the module is cast (`model.bfloat16()`): the weight stays what it was.

    Args:
        activation: None = weights only; "dynamic-token" = one scale a token, from its largest magnitude;
            "static-tensor" = the calibrated `input_scale`.
        act_bits: 2..8, where activations are quantized.
        dtype: what `weight` and `bias` come in (the model's dtype), by name, as `scale_dtype`, so that
            `geometry()` is JSON.
        cache_kernel_weight: kernels want the integers in a layout of their own. That is a second copy in memory,
            made at the first call, never saved, and dropped when the layer is moved or copied: int8 where weights
            below 8 bits are multiplied in integers, half a byte a weight for "int4-pack", one byte for "table". False
            keeps none: integer products then make it anew at each call, which is slow, and float32 on CPU is
            dequantized. (Before `torch.compile`, call the layer once: a compiled call uses the copy but makes none,
            and has no use for that of "table".)

    Raises:
        UnsupportedError: an option outside what is written here.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = True,
        bias: bool = True,
        activation: Activation | None = None,
        act_bits: int = 8,
        act_symmetric: bool = True,
        dtype: str = "float32",
        scale_dtype: str = "float32",
        cache_kernel_weight: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_bits(bits)
        check_bits(act_bits, "act_bits")
        if activation is not None:
            check_choice(activation, get_args(Activation), "activation")
        if group_size is not None and group_size < 1:
            raise UnsupportedError(f"group_size={group_size} is below 1")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.activation, self.act_bits, self.act_symmetric = activation, act_bits, act_symmetric
        self.cache_kernel_weight = cache_kernel_weight
        self.dtype = float_dtype(dtype, "dtype")
        scale_type = float_dtype(scale_dtype, "scale_dtype")

        width = packed_width(in_features, bits)
        groups = group_count(in_features, group_size)
        stored = torch.int8 if bits == 8 and symmetric else torch.uint8
        self.register_buffer("qweight", torch.zeros(out_features, width, dtype=stored, device=device))
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=scale_type, device=device))
        zero = None if symmetric else torch.zeros(out_features, groups, dtype=torch.uint8, device=device)
        self.register_buffer("zero", zero)
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=self.dtype, device=device) if bias else None
        )
        static = activation == "static-tensor"
        self.register_buffer("input_scale", torch.ones((), device=device) if static else None)
        input_zero = (
            torch.zeros((), dtype=torch.uint8, device=device) if static and not act_symmetric else None
        )
        self.register_buffer("input_zero", input_zero)
        self._kernel_layout: KernelLayout | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = True,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        activation: Activation | None = None,
        act_bits: int = 8,
        act_symmetric: bool = True,
        input_scale: Tensor | float | None = None,
        input_zero: Tensor | int | None = None,
        scale_dtype: torch.dtype | None = None,
        cache_kernel_weight: bool = True,
    ) -> QuantLinear:
        """Quantize an `nn.Linear`, or a transformers `Conv1D` (transposed: always stored [out, in]), to the nearest.

        `scale`, `zero` and `scale_dtype` as in `packing.quantize`; the rest as in the constructor.

        Raises:
            UnsupportedError: another module, or one that carries modules of its own (deltas): they would be lost.
        """
        if not isinstance(linear, (nn.Linear, Conv1D)):
            raise UnsupportedError(f"{type(linear).__name__} is neither nn.Linear nor Conv1D")
        carried = [name for name, _ in linear.named_children()]
        if carried:
            raise UnsupportedError(
                f"this {type(linear).__name__} carries {', '.join(carried)}, which quantizing would drop",
                hint="merge or detach what is attached first",
            )
        weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.t()
        quantized = quantize(
            weight,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            scale=scale,
            zero=zero,
            scale_dtype=scale_dtype,
        )
        return cls.from_quantized(
            quantized,
            bias=linear.bias,
            dtype=weight.dtype,
            activation=activation,
            act_bits=act_bits,
            act_symmetric=act_symmetric,
            input_scale=input_scale,
            input_zero=input_zero,
            cache_kernel_weight=cache_kernel_weight,
        )

    @classmethod
    def from_quantized(
        cls,
        quantized: Quantized,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: Activation | None = None,
        act_bits: int = 8,
        act_symmetric: bool = True,
        input_scale: Tensor | float | None = None,
        input_zero: Tensor | int | None = None,
        cache_kernel_weight: bool = True,
    ) -> QuantLinear:
        """Pack integers that a method has chosen itself: `quantized.q` is [out, in]."""
        out_features, in_features = quantized.q.shape
        module = cls(
            in_features=in_features,
            out_features=out_features,
            bits=quantized.bits,
            group_size=quantized.group_size,
            symmetric=quantized.symmetric,
            bias=bias is not None,
            activation=activation,
            act_bits=act_bits,
            act_symmetric=act_symmetric,
            dtype=dtype_name(dtype),
            scale_dtype=dtype_name(quantized.scale.dtype),
            cache_kernel_weight=cache_kernel_weight,
            device=quantized.q.device,
        )
        module.qweight = (
            quantized.q.clone() if quantized.bits == 8 else pack_in_range(quantized.q, quantized.bits)
        )
        module.scale = quantized.scale.detach().clone()
        module.zero = None if quantized.zero is None else quantized.zero.clone()
        module.bias = None if bias is None else bias.detach().to(dtype).clone()
        module._set_input_scale(input_scale, input_zero)
        return module

    def _set_input_scale(self, scale: Tensor | float | None, zero: Tensor | int | None) -> None:
        if (self.input_scale is None) != (scale is None):
            raise UnsupportedError(
                f"activation={self.activation!r}, input_scale={scale}: one needs the other"
            )
        if (self.input_zero is None) != (zero is None):
            raise UnsupportedError(f"act_symmetric={self.act_symmetric}, input_zero={zero}: they disagree")
        if scale is None or self.input_scale is None:
            return
        self.input_scale = torch.as_tensor(scale).detach().to(self.input_scale).reshape(())
        if not float(self.input_scale) > 0:
            raise UnsupportedError(f"input_scale={float(self.input_scale)} is not positive")
        if zero is not None and self.input_zero is not None:
            self.input_zero = torch.as_tensor(zero).to(self.input_zero).reshape(())

    def geometry(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able: `QuantLinear(**geometry)` takes this module's state dict."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "bias": self.bias is not None,
            "activation": self.activation,
            "act_bits": self.act_bits,
            "act_symmetric": self.act_symmetric,
            "dtype": dtype_name(self.dtype),
            "scale_dtype": dtype_name(self.scale.dtype),
            "cache_kernel_weight": self.cache_kernel_weight,
        }

    def quantized(self) -> Quantized:
        """The unpacked integers with their scales; q is [out, in]."""
        q = self.qweight
        if self.bits < 8:
            q = unpack_bits(q, self.bits, size=self.in_features, signed=self.symmetric)
        return Quantized(q=q, scale=self.scale, zero=self.zero, bits=self.bits, group_size=self.group_size)

    @property
    def weight(self) -> Tensor:
        """[out, in] in `dtype`: dequantized at each access, never stored."""
        return dequantize(self.quantized(), self.dtype)

    @property
    def nbytes_packed(self) -> int:
        """Bytes of what is saved: packed integers, scales, zeros, bias."""
        return sum(buffer.nbytes for buffer in self._buffers.values() if buffer is not None)

    @property
    def nbytes_resident(self) -> int:
        """Bytes in memory now: what is saved and, after a first call, the copy in a kernel's layout."""
        cached = self._kernel_layout
        if cached is None:
            return self.nbytes_packed
        return self.nbytes_packed + sum(t.nbytes for t in cached.tensors if t is not self.qweight)

    @property
    def kernel(self) -> Kernel:
        """What a call with inputs of the module's own dtype and device runs."""
        return self.kernel_for(self.qweight.device, self.dtype)

    def kernel_for(self, device: torch.device, dtype: torch.dtype) -> Kernel:
        """What a call with inputs of this device and dtype runs; see `kernels.choose`."""
        return choose(
            device, dtype, out_features=self.out_features, in_features=self.in_features, bits=self.bits,
            group_size=self.group_size, integers=self.activation is not None, keeps=self.cache_kernel_weight,
        )  # fmt: skip

    def extra_repr(self) -> str:
        acts = "" if self.activation is None else f", {self.activation} a{self.act_bits}"
        return f"{self.in_features}, {self.out_features}, w{self.bits}, group_size={self.group_size}{acts}"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        """Moves and casts, but scales only move: a cast scale would be another weight."""
        kept = {id(t) for t in (self.scale, self.input_scale) if t is not None}

        def keep_scales(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in kept and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_scales, recurse)
        self._kernel_layout = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of `x` (under autocast: in autocast's)."""
        if x.shape[-1] != self.in_features:
            raise UnsupportedError(f"input has {x.shape[-1]} features, the layer takes {self.in_features}")
        kind = x.device.type
        autocast = not x.is_meta and torch.is_autocast_enabled(kind)  # of meta torch raises an error
        if autocast:
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            rows = x.reshape(-1, self.in_features)
            if torch.is_grad_enabled() and x.requires_grad:
                y = QuantMatmul.apply(rows, self)
            else:
                y = self.product(rows)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x W^T [rows, out], by the kernel that fits. No autograd."""
        kernel = self.kernel_for(x.device, x.dtype)
        if kernel == "dequantize" or (kernel == "table" and torch.compiler.is_compiling()):
            return F.linear(x, dequantize(self.quantized(), x.dtype))
        if kernel == "table":
            layout = self._layout("table")
            return table_matmul(x, *layout, group_size=self.group_size, out_features=self.out_features)
        if kernel == "int4-pack":
            packed, scales = self._layout("int4-pack")
            return int4_matmul(x, packed, scales)
        scale, zero = self.activation_scale(x)
        x_q = to_integer(x, scale, zero, bits=self.act_bits)
        if kernel == "emulate":
            x_hat = from_integer(x_q, scale, zero, torch.float32)
            return F.linear(x_hat, dequantize(self.quantized(), torch.float32)).to(x.dtype)
        w_q, w_sum = self._layout("int8-matmul")
        w_zero = None if self.zero is None else self.zero.view(-1)
        return integer_linear(x_q, scale, zero, w_q, w_sum, self.scale.view(-1), w_zero).to(x.dtype)

    def activation_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What rounds x [rows, in]: scale and zero point, [rows, 1] or []. A subclass may choose others."""
        if self.activation == "static-tensor":
            return self.input_scale, self.input_zero
        return token_scale(x, bits=self.act_bits, symmetric=self.act_symmetric)

    def _layout(self, kernel: Kernel) -> tuple[Tensor, ...]:
        """The weight as `kernel` wants it: (int8 [out, in], row sums [out] int32), or what `int4_pack` or
        `table_pack` makes."""
        own = self._buffers  # thrice faster than by attribute, which counts where a product takes 0.1 ms
        cached, sources = self._kernel_layout, (own["qweight"], own["scale"], own["zero"])
        # A traced graph can neither ask for versions nor keep a copy.
        compiling = torch.compiler.is_compiling()
        if cached is not None and (cached.kernel == kernel if compiling else cached.serves(kernel, sources)):
            return cached.tensors
        if compiling:
            return self._make_layout(kernel)
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._make_layout(kernel)
        if self.cache_kernel_weight:
            self._kernel_layout = KernelLayout.of(kernel, sources, tensors)
        return tensors

    def _make_layout(self, kernel: Kernel) -> tuple[Tensor, ...]:
        q = self.quantized().q
        if kernel == "int4-pack":
            return int4_pack(q, self.scale, self.zero, group_size=self.group_size)
        if kernel == "table":
            return table_pack(q, self.scale, self.zero, bits=self.bits, group_size=self.group_size)
        w_q = to_signed(q)
        return w_q, w_q.sum(dim=-1, dtype=torch.int32)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own layout."""
        return {**self.__dict__, "_kernel_layout": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._kernel_layout = None
        super()._load_from_state_dict(*args)
