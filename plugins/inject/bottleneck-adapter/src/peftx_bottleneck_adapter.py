"""Bottleneck adapters: small networks with a skip connection inside each layer, in three places.

    A(h) = U f(D h + b_D) + b_U        h: [d], D: [m, d], U: [d, m], f a nonlinearity, m much smaller than d

houlsby ("Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751): behind the attention and behind the
feed-forward block, before the residual sum; the norms train as well.

    h' = h + A(h)                      h what the block gives

pfeiffer ("AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv:2005.00247): one, behind the
feed-forward's residual sum. In a post-norm layer it reads what the norm gives, and adds to what goes into the norm:

    y = LN(z + A(LN(z)))               post-norm, z the sum
    y = z + A(z)                       pre-norm

parallel ("Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366): one, beside the
feed-forward block.

    h' = h + s A(x)                    x what goes into the block, h what it gives

U = 0 and b = 0 at the start, so every form starts as the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import BoundSite, Claim, Delta, ModelView, Plugin, PluginConfig, hookimpl
from peftx.kernel.slots import kind_of

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": F.tanh,
}


class BottleneckAdapterConfig(PluginConfig):
    """Options of bottleneck adapters; what is left out follows from the form, as its paper has it."""

    form: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby", description="where adapters stand, and what they read"
    )
    bottleneck: int = Field(64, ge=1, description="m, the width of the adapters")
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] | None = Field(
        None, description="f; gelu of houlsby, relu of the others if left out"
    )
    scale: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="s; 4 of parallel, 1 of the others if left out"
    )
    train_norms: bool | None = Field(
        None, description="train the norms of the base as well; houlsby does if left out"
    )


class Adapter(Delta):
    """y + s A(y): behind a block.

    Args:
        features: d. bottleneck: m. nonlinearity: f. scale: s.
    """

    def __init__(self, features: int, *, bottleneck: int, nonlinearity: str, scale: float) -> None:
        super().__init__()
        self.f, self.scale = NONLINEARITIES[nonlinearity], scale
        self.down = nn.Linear(features, bottleneck)  # D: uniform within 1 / sqrt(d)
        self.up = nn.Linear(bottleneck, features)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def change(self, h: Tensor) -> Tensor:
        """s A(h), [..., d]."""
        return self.scale * self.up(self.f(self.down(h)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(y)


class NormAdapter(Adapter):
    """LN(z + s A(LN(z))): around the norm behind a residual sum z."""

    forward = Delta.forward  # it stands around the norm, not behind it

    def around(self, inner: Callable[..., Any], z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(z + self.change(inner(z, *args, **kwargs)), *args, **kwargs)


class Input(Delta):
    """Notes what goes into a feed-forward block, where its last matrix alone can be edited."""

    x: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.x = x
        return y


class ParallelAdapter(Adapter):
    """y + s A(x): beside a block.

    Args:
        seen: what notes x, if it is not the input of the module that this one stands on. Others: see `Adapter`.
    """

    def __init__(self, features: int, *, seen: Input | None = None, **options: Any) -> None:
        super().__init__(features, **options)
        self.seen = (seen,)  # in a tuple: no child of this module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (seen,) = self.seen
        if seen is not None:
            assert seen.x is not None
            x, seen.x = seen.x, None
        return y + self.change(x).view_as(y)  # some blocks of experts give tokens without rows


class BottleneckAdapter(Plugin):
    """See the module."""

    Config = BottleneckAdapterConfig
    claims = {Claim.IDENTITY_AT_START, Claim.TRAINS_BASE}
    architectures = ("mixtral", "bloom", "bart")
    config: BottleneckAdapterConfig

    def claimed(self) -> frozenset[Claim]:
        norms, houlsby = self.config.train_norms, self.config.form == "houlsby"
        self.norms = houlsby if norms is None else norms
        self.options: dict[str, Any] = {
            "bottleneck": self.config.bottleneck,
            "nonlinearity": self.config.nonlinearity or ("gelu" if houlsby else "relu"),
            "scale": self.config.scale or (4.0 if self.config.form == "parallel" else 1.0),
        }
        return self.claims if self.norms else self.claims - {Claim.TRAINS_BASE}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        form, blocks = self.config.form, model.blocks("mlp")
        # The sum of a pre-norm tower's layers is normed behind the last one.
        pre_norm = {site.tower for site in model.norms() if site.role == "norm.final"}
        for site in blocks + (model.blocks("attention") if form == "houlsby" else []):
            d = model.towers[site.tower].hidden_size
            if form == "houlsby":
                site.attach(Adapter(d, **self.options))
            elif form == "parallel":
                site.attach(ParallelAdapter(d, seen=self.input_of(model, site), **self.options))
            elif site.tower in pre_norm:
                model.site("block.layer", tower=site.tower, layer=site.layer).attach(
                    Adapter(d, **self.options)
                )
            else:
                norm = model.site("norm.mlp", tower=site.tower, layer=site.layer)
                norm.attach(NormAdapter(d, **self.options))
        if self.norms:
            for site in model.norms():
                site.train()

    @staticmethod
    def input_of(model: ModelView, site: BoundSite) -> Input | None:
        """What notes the input of a feed-forward block; None where the block's own module is called on it."""
        if kind_of(site.module) == "output":
            return None
        return model.site("mlp.up", tower=site.tower, layer=site.layer).attach(Input())
