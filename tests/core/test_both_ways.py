"""A decoder that reads both ways: every token sees the whole text, pads are seen by none."""

from __future__ import annotations

import pytest
import torch

from peftx import ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, UnsupportedError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.injecting import see_both_ways
from peftx_prefix_tuning import PrefixTuning

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])


class Reading(Plugin):
    """Reads both ways: all rows, or those that a column says."""

    def __init__(self, column: str | None = None) -> None:
        super().__init__()
        self.column = column

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if self.column is not None:
            model.column(self.column)
        see_both_ways(model, "reading", column=self.column)


def states(stack: Stack, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return stack.model(ids, output_hidden_states=True, use_cache=False, **more).hidden_states[-1]


def stack_of(arch: str = "llama", *others: Plugin, column: str | None = None) -> Stack:
    return Stack(tiny(arch), [*others, Reading(column)], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_sees_what_follows_and_no_pad(arch: str, side: str) -> None:
    stack = stack_of(arch)
    whole = states(stack, IDS)
    assert not torch.allclose(whole[0, 0], whole[1, 0], atol=1e-4)
    pads = torch.zeros(2, 2, dtype=torch.long)
    order = [pads, IDS] if side == "left" else [IDS, pads]
    mask = torch.cat([part.new_full(part.shape, part is IDS) for part in order], 1)
    found = states(
        stack, torch.cat(order, 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)
    )
    torch.testing.assert_close(found[mask.bool()].view_as(whole), whole, rtol=1e-4, atol=1e-5)


def test_rows_of_a_column_only() -> None:
    stack, plain = stack_of(column="flag"), Stack(tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(states(stack, IDS), states(plain, IDS))
    mixed = states(stack, IDS, flag=torch.tensor([1, 0]))
    torch.testing.assert_close(mixed[1], states(plain, IDS)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], states(stack_of(), IDS)[0], rtol=1e-4, atol=1e-5)


def test_one_token_sees_what_stands_in_front_of_it() -> None:
    prefix = PrefixTuning(length=3)
    plain = Stack(tiny("llama"), [prefix], tokenizer=tiny_tokenizer())
    both = stack_of("llama", prefix, column="flag")
    for name, value in plain.model.named_parameters():
        if value.requires_grad:
            both.model.get_parameter(name).data.copy_(value.data.normal_())
    found = states(both, IDS[:1, :1], flag=torch.tensor([1]))
    torch.testing.assert_close(found, states(plain, IDS[:1, :1]), rtol=1e-4, atol=1e-5)


def test_no_cache_and_no_other_attention() -> None:
    with pytest.raises(UnsupportedError, match="reading: reading, the states of a text depend") as caught:
        stack_of().generate("Once", max_new_tokens=2)
    assert "reading=False" in str(caught.value)
    assert stack_of(column="flag").generate("Once", max_new_tokens=2)
    with pytest.raises(ArchitectureError, match=r"reading needs attention with a mask .* in 1 of 2"):
        stack_of("qwen3_next")
