"""Around the call of the whole model: what goes in, and what came out.

Standard hooks of `nn.Module`, so that `model(...)`, `generate`, Trainer and lm-eval all pass through. The edits are
children of the model, so that what they hold trains, moves and is saved with it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from peftx.kernel.chain import Chain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHILD = "peftx_calls"
STATE = "_peftx_calls"


class CallEdit(nn.Module):
    """One plugin's view of each call of the model; define what the method needs."""

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        """Change the arguments, all of them by name."""
        return call

    def after(self, output: Any) -> None:
        """See the output; None where the call failed. What `before` noted is to be forgotten here."""


class _Calls(Chain[CallEdit]):
    """The edits of a model's calls, and the hooks that run them.

    Args:
        names: of the positional arguments of the model's forward.
    """

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__(CHILD)
        self.names = names
        self.handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for edit in self.active:
            call = edit.before(call)
        return (), call

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for edit in self.active:
            edit.after(output)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def attach(model: PreTrainedModel, edit: CallEdit, *, owner: str, rank: int) -> None:
    """Put the edit around the model's calls; the first in the stack sees the caller's arguments."""
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is None:
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        calls = model.__dict__[STATE] = _Calls(model, names)
    calls.append(model, edit, owner, rank)


def detach(model: PreTrainedModel, owner: str) -> None:
    """Take the owner's edits off the model's calls."""
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is not None and calls.drop(model, owner):
        calls.close()
        del model.__dict__[STATE]


def enable(model: PreTrainedModel, owner: str, enabled: bool) -> None:
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is not None:
        calls.switch(owner, enabled)
