"""Around the call of the whole model: what goes in, and what came out.

Standard hooks of `nn.Module`, so that `model(...)`, `generate`, Trainer and lm-eval all pass through; the ledger takes
them away again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CallEdit(nn.Module):
    """One plugin's view of each call of the model; define what the method needs."""

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        """Change the arguments, all of them by name."""
        return call

    def after(self, output: Any) -> None:
        """See the output; None where the call failed. What `before` noted is to be forgotten here."""


class Around:
    """An edit's two hooks on a model.

    Args:
        names: of the positional arguments of the model's forward.
    """

    def __init__(self, edit: CallEdit, names: tuple[str, ...]) -> None:
        self.edit = edit
        self.names = names

    def enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), self.edit.before({**dict(zip(self.names, args, strict=False)), **kwargs})

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.edit.after(output)


def attach(model: PreTrainedModel, edit: CallEdit) -> Callable[[bool], None]:
    """Put the edit around the model's calls; returns a switch: False takes it off, True puts it back."""
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    around = Around(edit, names)
    handles: list[Any] = []

    def switch(on: bool) -> None:
        if on and not handles:
            handles.append(model.register_forward_pre_hook(around.enter, with_kwargs=True))
            handles.append(model.register_forward_hook(around.leave, always_call=True))
        elif not on:
            for handle in handles:
                handle.remove()
            handles.clear()

    switch(True)
    return switch
