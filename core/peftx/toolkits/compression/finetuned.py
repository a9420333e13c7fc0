"""Fine-tuned models whose difference from their base is packed, and what text calibrates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftx.errors import ArchitectureError, ConflictError, ModelError
from peftx.kernel.chain import is_ours

if TYPE_CHECKING:
    from peftx.kernel.anatomy.site import Site
    from peftx.kernel.trained import Trained
    from peftx.kernel.view import ModelView


def text_blocks(model: ModelView, sites: Iterable[Site] = ()) -> None:
    """Raises ArchitectureError unless calibration text goes through all blocks, and each site is a linear layer in one
    of them."""
    kind = f"{model.owner}: {model.config.model_type}"
    if len(model.towers) > 1 or model.module.main_input_name != "input_ids":
        said = f"{kind} has {' and '.join(model.towers)}, and text goes through one tower of text"
        raise ArchitectureError(said, hint="a decoder, or an encoder, of text")
    for site in sites:
        if site.kind not in ("linear", "quantized") or site.layer is None:
            said = (
                f"{kind} has {site.role} ({site.kind}) in {site.path}, and linear layers in blocks are packed"
            )
            raise ArchitectureError(said, hint=f"targets: 'all !{site.role}'")


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own, under each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if not is_ours(name)}


def differences(model: ModelView, sites: Iterable[Site]) -> dict[str, Trained]:
    """All parameters of the base, to be fine-tuned, beside what they were.

    Args:
        sites: matrices whose difference is packed later.

    Raises:
        ConflictError: one of them is packed already.
    """
    places = model.train("re:.")  # all there are
    if packed := [s.path for s in sites if f"{s.path}.{s.parameter}" not in places]:
        said = f"{packed[0]} is packed already, so that no difference from it can be trained"
        raise ConflictError(f"{model.owner}: {said}", hint="pack it behind this plugin")
    return places


@torch.no_grad()
def adopt(model: ModelView, places: Mapping[str, Trained], tuned: nn.Module, source: str) -> None:
    """Take over the values of a model that is fine-tuned already; one that is tied has them under each of its names.

    Args:
        places: of `differences`. source: where it is from, for messages.

    Raises:
        ModelError: it is no fine-tune of this base.
    """
    own, theirs = base_parameters(model.module), dict(tuned.named_parameters(remove_duplicate=False))
    for name in places.keys() & theirs.keys():
        if own[name].shape == theirs[name].shape:
            own[name].copy_(theirs[name])
    for name in sorted(own.keys() | theirs.keys()):
        mine, other = own.get(name), theirs.get(name)
        if mine is None or other is None:
            said = f"'{source}' is no fine-tune of this base: {name} is in one of the two alone"
            raise ModelError(f"{model.owner}: {said}", hint="same architecture, tied alike, no adapters")
        if mine.shape != other.shape:
            said = f"'{source}' is no fine-tune of this base: {name} is {_size(other)}, and the base's {_size(mine)}"
            raise ModelError(f"{model.owner}: {said}", hint="same architecture, tied alike, no adapters")
        if not bool(other.isfinite().all()):
            raise ModelError(f"{model.owner}: '{source}': {name} has numbers that are not finite")
        if not torch.equal(mine, other.to(mine)):  # two names of one tensor here, and of two there
            said = f"'{source}' is no fine-tune of this base: {name} is tied to another tensor in one of the two alone"
            raise ModelError(f"{model.owner}: {said}", hint="same architecture, tied alike, no adapters")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
