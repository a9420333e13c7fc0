"""Localist dial: block logits, the group lasso on heads, and the recruitment of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, DataError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import PAD, example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.evaluation import perplexity
from peftx_localist_dial import LocalistDial, groups_of, ids_of, norms_of
from peftx_lora import Lora
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("localist-dial")

BLOCKS = {"vowels": tuple("aeiou"), "ends": tuple("tns")}
NUMBER = dict.fromkeys("aeiou", 1) | dict.fromkeys("tns", 2)
TEXT = "a stone in the nest is not a noise, it is tea"
ROWS = [{"text": TEXT}, {"text": "so it sits on its seat"}]
TRAIN = [{"prompt": "it is", "completion": f" a {word}"} for word in ("nest", "seat", "stone", "tea")]


def stack_of(arch: str = "llama", *others: Any, **options: Any) -> tuple[Stack, LocalistDial]:
    plugin = LocalistDial(**{"blocks": BLOCKS, **options})
    return Stack(tiny(arch), [*others, plugin], tokenizer=tiny_tokenizer()), plugin


def ids_and_blocks(*texts: str) -> tuple[Tensor, Tensor]:
    """Token ids padded on the left, and the block of each token."""
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    own = [[0] * (width - len(row)) + [NUMBER.get(tokenizer.decode(i), 0) for i in row] for row in rows]
    return ids, torch.tensor(own)


@contextmanager
def by_masks(model: nn.Module, own: Tensor, dial: float, rules: Any = ()) -> Iterator[None]:
    """The plain model, with the dial on the scores before the softmax."""
    model.set_attn_implementation("eager")  # which always makes a mask
    r = (own[:, :, None] == own[:, None]) & (own > 0)[:, :, None]
    for query, key in rules:
        r |= (own == query)[:, :, None] & (own == key)[:, None]

    def adds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + dial * r[:, None]}

    handles = [
        layer.self_attn.register_forward_pre_hook(adds, with_kwargs=True) for layer in model.model.layers
    ]
    yield
    for handle in handles:
        handle.remove()


# --------------------------------------------------------------------------------------------------------- the dial
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("rules", [(), (("vowels", "ends"),)])
@torch.no_grad()
def test_equals_the_dial_on_the_scores_before_the_softmax(arch: str, rules: Any) -> None:
    stack, _ = stack_of(arch, dial=1.7, rules=rules)
    ids, own = ids_and_blocks(TEXT, "so it sits")
    mask = (ids != PAD).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    plain = tiny(arch)
    with by_masks(plain, own, 1.7, [(1, 2)] if rules else []):
        expected = plain(**inputs).logits[mask.bool()]
    found = stack.model(**inputs).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, tiny(arch)(**inputs).logits[mask.bool()], atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@torch.no_grad()
def test_at_0_it_is_the_plain_model_to_the_bit(arch: str) -> None:
    stack, plugin = stack_of(arch, dial=0)
    inputs = example_inputs(stack.model)
    plain = output_of(tiny(arch), inputs)
    assert torch.equal(output_of(stack.model, inputs), plain)
    plugin.dial = 2.0
    assert not torch.allclose(output_of(stack.model, inputs), plain, atol=1e-3)


@torch.no_grad()
def test_a_cache_knows_the_blocks_of_earlier_tokens() -> None:
    stack, _ = stack_of(dial=3.0)
    ids, _ = ids_and_blocks(TEXT)
    whole = stack.model(ids).logits[:, -3:]
    cache = stack.model(ids[:, :-3], use_cache=True).past_key_values
    torch.testing.assert_close(
        stack.model(ids[:, -3:], past_key_values=cache).logits, whole, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_soft_tokens_are_of_no_block() -> None:
    """So they weigh less the further the dial goes, and at its end nothing."""
    stack, plugin = stack_of("llama", PromptTuning(length=3))
    ids, _ = ids_and_blocks("aaaa")
    plugin.dial = 60.0
    before = stack.model(ids).logits
    for p in stack.ledger.parameters("prompt-tuning"):
        p.mul_(-5)
    torch.testing.assert_close(stack.model(ids).logits, before, rtol=1e-3, atol=1e-4)
    plugin.dial = 0.0
    assert not torch.allclose(stack.model(ids).logits, before, atol=1e-3)


def scores(stack: Stack, **kwargs: Any) -> dict[str, float]:
    found = stack.evaluate(kwargs.pop("rows", ROWS), metrics=["localist-dial"], **kwargs)
    return {name.removeprefix("localist-dial/"): score.value for name, score in found.items()}


def test_mass_grows_and_entropy_falls_with_the_dial() -> None:
    stack, plugin = stack_of()
    found = []
    for plugin.dial in (0.0, 1.0, 2.0, 4.0, 8.0, 50.0):
        found.append(scores(stack))
    masses, entropies = ([each[name] for each in found] for name in ("mass", "entropy"))
    assert masses == sorted(masses)
    assert masses[0] < 0.6
    assert masses[-1] == pytest.approx(1, abs=1e-6)
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < entropies[0] - 0.5


@torch.no_grad()
def test_what_goes_astray_stays_below_the_bound() -> None:
    ids, own = ids_and_blocks(TEXT)
    plain = tiny("llama", head=None)
    plain.set_attn_implementation("eager")
    p = plain(ids, output_attentions=True).attentions[0][0].double()  # [H, Q, K], of the first layer
    r = ((own[0][:, None] == own[0]) & (own[0] > 0)[:, None]).tril()
    seen = torch.ones_like(r).tril()
    queries = (r.any(-1) & (seen & ~r).any(-1)).nonzero().flatten()
    for dial in (1.0, 3.0, 9.0):
        stack, plugin = stack_of(dial=dial)
        plugin.blocks.notes = []
        stack.model(ids)
        first, plugin.blocks.notes = plugin.blocks.notes[0], None
        s = p.log().masked_fill(~seen, -torch.inf)
        m = s.amax(-1) - s.masked_fill(~seen, torch.inf).amin(-1)  # [H, Q]
        w, v = (seen & ~r).sum(-1), r.sum(-1)
        astray = 1 - ((s + dial * r).softmax(-1) * r).sum(-1)
        assert bool((astray <= w / v * (m - dial).exp() + 1e-12)[:, queries].all())
        has = r.any(-1)
        assert first[0] == pytest.approx(float((1 - astray)[:, has].sum()), rel=1e-4)
        assert first[2] == 4 * has.sum()
        least = torch.where(has, (1 - w / v * (m - dial).exp()).clamp_min(0).nan_to_num(0), 0)
        assert first[3] == pytest.approx(float(least.sum()), rel=1e-4)
        assert 0 < first[3] <= first[0]


def test_the_experiment_and_its_figure(tmp_path: Path) -> None:
    """The bound holds under every dial, says nothing at first, and takes all at the end."""
    stack, plugin = stack_of(dial=1.5, sweep=(0.0, 2.0, 4.0, 8.0, 16.0))
    found = stack.evaluate(ROWS, metrics=["localist-dial"], output_dir=tmp_path / "figures")
    assert (plugin.dial, plugin.blocks.dial) == (1.5, 1.5)
    mass, least = curves = plugin.sweep(stack, ROWS)
    assert bool((least <= mass + 1e-6).all())
    assert (float(least[0]), float(least[-1])) == (0, pytest.approx(1, abs=1e-3))
    assert least.tolist() == sorted(least.tolist())
    plugin.dial = 4.0
    again = scores(stack)
    assert [again[name] for name in ("mass", "least_mass")] == pytest.approx(curves[:, 2].tolist(), rel=1e-5)
    assert again["mass"] != pytest.approx(found["mass"].value, rel=1e-3)
    page = (tmp_path / "figures" / "localist-dial.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert [len(part.split('"', 1)[0].split()) for part in page.split('points="')[1:]] == [5, 5]
    assert not stack.evaluate(ROWS, metrics=["localist-dial"]).keys() - found.keys(), (
        "and no figure without a place"
    )


@torch.no_grad()
def test_pads_are_of_no_block_though_their_token_be_of_one() -> None:
    stack, plugin = stack_of()
    ids, _ = ids_and_blocks(TEXT)
    padded = torch.cat((ids[:, :1].expand(1, 3), ids), 1)  # "a" is a vowel
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    plugin.blocks.notes = []
    stack.model(ids)
    stack.model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    notes, plugin.blocks.notes = torch.stack(plugin.blocks.notes), None
    torch.testing.assert_close(notes[2:], notes[:2], rtol=1e-4, atol=1e-3)


def test_where_a_head_is_gone_the_bound_is_exact() -> None:
    """All scores are 0, so that a query has v e^dial against w."""
    stack, plugin = stack_of("qwen2", dial=2.0)
    plugin.shrink(1e3)
    assert scores(stack)["zero"] == 1
    ids, own = ids_and_blocks(TEXT)
    plugin.blocks.notes = []
    with torch.no_grad():
        stack.model(ids)
    notes, plugin.blocks.notes = torch.stack(plugin.blocks.notes).sum(0), None
    r = ((own[0][:, None] == own[0]) & (own[0] > 0)[:, None]).tril()
    v, seen = r.sum(-1), torch.arange(1, len(r) + 1)
    mass = v * math.e**2 / (v * math.e**2 + seen - v)
    assert float(notes[0] / notes[2]) == pytest.approx(float(mass[v > 0].mean()), rel=1e-5)


# --------------------------------------------------------------------------------------------------- the group lasso
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@torch.no_grad()
def test_the_proximal_step_by_hand(arch: str) -> None:
    stack, plugin = stack_of(arch)
    view = stack.view("localist-dial")
    for role, count in (("attention.q", 4), ("attention.k", 4 if arch == "gpt2" else 2)):
        site = view.site(role, layer=1)
        at, tensors = groups_of(site, 8)
        groups = site.weight.clone().view(count, 8, -1)
        bias = site.bias.clone().view(count, 8) if site.bias is not None else torch.zeros(count, 0)
        both = torch.cat((groups.flatten(1), bias), 1)
        torch.testing.assert_close(norms_of(at, tensors), both.norm(dim=1))
        n = both.shape[1]
        by = (
            float(both.norm(dim=1).sort().values[:2].mean()) / n**0.5
        )  # between the smallest and the next one
        plugin.shrink(by)
        expected = both * (1 - by * n**0.5 / both.norm(dim=1, keepdim=True)).clamp_min(0)
        found = site.weight.reshape(count, -1)
        torch.testing.assert_close(found, expected[:, : found.shape[1]])
        if site.bias is not None:
            torch.testing.assert_close(site.bias.view(count, 8), expected[:, found.shape[1] :])
        zero = found.eq(0).all(1)
        assert zero.sum() == 1, "one group went, and whole"
        assert not found[~zero].eq(0).any()
        stack, plugin = stack_of(arch)
        view = stack.view("localist-dial")


def test_a_step_is_one_of_the_optimizer_and_then_the_proximal_one() -> None:
    found = {}
    for penalty in (0.0, 0.5):
        stack, plugin = stack_of(dial=2.0, penalty=penalty)
        stack.train(TRAIN, steps=1, batch_size=2, learning_rate=1e-2)
        found[penalty] = (stack, plugin)
    (free, other), (stack, _) = found.values()
    with torch.no_grad():
        other.shrink(1e-2 * 2.0 * 0.5)
    theta = {n: p.detach() for n, p in free.model.named_parameters() if p.requires_grad}
    assert {name.rpartition("layers.")[2][2:] for name in theta} == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
    }
    for name, p in stack.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), theta[name])


def test_heads_go_and_stay_whole_or_gone_in_a_run() -> None:
    stack, _ = stack_of(dial=1.0, penalty=20.0)
    start = scores(stack)["zero"]
    stack.train(TRAIN, steps=3, batch_size=2, learning_rate=1e-2)
    assert start == 0
    assert scores(stack)["zero"] > 0.5
    stack, _ = stack_of(dial=0.0, penalty=20.0)
    stack.train(TRAIN, steps=3, batch_size=2, learning_rate=1e-2)
    assert scores(stack)["zero"] == 0, "at 0 nothing is penalised"


# ------------------------------------------------------------------------------------------------------- recruitment
def nll(stack: Stack, rows: Any) -> float:
    """In bits, of all tokens."""
    found = perplexity(stack.model, stack.tokenizer, rows)["nll"]
    return found.value * found.count / math.log(2)


def test_a_candidate_gains_what_it_saves_less_what_it_costs() -> None:
    stack, plugin = stack_of(dial=4.0, candidates={"more": ("r", "h"), "absent": ("Q",)})
    rows = [{"text": "rather her hare, or her hair"}]
    gains = plugin.gains(stack, rows)
    bits = math.log2(stack.model.get_input_embeddings().weight.shape[0])
    assert gains["absent"] == pytest.approx(-bits), "it saves nothing, and says which token"
    wider, _ = stack_of(dial=4.0, blocks={**BLOCKS, "more": ("r", "h")})
    assert gains["more"] == pytest.approx(nll(stack, rows) - nll(wider, rows) - 2 * bits, rel=1e-4)
    assert scores(stack, rows=rows)["recruit/more"] == pytest.approx(gains["more"], rel=1e-4)


def test_a_block_is_recruited_where_the_rows_are_worth_it(tmp_path: Path) -> None:
    word = "lrl rll lrr"
    letters = {letter: (letter,) for letter in "lr"}
    stack, plugin = stack_of(dial=6.0, candidates=letters)
    costs = math.log2(len(plugin.blocks.of))
    saved = {name: gain + costs for name, gain in plugin.gains(stack, [{"text": word}]).items()}
    best = max(saved, key=saved.__getitem__)
    assert 0 < saved[best] < costs, "of this text one letter saves something, and less than it costs"
    assert plugin.recruit(stack, [{"text": word}]) == []
    times = 2 * math.ceil(costs / saved[best])
    rows = [{"text": word}] * times
    joined = plugin.recruit(stack, rows)
    assert joined[0] == best
    assert max([*plugin.gains(stack, rows).values(), -1.0]) <= 0, "it went on as long as one gained"
    assert plugin.recruit(stack, rows) == []
    assert plugin.recruit(stack, [{"text": TEXT}] * times) == [], (
        "texts of the blocks that are there want none"
    )
    plugin.dial = 5.0
    stack.save(tmp_path / "out")
    again = peftx.load(tmp_path / "out", model=tiny("llama"), tokenizer=tiny_tokenizer())
    other = again.plugins["localist-dial"]
    assert other.dial == other.blocks.dial == 5.0
    assert torch.equal(other.blocks.of, plugin.blocks.of)
    assert nll(again, rows[:1]) == pytest.approx(nll(stack, rows[:1]), rel=1e-5)


# --------------------------------------------------------------------------------------------------------- the rest
def test_words_become_tokens() -> None:
    class Words:
        """A tokenizer that knows three words, and two of them behind a blank."""

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            assert not add_special_tokens
            known = {"red": [1], " red": [2], "blue": [3], " blue": [4, 3], "green": [5]}

            class Found:
                input_ids = known.get(text, [8, 9])

            return Found

    assert ids_of(Words(), {"one": ("red", "blue"), "two": ("green",)}) == {"one": [1, 2, 3], "two": [5]}  # type: ignore[arg-type]
    with pytest.raises(PeftxError, match="'grey' of block 'one' is no single token"):
        ids_of(Words(), {"one": ("red", "grey")})  # type: ignore[arg-type]
    with pytest.raises(PeftxError, match="'red' of block 'two' is of block 'one' too"):
        ids_of(Words(), {"one": ("red",), "two": ("red",)})  # type: ignore[arg-type]


def test_it_trains_beside_an_adapter_and_in_bfloat16() -> None:
    stack, plugin = stack_of("llama", Lora(rank=2), penalty=0.1)
    report = stack.train(TRAIN, steps=2, batch_size=2, learning_rate=1e-2)
    assert math.isfinite(report.losses[-1][1])
    plugin = LocalistDial(blocks=BLOCKS, dial=1.3)
    stack = Stack(tiny("llama").to(torch.bfloat16), [plugin], tokenizer=tiny_tokenizer())
    stack.train(TRAIN, steps=2, batch_size=2, learning_rate=1e-2)
    assert stack.model(ids_and_blocks(TEXT)[0]).logits.dtype == torch.bfloat16


def test_clear_errors() -> None:
    for options, said in (
        ({"blocks": {}}, "blocks"),
        ({"blocks": {"none": ()}}, "'none' names no words"),
        ({"candidates": {"none": ()}}, "'none' names no words"),
        ({"candidates": {"ends": ("r",)}}, "'ends' names a block and a candidate"),
        ({"rules": (("vowels", "end"),)}, "'end', which is no block"),
        ({"dial": -1.0}, "dial"),
        ({"dial": math.inf}, "dial"),
        ({"penalty": -1.0}, "penalty"),
        ({"sweep": (-1.0,)}, "sweep"),
        ({"sweep": (2.0, 1.0)}, "rising"),
    ):
        with pytest.raises(PeftxError, match=said):
            LocalistDial(**{"blocks": BLOCKS, **options})
    stack, plugin = stack_of()
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(PeftxError, match="a dial of"):
            plugin.dial = value
    assert plugin.dial == plugin.blocks.dial == 1.0
    with pytest.raises(DataError, match="no token of the rows is of a block"):
        scores(stack, rows=[{"text": "grrr"}])
    ids, _ = ids_and_blocks(TEXT)
    with pytest.raises(PeftxError, match="told by token ids"):
        stack.model(inputs_embeds=stack.model.get_input_embeddings()(ids))
    for arch, said in (("t5", "no decoder"), ("bert", "no decoder"), ("gpt_oss", "more than scores")):
        with pytest.raises(ArchitectureError, match=said):
            stack_of(arch)
