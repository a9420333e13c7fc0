"""Around the call of the whole model: what goes in, and what came out.

Standard hooks of `nn.Module`, so that `model(...)`, `generate`, Trainer and lm-eval all pass through. The edits are
children of the model, so that what they hold trains, moves and is saved with it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from peftx.slots import child_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHILD = "peftx_calls"


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

    def __init__(self, model: PreTrainedModel, edit: CallEdit, name: str, names: tuple[str, ...]) -> None:
        self.model = model
        self.edit = edit
        self.name = name
        self.names = names
        self.handles: list[Any] = []

    def enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), self.edit.before({**dict(zip(self.names, args, strict=False)), **kwargs})

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.edit.after(output)

    def switch(self, on: bool) -> None:
        """Take the edit off the model's calls, or put it back."""
        if on and not self.handles:
            self.handles.append(self.model.register_forward_pre_hook(self.enter, with_kwargs=True))
            self.handles.append(self.model.register_forward_hook(self.leave, always_call=True))
        elif not on:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()

    def remove(self) -> None:
        """Off for good."""
        self.switch(False)
        children: nn.ModuleDict = self.model.get_submodule(CHILD)  # type: ignore[assignment]
        del children._modules[self.name]
        if not children:
            del self.model._modules[CHILD]


def attach(model: PreTrainedModel, edit: CallEdit, *, owner: str) -> Around:
    """Put the edit around the model's calls."""
    if CHILD not in model._modules:
        model.add_module(CHILD, nn.ModuleDict().train(model.training))
    children = model.get_submodule(CHILD)._modules
    name = child_name(children, owner)
    children[name] = edit  # not through ModuleDict, which refuses the names of its methods
    around = Around(model, edit, name, tuple(inspect.signature(type(model).forward).parameters)[1:])
    around.switch(True)
    return around
