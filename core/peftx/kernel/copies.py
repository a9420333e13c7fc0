"""A second model with the base's weights, for a plugin to own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.initialization import no_init_weights

from peftx.errors import UnsupportedError
from peftx.kernel.attention import PREFIX
from peftx.kernel.chain import is_ours

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with its weights as they are now, and nothing of what plugins put on it. `keep`, or an
    edit that holds the copy, makes its parameters a plugin's own.

    Raises:
        UnsupportedError: layers were replaced by packed ones, or biases added where the class has none.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = (config._attn_implementation or "eager").removeprefix(PREFIX)
    with torch.device(model.device), no_init_weights():
        found = _own_class(model)._from_config(config, dtype=model.dtype)
    found.tie_weights()  # which making it without first values leaves out
    weights = {name: t for name, t in model.state_dict().items() if not is_ours(name)}
    known = found.state_dict()
    if strange := sorted(weights.keys() ^ known.keys()):
        raise UnsupportedError(
            f"{type(found).__name__} cannot be copied: {strange[0]} is no weight that the class has",
            hint="put the plugin before those that pack layers",
        )
    if model.device.type != "meta":
        found.load_state_dict(weights)
    return found.train(model.training)


def _own_class(model: nn.Module) -> type[PreTrainedModel]:
    """Without the slots of plugins."""
    found = type(model)
    while "_peftx_base" in vars(found):
        found = vars(found)["_peftx_base"]
    return found
