"""The modes of a model, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peftx.kernel.ledger import Ledger


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, so without dropout, and with gradients; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inference mode with every module in eval mode; each module's own mode comes back afterwards."""
    with eval_mode(model), torch.inference_mode():
        yield


@contextmanager
def as_it_was(ledger: Ledger, values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model computes with earlier values of what plugins train, without gradients and in evaluation mode.

    Args:
        values: by name, as `Ledger.trained` gave them, copied; they are moved to where the model is, once.
    """
    now = ledger.trained()
    own = {name: x.data for name, x in now.items()}
    try:
        for name, x in now.items():
            x.data = values[name] = values[name].to(x)  # from a checkpoint they are on the CPU
        with eval_mode(ledger.model), torch.no_grad():
            yield
    finally:
        for name, x in now.items():
            x.data = own[name]
