"""Air-Decoding: the prefixes of a value, R and Bayes' rule by hand; caches, pads, beams; limits."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import peftx
from peftx import Generation, Stack
from peftx.errors import ArchitectureError, DataError, PeftxError, UnsupportedError
from peftx.kernel.parts import AttentionPart
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx_aded import Aded
from peftx_air_decoding import Air, AirDecoding, Prefix, log_R
from peftx_beam_patience import BeamPatience
from peftx_hydragen import Hydragen
from peftx_p_tuning_v2 import PTuningV2

test_conformance = conformance("air-decoding")

ROWS = [[40, 41, 42, 43, 44, 45, 46], [50, 51, 50], [60]]
NEW = 5
SMALL: dict[str, Any] = {"length": 3, "hidden": 8, "strength": 6.0}


def built(arch: str = "llama", *others: Any, alike: bool = False, **options: Any) -> Stack:
    """With prefixes that matter; `alike`: the same for all values."""
    air = AirDecoding(**{"steer": 1, **SMALL, **options})
    stack = Stack(tiny(arch), [air, *others], tokenizer=tiny_tokenizer())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("air-decoding"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if alike:
                parameter.copy_(parameter[:1].expand_as(parameter))
    return stack


def request(model: PreTrainedModel, rows: Sequence[list[int]] = ROWS, **options: Any) -> Generation:
    longest, config = max(map(len, rows)), copy.deepcopy(model.generation_config)
    config.update(**{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, "top_k": 0, **options})
    return Generation(
        model=model,
        tokenizer=tiny_tokenizer(),
        input_ids=torch.tensor([[2] * (longest - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        generation_config=config,
        seed=0,
    )


def text(stack: Stack, rows: Sequence[list[int]] = ROWS, **options: Any) -> Tensor:
    return stack.decode(request(stack.model, rows, **options))


def scores(stack: Stack, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and processed scores of each step [B, NEW, V]."""
    asked = request(stack.model, return_dict_in_generate=True, output_scores=True, **options)
    ids = stack.decode(asked)
    return ids, torch.stack(asked.state["generate"].scores, 1)


@torch.no_grad()
def log_p(stack: Stack, ids: Tensor, value: int | None) -> Tensor:
    """Of each token's successor, [L, V]; without pads and without a cache."""
    given = {} if value is None else {"attribute": torch.tensor([value])}
    return stack.model(ids[None], **given).logits[0].float().log_softmax(-1)


WAYS = [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "num_return_sequences": 2}]


# ---------------------------------------------------------------------------------------------------------- equations
def test_R_by_hand() -> None:
    p = torch.tensor([1e-6, 0.1, 0.5, 0.9, 1.0])
    R = log_R(p.log()).exp()
    torch.testing.assert_close(
        R[1:4], torch.tensor([1 / 2.302585, 1 / 0.693147, 1 / 0.105361]), rtol=1e-4, atol=0
    )
    assert (R.diff() > 0).all()
    assert R.isfinite().all()


@pytest.mark.parametrize("values", [2, 3])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_equations_step_by_step(arch: str, values: int) -> None:
    """Padded rows against P(v) in proportion to p(v) P(a | v)^lambda, as it is written, without caches."""
    stack = built(arch, values=values)
    ids, found = scores(stack)
    longest = max(map(len, ROWS))
    for row, prompt in enumerate(ROWS):
        whole = ids[row, longest - len(prompt) :]
        p = [log_p(stack, whole, value).double() for value in range(values)]
        w = [1.0] * values
        for step in range(NEW):
            at = len(prompt) - 1 + step
            R = [-1 / p[value][at] for value in range(values)]
            P = R[1] / (R[1] + sum(R[b] * w[b] for b in range(values) if b != 1))
            expected = log_p(stack, whole[: at + 1], None)[-1] + 6.0 * P.log()
            got = found[row, step].log_softmax(-1)
            torch.testing.assert_close(got, expected.log_softmax(-1).float(), atol=1e-3, rtol=0)
            token = int(whole[at + 1])
            w = [w[b] * float(R[b][token] / R[1][token]) for b in range(values)]


