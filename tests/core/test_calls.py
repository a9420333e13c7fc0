"""Edits around the call of the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from peftx import CallEdit, Delta, ModelView, Plugin, Stack, hookimpl
from peftx.kernel.parts import CallPart
from peftx.testing.models import tiny, tiny_tokenizer

IDS = torch.arange(3, 13).reshape(2, 5)


class Seen(CallEdit):
    """Counts the ids of a call for the embedding's delta, and turns 7 into 8."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Tensor | None = None
        self.outputs: list[Any] = []

    def before(self, call: dict[str, Any]) -> dict[str, Any]:
        self.ids = call["input_ids"]
        return call | {"input_ids": torch.where(self.ids == 7, 8, self.ids)}

    def after(self, output: Any) -> None:
        self.ids = None
        self.outputs.append(output)


class Reads(Delta):
    """Adds nothing, and needs the call's ids."""

    def __init__(self, edit: Seen) -> None:
        super().__init__()
        self.edit = (edit,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.edit[0].ids is not None
        return y + 0 * self.edit[0].ids.sum()


class Watches(Plugin):
    """Both."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        edit = Seen()
        model.around(edit)
        model.embedding().attach(Reads(edit))


def edit_of(stack: Stack) -> Seen:
    (part,) = (part for part in stack.ledger.parts if isinstance(part, CallPart))
    return part.module  # type: ignore[return-value]


def test_arguments_come_by_name_and_may_change() -> None:
    stack = Stack(tiny("llama"), [Watches()], tokenizer=tiny_tokenizer())
    plain = tiny("llama")
    with torch.no_grad():
        changed = plain(torch.where(IDS == 7, 8, IDS)).logits
        assert torch.equal(stack.model(IDS).logits, changed)
        assert torch.equal(stack.model(input_ids=IDS).logits, changed)
    assert edit_of(stack).ids is None
    assert len(edit_of(stack).outputs) == 2
    stack.model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert len(edit_of(stack).outputs) == 5


def test_a_call_that_fails_is_told_of() -> None:
    stack = Stack(tiny("llama"), [Watches()])
    with pytest.raises(IndexError):
        stack.model(input_ids=IDS + 10**6)
    assert edit_of(stack).ids is None
    assert edit_of(stack).outputs == [None]


def test_it_is_switched_off_copied_and_removed() -> None:
    stack = Stack(tiny("llama"), [Watches()])
    base = tiny("llama")(IDS).logits
    with torch.no_grad(), stack.disabled("watches"):
        assert torch.equal(stack.model(IDS).logits, base)
    twin = copy.deepcopy(stack.model)
    twin(IDS)
    assert edit_of(stack).outputs == []  # the copy has an edit of its own
    stack.model(IDS)
    edit = edit_of(stack)
    stack.remove("watches")
    assert torch.equal(stack.model(IDS).logits, base)
    assert len(edit.outputs) == 1
    assert not stack.model._forward_pre_hooks
    assert not stack.model._forward_hooks


def test_an_edit_whose_parts_differ_takes_the_dtype_of_the_model() -> None:
    """What it made of the model has the model's dtype already, and what it made anew has torch's."""

    class Mixed(CallEdit):
        def __init__(self, model: ModelView) -> None:
            super().__init__()
            self.e = torch.nn.Parameter(model.embedding().weight[:2].detach().clone())
            self.linear = torch.nn.Linear(2, 2)

    class Mixes(Plugin):
        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.around(Mixed(model))

    stack = Stack(tiny("llama").to(torch.bfloat16), [Mixes()], tokenizer=tiny_tokenizer())
    assert {p.dtype for p in edit_of(stack).parameters()} == {torch.bfloat16}
