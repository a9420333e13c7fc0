from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.subject import TEXTS
from peftx.toolkits.compression import Calibration
from peftx_longrope import LongRope, deltas, rope_parameters
from peftx_lora import Lora

test_conformance = conformance("longrope")

L, LONG = 12, 40
SMALL: dict[str, Any] = {
    "original": L,
    "scale": 4.0,
    "population": 6,
    "parents": 3,
    "texts": 2,
    "mutations": 3,
    "crossovers": 3,
    "rounds": 3,
}
FOUR = {"samples": 8, "length": 24}


def stack_of(arch: str = "llama", *more: tuple[str, LongRope], **options: Any) -> Stack:
    return Stack(tiny(arch), [LongRope(**{**SMALL, **options}), *more], tokenizer=tiny_tokenizer())


def searched(**options: Any) -> Stack:
    stack = stack_of(**options)
    stack.compress(TEXTS, **FOUR)
    return stack


def genes(size: int, scale: float = 4.0) -> Tensor:
    """Factors that rise, none of them 1 or the scale."""
    return torch.linspace(1.1, 1.2 * scale, size)


def ids_of(length: int, seed: int = 3) -> Tensor:
    return torch.randint(5, 300, (2, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, length: int, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids_of(length), **options).logits


def with_rope(arch: str = "llama", **parameters: Any) -> PreTrainedModel:
    """The tiny model with other `rope_parameters`, as transformers makes it of a configuration."""
    plain = tiny(arch)
    config = copy.deepcopy(plain.config)
    if getattr(config, "head_dim", 1) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.rope_parameters = {**config.rope_parameters, **parameters}
    model = type(plain)(config)
    model.load_state_dict(plain.state_dict())
    return model.eval()


# ------------------------------------------------------------------------------------------------------- the angles
def test_no_factors_are_the_model_itself() -> None:
    stack = stack_of()
    assert torch.equal(logits(stack.model, LONG), logits(tiny("llama"), LONG))


@pytest.mark.parametrize("n", [0, 5])
def test_angles_by_hand(n: int) -> None:
    stack = stack_of(attention_factor=1.5)
    (delta,) = deltas(stack)
    stack.plugins["longrope"].take((genes(len(delta.f)), n))
    rotary, position = stack.model.model.rotary_emb, torch.arange(LONG)[None]
    cos, sin = rotary(torch.zeros(1, LONG, 4), position)
    size = len(delta.f)
    for m in (0, 4, 5, 30):
        for i in range(size):
            theta = 10000.0 ** (-2 * i / (2 * size))
            angle = m * theta / (1 if m < n else float(delta.f[i]))
            for column in (i, i + size):
                assert float(cos[0, m, column]) == pytest.approx(1.5 * math.cos(angle), abs=1e-4)
                assert float(sin[0, m, column]) == pytest.approx(1.5 * math.sin(angle), abs=1e-4)
    assert torch.equal(rotary.inv_freq, tiny("llama").model.rotary_emb.inv_freq), "they are as they were"


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "mixtral", "qwen3"])
def test_known_methods_are_such_factors(arch: str) -> None:
    """Linear interpolation and YaRN as transformers computes them; NTK as another base."""
    stack = stack_of(arch)
    plugin = stack.plugins["longrope"]
    starts = plugin.starts(stack.view("longrope"))
    plugin.take((starts["linear"], 0))
    found = logits(stack.model, LONG)
    assert not torch.allclose(found, logits(tiny(arch), LONG), atol=1e-3)
    torch.testing.assert_close(
        found, logits(with_rope(arch, rope_type="linear", factor=4.0), LONG), rtol=0, atol=1e-4
    )
    plugin.take((starts["yarn"], 0))
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": L,
        "attention_factor": 1.0,
    }
    torch.testing.assert_close(
        logits(stack.model, LONG), logits(with_rope(arch, **yarn), LONG), rtol=0, atol=1e-4
    )
    if arch == "gpt_neox":  # whose tiny model turns one pair
        return
    plugin.take((starts["ntk"], 0))
    d, base = 2 * len(starts["ntk"]), tiny(arch).config.rope_parameters["rope_theta"]
    ntk = with_rope(arch, rope_theta=base * 4.0 ** (d / (d - 2)))
    torch.testing.assert_close(logits(stack.model, LONG), logits(ntk, LONG), rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [1024, 1131])  # 1131 / (2 pi 32) is where the ramp begins one pair later
