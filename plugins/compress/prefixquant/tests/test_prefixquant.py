from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import peftx
from peftx import Claim, Delta, ModelView, Plugin, Stack, hookimpl
from peftx.engines.data import read_dataset
from peftx.engines.models import asset_path
from peftx.errors import ArchitectureError, ConflictError, MergeError, PeftxError
from peftx.kernel.ledger import carried
from peftx.kernel.parts import AttentionPart, DeltaPart, FreePart, ReplacedPart
from peftx.testing import conformance
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.compression.batches import calibration as sequences
from peftx.toolkits.evaluation import perplexity
from peftx_prefixquant import (
    PrefixQuant,
    RotatedLinear,
    StaticKV,
    StaticLinear,
    find_prefix,
    rotated,
    static_scale,
    switch,
    token_peaks,
)

test_conformance = conformance("prefixquant")
INPUTS_ONLY = {"kv_bits": 16, "prefix_tokens": 0}
test_conformance_of_inputs_alone = conformance("prefixquant", options=INPUTS_ONLY, models=["llama", "gpt2"])

CALIBRATION = asset_path("peftx:sample/calibration.txt")
EXTRA = 8  # channels and neurons that planting adds


@torch.no_grad()
def planted(model: LlamaForCausalLM, tokens: tuple[int, int], *, height: float = 150.0) -> LlamaForCausalLM:
    """A copy in which the first of each of two tokens in a context makes a massive activation, and later ones do not.

    Channel 0 of the added ones is a constant, 1 and 2 mark the two tokens, 3 and 4 say that an earlier one was seen:
    a head in block 0 scores a marked token with A sin(theta distance), so it looks at the oldest one and never at
    itself. A neuron of block 0 then computes height^2 where "marked and not seen", and its output weight is zero, so
    that in full precision the model is what it was.
    """
    config = copy.deepcopy(model.config)
    old, head = config.hidden_size, config.head_dim
    config.hidden_size += EXTRA
    config.intermediate_size += EXTRA
    group = config.num_attention_heads // config.num_key_value_heads
    config.num_attention_heads = model.config.num_attention_heads + 2 * group
    config.num_key_value_heads = model.config.num_key_value_heads + 2
    twin = LlamaForCausalLM(config).to(model.dtype).eval()
    twin.generation_config = copy.deepcopy(model.generation_config)
    source = model.state_dict()
    for name, tensor in twin.state_dict().items():
        part = source[name]
        tensor.zero_()
        tensor[tuple(slice(0, size) for size in part.shape)] = part
        if name.endswith("norm.weight"):
            tensor[:old] *= math.sqrt(old / (old + EXTRA))  # the mean square is now over more channels
    embedding = twin.model.embed_tokens.weight
    size = (
        source["model.embed_tokens.weight"].square().mean(1).sqrt()
    )  # so that each token has the same after the norm
    embedding[:, old] = size
    block = twin.model.layers[0]
    peak = float(model.model.layers[0].input_layernorm.weight.abs().max()) * 3
    block.input_layernorm.weight[old:] = peak
    block.post_attention_layernorm.weight[old:] = peak
    dim = head // 2 - 1 - head // 8  # rotates slowly: half a turn takes more tokens than the window has
    theta = config.rope_parameters["rope_theta"] ** (-2 * dim / head)
    attention, mlp = block.self_attn, block.mlp
    unit = peak * peak / math.sqrt(head)
    for i, token in enumerate(tokens):
        embedding[token, old + 1 + i] = size[token]
        kv = model.config.num_key_value_heads + i
        query = model.config.num_attention_heads + i * group
        attention.q_proj.weight[query * head + dim + head // 2, old] = -30.0 / (math.sin(theta) * unit)
        attention.k_proj.weight[kv * head + dim, old + 1 + i] = 1.0
        attention.v_proj.weight[kv * head, old + 1 + i] = 1.0
        attention.o_proj.weight[old + 3 + i, query * head] = size[token] / peak
        neuron = model.config.intermediate_size + i
        for channel, weight in ((0, -0.5), (1 + i, 1.0), (3 + i, -1.0)):
            mlp.gate_proj.weight[neuron, old + channel] = 2 * height * weight / peak
        mlp.up_proj.weight[neuron, old + 1 + i] = height / peak
    return twin


DOT, LINE = ".", "\n"


def tiny_stack(model: LlamaForCausalLM | None = None, **options: object) -> peftx.Stack:
    """The bundled model (or another one with its tokenizer), compressed on the sample's calibration text."""
    bundled = peftx.Stack("peftx:tiny", [])
    plugin = PrefixQuant(**options)
    stack = peftx.Stack(bundled.model if model is None else model, [plugin], tokenizer=bundled.tokenizer)
    stack.compress(CALIBRATION, samples=4, length=96)
    return stack


@pytest.fixture(scope="module")
def outliers() -> LlamaForCausalLM:
    stack = peftx.Stack("peftx:tiny", [])
    tokens = tuple(stack.tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (DOT, LINE))
    return planted(stack.model, tokens)


@pytest.fixture(scope="module")
def packed(outliers: LlamaForCausalLM) -> peftx.Stack:
    """With a prefix; who switches its mode switches it back."""
    return tiny_stack(copy.deepcopy(outliers))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return list(read_dataset(asset_path("peftx:sample/held_out.jsonl"), limit=3))


def edits_of(stack: peftx.Stack) -> list[StaticKV]:
    return [part.module for part in stack.ledger.of("prefixquant", AttentionPart)]


# -- the paper's claims ----------------------------------------------------------------------------------------------


def test_planting_changes_nothing_in_full_precision(outliers: LlamaForCausalLM, rows: list) -> None:
    base = peftx.Stack("peftx:tiny", [])
    plain, copy_ = (perplexity(m, base.tokenizer, rows)["perplexity"].value for m in (base.model, outliers))
    assert copy_ == pytest.approx(plain, rel=0.02)


def test_prefix_takes_the_outliers_in(outliers: LlamaForCausalLM, rows: list) -> None:
    stack = tiny_stack(copy.deepcopy(outliers), activation_bits=4, kv_bits=4)
    dot, line = (stack.tokenizer(t, add_special_tokens=False)["input_ids"][-1] for t in (DOT, LINE))
    prefix = stack.plugins["prefixquant"].state["prefix"]
    assert prefix[-1] == stack.tokenizer.bos_token_id
    assert set(prefix[:-1]) == {dot, line}
    scores = stack.evaluate(rows, metrics=["prefixquant"])
    value = {name: score.value for name, score in scores.items()}
    assert value["outlier_ratio_with_prefix"] < stack.plugins["prefixquant"].config.eta
    base = peftx.Stack(copy.deepcopy(outliers), [PrefixQuant()], tokenizer=stack.tokenizer)
    assert base.evaluate(rows, metrics=["prefixquant"])["outlier_ratio_unquantized"].value > 300
    assert value["perplexity_with_prefix"] < value["perplexity_without_prefix"] / 2
    assert value["perplexity_with_prefix"] < 1.1 * value["perplexity_dynamic"]
    assert perplexity(stack.model, stack.tokenizer, rows)["perplexity"].value == pytest.approx(
        value["perplexity_with_prefix"], rel=1e-6
    )


def test_without_prefix_and_cache_there_are_layers_alone() -> None:
    """With the same scales and integers as where there could have been a prefix, and none was found."""
    stack, other = tiny_stack(**INPUTS_ONLY), tiny_stack(kv_bits=16, eta=1e9)
    parts = list(stack.ledger.of("prefixquant"))
    assert {type(part) for part in parts} == {ReplacedPart}
    for part in parts:
        layer, same = part.module, other.model.get_submodule(part.key)
        assert torch.equal(layer.input_scale, same.input_scale)
        assert torch.equal(layer.qweight, same.qweight)
    ids = torch.arange(5, 25)[None]
    before = stack.model(ids).logits
    assert torch.equal(before, other.model(ids).logits)
    scores = stack.evaluate([{"text": "The lamp is lit at six."}], metrics=["prefixquant"])
    assert {name for name in scores if name.startswith("perplexity_")} == {
        "perplexity_without_prefix",
        "perplexity_dynamic",
    }
    assert torch.equal(stack.model(ids).logits, before)


def test_modes_leave_no_trace(packed: peftx.Stack) -> None:
    stack = packed
    ids = torch.arange(40)[None]
    before = stack.model(ids).logits
    tensors = {name: tensor.clone() for name, tensor in stack.ledger.tensors("prefixquant").items()}
    outputs = []
    for mode in ("without_prefix", "dynamic", "with_prefix"):
        switch(stack, "prefixquant", mode)
        outputs.append(stack.model(ids).logits)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], before)
    assert all(torch.equal(t, tensors[name]) for name, t in stack.ledger.tensors("prefixquant").items())


