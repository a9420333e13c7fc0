"""One place of a model, under its canonical name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftx.errors import ArchitectureError
from peftx.kernel.slots import Rows, base_class

LINEAR_KINDS = ("linear", "experts", "router", "quantized")


@dataclass(eq=False)
class Site:
    """A matrix, or a module, with its role.

    `path` is the module's name in the model, `role` the canonical one (`attention.q`), `layer` its index in `tower`
    (None outside the layers). Sizes are those of the role, not of the fused matrix that may hold it.
    """

    role: str
    path: str
    module: nn.Module
    kind: str
    """linear (nn.Linear, Conv1D), quantized, experts, router, embedding, norm, convolution or block."""
    tower: str = ""
    layer: int | None = None
    parameter: str = "weight"
    rows: Rows | None = None
    fused: tuple[str, ...] = ()
    """All roles of the matrix, if it holds several."""
    read: bool = False
    """Another module reads the weight without calling this one."""
    called: bool = False
    """It does so only where a fused kernel runs, and calls this one elsewhere."""
    transposed: bool = False
    """The parameter is stored [..., in, out]."""
    bias_name: str = "bias"
    """The parameter that is added to the product."""
    apart: bool = False
    """`all` does not mean it."""

    @property
    def in_all(self) -> bool:
        """Does the word `all` mean it: the linear layers of the towers, no routers, heads and projections."""
        inside = self.layer is not None and self.kind in ("linear", "experts", "quantized")
        return inside and not self.apart and self.role.partition(".")[0] != "router"

    @property
    def names(self) -> tuple[str, ...]:
        """What a regular expression finds it by: the module's raw name, and of stacked experts the parameter's too."""
        return (self.path, f"{self.path}.{self.parameter}") if self.kind == "experts" else (self.path,)

    @property
    def key(self) -> str:
        """Unique in the model: the path, and the role where several share the module."""
        return f"{self.path}@{self.role}" if self.fused or self.kind == "experts" else self.path

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in] for matrices (leading: experts), else the parameter's own shape."""
        if self.kind == "quantized":
            out = self.module.out_features if self.rows is None else self.rows.size
            return (out, self.module.in_features)
        parameter = self.module._parameters.get(self.parameter)
        if parameter is None:
            return ()
        shape = tuple(parameter.shape)
        if self.turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if self.rows is not None:
            shape = (*shape[:-2], self.rows.size, shape[-1])
        return shape

    @property
    def turned(self) -> bool:
        """Is the matrix stored as [..., in, out]."""
        return self.transposed or issubclass(base_class(self.module), Conv1D)

    @property
    def batch(self) -> tuple[int, ...]:
        """(experts,) for stacked experts, else ()."""
        return self.shape[:-2]

    @property
    def out_features(self) -> int:
        """Size of the output's last dimension: out for a matrix, width of an embedding or norm."""
        return self._sized()[-1 if self.kind in ("embedding", "norm") else -2]

    @property
    def in_features(self) -> int:
        return self._sized()[-1]

    def _sized(self) -> tuple[int, ...]:
        if not self.shape:
            raise ArchitectureError(
                f"{self.path} ({self.kind}) has no '{self.parameter}', so it has no feature sizes"
            )
        return self.shape

    @property
    def weight(self) -> Tensor:
        """The matrix [..., out, in] as a view (interleaved rows: a copy); dequantized if it is quantized."""
        weight = self.module._parameters[self.parameter] if self.kind != "quantized" else self.module.weight
        weight = weight.mT if self.turned else weight
        return weight if self.rows is None else self.rows.take(weight, -2)

    @property
    def bias(self) -> Tensor | None:
        """[out] or None."""
        # A quantized layer's is a buffer.
        bias = self.module.bias if self.kind == "quantized" else self.module._parameters.get(self.bias_name)
        return bias if bias is None or self.rows is None else self.rows.take(bias)

    @property
    def dtype(self) -> torch.dtype:
        return next((parameter.dtype for parameter in self.module.parameters()), torch.float32)

    def __repr__(self) -> str:
        return f"Site({self.role}, {self.path}, {self.kind}, {'x'.join(map(str, self.shape))})"
