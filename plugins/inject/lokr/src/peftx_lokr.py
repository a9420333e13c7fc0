"""LoKr: the update of a frozen weight is a Kronecker product; LoHa: a Hadamard product.

"KronA: Parameter Efficient Tuning with Kronecker Adapter" (arXiv:2212.10650) and "Navigating Text-To-Image
Customization: From LyCORIS Fine-Tuning to Model Evaluation" (arXiv:2309.14859):

    h = W x + b + s (w1 (x) w2) x          w1: [a, c], w2: [b, d] with a b = out, c d = in
    (w1 (x) w2) x = w1 X w2^T              X: x as a matrix [c, d]; the product is never formed

w2 is itself of low rank, w2 = w2_a w2_b with w2_a: [b, r], w2_b: [r, d], where r is less than half of its longer side,
else a whole matrix; with `decompose_both` so is w1. The rank of the update is the product of the ranks, so that a whole
w1 gives full rank. a b and c d are the nearest to a square, or such that a and c are at most `factor`.

`hadamard` is "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning" (arXiv:2108.06098),
LoHa in LyCORIS:

    h = W x + b + s ((w1_a w1_b) * (w2_a w2_b)) x          w_a: [out, r], w_b: [r, in]: rank up to r^2

All factors start Kaiming-uniform but the last one of w2, which is zero, so the model starts unchanged; s = alpha / r.
Merged, W' = W + s (w1 (x) w2), they cost nothing.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, PeftFormat, Plugin, PluginConfig, Targets, hookimpl
from peftx.errors import AdapterError, OptionError
from peftx.peft_format import Settings, targets_of


class LokrConfig(PluginConfig):
    """Options of LoKr."""

    rank: int = Field(8, ge=1, description="r, the rank of w2 (and w1), or of both factors of LoHa")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; the rank if left out, so s = 1"
    )
    form: Literal["kronecker", "hadamard"] = Field("kronecker", description="LoKr, or LoHa")
    factor: int | None = Field(
        None,
        ge=1,
        description="LoKr: a and c, or the largest divisors below it; near the square root if left out",
    )
    decompose_both: bool = Field(
        False, description="LoKr: w1 of low rank too, where r is below half its size"
    )
    targets: Targets = Field(Targets("all"), description="linear layers to adapt")


def split(dimension: int, factor: int | None) -> tuple[int, int]:
    """(m, n), m n = dimension, m <= n unless m is the factor itself: the largest m that is at most `factor`.

    Args:
        factor: none for m and n as near to each other as they can be.
    """
    if factor is not None and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor is None else min(factor, math.isqrt(dimension))
    m = max(m for m in range(1, most + 1) if dimension % m == 0)
    return m, dimension // m


class Product(Delta):
    """An update of matrices that are whole or the product of two.

    Args:
        scale: s. batch: leading dimensions of stacked experts' weights.
    """

    def __init__(self, *, scale: float, batch: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.scale, self.batch = scale, batch

    def matrix(self, name: str, rows: int, columns: int, rank: int | None, *, zero: bool = False) -> None:
        """`name` [rows, columns], or `name`_a `name`_b of this rank; the last one Kaiming-uniform or zero."""
        shapes = (
            {name: (rows, columns)}
            if rank is None
            else {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
        )
        for key, shape in shapes.items():
            bound = 0.0 if zero and key == list(shapes)[-1] else 1 / math.sqrt(shape[1])  # a = sqrt(5)
            self.register_parameter(
                key, nn.Parameter(torch.empty(*self.batch, *shape).uniform_(-bound, bound))
            )

    def parts(self, name: str) -> list[Tensor]:
        """[w], or [w_a, w_b]."""
        own = self._parameters
        return [own[name]] if name in own else [own[f"{name}_a"], own[f"{name}_b"]]

    def update(self) -> Tensor:
        """delta W, [..., out, in]."""
        raise NotImplementedError

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.update().to(weight.dtype), bias


class LokrDelta(Product):
    """h = y + s (w1 (x) w2) x.

    Args:
        in_features, out_features: c d and a b. rank: r. config: factor, decompose_both. others: as for `Product`.
    """

    def __init__(self, in_features: int, out_features: int, config: LokrConfig, **others: Any) -> None:
        super().__init__(**others)
        r = config.rank
        (a, b), (c, d) = split(out_features, config.factor), split(in_features, config.factor)
        self.shape = c, d
        self.matrix("lokr_w1", a, c, r if config.decompose_both and r < max(a, c) / 2 else None)
        self.matrix("lokr_w2", b, d, r if r < max(b, d) / 2 else None, zero=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        X = x.to(y.dtype).unflatten(-1, self.shape)
        for name in ("lokr_w2", "lokr_w1"):  # X -> (X w2^T)^T -> (w1 X w2^T)
            for w in reversed(self.parts(name)):
                X = X @ w.mT.to(y.dtype)
            X = X.mT
        return torch.add(y, X.flatten(-2), alpha=self.scale)

    def update(self) -> Tensor:
        w1, w2 = (reduce(torch.matmul, self.parts(name)) for name in ("lokr_w1", "lokr_w2"))
        product = torch.einsum("...ac,...bd->...abcd", w1, w2)
        return self.scale * product.flatten(-4, -3).flatten(-2)


class LohaDelta(Product):
    """h = y + s ((w1_a w1_b) * (w2_a w2_b)) x.

    Args:
        in_features, out_features: of the layer. config: rank. others: as for `Product`.
    """

    def __init__(self, in_features: int, out_features: int, config: LokrConfig, **others: Any) -> None:
        super().__init__(**others)
        self.matrix("hada_w1", out_features, in_features, config.rank)
        self.matrix("hada_w2", out_features, in_features, config.rank, zero=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x.to(y.dtype), self.update().to(y.dtype))

    def update(self) -> Tensor:
        (a1, b1), (a2, b2) = self.parts("hada_w1"), self.parts("hada_w2")
        return self.scale * (a1 @ b1) * (a2 @ b2)


W1 = ("lokr_w1", "lokr_w1_a", "lokr_w1_b")
W2 = ("lokr_w2", "lokr_w2_a", "lokr_w2_b")
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def lokr_options(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says of LoKr."""
    factor = settings.get("decompose_factor", -1)
    return {
        **_options(settings, settings.adapted(*W1)),
        "factor": None if factor == -1 else factor,
        "decompose_both": bool(settings["decompose_both"]),
    }


