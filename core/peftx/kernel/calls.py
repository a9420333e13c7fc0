"""Around the call of the whole model: what goes in, what came out, and what everything inside may know of it.

Standard hooks of `nn.Module`, so that `model(...)`, `generate`, Trainer and lm-eval all pass through. The edits are
children of the model, so that what they hold trains, moves and is saved with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peftx.kernel.call import Call
from peftx.kernel.chain import Chain
from peftx.kernel.virtual_tokens import arguments_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
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
    """The edits of a model's calls, and the hooks that run them: on the model, and on an encoder in it, which
    `generate` calls by itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(CHILD)
        self.call = Call(model)
        self.running: nn.Module | None = None
        """What is called now; inside the model, its encoder is a part of that call."""
        self.handles: list[RemovableHandle] = []
        for host in (model, model.get_encoder()) if model.config.is_encoder_decoder else (model,):
            enter = partial(self.enter, takes(host))
            self.handles += [
                host.register_forward_pre_hook(enter, with_kwargs=True),
                host.register_forward_hook(self.leave, always_call=True),
            ]

    def enter(
        self, names: tuple[str, ...], host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.running is not None:
            return None
        self.running = host
        arguments = self.call.begin({**dict(zip(names, args, strict=False)), **kwargs})
        for edit in self.active:
            arguments = edit.before(arguments)
        self.call.take(arguments)
        return (), arguments

    def leave(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.running is not host:
            return
        self.running = None
        for edit in self.active:
            edit.after(output)
        self.call.end(output)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def takes(host: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a model's forward, in order; where soft tokens stand, of its own class's."""
    return arguments_of(vars(type(host)).get("_peftx_base", type(host)))


def _calls(model: PreTrainedModel) -> _Calls:
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is None:
        calls = model.__dict__[STATE] = _Calls(model)
    return calls


def call_of(model: PreTrainedModel) -> Call | None:
    """The context of a model's calls; None where no plugin looks at them."""
    calls: _Calls | None = model.__dict__.get(STATE)
    return None if calls is None else calls.call


def giving(model: PreTrainedModel, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """See `Call.giving`; a model whose calls no plugin looks at has no columns."""
    return (call_of(model) or Call()).giving(values)


def columns_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Columns that plugins on the model read, and it does not take."""
    call = call_of(model)
    return () if call is None else call.columns


@contextmanager
def listening(model: PreTrainedModel) -> Iterator[Call]:
    """Inside, the context of the model's calls, also where no plugin asks for it: to measure merged weights, say."""
    edit = CallEdit()
    owner = f"listener {id(edit)}"
    call = attach(model, edit, owner=owner, rank=0)
    try:
        yield call
    finally:
        detach(model, owner)


def own_lengths_of(model: PreTrainedModel) -> frozenset[str]:
    """Those of them whose lists are as long as they like."""
    call = call_of(model)
    return frozenset() if call is None else call.own_lengths


def attach(model: PreTrainedModel, edit: CallEdit, *, owner: str, rank: int) -> Call:
    """Put the edit around the model's calls; the first in the stack sees the caller's arguments."""
    calls = _calls(model)
    calls.append(model, edit, owner, rank)
    return calls.call


def detach(model: PreTrainedModel, owner: str) -> None:
    """Take the owner's edits off the model's calls."""
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is None:
        return
    calls.call.withdraw(owner)
    if calls.drop(model, owner):
        calls.close()
        del model.__dict__[STATE]


def enable(model: PreTrainedModel, owner: str, enabled: bool) -> None:
    calls: _Calls | None = model.__dict__.get(STATE)
    if calls is not None:
        calls.switch(owner, enabled)
