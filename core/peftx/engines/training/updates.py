"""What runs around the next step of the optimizer that holds a stack's parameters, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

Action = Callable[[Optimizer], None]


def around_next_update(
    parameters: Sequence[nn.Parameter], before: Sequence[Action], after: Sequence[Action]
) -> list[RemovableHandle]:
    """Run these once, before and after the next step; remove the handles if that step does not come."""
    sides = ((register_optimizer_step_pre_hook, before), (register_optimizer_step_post_hook, after))
    return [_once(register, parameters, actions) for register, actions in sides if actions]


def _once(
    register: Callable[[Any], RemovableHandle], parameters: Sequence[nn.Parameter], actions: Sequence[Action]
) -> RemovableHandle:
    known = {id(p) for p in parameters}

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            handle.remove()
            for action in actions:
                action(optimizer)

    handle = register(hook)
    return handle


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
