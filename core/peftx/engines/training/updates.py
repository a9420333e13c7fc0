"""What runs around the next step of the optimizer that holds a stack's parameters, whoever calls it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peftx.engines.training.optimizer import WideAdamW, WideSGD
from peftx.engines.training.outside import watch_calls
from peftx.errors import TrainingError

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack

Action = Callable[[Optimizer], None]


class Waiting:
    """Actions that wait for the next step of an optimizer that holds one of these parameters."""

    def __init__(
        self, queue: list[Waiting], parameters: Sequence[nn.Parameter], actions: Sequence[Action]
    ) -> None:
        self.queue, self.actions = queue, actions
        self.known = {
            id(p): weakref.ref(p) for p in parameters
        }  # an id may come again when its tensor is gone
        queue.append(self)

    def is_for(self, optimizer: Optimizer) -> bool:
        held = (p for group in optimizer.param_groups for p in group["params"])
        return any((ref := self.known.get(id(p))) is not None and ref() is p for p in held)

    def remove(self) -> None:
        """Wait no longer."""
        if self in self.queue:
            self.queue.remove(self)


_BEFORE: list[Waiting] = []
_AFTER: list[Waiting] = []


@cache
def _listen() -> None:
    """One hook for all that wait: torch goes over its hooks as they are, so none may come or go meanwhile."""
    register_optimizer_step_pre_hook(_check)
    register_optimizer_step_pre_hook(partial(_run, _BEFORE))
    register_optimizer_step_post_hook(partial(_run, _AFTER))
    register_optimizer_step_post_hook(_done)


def _run(queue: list[Waiting], optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for waiting in [each for each in queue if each.is_for(optimizer)]:
        waiting.remove()
        for action in waiting.actions:
            action(optimizer)


def around_next_update(
    parameters: Sequence[nn.Parameter], before: Sequence[Action], after: Sequence[Action]
) -> list[Waiting]:
    """Run these once, before and after the next step; remove them if that step does not come."""
    _listen()
    sides = ((_BEFORE, before), (_AFTER, after))
    return [Waiting(queue, parameters, actions) for queue, actions in sides if actions]


_WATCHED: weakref.WeakSet[Stack] = weakref.WeakSet()


def watch(stack: Stack) -> None:
    """Let no trainer that knows nothing of plugins pass them by without a word: no call of the model, and no optimizer
    that moves this stack's parameters past its `train_step` hooks, or without a trace."""
    watch_calls(stack.model)
    _listen()
    if stack.implementers("train_step"):
        _WATCHED.add(stack)


def _held_by(optimizer: Optimizer) -> list[Stack]:
    """Watched stacks of which it holds a parameter."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} if _WATCHED else set()
    return [stack for stack in _WATCHED if any(id(p) in held for p in stack.model.parameters())]


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for stack in _held_by(optimizer):
        asleep = {id for id, at in stack.standing.items() if at.disabled or at.folded}
        missed = [m.id for m in stack.implementers("train_step") if m.id not in asleep]
        # Hooks that fit something of their own, as compression does, do so in evaluation mode.
        if missed and stack.model.training and not stack.update_is_due:
            raise TrainingError(
                f"an optimizer steps, and the train_step of {', '.join(missed)} did not run",
                hint="make the trainer by stack.trainer(Trainer)(model=stack.model, ...), with its class; in a loop of "
                "your own call stack.train_step(batch)",
            )


def _done(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # Torch's count of changes, by which layers know that what they have computed is old: fused kernels write past it.
    moved = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    torch.autograd.graph.increment_version(list(moved))
    for stack in _held_by(optimizer):
        stack.update_is_due = False


def drop(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Take parameters that are gone out of an optimizer, which holds neither them nor moments of them any longer."""
    gone = {id(p) for p in parameters}
    forget(optimizer, parameters)
    if isinstance(optimizer, WideAdamW | WideSGD):
        for parameter in parameters:
            optimizer.wide.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]


@torch.no_grad()
def forget(optimizer: Optimizer, parameters: Sequence[nn.Parameter], at: Tensor | None = None) -> None:
    """Let the optimizer begin anew for these: its moments and counts are gone.

    Args:
        at: for these entries of theirs alone. Their moments are zero then; the count of steps is the parameter's.
    """
    for parameter in parameters:
        if at is None:
            optimizer.state.pop(parameter, None)
        elif parameter in optimizer.state:
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[at] = 0
