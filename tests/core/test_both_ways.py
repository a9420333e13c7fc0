"""Attention without the causal mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftx import ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, UnsupportedError
from peftx.testing import example_inputs, tiny
from peftx.toolkits.injecting import both_ways

FLAG = "whole"


class Whole(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        both_ways(model, "whole")


class Flagged(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        model.column(FLAG)
        both_ways(model, "whole", column=FLAG)


@torch.no_grad()
def logits(stack: Stack, inputs: dict[str, Tensor], **columns: Tensor) -> Tensor:
    found: Tensor = stack.model(**inputs, **columns, use_cache=False).logits
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_follows_is_seen_and_pads_are_not(arch: str) -> None:
    stack = Stack(tiny(arch), [Whole()])
    inputs = example_inputs(stack.model, padding="right")
    real = inputs["attention_mask"].bool()
    other = {**inputs, "input_ids": inputs["input_ids"] + ~real}
    assert torch.equal(logits(stack, inputs)[real], logits(stack, other)[real])
    inputs["input_ids"][0, -1] += 1
    assert not torch.equal(logits(stack, inputs)[0, 0], logits(stack, other)[0, 0])


def test_a_column_says_which_rows_see_both_ways() -> None:
    plain, whole, stack = (Stack(tiny("llama"), plugins) for plugins in ([], [Whole()], [Flagged()]))
    inputs = example_inputs(plain.model)
    assert torch.equal(logits(stack, inputs), logits(plain, inputs))
    found = logits(stack, inputs, **{FLAG: torch.tensor([1, 0])})
    torch.testing.assert_close(found[0], logits(whole, inputs)[0])
    torch.testing.assert_close(found[1], logits(plain, inputs)[1])
    assert not torch.allclose(found[0], logits(plain, inputs)[0], atol=1e-3)


def test_no_call_goes_on_from_a_cache() -> None:
    whole, flagged = Stack(tiny("llama"), [Whole()]), Stack(tiny("llama"), [Flagged()])
    ids = example_inputs(whole.model)["input_ids"]
    cache = Stack(tiny("llama")).model(ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="whole: with whole the states of a text depend"):
        whole.model(ids, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="flagged: with whole"):
        flagged.model(ids, past_key_values=cache, whole=torch.tensor([0, 1]))
    flagged.model(ids, past_key_values=cache)


def test_layers_without_such_a_mask_are_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"whole: whole needs attention with a mask .* in \d of \d"):
        Stack(tiny("qwen3_next"), [Whole()])