def test_probabilities_of_the_values_sum_to_one() -> None:
    stack = built(values=3)
    asked = request(stack.model)
    air = Air(stack.plugins["air-decoding"], asked)
    with torch.no_grad():
        first = air.log_P(asked.input_ids)
        more = air.log_P(torch.cat((asked.input_ids, torch.tensor([[9, 8], [7, 6], [5, 4]])), 1))
    for P in (first, more):
        assert P.shape == (3, 3, 320)
        torch.testing.assert_close(P.exp().sum(0), torch.ones(3, 320))
    assert (first.exp() - 1 / 3).abs().max() > 0.05


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_limits(options: dict[str, Any]) -> None:
    """Without strength, with values alike, and with none to steer to, it is the base."""
    base = text(Stack(tiny("llama")), **options)
    assert torch.equal(text(built(strength=0.0), **options), base)
    assert torch.equal(text(built(alike=True), **options), base)
    assert torch.equal(text(built(steer=None), **options), base)
    steered = built()
    assert not torch.equal(text(steered, **options), base)
    steered.plugins["air-decoding"].steer = None
    assert torch.equal(text(steered, **options), base)
    assert torch.equal(scores(built(strength=0.0))[1], scores(Stack(tiny("llama")))[1])


def test_values_pull_apart() -> None:
    """Each makes the tokens likelier that are likely behind its prefix and not behind the other's."""
    first = [scores(built(steer=value), max_new_tokens=1)[1][:, 0].log_softmax(-1) for value in (0, 1)]
    stack = built()
    for row, prompt in enumerate(ROWS):
        told = [log_p(stack, torch.tensor(prompt), value)[-1] for value in (0, 1)]
        sure = (told[0] - told[1]).abs() > 1
        same = ((first[0] - first[1])[row] > 0) == (told[0] - told[1] > 0)
        assert same[sure].float().mean() > 0.8


def test_temperature_and_filters_come_behind() -> None:
    plain = scores(built(), max_new_tokens=1)[1]
    warm = scores(built(), max_new_tokens=1, do_sample=True, temperature=2.0, top_k=5)[1]
    kept = warm.isfinite()
    assert torch.equal(kept.sum(-1), torch.full(kept.shape[:-1], 5))
    torch.testing.assert_close(warm[kept], plain[kept] / 2)


# ------------------------------------------------------------------------------------------------------------ prefixes
def test_a_prefix_is_that_of_p_tuning_v2() -> None:
    stack = built("gpt2")
    inputs = request(stack.model)
    given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    with torch.no_grad():
        found = stack.model(**given, attribute=torch.tensor([1, 0, 1])).logits
        assert torch.equal(stack.model(**given).logits, tiny("gpt2")(**given).logits)
    edits = [part.module for part in stack.ledger.of("air-decoding", AttentionPart)]
    for value, row in ((0, 1), (1, 0), (1, 2)):
        other = Stack(tiny("gpt2"), [PTuningV2(length=3, dropout=0)])
        with torch.no_grad():
            for part, edit in zip(other.ledger.of("p-tuning-v2", AttentionPart), edits, strict=True):
                assert isinstance(edit, Prefix)
                part.module.prompt.rows.copy_(edit.rows()[value])
            torch.testing.assert_close(
                other.model(**given).logits[row, -1], found[row, -1], atol=1e-4, rtol=0
            )


def test_the_rows_by_hand() -> None:
    """E_K W + b and E_V W + b, others for each value."""
    edit = built().ledger.of("air-decoding", AttentionPart)[0].module
    for value in range(2):
        for kind in range(2):
            flat = edit.E[value, kind] @ edit.W[value, 0] + edit.b[value, 0]  # [l, heads * size]
            found = edit.rows()[value, kind]  # [heads, l, size]
            torch.testing.assert_close(found.transpose(0, 1).flatten(1), flat)


