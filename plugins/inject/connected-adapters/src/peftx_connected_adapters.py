"""Connected adapters: a small network behind each layer, and a side path past the frozen layers that links them.

"Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval" (arXiv:2208.09847).
Adapters in the layers hear of the loss, and of each other, through frozen layers. Modules aside of the model make one
path of them. Behind layer l of L, which gives z_l:

    h_l = z_l + A_l(z_l + s_{l-1})        inside: what the next layer reads; s_0 = 0
    s_l = s_{l-1} + F_l(h_l)              aside: s never goes through a layer of the model
    out = h_L + s_L                       behind the last layer

    A_l, F_l: h -> U gelu(D h + b_D) + b_U        of width m inside and k aside

U and b are zero at the start, so the model starts unchanged. The path from the loss to A_l, and the one from A_{l+1}
to A_l, has F_l on it and no frozen layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, hookimpl
from peftx.errors import UnsupportedError
from peftx.kernel.call import Call


class ConnectedAdaptersConfig(PluginConfig):
    """Options of connected adapters; a layer trains 2 (m + k) d + m + k + 2 d numbers."""

    inside: int = Field(64, ge=1, description="m, the width of the adapters behind layers")
    aside: int = Field(16, ge=1, description="k, the width of the networks of the side path")


class Bottleneck(nn.Module):
    """U gelu(D h + b_D) + b_U, [..., d] to [..., d]; 0 at the start."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d, width), nn.Linear(width, d)  # D: uniform within 1 / sqrt(d)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        low = h.to(self.down.weight.dtype)  # Mamba hands on float32 in a model of half precision
        return self.up(F.gelu(self.down(low))).to(h.dtype)  # type: ignore[no-any-return]


class Connected(Delta):
    """What stands behind one layer: its output [..., d], edited, goes on, and s goes aside.

    Args:
        d: width of the model. config: m and k. call: what the model is called on; s of this call is kept with it.
        path: the name of the side path, unique in the model. index: place of the layer on it, from 0. last: is it the
            last.

    Raises:
        UnsupportedError: the layer runs, and the s of those before it is not there, or cut off from their gradients.
    """

    def __init__(
        self, d: int, config: ConnectedAdaptersConfig, call: Call, path: str, index: int, last: bool
    ) -> None:
        super().__init__()
        self.inside, self.aside = Bottleneck(d, config.inside), Bottleneck(d, config.aside)
        self.call, self.path, self.index, self.last = call, path, index, last

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        states: dict[Any, Any] = self.call.once(self.path, dict)
        before = self.before(x, states)
        h = y + self.inside(y if before is None else y + before)
        s = self.aside(h) if before is None else before + self.aside(h)
        states["s"] = s
        return h + s if self.last else h

    def before(self, x: Tensor, states: dict[Any, Any]) -> Tensor | None:
        """s_{l-1} of this call, None for 0; the same again where checkpointing runs a layer a second time."""
        if self.index == 0:
            return None
        at, s = x.data_ptr(), states.get("s")
        if torch.is_grad_enabled():
            at, s = states.setdefault(self.index, (at, s))
        trains = torch.is_grad_enabled() and self.aside.up.weight.requires_grad
        if s is None or at != x.data_ptr() or (trains and not s.requires_grad):
            raise UnsupportedError(
                f"connected-adapters: layer {self.index} runs, and what the layers before it handed on is not known",
                hint="call the whole model and not a layer; checkpoint with use_reentrant=False, and one call a step",
            )
        found: Tensor = s
        return found


class ConnectedAdapters(Plugin):
    """See the module."""

    Config = ConnectedAdaptersConfig
    claims = {Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.WHOLE_CALLS}
    config: ConnectedAdaptersConfig
    architectures = ("mamba", "mixtral")

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for tower, facts in model.towers.items():
            sites = model.blocks("layer", tower=tower)
            for index, site in enumerate(sites):
                path, last = f"{model.owner}-{tower}", index == len(sites) - 1
                site.attach(Connected(facts.hidden_size, self.config, model.call, path, index, last))
