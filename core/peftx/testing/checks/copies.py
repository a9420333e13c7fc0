"""Copies and neighbours do not share what they should not."""

from __future__ import annotations

import copy

import torch
from torch import nn

from peftx.testing.case import Case, assert_equal, inputs_for, output
from peftx.testing.checks.check import changes_model, check, trains


def _shift(model: nn.Module) -> None:
    """Move every number of a model."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1)


@check(when=changes_model)
def check_deepcopy_is_independent(case: Case) -> None:
    """A deep copy computes the same, and neither follows the other's weights."""
    stack = case.finished()
    inputs = inputs_for(stack.model)
    before = case.output(stack)
    followed: dict[int, object] = {}
    twin, third = copy.deepcopy(stack.model, followed), copy.deepcopy(stack.model)
    assert id(stack.ledger) not in followed, (
        "a copy of the model takes the stack's ledger along: hold a site's module, not the bound site"
    )
    assert_equal(output(twin, inputs), before, "logits of the copy and of the original")
    _shift(twin)
    assert_equal(case.output(stack), before, "logits of the original after its copy changed")
    _shift(stack.model)
    assert_equal(output(third, inputs), before, "logits of a copy after the original changed")


@check(when=lambda subject: changes_model(subject) or trains(subject))
def check_two_stacks_at_once(case: Case) -> None:
    """A second stack, its training and its removal leave the first one alone."""
    first = case.finished()
    before = case.output(first)
    second = case.stack(seed=1)
    if second.trainable_parameters():
        case.train(second, 1)
    case.compress(second)
    case.output(second)
    assert_equal(case.output(first), before, "logits of the first stack after a second one was used")
    second.remove(case.id)
    assert_equal(case.output(first), before, "logits of the first stack after the second one was taken apart")


CHECKS = (check_deepcopy_is_independent, check_two_stacks_at_once)
