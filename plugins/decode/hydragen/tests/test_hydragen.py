"""Hydragen: the parts of an attention merge exactly, shared prefixes are held once, the text is a plain batch's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from peftx import AttentionEdit, Claim, Generation, ModelView, Plugin, Stack, hookimpl
from peftx.errors import ArchitectureError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import ReferenceLowRank, ReferencePrompt
from peftx.testing.shapes import PAD
from peftx.toolkits.serving import Engine, Request, Server
from peftx_hydragen import Hydragen, attend_part, merge, take_apart
from peftx_token_trails import TokenTrails

test_conformance = conformance("hydragen")

HEAD = list(range(10, 50))
RAGGED = [[*HEAD, 60, 61], [*HEAD, 70], [*HEAD, 80, 81, 82]]
EVEN = [[*HEAD, 60, 61], [*HEAD, 70, 71], [*HEAD, 80, 81]]


def request(model: torch.nn.Module, rows: list[list[int]], new: int = 12, **options: object) -> Generation:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    made = Generation(model=model, input_ids=ids, attention_mask=mask, seed=0)
    made.generation_config.update(
        **{"max_new_tokens": new, "eos_token_id": None, "pad_token_id": PAD} | options
    )
    return made


def plain(model: torch.nn.Module, rows: list[list[int]], new: int = 12, **options: object) -> Tensor:
    with torch.no_grad():
        return request(model, rows, new, **options).run_default()


# ------------------------------------------------------------------------------------------------- the decomposition
def random_attention(batch: int, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + rows * 10 + keys)
    return (
        torch.randn(batch, 2, rows, 8, generator=generator),
        torch.randn(batch, 2, keys, 8, generator=generator),
        torch.randn(batch, 2, keys, 8, generator=generator),
    )


def full(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.4)


def test_merge_by_hand() -> None:
    """Scores ln 1, ln 2 and ln 5, values 1, 4 and 10: the parts are 1, L = 0 and 58/7, L = ln 7."""
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([1.0, 2.0, 5.0]).log().view(1, 1, 3, 1)
    value = torch.tensor([1.0, 4.0, 10.0]).view(1, 1, 3, 1)
    first = attend_part(query, key[:, :, :1], value[:, :, :1], 1.0)
    second = attend_part(query, key[:, :, 1:], value[:, :, 1:], 1.0)
    assert (float(first.out), float(first.lse)) == pytest.approx((1, 0), abs=1e-6)
    assert (float(second.out), float(second.lse)) == pytest.approx((58 / 7, 1.9459101), abs=1e-5)
    assert float(merge([first, second])) == pytest.approx(59 / 8, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_equal_full_attention(rows: int) -> None:
    query, key, value = random_attention(6, rows, 30)
    key[:, :, :20], value[:, :, :20] = key[:1, :, :20], value[:1, :, :20]  # 20 keys are common
    parts = [
        attend_part(query, key[:1, :, :20], value[:1, :, :20], 0.4),
        attend_part(query, key[:, :, 20:], value[:, :, 20:], 0.4),
    ]
    torch.testing.assert_close(merge(parts), full(query, key, value), atol=1e-5, rtol=0)


def test_tree_of_levels_in_any_order() -> None:
    query, key, value = random_attention(6, 2, 40)
    key[:, :, :20], value[:, :, :20] = key[:1, :, :20], value[:1, :, :20]
    for tensor in (key, value):  # sequences 0-2 and 3-5 share ten more
        tensor[:, :, 20:30] = tensor[::3, :, 20:30].repeat_interleave(3, dim=0)
    parts = [
        attend_part(query, key[:1, :, :20], value[:1, :, :20], 0.4),
        attend_part(query, key[::3, :, 20:30], value[::3, :, 20:30], 0.4),
        attend_part(query, key[:, :, 30:], value[:, :, 30:], 0.4),
    ]
    expected = full(query, key, value)
    for order in itertools.permutations(parts):
        torch.testing.assert_close(merge(order), expected, atol=1e-5, rtol=0)
    # Depth 1: the two-level formula, with m subtracted, equals the general merge.
    (o_p, l_p), (o_s, l_s) = parts[0], parts[2]
    m = torch.maximum(l_p, l_s)
    w_p, w_s = (l_p - m).exp()[..., None], (l_s - m).exp()[..., None]
    two = (o_p * w_p + o_s * w_s) / (w_p + w_s)
    torch.testing.assert_close(merge([parts[0], parts[2]]), two, atol=1e-6, rtol=0)


def test_one_part_is_ordinary_attention() -> None:
    """n_p = 0 and n_s = 0: one part remains."""
    query, key, value = random_attention(4, 1, 9)
    torch.testing.assert_close(merge([attend_part(query, key, value, 0.4)]), full(query, key, value))
    shared = attend_part(query, key[:1], value[:1], 0.4)
    torch.testing.assert_close(
        merge([shared]), full(query, key[:1].expand_as(key), value[:1].expand_as(value))
    )


def test_masked_part_has_no_weight() -> None:
    query, key, value = random_attention(4, 1, 9)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(4, 1, 1, 9)
    mask[1], mask[2, ..., :4] = lowest, lowest
    parts = [attend_part(query, key, value, 0.4, mask), attend_part(query, key[:1], value[:1], 0.4)]
    merged = merge(parts)
    torch.testing.assert_close(merged[1], parts[1].out[1])
    only = attend_part(query[2:3], key[2:3, :, 4:], value[2:3, :, 4:], 0.4)
    torch.testing.assert_close(parts[0].out[2:3], only.out)
    torch.testing.assert_close(parts[0].lse[2:3], only.lse)


@pytest.mark.parametrize("masked", [False, True])
def test_written_out_equals_fused(masked: bool) -> None:
    """Where the fused kernel does not serve (values of another width), the products are written out."""
    query, key, value = random_attention(4, 3, 9)
    mask = torch.zeros(4, 1, 3, 9).masked_fill(torch.rand(4, 1, 3, 9) < 0.5, -1e30) if masked else None
    fused = attend_part(query, key, value, 0.4, mask)
    written = attend_part(query, key, value[..., :5], 0.4, mask)
    torch.testing.assert_close(written.out, fused.out[..., :5])
    torch.testing.assert_close(written.lse, fused.lse)


@pytest.mark.parametrize(
    ("rows", "least", "head", "starts"),
    [
        ([[1, 2, 3, 4], [1, 2, 5]], 2, 2, []),
        ([[1, 2, 3, 4], [1, 2, 5]], 3, 0, []),  # too short a head
        ([[1, 2, 3], [1, 2, 3], [1, 2, 3]], 2, 2, []),  # one prompt: all but its last token
        ([[1, 2, 3], [1, 2]], 1, 1, []),  # each keeps a token
        ([[1, 2, 3, 4, 5]] * 2 + [[1, 2, 3, 4, 6]] * 2, 4, 4, []),
        ([[1, 3, 4, 5]] * 2 + [[1, 6, 7, 8]] * 2, 1, 1, [0, 2]),
        ([[1, 3, 4, 5]] * 3 + [[2, 6, 7, 8]] * 3, 3, 0, [0, 3]),
        ([[1, 3, 4, 5]] * 3 + [[2, 6, 7, 8]] * 2, 3, 0, []),  # uneven groups
        ([[1, 2, 3, 4]], 1, 0, []),  # nothing to share with
    ],
)
def test_take_apart(rows: list[list[int]], least: int, head: int, starts: list[int]) -> None:
    assert take_apart(rows, least) == (head, starts)


# -------------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "gpt_neox", "mixtral", "opt"])
def test_greedy_text_is_unchanged(arch: str) -> None:
    stack, base = Stack(tiny(arch), [Hydragen()]), tiny(arch)
    for rows in (RAGGED, EVEN, [HEAD] * 4, [[*HEAD, 60, 61, 62]] * 2 + [[*HEAD, 70]] * 2):
        got = request(stack.model, rows)
        assert torch.equal(stack.decode(got), plain(base, rows))
        assert got.stats["shared_tokens"] >= 39


@pytest.mark.parametrize("rows", [RAGGED, EVEN, [HEAD] * 3], ids=["ragged", "even", "samples"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_unchanged(rows: list[list[int]], implementation: str) -> None:
    logits = []
    for plugins in ([Hydragen()], []):
        model = tiny("llama")
        model.set_attn_implementation(implementation)
        asked = request(model, rows, 8, return_dict_in_generate=True, output_logits=True)
        Stack(model, plugins).decode(asked)
        logits.append(torch.stack(asked.state["generate"].logits))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(100, 200))},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_options_of_generate(options: dict[str, object]) -> None:
    stack, base = Stack(tiny("llama"), [Hydragen(min_prefix=4)]), tiny("llama")
    prompts = [[*HEAD, 60, 61, 62, 63, 64, 65], [*HEAD, 70, 71, 72, 73, 74]]
    for rows in (prompts, prompts[:1], [prompts[0][30:], prompts[1][:9]]):
        assert torch.equal(stack.decode(request(stack.model, rows, **options)), plain(base, rows, **options))


def test_prefix_is_held_once() -> None:
    """2 layers, 2 key-value heads of 8 float32: 256 bytes a token."""
    stack = Stack(tiny("llama"), [Hydragen()])
    got = request(stack.model, RAGGED)
    stack.decode(got)
    assert got.stats["shared_tokens"] == 40
    assert got.stats["kv_bytes"] == 256 * (40 + 3 * (3 + 11))  # the longest rest, and the fed new tokens
    assert got.stats["kv_bytes_plain"] == 256 * 3 * (43 + 11)
    assert got.stats["model_calls"] == 1 + 12


def test_three_levels_hold_each_prompt_once() -> None:
    stack = Stack(tiny("llama"), [Hydragen(min_prefix=4)])
    rows = [[*HEAD, 60, 61, 62, 63, 64, 65], [*HEAD, 70, 71, 72, 73, 74]]
    got = request(stack.model, rows, num_return_sequences=5, do_sample=True)
    assert torch.equal(stack.decode(got), plain(tiny("llama"), rows, num_return_sequences=5, do_sample=True))
    assert got.stats["shared_tokens"] == 45
    assert got.stats["kv_bytes"] == 256 * (40 + 2 * 5 + 10 * 12)
    assert got.stats["model_calls"] == 2 + 12


def test_positions_go_on_after_the_prefix() -> None:
    stack = Stack(tiny("llama"), [Hydragen()])
    seen: list[tuple[tuple[int, ...], list[list[int]]]] = []
    stack.model.model.rotary_emb.register_forward_hook(
        lambda _module, inputs, named, _out: seen.append(
            (tuple(inputs[0].shape[:2]), named["position_ids"].tolist())
        ),
        with_kwargs=True,
    )
    stack.decode(request(stack.model, EVEN, 3))
    assert [shape for shape, _ in seen] == [(1, 40), (3, 2), (3, 1), (3, 1)]
    assert seen[0][1] == [list(range(40))]
    assert [places[0] for _, places in seen[1:]] == [[40, 41], [42], [43]]


def test_nothing_is_shared_below_the_limit() -> None:
    stack = Stack(tiny("llama"), [Hydragen(min_prefix=41)])
    got = request(stack.model, RAGGED)
    assert torch.equal(stack.decode(got), plain(tiny("llama"), RAGGED))
    assert "kv_bytes" not in got.stats


def test_request_and_model_are_left_as_they_were() -> None:
    stack = Stack(tiny("llama"), [Hydragen()])
    got = request(stack.model, RAGGED)
    ids, mask = got.input_ids.clone(), got.attention_mask.clone()
    first = stack.decode(got)
    assert torch.equal(got.input_ids, ids)
    assert torch.equal(got.attention_mask, mask)
    assert got.past_key_values is None
    assert torch.equal(stack.decode(got), first)
    with torch.no_grad():
        assert torch.equal(stack.model(ids).logits, tiny("llama")(ids).logits)
    got.attention_mask = None  # `generate` sees the pads by their token
    assert torch.equal(stack.decode(got), first)


# ------------------------------------------------------------------------------------------------------- composition
def test_with_an_unmerged_low_rank_update() -> None:
    both = Stack(tiny("llama"), [ReferenceLowRank(), Hydragen()])
    alone = Stack(tiny("llama"), [ReferenceLowRank()])
    got = request(both.model, RAGGED)
    expected = alone.decode(request(alone.model, RAGGED))
    assert torch.equal(both.decode(got), expected)
    assert got.stats["shared_tokens"] == 40
    assert not torch.equal(expected, plain(tiny("llama"), RAGGED))  # so that the update matters


class _Learned(AttentionEdit):
    """Three learned keys and values in front of each layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(3 * torch.randn(2, 2, 3, 8))

    def keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        front = self.rows[:, None].expand(-1, len(key), -1, -1, -1)
        return torch.cat([front[0], key], dim=2), torch.cat([front[1], value], dim=2)