def test_yarn_is_that_of_transformers(length: int) -> None:
    stack = Stack("peftx:tiny", [LongRope(scale=8, original=length)])
    yarn = stack.plugins["longrope"].starts(stack.view("longrope"))["yarn"]
    config = copy.deepcopy(stack.model.config)
    own = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": length}
    config.rope_parameters = {**config.rope_parameters, **own}
    frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    torch.testing.assert_close(stack.model.model.rotary_emb.inv_freq / yarn, frequencies, rtol=1e-5, atol=0)
    assert ((yarn > 1.01) & (yarn < 7.9)).sum() > 2


# ------------------------------------------------------------------------------------------------------ the length
def test_short_texts_are_left_alone() -> None:
    stack = stack_of()
    stack.plugins["longrope"].take((genes(len(deltas(stack)[0].f)), 0))
    assert torch.equal(logits(stack.model, L), logits(tiny("llama"), L))
    assert not torch.allclose(logits(stack.model, L + 1), logits(tiny("llama"), L + 1), atol=1e-3)


def test_short_factors_are_for_short_texts() -> None:
    stack = stack_of(part="short")
    stack.plugins["longrope"].take((genes(len(deltas(stack)[0].f)), 0))
    assert not torch.allclose(logits(stack.model, L), logits(tiny("llama"), L), atol=1e-3)
    assert torch.equal(logits(stack.model, L + 1), logits(tiny("llama"), L + 1))


@pytest.mark.parametrize("start", [6, L + 4])
def test_a_text_that_goes_on_keeps_its_factors(start: int) -> None:
    """Keys in the cache were turned once; what comes after is turned alike, over L too."""
    stack = stack_of()
    plugin, ids = stack.plugins["longrope"], ids_of(L + 8)
    plugin.take((genes(len(plugin.delta.f)), 0))
    with torch.no_grad():
        cache = stack.model(ids[:, :start], use_cache=True).past_key_values
        steps = [stack.model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start, L + 8)]
        plain = tiny("llama")
        if start > L:
            whole = stack.model(ids).logits[:, start:]
        else:
            whole = plain(ids).logits[:, start:]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-4)


def test_a_plain_configuration_says_the_same() -> None:
    short = LongRope(**{**SMALL, "part": "short", "attention_factor": 1.2})
    stack = stack_of("llama", ("short", short), attention_factor=1.2)
    size = len(short.delta.f)
    stack.plugins["longrope"].take((genes(size), 0))
    short.take((genes(size, 1.5), 0))
    found = rope_parameters(stack)
    model = with_rope(**found)
    assert model.model.rotary_emb.rope_type == "longrope"
    for length in (L - 2, L, L + 1, LONG):
        torch.testing.assert_close(logits(stack.model, length), logits(model, length), rtol=0, atol=1e-4)
    assert found["factor"] == 4.0
    short.take((genes(size, 1.5), 4))
    with pytest.raises(PeftxError, match="no tokens apart"):
        rope_parameters(stack)


def test_a_second_stage_stands_on_the_first() -> None:
    second = LongRope(**{**SMALL, "scale": 2.0})
    stack = stack_of("llama", ("second", second))
    first, size = stack.plugins["longrope"], len(second.delta.f)
    assert (first.delta.limit, second.delta.limit, second.delta.reach) == (L, 4 * L, 8 * L)
    f, g = genes(size), genes(size, 2.0)
    first.take((f, 0))
    second.take((g, 0))
    alone = stack_of(scale=8.0)
    for length, factors in ((4 * L, f), (4 * L + 1, f * g)):
        alone.plugins["longrope"].take((factors, 0))
        torch.testing.assert_close(
            logits(stack.model, length), logits(alone.model, length), rtol=0, atol=1e-4
        )
    assert torch.equal(logits(stack.model, L), logits(tiny("llama"), L))
    with pytest.raises(PeftxError, match="one plugin of part long"):
        rope_parameters(stack)


