"""What routers decide in a training step, for the losses that balance them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from peftx.errors import OptionError, TrainingError, UnsupportedError
from peftx.kernel.parts import DeltaPart
from peftx.kernel.slots import Delta

if TYPE_CHECKING:
    from peftx.engines.training import TrainStep
    from peftx.kernel.anatomy.site import Site
    from peftx.kernel.call import Call
    from peftx.kernel.plugin import Plugin
    from peftx.kernel.view import ModelView

Side = Literal["source", "target"] | None
"""Whose tokens a layer sees: the text's, those of a decoder behind an encoder, or none (images)."""


def side_of(model: ModelView, site: Site) -> Side:
    if not model.config.is_encoder_decoder:
        return "source" if site.tower in (model.main.name, "") else None
    source = site.tower == "encoder" or site.role in ("cross_attention.k", "cross_attention.v")
    return "source" if source else "target"


def check_experts(owner: str, experts: int, widths: Mapping[str, int]) -> None:
    """Refuse more experts than a linear router can score apart: of more rows than columns some follow from others.

    Args:
        owner: the plugin's id. widths: numbers that a router reads, by the path of its layer.

    Raises:
        OptionError: names the narrowest layer.
    """
    path, width = min(widths.items(), key=lambda each: each[1])
    if experts > width:
        raise OptionError(
            f"{owner}: {experts} experts, and the router of {path} tells them apart by {width} numbers",
            hint=f"experts at most {width}",
        )


class Router(Delta):
    """A delta that decides something for each token, and tells it to the loss of a step.

    Args:
        call, side: what the model is called on, and which of its tokens the layer sees.

    Attributes:
        routing: what `tell` was given in the last call inside of `watching`, else None.
    """

    full_precision = True  # what is decided hangs on small differences

    def __init__(self, call: Call, side: Side = "source") -> None:
        super().__init__()
        self.call, self.side = call, side
        self.watched = self.recorded = self.hidden = False
        self.step: TrainStep | None = None
        self.routing: Any = None

    def tell(self, make: Callable[[], object], p: Tensor, weight: nn.Parameter) -> None:
        """Kept is what the task's own pass decides, and of a pass without gradients behind one with them nothing: it is
        another plugin's, as of a reference.

        Args:
            make: gives what was decided, where the step is watched. p: what carries its gradient. weight: the router's
                own.
        """
        if not self.watched or not (torch.is_grad_enabled() or not self.recorded):
            return
        made = make()  # of every pass: a checkpointed layer does the same when it runs again
        if self.step is None or self.step.in_task:
            self.routing, self.recorded = made, p.requires_grad
            self.hidden = weight.requires_grad and not p.requires_grad

    def real(self, x: Tensor) -> Tensor:
        """Which rows of x [..., d] are no pads, by text: bool [G, T]; soft tokens are real."""
        known = {"source": self.call.real, "target": self.call.decoder_real, None: None}[self.side]
        tokens = x[..., 0].numel()
        if known is None or tokens < known.numel() or tokens % len(known):
            shape = (len(x), -1) if x.ndim > 1 else (1, 1)  # no tokens: images, or one vector for each text
            return torch.ones_like(x[..., 0], dtype=torch.bool).reshape(shape)
        return self.call.rows(known, x.reshape(len(known), -1, x.shape[-1]), fill=True).bool()


@contextmanager
def watching(step: TrainStep, plugin: Plugin) -> Iterator[list[Any]]:
    """Inside, the plugin's routers keep what they tell. For all of a step: a checkpointed layer runs again in the
    backward pass."""
    layers: list[Any] = [p.module for p in step.stack.ledger.of(step.stack.id_of(plugin), DeltaPart)]
    try:
        for layer in layers:
            layer.watched, layer.step = True, step
        yield layers
    finally:
        for layer in layers:
            layer.watched = layer.recorded = layer.hidden = False
            layer.step = layer.routing = None


def routings(id: str, layers: Sequence[Router]) -> list[Any]:
    """What each layer that ran has told.

    Raises:
        TrainingError: none ran. UnsupportedError: what they told has no gradient to the routers.
    """
    ran = [layer for layer in layers if layer.routing is not None]
    if not ran:
        said = f"{id}: no layer with a router ran in this step"
        raise TrainingError(said, hint="call the model in the step, and route layers that it runs")
    if torch.is_grad_enabled() and any(layer.hidden for layer in ran):
        raise UnsupportedError(
            f"{id}: reentrant checkpointing hides the routers from the loss",
            hint="gradient checkpointing with use_reentrant=False",
        )
    return [layer.routing for layer in ran]