class Learned(Plugin):
    claims = {Claim.BESIDE_WEIGHTS}

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.attention_sites():
            model.attend(site, _Learned())


@pytest.mark.parametrize("rows", [RAGGED, [HEAD] * 3], ids=["ragged", "samples"])
def test_with_a_learned_prefix(rows: list[list[int]]) -> None:
    both, alone = Stack(tiny("llama"), [Learned(), Hydragen()]), Stack(tiny("llama"), [Learned()])
    got = request(both.model, rows)
    expected = alone.decode(request(alone.model, rows))
    assert torch.equal(both.decode(got), expected)
    assert got.stats["shared_tokens"] >= 39
    assert not torch.equal(expected, plain(tiny("llama"), rows))


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3, "do_sample": True}, {"num_beams": 2}])
@pytest.mark.parametrize("last", [True, False])
def test_with_a_plugin_around_the_model(last: bool, options: dict[str, object]) -> None:
    """Token Trails keeps who speaks in the cache. Behind the head, within a marker, rows go on at unlike lengths."""
    head = "User: how many seats?\nAssistant: three\nUs"
    texts = [head + rest for rest in ("er: at two", "er: where", "ually no")]
    rows = [tiny_tokenizer()(text)["input_ids"] for text in texts]
    stacks = []
    for plugins in ([Hydragen(), TokenTrails()] if last else [TokenTrails(), Hydragen()], [TokenTrails()]):
        stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer())
        for p in stack.ledger.parameters("token-trails"):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        stacks.append(stack)
    both, alone = stacks
    more = ", and a bit more of it"  # so that each of two groups has a level of its own
    groups = [tiny_tokenizer()(text + more)["input_ids"] for text in texts[:2]]
    for batch in (rows, groups[:1] * 2 + groups[1:] * 2):
        got = request(both.model, batch, **options)
        expected = alone.decode(request(alone.model, batch, **options))
        assert torch.equal(both.decode(got), expected)
        assert got.stats["shared_tokens"] >= len(head)
    assert not torch.equal(expected, plain(tiny("llama"), batch, **options))