# ------------------------------------------------------------------------------------------------------ the search
def test_the_search_improves_and_every_candidate_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, int]] = []
    measure = LongRope.perplexity

    def noting(self: LongRope, stack: Stack, rows: Tensor, of: tuple[Tensor, int]) -> float:
        seen.append((of[0].clone(), of[1]))
        assert rows.shape == (2, 4 * L)
        return measure(self, stack, rows, of)

    monkeypatch.setattr(LongRope, "perplexity", noting)
    stack = searched(probability=0.5)
    state, (delta,) = stack.plugins["longrope"].state, deltas(stack)
    candidates = seen[4:]  # behind the four known ones
    assert 6 + 3 * 3 <= len(candidates) <= 6 + 3 * 6
    for f, n in candidates:
        assert (f.diff() >= 0).all()
        assert 1 <= f.min() <= f.max() <= 1.25 * 4 + 1e-6
        assert n in stack.plugins["longrope"].config.first_tokens
    assert len({n for _, n in candidates}) > 1
    rounds = state["rounds"]
    assert len(rounds) == 4
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[0] <= min(value for name, value in state["start"].items() if name != "none")
    assert any(torch.equal(delta.f, f) and int(delta.n) == n for f, n in candidates)
    scores = stack.evaluate(metrics=["longrope"])
    assert scores["perplexity_found"].value == rounds[-1]
    assert set(state["start"]) == {"none", "linear", "ntk", "yarn"}