def test_they_are_computed_once_for_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, times = built(), []
    rows = Prefix.rows
    monkeypatch.setattr(Prefix, "rows", lambda edit: times.append(1) or rows(edit))
    text(stack)
    assert len(times) == 2 * 2  # in each layer, for the prompt, and for the cache that it leaves


def test_rows_train_their_values_prefix_alone() -> None:
    stack = built(values=3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    stack.model.train()
    stack.train_step({"input_ids": ids, "labels": ids, "attribute": torch.tensor([2, 0])})
    for parameter in stack.ledger.parameters("air-decoding"):
        moved = parameter.grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [True, False, True]


def test_trained_values_are_told_apart() -> None:
    """Two values with a word each: the word's value is likelier behind it, and texts have it."""
    rows = [
        {"prompt": "It is", "completion": word * 3, "attribute": n} for n, word in enumerate((" wet", " dry"))
    ]
    stack = Stack(tiny("llama"), [AirDecoding(length=3, hidden=16, steer=0)], tokenizer=tiny_tokenizer())
    stack.train(rows * 2, steps=40, batch_size=4, learning_rate=0.05)
    asked = request(stack.model, [tiny_tokenizer()("It is ")["input_ids"]])
    with torch.no_grad():
        P = Air(stack.plugins["air-decoding"], asked).log_P(asked.input_ids).exp()[:, 0]
    wet, dry = (tiny_tokenizer()(letter)["input_ids"][0] for letter in "wd")
    assert P[0, wet] > 0.6
    assert P[1, dry] > 0.6
    for value, sign in ((0, 1), (1, -1)):
        stack.plugins["air-decoding"].steer = value
        asked = request(stack.model, [tiny_tokenizer()("It is ")["input_ids"]])
        asked.generation_config.update(return_dict_in_generate=True, output_scores=True)
        stack.decode(asked)
        first = asked.state["generate"].scores[0][0]
        assert sign * (first[wet] - first[dry]) > 10


@pytest.mark.parametrize("column", [None, [0, 2], [-1, 0]])
def test_rows_without_a_value(column: list[int] | None) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    batch = {"input_ids": ids, "labels": ids} | (
        {} if column is None else {"attribute": torch.tensor(column)}
    )
    with pytest.raises(DataError, match="air-decoding: rows without 'attribute', a whole number from 0 to 1"):
        built().train_step(batch)


# -------------------------------------------------------------------------------------------------------------- caches
def test_the_values_read_each_token_once() -> None:
    stack, seen = built(values=3), []
    stack.model.model.layers[0].register_forward_pre_hook(
        lambda _module, args: seen.append(tuple(args[0].shape[:2]))
    )
    text(stack)
    assert seen[:2] == [(3, 7), (9, 7)]
    assert seen[2:] == [(3, 1), (9, 1)] * (NEW - 1)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_caches_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache and history follow the beams: each step anew gives the same text."""
    cached = text(built(), **options)
    follow = Air.follow

    def anew(air: Air, rows: Tensor) -> int:
        air.cache = None
        return follow(air, rows)

    monkeypatch.setattr(Air, "follow", anew)
    assert torch.equal(text(built(), **options), cached)


def test_a_cache_follows_its_rows() -> None:
    """In another order, fewer, a step back, others, several tokens at once."""
    stack = built()
    plugin = stack.plugins["air-decoding"]
    prompts = request(stack.model, [[5, 6, 7], [6, 7]])

    def once(rows: list[list[int]], twice: Air) -> None:
        ids = torch.tensor(rows)
        with torch.no_grad():
            found, expected = twice.log_P(ids), Air(plugin, prompts).log_P(ids)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    a, b, c, d = [5, 6, 7, 8], [5, 6, 7, 9], [2, 6, 7, 8], [2, 6, 7, 9]
    air = Air(plugin, prompts)
    for rows in (
        [a, b, c, d],
        [[*b, 1], [*a, 2], [*d, 3], [*d, 4]],
        [[*b, 1, 1], [*d, 4, 1]],
        [[*b, 1, 1], [*d, 4, 1]],
        [[*b, 2], [*d, 4]],
        [[*b, 2, 6, 6], [*d, 4, 7, 8]],
        [[*b, 2, 6, 6, 1], [*d, 5, 7, 8, 1]],
    ):
        once(rows, air)


def test_a_mask_is_found_as_generate_finds_it() -> None:
    for options in ({}, {"num_beams": 2}):
        asked = request((stack := built()).model, **options)
        asked.attention_mask = None
        assert torch.equal(stack.decode(asked), text(built(), **options))


def test_scores_of_beams_are_log_probabilities() -> None:
    _, found = scores(built(), num_beams=3)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(found.shape[:-1]), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------- composition
def test_with_another_loop() -> None:
    """What was written in a row is known where the prompts are those of the request."""
    rows = [[40, 50, 60] * 6, [*[40, 50, 60] * 6, 41, 42], [40, 50] * 9]
    assert torch.equal(text(built("llama", Hydragen()), rows), text(built(), rows))
    assert torch.equal(text(built("llama", Aded()), rows[:1]), text(built(), rows[:1]))
    for several in (rows, [rows[0], rows[0]]):
        with pytest.raises(UnsupportedError, match="air-decoding: prompts that are decoded one by one"):
            text(built("llama", Aded()), several)


def test_a_bundle(tmp_path: Path) -> None:
    stack = built()
    stack.save(tmp_path / "bundle")
    again = peftx.load(tmp_path / "bundle", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(text(again), text(stack))


def test_beams_of_another_loop() -> None:
    """Which a request need not name."""
    both = built("llama", BeamPatience(patience=1.0, beams=3))
    alone = built()
    assert torch.equal(text(both), text(alone, num_beams=3, early_stopping=True))


def test_the_request_is_left_as_it_was() -> None:
    stack = built()
    asked = request(stack.model)
    first = stack.decode(asked)
    assert len(asked.logits_processors) == 0
    assert torch.equal(stack.decode(asked), first)
    with stack.disabled():
        assert torch.equal(text(stack), text(Stack(tiny("llama"))))


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("arch", ["bert", "t5", "vit"])
def test_models_without_a_text(arch: str) -> None:
    with pytest.raises(ArchitectureError, match=r"air-decoding: .* is no decoder that writes text"):
        Stack(tiny(arch), [AirDecoding()])


def test_texts_that_are_repacked() -> None:
    with pytest.raises(PeftxError, match="text is repacked into blocks"):
        built().train([{"text": "A joy.", "attribute": 1}] * 2, steps=1)


def test_an_empty_prompt_trains_on_all_of_a_text() -> None:
    rows = [
        {"prompt": "", "completion": word, "attribute": n} for n, word in enumerate(("A bore.", "A joy."))
    ]
    assert built().train(rows, steps=1, batch_size=2).terms["task"] > 0


def test_keys_and_values_of_two_sizes() -> None:
    with pytest.raises(ArchitectureError, match="air-decoding: keys and values of Deepseek"):
        Stack(tiny("deepseek_v3"), [AirDecoding()])


def test_what_the_values_cannot_read() -> None:
    stack = built()
    asked = request(stack.model)
    asked.model_kwargs["token_type_ids"] = torch.zeros_like(asked.input_ids)
    with pytest.raises(UnsupportedError, match=r"air-decoding: .* brings token_type_ids"):
        stack.decode(asked)


@pytest.mark.parametrize(
    ("option", "value"),
    [("values", 1), ("steer", 2), ("steer", -1), ("strength", -1), ("length", 0), ("hidden", 0), ("lam", 1)],
)
def test_bad_options(option: str, value: object) -> None:
    with pytest.raises(PeftxError, match=f"AirDecoding.*{option}"):
        AirDecoding(**{option: value})


def test_defaults_are_the_papers() -> None:
    config = AirDecoding().config
    assert (config.length, config.hidden, config.strength) == (20, 512, 140.0)
    assert math.isfinite(config.strength)
