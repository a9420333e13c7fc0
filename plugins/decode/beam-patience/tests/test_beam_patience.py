"""Beam patience: p = 1 is transformers' first-come-first-served search; what p changes, and what it does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from peftx import Generation, Stack
from peftx.errors import ArchitectureError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank, ReferencePrompt
from peftx_beam_patience import BeamPatience

test_conformance = conformance("beam-patience")

ROWS = [[40, 41, 42, 43], [50, 51], [60]]
PAD, EOS = 2, list(range(100, 140))
NEW = 12


def request(model: PreTrainedModel, rows: Sequence[list[int]] = ROWS, **options: Any) -> Generation:
    longest = max(map(len, rows))
    config = copy.deepcopy(model.generation_config)
    config.update(
        **{
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "num_beams": 3,
            "early_stopping": True,
            **options,
        }
    )
    return Generation(
        model=model,
        tokenizer=tiny_tokenizer(),
        input_ids=torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        generation_config=config,
        seed=0,
    )


def run(
    p: float, rows: Sequence[list[int]] = ROWS, arch: str = "llama", **options: Any
) -> tuple[Tensor, Generation]:
    stack = Stack(tiny(arch), [BeamPatience(patience=p)], tokenizer=tiny_tokenizer())
    asked = request(stack.model, rows, **options)
    return stack.decode(asked), asked


def plain(rows: Sequence[list[int]] = ROWS, arch: str = "llama", **options: Any) -> Tensor:
    with torch.no_grad():
        return request(tiny(arch), rows, **options).run_default()


# ------------------------------------------------------------------------------------------------------------- p = 1
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 2.0},
        {"num_beams": 2, "length_penalty": 0.0, "use_cache": False},
        {"length_penalty": -1.0, "min_new_tokens": 4, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": True, "top_k": 0, "eos_token_id": 104},
        {"max_new_tokens": 1, "num_return_sequences": 3},
        {"eos_token_id": None, "max_new_tokens": 4},
        {"eos_token_id": 104, "max_new_tokens": 6},
        {"eos_token_id": list(range(20, 300)), "num_beams": 5},
        {"eos_token_id": None, "stop_strings": ["a", "e", "x", "\ufffd"]},
    ],
    ids=str,
)
def test_patience_one_is_the_search_of_transformers(options: dict[str, Any]) -> None:
    assert torch.equal(run(1.0, **options)[0], plain(**options))


@pytest.mark.parametrize("arch", ["gpt2", "t5", "mamba"])
def test_of_other_models(arch: str) -> None:
    rows = [[40, 41, 42], [50, 51, 52]]  # Mamba's states would take pads in
    assert torch.equal(run(1.0, rows, arch)[0], plain(rows, arch))


@pytest.mark.parametrize("row", range(3))
def test_it_stops_as_early(row: int) -> None:
    """The same number of forwards, fewer than the length allows."""
    found, asked = run(1.0, ROWS[row : row + 1], max_new_tokens=40)
    expected = request(tiny("llama"), ROWS[row : row + 1], max_new_tokens=40)
    assert torch.equal(found, expected.run_default())
    assert asked.stats["model_calls"] == expected.stats["model_calls"] < 40


def test_a_prompt_in_the_cache() -> None:
    stack = Stack(tiny("llama"), [BeamPatience(patience=1.0)])
    asked = request(stack.model, ROWS[:1])
    with torch.no_grad():
        asked.past_key_values = stack.model(asked.input_ids[:, :3]).past_key_values
        asked.past_key_values.batch_repeat_interleave(3)
    assert torch.equal(stack.decode(asked), plain(ROWS[:1]))


# ----------------------------------------------------------------------------------------------------------- other p
def test_what_patience_does() -> None:
    """More of it: more forwards, more finished texts, and a best one that is no worse."""
    for row in ROWS:
        calls, scores = [], []
        for p in (0.3, 1.0, 1.5, 2.0):
            _, asked = run(p, [row], max_new_tokens=40, eos_token_id=list(range(100, 200)))
            assert asked.stats["finished"] >= math.ceil(3 * p) or asked.stats["model_calls"] == 40
            calls.append(asked.stats["model_calls"])
            scores.append(asked.state["beam-patience"][0])
        assert calls == sorted(calls)
        assert calls[0] < calls[-1]
        assert scores == sorted(scores)


def test_some_patience_finds_a_better_text() -> None:
    """With alpha = 2 longer texts win, and waiting pays."""
    (short, one), (long, two) = (run(p, ROWS[:1], max_new_tokens=40, length_penalty=2.0) for p in (0.3, 4.0))
    assert two.state["beam-patience"] > one.state["beam-patience"]
    assert long.shape[1] > short.shape[1]


def test_by_hand() -> None:
    """Two beams over a table of probabilities: which texts finish, when, and which of them is given.

    A = 10, B = 11, end = 1. A is likelier first, ends are likelier behind B.
    """

    class Table(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            new = [tuple(row[1:].tolist()) for row in input_ids]
            told = {
                (): {10: 0.6, 11: 0.3, 1: 0.1},
                (10,): {10: 0.55, 11: 0.4, 1: 0.05},
                (11,): {1: 0.9, 10: 0.1},
                (10, 10): {1: 0.9, 10: 0.1},
                (10, 11): {1: 0.2, 10: 0.8},
            }
            out = torch.full_like(scores, -float("inf"))
            for place, key in zip(out, new, strict=True):
                for token, probability in told.get(key, {1: 0.6, 10: 0.4}).items():
                    place[token] = math.log(probability)
            return out

    def found(p: float, alpha: float) -> tuple[list[int], Generation]:
        stack = Stack(tiny("llama"), [BeamPatience(patience=p)])
        asked = request(
            stack.model, [[40]], num_beams=2, eos_token_id=1, length_penalty=alpha, max_new_tokens=9
        )
        asked.logits_processors.append(Table())
        return stack.decode(asked)[0, 1:].tolist(), asked

    # Step 2 of beams A (0.6), B (0.3): AA 0.33, then B end 0.27 (in F), AB 0.24. Step 3: AA end 0.297 (in F).
    text, asked = found(0.5, 0.0)
    assert text == [11, 1]
    assert asked.stats["model_calls"] == 2
    assert asked.state["beam-patience"][0] == pytest.approx(math.log(0.27), abs=1e-5)
    text, asked = found(1.0, 0.0)
    assert text == [10, 10, 1]
    assert asked.stats["model_calls"] == 3
    assert asked.state["beam-patience"][0] == pytest.approx(math.log(0.297), abs=1e-5)
    text, asked = found(1.0, 1.0)
    assert asked.state["beam-patience"][0] == pytest.approx(math.log(0.297) / 3, abs=1e-5)
    # Step 4 of ABA (0.192) and AAA (0.033): ABA end 0.1152, ABAA 0.0768; with alpha = 3 it is the best.
    text, asked = found(1.5, 3.0)
    assert text == [10, 11, 10, 1]
    assert asked.stats["model_calls"] == 4
    assert asked.stats["finished"] == 3
    assert asked.state["beam-patience"][0] == pytest.approx(math.log(0.1152) / 64, abs=1e-5)


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_one_beam_is_greedy(p: float) -> None:
    assert torch.equal(run(p, num_beams=1)[0], plain(num_beams=1))


def test_texts_that_are_missing_still_run() -> None:
    """One token is allowed, so one text can finish; it comes first, and rows stay rows."""
    stack = Stack(tiny("llama"), [BeamPatience(patience=1.0)])
    asked = request(stack.model, ROWS[:1], num_return_sequences=2, max_new_tokens=3)

    class OneToken(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            out = torch.full_like(scores, -float("inf"))
            out[:, 70] = scores[:, 70]
            return out

    asked.logits_processors.append(OneToken())
    found = stack.decode(asked)
    assert found.shape == (2, 7)
    assert found[0].tolist() == [*ROWS[0], 70, 70, 70]
    assert asked.stats["finished"] == 1


# ------------------------------------------------------------------------------------------------- requests, stacks
def test_which_requests_have_beams() -> None:
    stack = Stack(tiny("llama"), [BeamPatience(patience=1.0, beams=4)])
    asked = request(stack.model, num_beams=None)
    assert torch.equal(stack.decode(asked), plain(num_beams=4))
    assert asked.generation_config.num_beams is None
    sampled = request(stack.model, num_beams=None, do_sample=True)
    assert torch.equal(stack.decode(sampled), plain(num_beams=None, do_sample=True))
    with stack.disabled():
        assert torch.equal(stack.decode(request(stack.model, num_beams=None)), plain(num_beams=None))


@pytest.mark.parametrize("other", [ReferenceLowRank, ReferencePrompt])
@pytest.mark.parametrize("last", [True, False])
def test_with_other_plugins(other: Any, last: bool) -> None:
    found = []
    for plugins in ([other(), BeamPatience(patience=1.0)][:: 1 if last else -1], [other()]):
        stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
        for parameter in stack.model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        found.append(stack.decode(request(stack.model)))
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain())


def test_texts_of_a_stack() -> None:
    stack = Stack("peftx:tiny", [BeamPatience()])
    texts = stack.generate(["The light is", "Once"], max_new_tokens=6)
    assert len(texts) == 2
    assert all(texts)


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"early_stopping": "never"}, "beam-patience does not support early_stopping='never'"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"num_return_sequences": 3}, r"num_return_sequences over k p = 1\.5"),
    ],
)
def test_requests_that_are_refused(options: dict[str, Any], match: str) -> None:
    run(0.5, num_return_sequences=2)
    with pytest.raises(UnsupportedError, match=match):
        run(0.5, **options)


def test_nothing_can_be_streamed() -> None:
    stack = Stack(tiny("llama"), [BeamPatience()])
    asked = request(stack.model)
    asked.streamer = BaseStreamer()
    with pytest.raises(UnsupportedError, match="a streamer: no text is certain before the end"):
        stack.decode(asked)


def test_encoders_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="beam-patience: BertForMaskedLM writes no text"):
        Stack(tiny("bert"), [BeamPatience()])


@pytest.mark.parametrize(
    ("option", "value"), [("patience", 0), ("patience", float("inf")), ("beams", 0), ("p", 1)]
)
def test_bad_options(option: str, value: object) -> None:
    with pytest.raises(PeftxError, match=f"BeamPatience.*{option}"):
        BeamPatience(**{option: value})