def test_a_server_gives_it_batches() -> None:
    """Requests that wait together begin with one head, run once; each has the text that it has alone."""
    texts = [
        f"The keeper of the light at South Head said: {rest}" for rest in ("no", "it is late", "come in")
    ]
    alone = Stack(tiny("llama"), [], tokenizer=tiny_tokenizer())
    stack = Stack(tiny("llama"), [Hydragen()], tokenizer=tiny_tokenizer())
    shapes: list[tuple[int, ...]] = []
    stack.model.model.rotary_emb.register_forward_hook(
        lambda _m, inputs, _out: shapes.append(tuple(inputs[0].shape[:2]))
    )
    engine = Engine(Server(stack))
    asked = [engine.submit(Request(text, max_tokens=6, temperature=0)) for text in texts]
    with engine:
        answers = [one.result(60).text for one in asked]
    assert answers == [alone.generate(text, max_new_tokens=6, do_sample=False) for text in texts]
    assert shapes[0] == (1, len(texts[0]) - 2)
    assert {rows for rows, _ in shapes[1:]} == {3}


def test_soft_tokens_are_refused() -> None:
    stack = Stack(tiny("llama"), [ReferencePrompt(), Hydragen()])
    with pytest.raises(UnsupportedError, match=r"hydragen: .* soft tokens"):
        stack.decode(request(stack.model, RAGGED))


