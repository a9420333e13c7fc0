"""Keys and values that a network writes in front of an attention's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from peftx.kernel.attention import AttentionEdit

if TYPE_CHECKING:
    from peftx.kernel.call import Call
    from peftx.kernel.view import BoundSite, ModelView

T = TypeVar("T")


def once_written(call: Call, name: str, make: Callable[[], T]) -> T:
    """What `make` computes of parameters: in decoding once for a cache, whose keys and values were computed with it;
    with gradients each time, since a checkpointed layer that runs again must compute what it computed before."""
    return make() if torch.is_grad_enabled() else call.once(name, make)


def columns(model: ModelView, sites: Sequence[BoundSite]) -> list[slice]:
    """Which columns of [l, widths] are each attention's: all of its keys, then all of its values. The last ends at the
    width of all."""
    sizes = [model.heads_of(site) for site in sites]
    ends = accumulate((n.kv_heads * (n.head_dim + n.value_dim) for n in sizes), initial=0)
    return [slice(*pair) for pair in pairwise(ends)]


class NetworkPrefix(AttentionEdit):
    """K' = [P_K ; K], V' = [P_V ; V] in one attention, its part of the rows P that a network writes for many.

    Args:
        network: gives columns of P, as `columns` has them: slice -> [l, width]. part: this attention's. call: of the
            model. name: of the rows in a cache.
    """

    def __init__(self, network: nn.Module, part: slice, call: Call, name: str) -> None:
        super().__init__()
        self.network, self.part = (network,), part  # in a tuple: the plugin owns it, not this layer
        self.call, self.name = call, name

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        P = once_written(self.call, self.name, self.compute)
        heads, sizes = key.shape[1], (key.shape[-1], value.shape[-1])
        P_K, P_V = (
            rows.unflatten(-1, (heads, -1))
            .transpose(0, 1)
            .expand(len(key), -1, -1, -1)  # [B, heads, l, size]
            for rows in P.to(key).split([heads * size for size in sizes], -1)
        )
        return torch.cat((P_K, key), 2), torch.cat((P_V, value), 2)

    def compute(self) -> Tensor:
        rows: Tensor = self.network[0](self.part)
        return rows
