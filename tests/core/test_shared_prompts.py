"""Rows of several answers: which models read them, how a prompt is cut for them, and when they are as if alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from peftx import ModelView, Plugin, Stack, TrainingData, hookimpl
from peftx.errors import ArchitectureError, DataError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.shared_prompts import check_alike, check_layout, prompt_beside


class Sharing(Plugin):
    def __init__(self, each_layer: bool) -> None:
        super().__init__()
        self.each_layer = each_layer

    def suits(self, model: ModelView) -> None:
        check_layout(model, each_layer=self.each_layer)

    @hookimpl
    def inject(self, model: ModelView) -> None: ...


def refused(arch: str, *, each_layer: bool = False) -> None:
    match = r"sharing: \w+ \(attention '\w+'\) is no decoder that takes positions and a mask"
    with pytest.raises(ArchitectureError, match=match):
        Stack(tiny(arch), [Sharing(each_layer)], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("arch", ["bert", "t5", "mamba", "bloom", "llava"])
def test_models_whose_positions_and_masks_are_their_own(arch: str) -> None:
    refused(arch)


def test_an_attention_in_each_layer_where_it_is_entered() -> None:
    for each_layer in (False, True):
        Stack(tiny("llama"), [Sharing(each_layer)], tokenizer=tiny_tokenizer())
    Stack(tiny("qwen3_next"), [Sharing(False)], tokenizer=tiny_tokenizer())
    refused("qwen3_next", each_layer=True)


def test_long_prompts_are_cut_once_at_their_left() -> None:
    tokenizer = Stack("peftx:tiny").tokenizer  # with BOS
    data = partial(
        TrainingData, train=None, eval=None, tokenizer=tokenizer, seed=0, format="prompt-completion"
    )

    def cut(most: int, more: int = 0) -> list[int]:
        return prompt_beside(data(max_length=most), "Is tea nice?", [5, 4], "row 3", more=more)

    whole = cut(99)
    assert whole[0] == tokenizer.bos_token_id
    assert cut(9 + len(whole)) == whole
    assert cut(7 + len(whole)) == cut(8 + len(whole), more=1) == whole[:1] + whole[3:]
    assert cut(11) == [whole[0], whole[-1]]
    with pytest.raises(
        DataError, match="row 3: the answers have 5 and 4 tokens with EOS, which leaves no room"
    ):
        cut(10)


def test_a_prompt_without_tokens() -> None:
    data = TrainingData(
        train=None, eval=None, tokenizer=tiny_tokenizer(), seed=0, format="prompt-completion", max_length=9
    )
    with pytest.raises(DataError, match="row 3 has no prompt, and the tokenizer no BOS"):
        prompt_beside(data, "", [1], "row 3")


@pytest.mark.parametrize("wrong", [0.002, float("nan")])
def test_answers_that_are_not_as_if_alone(wrong: float) -> None:
    model, apart = tiny("llama"), torch.zeros(2, 3)
    check_alike(model, apart + 0.0009, apart, tokens=7)
    shared = apart.clone()
    shared[1, 2] = wrong
    with pytest.raises(ArchitectureError, match=f"the longest row, of 7, has another .* by {wrong}"):
        check_alike(model, shared, apart, tokens=7)