def test_the_best_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fitness that is known, the search comes near the factors that it is lowest at."""
    target = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def distance(self: LongRope, stack: Stack, rows: Tensor, of: tuple[Tensor, int]) -> float:
        return float((of[0] - target).abs().sum()) + (of[1] != 8)

    stack = stack_of(rounds=60, mutations=10, crossovers=10, population=20, parents=8)
    (delta,) = deltas(stack)
    assert len(delta.f) == 4
    monkeypatch.setattr(LongRope, "perplexity", distance)
    stack.compress(TEXTS, **FOUR)
    assert float((delta.f - target).abs().max()) < 0.15
    assert int(delta.n) == 8


def test_mutants_and_crossings() -> None:
    plugin = LongRope(**{**SMALL, "probability": 1.0})
    torch.manual_seed(0)
    parent = (torch.tensor([1.0, 2.0, 2.0, 4.0]), 4)
    for _ in range(50):
        f, _ = plugin.mutant([parent])
        assert (f.diff() >= 0).all()
        assert f[0] >= 1
        assert f[-1] <= 5
        assert torch.allclose(f * 100, (f * 100).round(), atol=1e-3)
    assert max(float(plugin.mutant([parent])[0][-1]) for _ in range(20)) > 4, "up to 1.25 s"
    f, n = LongRope(**{**SMALL, "probability": 0.0}).mutant([parent])
    assert torch.equal(f, parent[0])
    assert n == 4
    other = (torch.tensor([1.5, 1.5, 3.0, 5.0]), 8)
    found = [child for child in (plugin.crossing([parent, other]) for _ in range(60)) if child]
    kinds = {tuple(f.tolist()) for f, _ in found}
    assert len(kinds) > 4
    assert {n for _, n in found} == {4, 8}
    for f, _ in found:
        assert ((f == parent[0]) | (f == other[0])).all()
        assert (f.diff() >= 0).all()


def test_texts_are_put_together_again() -> None:
    stack = stack_of()
    plugin = stack.plugins["longrope"]
    pieces = [torch.tensor([[1, *range(10 * i, 10 * i + 9)]]) for i in range(1, 13)]
    rows = plugin.rows(Calibration([{"input_ids": piece} for piece in pieces]), "longrope")
    assert rows.shape == (2, 48)
    assert rows[0, :12].tolist() == [1, *range(10, 19), 20, 21]
    with pytest.raises(PeftxError, match="19 tokens of calibration text are no text of 48"):
        plugin.rows(Calibration([{"input_ids": piece} for piece in pieces[:2]]), "longrope")


def test_short_texts_are_searched_at_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    measure = LongRope.perplexity

    def noting(self: LongRope, stack: Stack, rows: Tensor, of: tuple[Tensor, int]) -> float:
        lengths.append(rows.shape[1])
        return measure(self, stack, rows, of)

    monkeypatch.setattr(LongRope, "perplexity", noting)
    stack = searched(part="short")
    assert set(lengths) == {L}
    state = stack.plugins["longrope"].state
    assert set(state["start"]) == {"none"}
    assert state["rounds"][0] <= state["start"]["none"]


# ------------------------------------------------------------------------------------------------------- the stack
def test_bundles_and_removal(tmp_path: Path) -> None:
    stack = searched()
    given = logits(stack.model, LONG)
    assert not torch.allclose(given, logits(tiny("llama"), LONG), atol=1e-3)
    stack.save(tmp_path / "out")
    assert (tmp_path / "out" / "longrope.safetensors").stat().st_size < 1000
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=tiny_tokenizer())
    assert torch.equal(logits(again.model, LONG), given)
    with stack.disabled("longrope"):
        assert torch.equal(logits(stack.model, LONG), logits(tiny("llama"), LONG))
    stack.remove("longrope")
    assert torch.equal(logits(stack.model, LONG), logits(tiny("llama"), LONG))
    assert type(stack.model.model.rotary_emb) is type(tiny("llama").model.rotary_emb)


def test_what_breaks_off_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of()
    monkeypatch.setattr(LongRope, "crossing", lambda *a: 1 / 0)
    with pytest.raises(PeftxError, match="ZeroDivisionError"):
        stack.compress(TEXTS, **FOUR)
    assert torch.equal(logits(stack.model, LONG), logits(tiny("llama"), LONG))
    assert not stack.plugins["longrope"].state


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (lambda: torch.empty(2**55), "longrope: .*a text of 48 tokens does not fit in memory"),
        (lambda: torch.ones(2) @ torch.ones(3), "failed in compress: RuntimeError: .*size"),
    ],
)
def test_a_context_beyond_memory(fails: Callable[[], Any], said: str) -> None:
    """A real allocation that the machine refuses, in the fifth text that is read; other errors stay what they are."""
    stack, texts = stack_of(), itertools.count()
    stack.model.register_forward_pre_hook(lambda *_: fails() if next(texts) == 4 else None)
    with pytest.raises(PeftxError, match=said):
        stack.compress(TEXTS, **FOUR)
    assert next(texts) == 5
    assert torch.equal(logits(stack.model, LONG), logits(tiny("llama"), LONG))
    assert not stack.plugins["longrope"].state


def test_it_may_compress_before_it_is_injected() -> None:
    stack = Stack(tiny("llama"), [LongRope(**SMALL)], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, **FOUR)
    stack.inject()
    assert len(deltas(stack)) == 1
    assert torch.equal(deltas(stack)[0].f, deltas(searched())[0].f)


def test_clear_errors() -> None:
    with pytest.raises(ArchitectureError, match="no rotary module"):
        stack_of("opt")
    with pytest.raises(ArchitectureError, match="no rotary module"):
        stack_of("gemma3")
    with pytest.raises(ArchitectureError, match="no rotary module"):
        stack_of("llava")
    with pytest.raises(ArchitectureError, match="scales its frequencies already"):
        Stack(with_rope(rope_type="linear", factor=2.0), [LongRope(**SMALL)], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match="7 parents of a population of 6"):
        stack_of(parents=7)


def test_search_train_and_search_again(tmp_path: Path) -> None:
    """The paper's stages: long factors, training at length, longer ones, and short ones again."""
    plugins: list[Any] = [
        LongRope(**SMALL),
        Lora(rank=2),
        ("second", LongRope(**{**SMALL, "scale": 2.0, "texts": 1})),
    ]
    plugins.append(("short", LongRope(**{**SMALL, "part": "short"})))
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
    stack.compress(TEXTS, ["longrope"], **FOUR)
    first = deltas(stack)[0].f.clone()
    rows = [{"text": " ".join(TEXTS)[:15]}] * 4
    stack.train(rows, steps=2, batch_size=2, learning_rate=1e-2)
    stack.compress(TEXTS, ["second", "short"], **FOUR)
    one, two, short = deltas(stack)
    assert torch.equal(one.f, first)
    assert (one.limit, two.limit, short.limit) == (L, 4 * L, L)
    assert not torch.equal(two.f, torch.ones_like(two.f))
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=tiny_tokenizer())
    for length in (L, LONG, 5 * L):
        assert torch.equal(logits(again.model, length), logits(stack.model.eval(), length))
