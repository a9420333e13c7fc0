from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import PAD, tiny, tiny_tokenizer
from peftx.toolkits.decoding.text import request_for
from peftx_attention_steering import AttentionSteering, Steer, marks, profile
from peftx_p_tuning_v2 import PTuningV2
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("attention-steering")

HEADS = ((0, 1), (0, 3), (1, 0))
ALPHA = 0.05
IDS = torch.tensor([[9, 8, 7, 6, 5, 4], [PAD, PAD, 3, 20, 21, 22]])
MARKS = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0]])
MASK = (IDS != PAD).long()
GREEDY: dict[str, Any] = {
    "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


def stack_of(*plugins: Any, arch: str = "llama", **options: Any) -> Stack:
    options = {"alpha": ALPHA, "heads": HEADS, **options}
    return Stack(tiny(arch), [*plugins, AttentionSteering(**options)], tokenizer=tiny_tokenizer())


@contextmanager
def by_masks(
    model: nn.Module, highlight: Tensor, heads: Sequence[tuple[int, int]] = HEADS, alpha: float = ALPHA
) -> Iterator[None]:
    """The plain model, with log(alpha) on the scores of a prompt's other tokens: softmax makes T of it."""
    model.set_attn_implementation("eager")  # which always makes a mask

    def hook(layer: int) -> Any:
        own = [head for place, head in heads if place == layer]

        def adds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            mask, rows = kwargs["attention_mask"], len(kwargs["attention_mask"]) // len(highlight)
            mask = mask.expand(-1, 4, -1, -1).clone()
            marked = highlight.repeat_interleave(rows, 0)
            for row, places in enumerate(marked.tolist()):
                for token, place in enumerate(places):
                    if not place:
                        mask[row, own, :, token] += math.log(alpha)
            return args, {**kwargs, "attention_mask": mask}

        return adds

    handles = [
        layer.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("arch", ["llama", "gemma", "mistral"])
@torch.no_grad()
def test_equals_what_masks_do_before_the_softmax(arch: str) -> None:
    stack, plain, real = stack_of(arch=arch), tiny(arch), MASK.bool()
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "position_ids": positions}
    with by_masks(plain, MARKS):
        expected = plain(**inputs).logits[real]
    found = stack.model(**inputs, highlight=MARKS).logits[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, tiny(arch)(**inputs).logits[real], atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
@torch.no_grad()
def test_generates_what_masks_on_the_prompt_generate(options: dict[str, Any]) -> None:
    """Tokens that are written weigh as marked ones do; rows are padded on the left, and rise through beams."""
    stack, plain = stack_of(), tiny("llama")
    with by_masks(plain, MARKS):
        expected = plain.generate(IDS, attention_mask=MASK, **GREEDY, **options)
    with stack.columns(highlight=MARKS):
        found = stack.model.generate(IDS, attention_mask=MASK, **GREEDY, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-4)
    without = stack.model.generate(IDS, attention_mask=MASK, **GREEDY, **options)
    assert not torch.allclose(torch.stack(without.logits)[0], torch.stack(found.logits)[0], atol=1e-2)


@pytest.mark.parametrize("others", [(PromptTuning(length=3, init="uniform"),), (PTuningV2(length=3),)])
@torch.no_grad()
def test_marks_stay_on_their_tokens_beside_rows_of_others(others: tuple[Any, ...]) -> None:
    """Cached, padded and beside others as uncached and alone; soft tokens and prefixes weigh as marked ones do."""
    stack = stack_of(*others)
    with stack.columns(highlight=MARKS):
        cached = stack.model.generate(IDS, attention_mask=MASK, **GREEDY)
        uncached = stack.model.generate(IDS, attention_mask=MASK, **GREEDY, use_cache=False)
    with stack.columns(highlight=MARKS[1:, 2:]):
        alone = stack.model.generate(IDS[1:, 2:], attention_mask=MASK[1:, 2:], **GREEDY)
    cached, uncached, alone = (torch.stack(out.logits) for out in (cached, uncached, alone))
    torch.testing.assert_close(cached, uncached, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cached[:, 1:], alone, rtol=1e-3, atol=1e-4)


class Watched(Steer):
    """Notes what goes in and comes out."""

    def probabilities(self, p: Tensor) -> Tensor:
        self.seen = p, super().probabilities(p)
        return self.seen[1]


@torch.no_grad()
def test_the_equation_in_a_head_that_steers_and_nothing_in_others() -> None:
    stack = stack_of()
    edit = next(
        part.module for part in stack.ledger.of("attention-steering") if isinstance(part.module, Steer)
    )
    edit.__class__ = Watched
    stack.model(IDS[:1], highlight=MARKS[:1])
    A, T = (x[0] for x in edit.seen)  # [H, Q, K]
    G = [1, 2, 5]
    for i in range(6):
        for h in (1, 3):
            C = sum(float(A[h, i, j]) * (1 if j in G else ALPHA) for j in range(6))
            for j in range(6):
                expected = float(A[h, i, j]) * (1 if j in G else ALPHA) / C
                assert float(T[h, i, j]) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(T[[0, 2]], A[[0, 2]])
    torch.testing.assert_close(T.sum(-1), torch.ones(4, 6))
    assert (T[[1, 3], 3:][..., G].sum(-1) > A[[1, 3], 3:][..., G].sum(-1)).all()


@torch.no_grad()
def test_rows_without_marks_and_a_scale_of_1_change_nothing() -> None:
    plain, some = tiny("llama")(IDS).logits, MARKS.clone()
    some[1] = 0
    found = stack_of().model(IDS, highlight=some).logits
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], plain[0], atol=1e-2)
    stack = stack_of()
    with stack.columns(highlight=some):
        found = torch.stack(stack.model.generate(IDS, attention_mask=MASK, **GREEDY).logits)
    plain_too = torch.stack(tiny("llama").generate(IDS, attention_mask=MASK, **GREEDY).logits)
    torch.testing.assert_close(found[:, 1], plain_too[:, 1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        stack_of(alpha=1.0).model(IDS, highlight=MARKS).logits, plain, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_all_heads_steer_if_none_are_named() -> None:
    every = [(layer, head) for layer in range(2) for head in range(4)]
    found = stack_of(heads=()).model(IDS[:1], highlight=MARKS[:1]).logits
    assert torch.equal(found, stack_of(heads=every).model(IDS[:1], highlight=MARKS[:1]).logits)
    assert not torch.allclose(found, stack_of().model(IDS[:1], highlight=MARKS[:1]).logits, atol=1e-3)


# -- marks -----------------------------------------------------------------------------------------------------------


def test_marks_are_of_the_tokens_that_generate_reads() -> None:
    stack = Stack("peftx:tiny", [AttentionSteering()])
    prompts = ["Mary is a doctor. Answer in French: who is Mary?", "The sea is near."]
    spans = [["Answer in French", "Mary"], ["sea"]]
    found, request = marks(stack, prompts, spans), request_for(stack, prompts, 1, None, {})
    assert found.shape == request.input_ids.shape
    for row, texts in enumerate((["Mary", "Answer in French"], ["sea"])):
        ids = request.input_ids[row][found[row].bool()]
        words = stack.tokenizer.decode(ids).split()
        assert " ".join(words) == " ".join(texts)
    with stack.columns(highlight=found):
        steered = stack.generate(prompts, max_new_tokens=8)
    assert steered != stack.generate(prompts, max_new_tokens=8)
    alone = marks(stack, prompts[1:], spans[1:])
    assert alone.tolist() == found[1:, -alone.shape[1] :].tolist()


def test_the_tokens_beside_a_span_are_not_marked() -> None:
    found = marks(
        Stack(tiny("llama"), [AttentionSteering()], tokenizer=tiny_tokenizer()), ["abcdef"], [["cd"]]
    )
    assert found[0, -6:].tolist() == [0, 0, 1, 1, 0, 0]  # a token a letter


def test_a_span_that_is_not_there_is_refused() -> None:
    stack = Stack("peftx:tiny", [AttentionSteering()])
    with pytest.raises(PeftxError, match="attention-steering: 'lake' is not in the prompt 'The sea'"):
        marks(stack, ["The sea"], [["lake"]])


# -- heads -----------------------------------------------------------------------------------------------------------


def test_profile_keeps_heads_that_are_among_the_best_of_every_task() -> None:
    stack = stack_of(heads=())
    edits = [p.module for p in stack.ledger.of("attention-steering") if isinstance(p.module, Steer)]
    steering: list[list[tuple[int, int]]] = []
    gains = {(0, 1): (5, 1), (0, 2): (4, 5), (1, 0): (3, 4), (1, 3): (0, 3)}

    def task(index: int) -> Any:
        def score() -> float:
            alone = [(edit.layer, head) for edit in edits for head in edit.H]
            steering.append(alone)
            return gains.get(alone[0], (-1, -1))[index]

        return score

    before = [edit.H for edit in edits]
    assert profile(stack, [task(0), task(1)], k=3) == [(0, 2), (1, 0)]
    assert sorted(place for alone in steering for place in alone) == sorted(2 * [*gains, *others(gains)])
    assert [edit.H for edit in edits] == before
    with pytest.raises(PeftxError, match="no head is among the 1 best of every task"):
        profile(stack, [task(0), task(1)], k=1)
    with pytest.raises(ZeroDivisionError):
        profile(stack, [lambda: 1 / 0], k=1)
    assert [edit.H for edit in edits] == before


def others(known: Any) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(2) for head in range(4) if (layer, head) not in known]


@torch.no_grad()
def test_a_profile_of_what_the_model_does() -> None:
    """Of one task, the head whose steering alone raises a token's probability most."""
    stack = stack_of(heads=())

    def task() -> float:
        return float(stack.model(IDS[:1], highlight=MARKS[:1]).logits[0, -1].log_softmax(-1)[40])

    (best,) = profile(stack, [task], k=1)
    alone = {}
    for place in others(()):
        one = stack_of(heads=(place,))
        logits = one.model(IDS[:1], highlight=MARKS[:1]).logits
        alone[place] = float(logits[0, -1].log_softmax(-1)[40])
    assert best == max(alone, key=lambda place: alone[place])


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"there is no head \[1, 4\]") as caught:
        stack_of(heads=((0, 0), (1, 4)))
    assert "from [0, 0] to [1, 3]" in str(caught.value.hint)
    for arch in ("t5", "whisper"):
        with pytest.raises(ArchitectureError, match=f"attention-steering: {arch} does not attend"):
            stack_of(arch=arch)
    with pytest.raises(PeftxError, match="alpha"):
        AttentionSteering(alpha=0)