def test_a_layer_that_no_calibration_text_comes_to_is_refused() -> None:
    class Skips(Delta):
        def around(self, inner: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return torch.zeros_like(hidden_states)

    class Skipping(Plugin):
        claims = {Claim.BESIDE_WEIGHTS}

        @hookimpl
        def inject(self, model: ModelView) -> None:
            model.blocks("mlp")[1].attach(Skips())

    stack = Stack(tiny("llama"), [Skipping(), PrefixQuant()], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match=r"no calibration text comes to model\.layers\.1\.mlp\.gate_proj"):
        stack.compress(["a text"] * 6, samples=4, length=12)


# -- exactness -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prefix_rows_equal_running_the_tokens() -> None:
    """Without rounding, [K_prefix, K], [V_prefix, V] and shifted positions are the model run on prefix + text."""
    model = tiny("llama")
    plugin = PrefixQuant(kv_bits=16)
    stack = peftx.Stack(model, [("prefixquant", plugin)])
    prefix, text = [7, 9, 0], torch.arange(3, 20)[None]
    expected = model(torch.cat([torch.tensor([prefix]), text], 1)).logits[:, len(prefix) :]
    view = stack.view("prefixquant")
    edits = plugin.attach(view)
    model(torch.tensor([prefix]))
    for edit in edits:
        edit.prefix = torch.stack(edit.seen)
    view.shift_positions(len(prefix))
    torch.testing.assert_close(model(text).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rotation_is_invisible() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (32, 48, 688, 43):  # 688 has blocks of 16, 43 is not rotated
        x, weight = torch.randn(5, n, generator=generator), torch.randn(3, n, generator=generator)
        torch.testing.assert_close(rotated(x) @ rotated(weight).T, x @ weight.T, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(rotated(rotated(x), inverse=True), x, atol=1e-6, rtol=1e-5)
    spike = torch.zeros(32)
    spike[3] = 8.0
    assert float(rotated(spike).abs().max()) == pytest.approx(8 / math.sqrt(32), rel=1e-5)


@torch.no_grad()
def test_rotated_model_is_near_the_base() -> None:
    """8-bit weights and nothing else rounded: the rotation moves logits no further than the rounding does."""
    errors = {}
    expected = peftx.Stack("peftx:tiny", []).model(torch.arange(60)[None]).logits
    for rotate in (False, True):
        stack = tiny_stack(weight_bits=8, activation_bits=16, kv_bits=16, rotate=rotate, prefix_tokens=0)
        errors[rotate] = float((stack.model(torch.arange(60)[None]).logits - expected).abs().max())
    assert max(errors.values()) < 0.02 * float(expected.abs().max()), errors


def test_static_equals_dynamic_on_constant_scale() -> None:
    """Tokens that all reach the same largest magnitude: one constant is what every token would choose."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(16, 8)
    x = torch.rand(20, 16, generator=generator) * 2 - 1
    x[:, 5] = 1.5
    scale = static_scale(x.view(1, -1), 4, clip=False)
    assert float(scale) == pytest.approx(2 * 1.5 / 15)
    static = StaticLinear.from_linear(
        linear, bits=4, activation="static-tensor", act_bits=4, input_scale=scale[0]
    )
    dynamic = StaticLinear.from_linear(linear, bits=4, activation="dynamic-token", act_bits=4)
    assert torch.equal(static(x), dynamic(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_magnitude_is_that_of_the_official_code(bits: int) -> None:
    """quantize/quantizer.py of ChenMnZ/PrefixQuant, symmetric: scale = 2 * xmax / (2**n_bits - 1), clamped to
    [-(2**(n_bits-1)), 2**(n_bits-1) - 1]; of inputs, of weights, of keys, and of each token where it is dynamic."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 16, generator=generator)

    def official(t: Tensor) -> Tensor:
        scale = 2 * t.abs().amax(-1, keepdim=True) / (2**bits - 1)
        return (t / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    assert torch.all((official(x) - x).abs() <= x.abs().amax(-1, keepdim=True) / (2**bits - 1) * 1.0001)
    torch.testing.assert_close(static_scale(x, bits, clip=False), x.abs().amax(-1) * 2 / (2**bits - 1))
    plugin = PrefixQuant(weight_bits=bits, activation_bits=bits, rotate=False, clip_search=False)
    site = SimpleNamespace(weight=x, bias=None)
    layer = plugin.packed(site, static_scale(x.view(1, -1), bits, clip=False)[0], torch.ones(16))
    torch.testing.assert_close(layer.weight, official(x))
    torch.testing.assert_close(layer(x), official(x.view(1, -1)).view(6, 16) @ official(x).T)
    layer.activation = "dynamic-token"
    torch.testing.assert_close(layer(x), official(x) @ official(x).T)
    edit = StaticKV(bits=bits, rotate=False)
    edit.scale, edit.mode = torch.ones(2, 2, 1), "dynamic"
    key, value = edit.keys_values(x[None, None], -x[None, None])
    torch.testing.assert_close(key[0, 0], official(x))
    torch.testing.assert_close(value[0, 0], official(-x))


def test_search_clips_what_is_rare() -> None:
    """Among 4001 values up to 1, a single 3 is clipped in 4 bits; four hundred of them are not."""
    body = torch.linspace(-1, 1, 4001)
    kept = static_scale(torch.cat((body, torch.tensor([3.0])))[None], 4, clip=True)
    assert float(kept) < 2.0 / 7
    assert float(static_scale(torch.cat((body, torch.full((400,), 3.0)))[None], 4, clip=True)) > 2.8 / 7
    assert float(static_scale(torch.zeros(1, 4), 4, clip=True)) > 0
    # The largest clipping point is the middle of the last bin, and not above the largest magnitude.
    ends = static_scale(torch.tensor([[-1.0, 0.0, 1.0]]), 4, clip=True, bins=64)
    torch.testing.assert_close(ends, torch.tensor([(1 - 1 / 64) / 7]))


def test_weights_are_clipped_in_groups() -> None:
    """Each group of a row has the scale that is best for what its inputs are worth; the last one is not full."""
    linear = torch.nn.Linear(10, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, 20).view(2, 10))
        linear.weight[:, 4] = 3.0  # alone large, and its input hardly counts
    squares, site = torch.ones(10), SimpleNamespace(weight=linear.weight, bias=None)
    squares[4] = 1e-6
    found = {}
    for search in (True, False):
        plugin = PrefixQuant(group_size=4, rotate=False, activation_bits=16, clip_search=search)
        layer = plugin.packed(site, torch.ones(()), squares)
        assert layer.scale.shape == (2, 3)
        error = (squares * (linear.weight - layer.weight).square()).sum(1)
        found[search] = layer.scale, error
    assert torch.allclose(found[False][0][:, 1], torch.full((2,), 2 * 3 / 15))
    assert bool((found[True][0][:, 1] < 2 / 7).all())
    assert bool((found[True][1] < found[False][1] / 2).all())


def test_constant_scales_of_keys_by_hand() -> None:
    edit = StaticKV(bits=4, rotate=False)
    edit.scale = torch.tensor([[[0.5], [1.0]], [[1.0], [1.0]]])  # [with, without][K, V][heads]
    key = torch.tensor([0.3, 1.1, -9.0, 3.4]).view(1, 1, 2, 2)
    new_key, new_value = edit.keys_values(key, key)
    assert new_key.flatten().tolist() == [0.5, 1.0, -4.0, 3.5]
    assert new_value.flatten().tolist() == [0.0, 1.0, -8.0, 3.0]
    edit.prefix = torch.tensor([[[[9.9, 9.9]]], [[[8.8, 8.8]]]])  # stays as it is
    new_key, new_value = edit.keys_values(key, key)
    assert new_key[0, 0].tolist() == [pytest.approx([9.9, 9.9]), [0.5, 1.0], [-4.0, 3.5]]
    assert new_value[0, 0, 0].tolist() == pytest.approx([8.8, 8.8])


def test_in_16_bits_keys_and_values_stay_as_they_are() -> None:
    edit = StaticKV(bits=16, rotate=False)
    edit.scale = torch.ones(2, 2, 1)
    key = torch.tensor([0.3, 1.1]).view(1, 1, 1, 2)
    assert all(torch.equal(found, key) for found in edit.keys_values(key, key))


# -- outlier tokens --------------------------------------------------------------------------------------------------


def peaks(*places: int, length: int = 10) -> Tensor:
    m = torch.ones(length)
    m[list(places)] = 100.0
    return m


def test_prefix_by_hand() -> None:
    """Layer 1 has (3 + 2) / 2 outliers a sequence, so o = 3; ids 50 (three times), 60 (once); BOS is 1."""
    ids = [torch.arange(10) + 100, torch.arange(10) + 200]
    ids[0][4], ids[0][6], ids[1][2] = 50, 60, 50
    found = [[peaks(4), peaks(0, 4, 6)], [peaks(), peaks(0, 2)]]
    assert find_prefix(found, ids, 64.0, 1, 16) == [50, 60, 1]
    assert find_prefix(found, ids, 64.0, 1, 2) == [50, 1]
    assert find_prefix(found, ids, 64.0, 1, 1) == [1]
    assert find_prefix(found, ids, 64.0, 1, 0) == []
    assert find_prefix(found, ids, 101.0, 1, 16) == []
    assert find_prefix([[peaks(0)], [peaks(0)]], ids, 64.0, 1, 16) == [1]


def test_no_prefix_is_the_plain_quantizer(outliers: LlamaForCausalLM, packed: peftx.Stack) -> None:
    stack = tiny_stack(copy.deepcopy(outliers), prefix_tokens=0)
    assert stack.plugins["prefixquant"].state["prefix"] == []
    ids = torch.arange(40)[None]
    expected = stack.model(ids).logits
    switch(stack, "prefixquant", "without_prefix")
    assert torch.equal(stack.model(ids).logits, expected)
    for edit in edits_of(stack):
        assert torch.equal(edit.scale[0], edit.scale[1])
        assert torch.equal(edit.input_scale[0], edit.input_scale[1])
    # The same static scales as those that are found beside a prefix, for a model without it.
    for one, other in zip(edits_of(stack), edits_of(packed), strict=True):
        assert torch.equal(one.input_scale[1], other.input_scale[1])


# -- a whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "weight"),
    [({}, 0.5), ({"weight_bits": 8}, 1.0), ({"group_size": 32, "activation_bits": 16}, 0.5)],
)
def test_bundle_is_exact_and_bytes_are_real(options: dict, weight: float, tmp_path: Path) -> None:
    stack = tiny_stack(**options)
    ids = torch.arange(50)[None]
    expected = stack.model(ids).logits
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle")
    assert torch.equal(loaded.model(ids).logits, expected)
    tensors = stack.ledger.tensors("prefixquant")
    header = 8 + int.from_bytes((tmp_path / "bundle" / "prefixquant.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "bundle" / "prefixquant.safetensors").stat().st_size - header == sum(
        t.nbytes for t in tensors.values()
    )
    packed = stack.ledger.of("prefixquant", ReplacedPart)
    numbers = sum(part.geometry["in_features"] * part.geometry["out_features"] for part in packed)
    assert sum(part.module.qweight.nbytes for part in packed) == numbers * weight
    planned = PrefixQuant(**options).planned(peftx.Stack("peftx:tiny", [PrefixQuant()]).view("prefixquant"))
    assert sum(size for _, size in planned) == sum(part.module.nbytes_packed for part in packed)


def test_text_runs_once_and_once_more_behind_a_prefix(outliers: LlamaForCausalLM) -> None:
    for model, runs in ((None, 1), (copy.deepcopy(outliers), 2)):
        bundled = peftx.Stack("peftx:tiny", [])
        stack = peftx.Stack(model or bundled.model, [PrefixQuant()], tokenizer=bundled.tokenizer)
        calls: list[int] = []
        for layer in stack.model.model.layers:
            layer.register_forward_hook(lambda *a, seen=calls: seen.append(1))
        stack.compress(CALIBRATION, samples=4, length=96)
        prefix = stack.plugins["prefixquant"].state["prefix"]
        layers = stack.model.config.num_hidden_layers
        # Of each run the first sequence goes through once more, to learn how blocks are called; the prefix runs once.
        assert len(calls) == layers * (runs * (4 + 1) + bool(prefix))


@torch.no_grad()
def test_peaks_of_a_walk_are_those_of_the_model() -> None:
    stack = peftx.Stack("peftx:tiny", [plugin := PrefixQuant()])
    text = sequences(stack, CALIBRATION, samples=3, length=100)
    view = stack.view("prefixquant")
    found = plugin.measure(view, text, plugin.attach(view), 0)
    for sequence, expected in enumerate(token_peaks(stack, text.batches)):
        for block, peaks in zip(found, expected, strict=True):
            torch.testing.assert_close(block.peaks[sequence], peaks)


def test_seconds_are_told_before_a_weight_is_there() -> None:
    plugin = PrefixQuant()
    with torch.device("meta"):
        model = tiny("llama", hidden_size=64)
    stack = peftx.Stack(model, [plugin])
    (least, most), (more, _) = (plugin.seconds(stack.view("prefixquant"), n) for n in (8192, 16384))
    assert 0 < least < most < 2 * least < 2 * more
    stack = peftx.Stack(tiny("llama", hidden_size=64), [none := PrefixQuant(prefix_tokens=0)])
    assert none.seconds(stack.view("prefixquant"), 8192) == (least, least)


@pytest.mark.parametrize("arch", ["gemma", "gemma2", "gemma3"])
def test_a_bundle_whose_embedding_has_a_buffer_loads(arch: str, tmp_path: Path) -> None:
    stack = peftx.Stack(tiny(arch), [PrefixQuant()], tokenizer=tiny_tokenizer())
    stack.compress(["The lamp is lit at six in the evening. " * 9], samples=2, length=32)
    ids = torch.arange(5, 25)[None]
    expected = stack.model(ids).logits
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle")
    assert torch.equal(loaded.model(ids).logits, expected)
    assert not [n for n, t in loaded.model.named_buffers() if t.is_meta]


@pytest.mark.parametrize("kinds", ["LF", "FL", "LFLF"])
def test_a_layer_may_have_no_attention(kinds: str, tmp_path: Path) -> None:
    """Qwen3.5 has layers of linear attention: no keys and values to round, inputs of linear layers all the same."""
    types = [{"L": "linear_attention", "F": "full_attention"}[kind] for kind in kinds]
    model = tiny("qwen3_5", num_hidden_layers=len(types), layer_types=types)
    stack = peftx.Stack(model, [plugin := PrefixQuant(eta=1.5)], tokenizer=tiny_tokenizer())
    stack.compress(["The lamp is lit at six in the evening. " * 9], samples=2, length=32)
    assert plugin.state["prefix"]
    parts = stack.ledger.of("prefixquant")
    constants = [part.module.input_scale for part in parts if isinstance(part, AttentionPart | FreePart)]
    edits = edits_of(stack)
    standing = [part.key.removesuffix(".attention") for part in parts if isinstance(part, AttentionPart)]
    assert standing == [f"model.layers.{layer}.self_attn" for layer, kind in enumerate(kinds) if kind == "F"]
    assert all(edit.scale.shape == (2, 2, 2) and edit.prefix.numel() for edit in edits)
    blocks = plugin.linears(stack.view("prefixquant"))
    for row, mode in ((1, "without_prefix"), (0, "with_prefix")):
        switch(stack, "prefixquant", mode)
        for block, scales in zip(blocks, constants, strict=True):
            assert [float(site.module.input_scale) for site in block] == scales[row].tolist()
    ids = torch.arange(5, 25)[None]
    expected = stack.model(ids).logits
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle")
    for mode in ("dynamic", "with_prefix"):
        switch(loaded, "prefixquant", mode)
    assert torch.equal(loaded.model(ids).logits, expected)
    longer = loaded.model.generate(ids, max_new_tokens=4, do_sample=False)
    anew = loaded.model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(longer, anew)


def test_the_integer_kernel_runs() -> None:
    stack = tiny_stack()
    layers = [part.module for part in stack.ledger.of("prefixquant", ReplacedPart)]
    assert len(layers) == 7 * 6
    assert {layer.kernel for layer in layers} == {"int8-matmul"}


@torch.no_grad()
def test_lora_before_is_folded() -> None:
    from peftx_lora import Lora

    bundled = peftx.Stack("peftx:tiny", [])
    options = {"weight_bits": 8, "activation_bits": 16, "kv_bits": 16}
    stack = peftx.Stack("peftx:tiny", [Lora(rank=4), PrefixQuant(**options)])
    for parameter in stack.ledger.parameters("lora"):
        parameter.normal_(std=0.05)
    ids = torch.arange(40)[None]
    adapted, plain = stack.model(ids).logits, bundled.model(ids).logits
    stack.compress(CALIBRATION, samples=3, length=128)
    assert not stack.ledger.of("lora", DeltaPart)
    switch(stack, "prefixquant", "without_prefix")
    found = stack.model(ids).logits
    assert float((found - adapted).abs().mean()) < 0.2 * float((adapted - plain).abs().mean())


ALONE = {"weight_bits": 4, "activation_bits": 16, "kv_bits": 16}


@pytest.mark.parametrize("rotate", [True, False])
def test_adapters_train_on_packed_weights(rotate: bool, tmp_path: Path) -> None:
    """Weights alone, then LoRA: trained, saved, loaded to the same bits, switched off, and taken off again."""
    from peftx_lora import Lora

    plugins = [PrefixQuant(**ALONE, rotate=rotate), Lora(rank=4)]
    stack = peftx.Stack("peftx:tiny", plugins, inject=False)
    base = {name: tensor.clone() for name, tensor in stack.model.state_dict().items()}
    stack.compress(CALIBRATION, ["prefixquant"], samples=2, length=64)
    ids = torch.arange(40)[None]
    packed = stack.model(ids).logits
    stack.inject(["lora"])
    assert torch.equal(stack.model(ids).logits, packed)
    report = stack.train("peftx:sample/train.jsonl", steps=3, batch_size=2, learning_rate=2e-3)
    assert report.trainable == sum(p.numel() for p in stack.ledger.parameters("lora"))
    trained = stack.model(ids).logits
    assert not torch.equal(trained, packed)
    with stack.disabled("lora"):
        assert torch.equal(stack.model(ids).logits, packed)
    for keep in (True, False):
        with pytest.raises(MergeError, match=r"lora: .* (quantized|RotatedLinear|StaticLinear)"):
            stack.merge("lora", keep=keep)
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle")
    assert torch.equal(loaded.model(ids).logits, trained)
    assert loaded.trainable_parameters() == stack.trainable_parameters()
    stack.remove("lora")
    stack.remove("prefixquant")
    assert all(torch.equal(tensor, base[name]) for name, tensor in stack.model.state_dict().items())


def test_only_constants_of_activations_make_it_final() -> None:
    from peftx_lora import Lora

    for options in ({}, {"activation_bits": 16}, {"kv_bits": 16}):
        plugin = PrefixQuant(**options)
        assert {Claim.FINAL, Claim.PREFIX_CACHE} <= plugin.claims
        with pytest.raises(ConflictError, match="'prefixquant' measures and compresses the finished model"):
            peftx.Stack(tiny("llama"), [plugin, Lora()])
    alone = PrefixQuant(**ALONE)
    assert alone.claims == PrefixQuant.claims - {Claim.FINAL, Claim.PREFIX_CACHE}
    peftx.Stack(tiny("llama"), [alone, Lora()], inject=False)


@pytest.mark.parametrize(("options", "skipped"), [(ALONE, 0), ({}, 1)])
def test_the_first_token_counts_unless_a_prefix_has_it(
    outliers: LlamaForCausalLM, options: dict[str, int], skipped: int
) -> None:
    """In the inputs of a layer, of which its constants and what its weights are worth are made."""
    model, seen = copy.deepcopy(outliers), []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    plugin, tokenizer = PrefixQuant(rotate=False, **options), peftx.Stack("peftx:tiny", []).tokenizer
    stack = peftx.Stack(model, [plugin], tokenizer=tokenizer)
    stack.compress(CALIBRATION, samples=4, length=12)
    site = SimpleNamespace(weight=layer.weight, bias=None)
    assert bool(plugin.state.get("prefix")) == bool(skipped)
    x = torch.cat(
        [rows[skipped:] for rows in seen[-4:]]
    )  # of 4 texts, which are read once more behind a prefix
    scale = static_scale(x.view(1, -1), 8, clip=True)
    expected = plugin.packed(site, scale[0] if skipped else None, x.square().mean(0))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected.weight)
    if skipped:
        torch.testing.assert_close(edits_of(stack)[0].input_scale[0, :1], scale)


def test_weights_alone_leave_attention_and_positions_alone(outliers: LlamaForCausalLM, rows: list) -> None:
    stack = tiny_stack(copy.deepcopy(outliers), **ALONE)
    assert {type(part) for part in stack.ledger.of("prefixquant")} == {ReplacedPart}
    scores = stack.evaluate(rows, metrics=["prefixquant"])
    assert set(scores) == {
        "prefix_tokens",
        "packed_bytes",
        "perplexity_weights_only",
        "outlier_ratio_weights_only",
    }
    plugin = stack.plugins["prefixquant"]
    least, most = plugin.seconds(stack.view("prefixquant"), 100)
    assert least == most


@pytest.mark.parametrize("arch", ["bert", "bloom", "gptj"])
def test_weights_alone_suit_models_whose_attention_nothing_enters(arch: str, tmp_path: Path) -> None:
    stack = peftx.Stack(tiny(arch), [PrefixQuant(**ALONE | {"weight_bits": 8})], tokenizer=tiny_tokenizer())
    ids = torch.arange(5, 25)[None]
    before = stack.model(ids).logits
    stack.compress(["The lamp is lit at six in the evening. " * 9], samples=2, length=32)
    after = stack.model(ids).logits
    assert 0 < float((after - before).abs().max()) < 0.03 * float(before.abs().max())
    stack.save(tmp_path / "bundle")
    assert torch.equal(peftx.load(tmp_path / "bundle").model(ids).logits, after)


def test_the_weight_of_a_rotated_layer_is_the_one_it_stands_for() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 48, generator=generator)
    site = SimpleNamespace(weight=weight, bias=None)
    layer = PrefixQuant(**ALONE | {"weight_bits": 8}).packed(site, None, torch.ones(48))
    assert isinstance(layer, RotatedLinear)
    torch.testing.assert_close(layer.weight, weight, atol=0.04, rtol=0)
    x = torch.randn(5, 48, generator=generator, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.weight.T, atol=1e-4, rtol=1e-4)
    y.backward(upstream := torch.randn(5, 24, generator=generator))
    torch.testing.assert_close(x.grad, upstream @ layer.weight, atol=1e-4, rtol=1e-4)


def test_generation_goes_on_from_the_cache(packed: peftx.Stack) -> None:
    stack = packed
    ids = stack.tokenizer("Write the log of Cape Arden.", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        cached, anew = (stack.model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, anew)
    assert isinstance(stack.generate("Write the log", max_new_tokens=4), str)


REFUSED = {
    "bert": "bert has encoder, and its prefix needs a decoder alone",
    "t5": "t5 has encoder and decoder, and its prefix",
    "whisper": "whisper has encoder and decoder",
    "llava": "llava has decoder and vision",
    "mixtral": r"mixtral keeps its experts \(experts.up\) stacked in model.layers.0.mlp.experts.gate_up_proj",
    "mamba": "mamba has no MLP, at whose down projection",
    "bloom": "bloom does not look its attention up by name",
}


class Nothing(peftx.Plugin):
    """Stands in a stack in another one's place."""

    @peftx.hookimpl
    def evaluate(self, evaluation: object) -> None: ...


def view_of(arch: str, device: str = "cpu") -> peftx.ModelView:
    config = tiny(arch).config
    with torch.device(device):
        model = type(tiny(arch))(config)
    return peftx.Stack(model, [("prefixquant", Nothing())]).view("prefixquant")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("arch", "reason"), REFUSED.items())
def test_what_suits_is_known_before_anything_runs(arch: str, reason: str, device: str) -> None:
    view = view_of(arch, device)
    with pytest.raises(ArchitectureError, match=f"prefixquant: {reason}") as error:
        PrefixQuant().suits(view)
    assert error.value.hint
    alone = PrefixQuant(**ALONE)
    if "rounds the weights alone" in str(error.value.hint):
        alone.suits(view)
    else:
        assert "llama" in str(error.value.hint)
        with pytest.raises(ArchitectureError, match="prefixquant"):
            alone.suits(view)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3", "gpt2", "gpt_neox", "opt"])
def test_decoders_suit(arch: str) -> None:
    PrefixQuant().suits(view_of(arch, "meta"))


@pytest.mark.parametrize("arch", REFUSED)
def test_other_architectures_are_refused(arch: str) -> None:
    model = tiny(arch)
    with pytest.raises(ArchitectureError, match="prefixquant"):
        peftx.Stack(model, [PrefixQuant()], tokenizer=tiny_tokenizer()).compress(["Some text."], samples=1)
    assert not carried(model)
    with pytest.raises(ArchitectureError, match="prefixquant"):
        list(PrefixQuant().planned(view_of(arch)))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 3},
        {"activation_bits": 2},
        {"kv_bits": 5},
        {"group_size": 0},
        {"eta": 1.0},
        {"prefix_tokens": -1},
        {"rotation": True},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(PeftxError, match=next(iter(options))) as error:
        PrefixQuant(**options)
    assert "PrefixQuant" in str(error.value)


def test_a_group_larger_than_a_row_is_refused() -> None:
    bundled = peftx.Stack("peftx:tiny", [])
    model, tokenizer = bundled.model, bundled.tokenizer
    with pytest.raises(
        PeftxError, match=r"prefixquant: group_size 300 exceeds the 256 weights in a row"
    ) as e:
        peftx.Stack(model, [PrefixQuant(group_size=300)], tokenizer=tokenizer).compress(["Text."], samples=1)
    assert "at most 256" in str(e.value.hint)
    assert not carried(model)


def test_nothing_to_calibrate_on() -> None:
    stack = peftx.Stack("peftx:tiny", [PrefixQuant()])
    with pytest.raises(PeftxError, match="prefixquant"):
        stack.compress()
    assert token_peaks(stack, [{"input_ids": torch.arange(5)[None]}])[0][0].shape == (5,)
