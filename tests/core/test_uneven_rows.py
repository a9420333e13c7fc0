"""Rows of very different lengths: each is answered as alone, and attention reads about as much of each as it has."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftx import Stack
from peftx.errors import GenerationError
from peftx.testing import tiny, tiny_tokenizer
from peftx.toolkits.serving import Job, Request, shelves, slots, uneven
from peftx.toolkits.serving.answers import Answers
from peftx.toolkits.serving.rows import Rows
from peftx.toolkits.serving.shelves import Shelved

LENGTHS = (60, 3, 5, 33, 4)
NEW = 12


def columns_of(lengths: Sequence[int], rows: Sequence[int], call: int) -> int:
    """That attention reads with these rows by themselves, its calls counted too."""
    others = [length for i, length in enumerate(lengths) if i not in rows]
    return sum(lengths[i] + call for i in rows) + len(lengths) * max(others)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=8), st.integers(0, 300))
def test_no_other_choice_of_long_rows_reads_less(lengths: list[int], call: int) -> None:
    found = uneven.alone(lengths, call)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    every = [columns_of(lengths, order[:count], call) for count in range(len(lengths))]
    assert columns_of(lengths, found, call) == min(every)


def test_what_is_long_stands_alone() -> None:
    assert uneven.alone([40, 900, 38, 35]) == [1]
    assert uneven.alone([40, 900, 38, 800] * 8) == [*range(1, 32, 4), *range(3, 32, 4)]
    assert uneven.alone([40, 60, 38, 35]) == []
    assert uneven.alone([]) == []


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if calls cost little, so that the longest two rows of the tiny models are long enough."""
    least = uneven.alone
    monkeypatch.setattr(uneven, "alone", lambda lengths: least(lengths, 20))


def answered(stack: Stack, asked: Sequence[Sequence[int]], **options: Any) -> list[str]:
    rows = Rows({"one": Answers(stack)}, most=len(asked))
    jobs = [
        Job(
            Request("", ids=tuple(ids), max_tokens=NEW, temperature=0.0, **options),
            list(ids),
            NEW,
            model="one",
        )
        for ids in asked
    ]
    rows.step(jobs)
    while rows.busy:
        rows.step([])
    return [job.result(0).text for job in jobs]


def asked_of(stack: Stack) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(100, 200) for _ in range(length)] for length in LENGTHS]


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "opt", "mixtral"])
def test_each_is_answered_as_alone(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With heads that share keys, windows that slide (of 64: one row is longer), and experts."""
    read = list[tuple[int, int]]()
    plain = uneven.sdpa_attention_forward

    def watched(module: object, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        read.append((len(key), key.shape[2]))
        return plain(module, query, key, *rest, **options)

    monkeypatch.setattr(uneven, "sdpa_attention_forward", watched)
    stack = Stack(tiny(arch).eval(), [], tokenizer=tiny_tokenizer())
    asked = asked_of(stack)
    together = answered(stack, asked)
    assert together == [answered(stack, [ids])[0] for ids in asked]
    assert {(1, 61), (1, 34), (5, 6)} <= {*read}, "the others are read as if there were no long rows"
    assert not [pair for pair in read if pair == (5, 61)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "arch", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "opt", "mixtral", "bloom", "phi3"]
)
def test_rows_of_several_shelves_are_answered_as_alone(
    arch: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of them leave theirs while they are answered; where attention is another's, it sees one tensor."""
    monkeypatch.setattr(shelves, "LEAST", 8)
    model = tiny(arch).eval()
    model.set_attn_implementation(attention)
    stack = Stack(model, [], tokenizer=tiny_tokenizer())
    read, whole = set[tuple[int, ...]](), []
    update, made = slots.Slots.update, Shelved.whole

    def updated(self: Any, *args: Any, **options: Any) -> Any:
        read.add(tuple(shelf.size for shelf in self.shelves))
        return update(self, *args, **options)

    def counted(self: Shelved) -> Tensor:
        whole.append(1)
        return made(self)

    monkeypatch.setattr(slots.Slots, "update", updated)
    monkeypatch.setattr(Shelved, "whole", counted)
    asked = asked_of(stack)
    assert answered(stack, asked) == [answered(stack, [ids])[0] for ids in asked]
    assert {(8, 64), (16, 64, 128)} <= read
    assert bool(whole) == (attention == "eager" or arch == "bloom")


@pytest.mark.usefixtures("cheap")
def test_logits_are_those_of_plain_attention() -> None:
    stack = Stack(tiny("llama").eval(), [], tokenizer=tiny_tokenizer())

    def logits() -> list[Tensor]:
        seen = list[Tensor]()
        hook = stack.model.register_forward_hook(lambda *call: seen.append(call[2].logits[:, -1].clone()))
        answered(stack, asked_of(stack))
        hook.remove()
        return seen

    found = logits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uneven, "alone", lambda lengths: [])
        expected = logits()
    assert len(found) == len(expected) > NEW
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_attends_as_before_when_the_step_is_done(implementation: str) -> None:
    """Also where the step fails, and nothing is touched where attention is another's."""
    stack = Stack(tiny("llama").eval(), [], tokenizer=tiny_tokenizer())
    stack.model.set_attn_implementation(implementation)
    during = list[str]()

    @contextmanager
    def failing() -> Iterator[None]:
        def fail(*_: object) -> None:
            during.append(stack.model.config._attn_implementation)
            raise GenerationError("no more")

        hook = stack.model.register_forward_pre_hook(fail)
        yield
        hook.remove()

    answered(stack, asked_of(stack))
    assert stack.model.config._attn_implementation == implementation
    with failing(), uneven.by_length(stack.model, [LENGTHS]), pytest.raises(GenerationError):
        stack.model(input_ids=torch.ones(5, 1, dtype=torch.long))
    assert during == [uneven.NAME if implementation == "sdpa" else "eager"]
    assert stack.model.config._attn_implementation == implementation
    assert uneven._PARTS.get() == ()