def loha_options(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says of LoHa."""
    return {**_options(settings, settings.adapted("hada_w1_b")), "form": "hadamard"}


def _options(settings: Settings, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    # Of convolutions, of training alone, or of the start.
    for name in (
        "use_effective_conv2d",
        "rank_dropout",
        "rank_dropout_scale",
        "module_dropout",
        "init_weights",
    ):
        settings[name]
    for name, usual in (("rank_pattern", settings.get("r", 8)), ("alpha_pattern", settings.get("alpha", 8))):
        for path in shapes:
            found = settings.pattern(name, path)
            if found not in (None, usual):
                raise AdapterError(
                    f"lokr: the adapter has {found} by {name} for {path}, and {usual} elsewhere; the plugin "
                    "has one for all",
                    hint="load it with PEFT, and merge it into the base: PeftModel.merge_and_unload",
                )
    return {
        "rank": settings.get("r", 8),
        "alpha": float(settings.get("alpha", 8)),
        "targets": targets_of(shapes),
    }


def settings_of(config: LokrConfig) -> dict[str, Any]:
    """For `adapter_config.json`."""
    found: dict[str, Any] = {"r": config.rank, "alpha": config.rank if config.alpha is None else config.alpha}
    if config.form == "hadamard":
        return found
    factor = -1 if config.factor is None else config.factor
    return found | {"decompose_factor": factor, "decompose_both": config.decompose_both}


class Lokr(Plugin):
    """See the module."""

    Config = LokrConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}
    architectures = ("mixtral",)
    config: LokrConfig
    peft = (
        PeftFormat(
            "LOKR",
            tensors={name: name for name in (*W1, *W2)},
            fused=False,  # a Kronecker product is of the whole matrix
            options=lokr_options,
            settings=settings_of,
            written=lambda config: config.form == "kronecker",
        ),
        PeftFormat(
            "LOHA",
            tensors={name: name for name in HADAMARD},
            divided={"hada_w1_a": 0, "hada_w2_a": 0},
            options=loha_options,
            settings=settings_of,
            written=lambda config: config.form == "hadamard",
        ),
    )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        hadamard = self.config.form == "hadamard"
        if hadamard and (self.config.factor is not None or self.config.decompose_both):
            raise OptionError(
                "lokr: form hadamard has no Kronecker product, which factor and decompose_both are of",
                hint="leave them out, or form: kronecker",
            )
        scale = 1.0 if self.config.alpha is None else self.config.alpha / self.config.rank
        for site in model.linears(self.config.targets):
            if hadamard:
                site.check_rank(self.config.rank)
            delta = LohaDelta if hadamard else LokrDelta
            site.attach(
                delta(site.in_features, site.out_features, self.config, scale=scale, batch=site.batch)
            )
