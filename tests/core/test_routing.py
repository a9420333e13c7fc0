"""What routers tell the loss of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftx import ModelView, Plugin, Stack, TrainStep, hookimpl
from peftx.errors import PeftxError, TrainingError, UnsupportedError
from peftx.kernel.parts import DeltaPart
from peftx.testing import example_inputs, tiny
from peftx.toolkits.injecting import Router, routings, side_of, watching


class Mean(Router):
    """Tells the mean of w . x over real tokens, and leaves its layer as it is."""

    def __init__(self, width: int, **where: Any) -> None:
        super().__init__(**where)
        self.w, self.made = nn.Parameter(torch.ones(width)), 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p = x @ self.w

        def make() -> Tensor:
            self.made += 1
            return p.view(*self.real(x).shape)[self.real(x)].mean()

        self.tell(make, p, self.w)
        return y


class Means(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.attach(Mean(site.in_features, call=model.call, side=side_of(model, site)))

    def layers(self, stack: Stack) -> list[Any]:
        with watching(TrainStep(stack, {}), self) as layers:
            return layers


def built(arch: str = "llama") -> tuple[Stack, Means, dict[str, Tensor]]:
    plugin = Means()
    stack = Stack(tiny(arch), [plugin])
    return stack, plugin, example_inputs(stack.model, padding="left")


def in_task(stack: Stack, inputs: dict[str, Tensor]) -> TrainStep:
    """A step that computes its task's loss."""
    step = TrainStep(stack, inputs)
    step.in_task = True
    return step


def fails(stack: Stack, inputs: dict[str, Tensor]) -> None:
    stack.model(**inputs)
    raise PeftxError("too long")


def test_nothing_is_made_unless_somebody_watches() -> None:
    stack, plugin, inputs = built()
    stack.model(**inputs)
    assert [layer.made for layer in plugin.layers(stack)] == [0, 0]
    with watching(in_task(stack, inputs), plugin) as layers:
        stack.model(**inputs)
        assert len(routings("means", layers)) == 2
    assert [layer.made for layer in layers] == [1, 1]
    assert all(layer.routing is None and not layer.watched for layer in layers)


def test_it_is_over_when_a_step_fails() -> None:
    stack, plugin, inputs = built()
    layers = plugin.layers(stack)
    with pytest.raises(PeftxError, match="too long"), watching(in_task(stack, inputs), plugin):
        fails(stack, inputs)
    assert all(layer.routing is None and not layer.watched for layer in layers)


def test_pads_are_not_real() -> None:
    stack, plugin, inputs = built()
    told = []
    for change in (0, 1):
        ids = inputs["input_ids"] + change * (1 - inputs["attention_mask"])
        with watching(in_task(stack, inputs), plugin) as layers, torch.no_grad():
            stack.model(**{**inputs, "input_ids": ids})
            told.append(torch.stack(routings("means", layers)))
    assert torch.equal(*told)


def test_a_pass_without_gradients_counts_only_where_it_is_the_first() -> None:
    stack, plugin, inputs = built()
    other = {**inputs, "input_ids": inputs["input_ids"] + 1}
    with watching(in_task(stack, inputs), plugin) as layers:
        stack.model(**inputs)
        first = routings("means", layers)
        with torch.no_grad():
            stack.model(**other)
        assert all(a is b for a, b in zip(first, routings("means", layers), strict=True))
    with watching(in_task(stack, inputs), plugin) as layers, torch.no_grad():
        stack.model(**other)  # as mezo's
        assert len(routings("means", layers)) == 2


def test_what_another_plugin_calls_the_model_on_is_no_business_of_the_loss() -> None:
    """As mend's rows that have nothing to do with its facts: before the task's loss, and in a term."""
    stack, plugin, inputs = built()
    other = {**inputs, "input_ids": inputs["input_ids"] + 1}
    step, told = TrainStep(stack, {**inputs, "labels": inputs["input_ids"]}), list[Tensor]()
    step.add_loss("apart", lambda _: stack.model(**other).logits.mean(), over="step")
    step.add_loss(
        "mean", lambda _: told.append(torch.stack(routings("means", layers))) or told[-1].sum(), over="step"
    )  # type: ignore[func-returns-value]
    with watching(step, plugin) as layers:
        stack.model(**other)
        step.total_loss()
    with watching(in_task(stack, inputs), plugin) as layers:
        stack.model(**inputs)
        assert torch.equal(told[0], torch.stack(routings("means", layers)))


def test_a_step_in_which_none_ran_is_refused() -> None:
    stack, plugin, inputs = built()
    with (
        pytest.raises(TrainingError, match="means: no layer with a router ran"),
        watching(in_task(stack, inputs), plugin) as layers,
    ):
        routings("means", layers)


def test_a_router_that_the_loss_cannot_reach_is_refused() -> None:
    stack, plugin, inputs = built()
    stack.model.train()
    stack.model.activation_checkpointing_enable({"use_reentrant": True})
    with watching(in_task(stack, inputs), plugin) as layers:
        stack.model(**inputs)
        with pytest.raises(UnsupportedError, match="means: reentrant checkpointing"):
            routings("means", layers)
        with torch.no_grad():
            assert len(routings("means", layers)) == 2
    for layer in layers:
        layer.w.requires_grad_(False)  # it does not train, so nothing is hidden
    with watching(in_task(stack, inputs), plugin) as layers:
        stack.model(**inputs)
        assert len(routings("means", layers)) == 2


def test_sides() -> None:
    stack = Stack(tiny("t5"), [Means()])
    sides = {part.path.split(".")[0]: part.module.side for part in stack.ledger.of("means", DeltaPart)}
    assert sides == {"encoder": "source", "decoder": "target"}
    clip = Stack(tiny("clip"), [Means()])
    for part in clip.ledger.of("means", DeltaPart):
        assert part.module.side == ("source" if part.path.startswith("text") else None)