def test_disabled() -> None:
    stack = Stack(tiny("llama"), [Hydragen()])
    got = request(stack.model, RAGGED)
    with stack.disabled():
        assert torch.equal(stack.decode(got), plain(tiny("llama"), RAGGED))
    assert "kv_bytes" not in got.stats
    stack.remove("hydragen")
    assert stack.model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("arch", ["bert", "t5", "mamba", "mistral", "gemma2", "bloom", "whisper", "vit"])
def test_models_that_share_no_prefix(arch: str) -> None:
    model = tiny(arch)
    with pytest.raises(ArchitectureError, match="hydragen: "):
        Stack(model, [Hydragen()])
    assert not any(isinstance(module, AttentionEdit) for module in model.modules())


def test_latents_in_a_cache_are_no_keys() -> None:
    """DeepSeek-V3 keeps what keys and values are made of, another width than theirs."""
    with pytest.raises(ArchitectureError, match="hydragen: DeepseekV3ForCausalLM keeps latents in its cache"):
        Stack(tiny("deepseek_v3"), [Hydragen()])


def test_mistral_without_windows() -> None:
    stack = Stack(tiny("mistral", sliding_window=None), [Hydragen()])
    expected = plain(tiny("mistral", sliding_window=None), RAGGED)
    assert torch.equal(stack.decode(request(stack.model, RAGGED)), expected)


def test_requests_that_are_refused() -> None:
    stack = Stack(tiny("llama"), [Hydragen()])
    wrong = request(stack.model, RAGGED, use_cache=False)
    with pytest.raises(UnsupportedError, match="hydragen keeps the cache itself"):
        stack.decode(wrong)
    wrong = request(stack.model, RAGGED)
    wrong.model_kwargs["token_type_ids"] = torch.zeros_like(wrong.input_ids)
    with pytest.raises(UnsupportedError, match="hydragen does not support token_type_ids"):
        stack.decode(wrong)
    wrong = request(stack.model, RAGGED)
    wrong.attention_mask = wrong.attention_mask.flip(1)
    with pytest.raises(PeftxError, match="hydragen: padding must be on the left"):
        stack.decode(wrong)


@pytest.mark.parametrize(("option", "value"), [("min_prefix", 0), ("min_prefix", "long"), ("prefix", 3)])
def test_bad_options(option: str, value: object) -> None:
    with pytest.raises(PeftxError, match=f"Hydragen.*{option}") as caught:
        Hydragen(**{option: value})
    assert "min_prefix" in str(caught.value.hint)
