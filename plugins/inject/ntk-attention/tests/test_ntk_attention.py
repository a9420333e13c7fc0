from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM, PreTrainedModel

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, PeftxError
from peftx.kernel.anatomy.anatomy import Heads
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx_lora import Lora
from peftx_ntk_attention import NtkAttention, Prefix, phi, set_prefix, statistics
from peftx_p_tuning_v2 import PTuningV2

test_conformance = conformance("ntk-attention")

ARCHES = ["llama", "gpt2", "bert", "t5", "vit", "clip"]

# What the official `ntk_attn` gives for `wave` inputs (causal, 2 heads of 2, 3 tokens): the output [H, Q, d], then the
# gradients of Z and z. Made once outside this repository; the README says where.
OFFICIAL = (
    [
        [[0.6256432, -0.0305628], [-0.5508958, 0.4499989], [0.6857254, -0.4697066]],
        [[-0.3034418, 0.8807753], [0.0726895, -0.7278814], [-0.1733671, 0.9555983]],
    ],
    [[[-0.1197121, 0.0708174], [-0.5265158, 0.2894026]], [[-0.0451119, 0.2438022], [-0.0148742, 0.1011502]]],
    [[-0.3388578, -0.4698167], [0.3184708, 0.2819277]],
)


def wave(*shape: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) * 1.7 + shift).view(shape) * scale


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """A causal layer's own attention."""
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2)


def edits(stack: Stack) -> list[Prefix]:
    return [part.module for part in stack.ledger.of("ntk-attention")]


def sizes(heads: int, size: int, value: int | None = None) -> Heads:
    return Heads(heads, heads, size, value or size)


def spread(stack: Stack) -> Stack:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("ntk-attention"):
            parameter.normal_()
    return stack


def filled(heads: int, size: int, *, causal: bool = True) -> Prefix:
    torch.manual_seed(5)
    edit = Prefix(sizes(heads, size), dropout=0.0, causal=causal)
    edit.Z.data.normal_()
    edit.z.data.normal_()
    return edit


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


def explicit(
    query: Tensor, key: Tensor, value: Tensor, sees: Tensor, prefix: tuple[Tensor, Tensor], kernel: str
) -> Tensor:
    """Numerator and denominator summed one by one: query [B, H, Q, d], sees [B, Q, K] -> [B, Q, H, d]."""
    batch, heads, length, size = query.shape
    groups, width = heads // key.shape[1], value.shape[-1]
    out = torch.zeros(batch, length, heads, width)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                q, above, below = query[b, h, i], torch.zeros(width), torch.zeros(())
                for j in range(key.shape[2]):
                    if sees[b, i, j]:
                        weight = (q @ key[b, h // groups, j] / size**0.5).exp()
                        above, below = above + weight * value[b, h // groups, j], below + weight
                for k, v in zip(*(part[h // groups] for part in prefix), strict=True):
                    if kernel == "phi":
                        weight = phi(q, size**-0.5) @ phi(k, size**-0.5) / size
                    else:
                        weight = (q @ k / size**0.5).exp()
                    above, below = above + weight * v, below + weight
                out[b, i, h] = above / below
    return out


def test_equals_the_official_function() -> None:
    query, key = wave(1, 2, 3, 2, scale=2), wave(1, 2, 3, 2, scale=2, shift=1)
    value, gradient = wave(1, 2, 3, 2, shift=2), wave(1, 2, 3, 2, shift=5)
    edit = Prefix(sizes(2, 2), dropout=0.0, causal=True)
    edit.Z.data, edit.z.data = wave(2, 2, 2, shift=3), wave(2, 2, shift=4)
    out = edit.replace(query, key, value, None, 2**-0.5, softmax_attention).transpose(1, 2)
    out.backward(gradient)
    for ours, theirs in zip((out[0], edit.Z.grad, edit.z.grad), OFFICIAL, strict=True):
        assert torch.allclose(ours, torch.tensor(theirs), atol=1e-6)


@pytest.mark.parametrize("arch", ARCHES)
def test_zeros_give_the_base_bit_for_bit(arch: str) -> None:
    model = tiny(arch)
    for padding in (None, "right") if arch != "vit" else (None,):
        inputs = example_inputs(model, padding=padding)
        with torch.no_grad():
            base = output_of(model, inputs)
            stack = Stack(model, [NtkAttention()])
            assert torch.equal(output_of(model, inputs), base)
            spread(stack)
            assert difference(output_of(model, inputs), base) > 0.02
            stack.remove("ntk-attention")


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_equals_the_sums_of_the_kernel(mask: str) -> None:
    """A prefix of three rows, two query heads on one key-value head, causal; with masks, row 1 has two left pads."""
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    prefix = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    sees = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    if mask != "none":
        sees[1, :, :2] = False
    given = {"none": None, "bool": sees[:, None]}.get(
        mask, torch.zeros(2, 1, 5, 5).masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
    )
    edit = Prefix(sizes(4, 8), dropout=0.0, causal=True)
    edit.Z.data, edit.z.data = statistics(*prefix, groups=2)
    ours = edit.replace(query, key, value, given, 8**-0.5, softmax_attention)
    real = sees.any(-1)  # a pad sees nothing, and what it gets nobody reads
    assert difference(ours[real], explicit(query, key, value, sees, prefix, "phi")[real]) < 2e-6
    assert bool(ours.isfinite().all())


def test_values_may_be_narrower_than_keys() -> None:
    """As in DeepSeek-V3; the kernel's sums over keys of 8 numbers and values of 5."""
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 5)
    prefix = torch.randn(2, 3, 8), torch.randn(2, 3, 5)
    sees = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    edit = Prefix(sizes(4, 8, 5), dropout=0.0, causal=True)
    edit.Z.data, edit.z.data = statistics(*prefix, groups=2)
    ours = edit.replace(query, key, value, sees[:, None], 8**-0.5, softmax_attention)
    assert difference(ours, explicit(query, key, value, sees, prefix, "phi")) < 2e-6


@pytest.mark.parametrize(
    ("arch", "shapes"),
    [
        ("deepseek_v3", 2 * [(4, 12, 8)]),
        ("gemma4", [(4, 8, 8), (4, 16, 16), (4, 16, 16)]),  # wider heads where attention is full
    ],
)
def test_each_layer_has_heads_of_its_own_size(arch: str, shapes: list[tuple[int, ...]]) -> None:
    model = tiny(arch)
    inputs = example_inputs(model)
    with torch.no_grad():
        base = output_of(model, inputs)
        stack = Stack(model, [NtkAttention()])
        assert [tuple(edit.Z.shape) for edit in edits(stack)] == shapes
        assert torch.equal(output_of(model, inputs), base)
        spread(stack)
        assert difference(output_of(model, inputs), base) > 0.02
        narrower = [(torch.randn(2, 5, size), torch.randn(2, 5, width)) for _, size, width in shapes]
        set_prefix(stack, narrower)
        assert [tuple(edit.Z.shape) for edit in edits(stack)] == shapes


def test_a_new_token_sees_all_keys() -> None:
    """One query and no mask, as a cache gives it, in a causal layer; and any query in one that is not causal."""
    torch.manual_seed(1)
    query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    prefix = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = explicit(query, key, value, torch.ones(1, 3, 6, dtype=torch.bool), prefix, "phi")

    def all_keys(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    for causal, queries in ((True, slice(2, 3)), (False, slice(0, 3))):
        edit = Prefix(sizes(2, 4), dropout=0.0, causal=causal)
        edit.Z.data, edit.z.data = statistics(*prefix)
        ours = edit.replace(query[:, :, queries], key, value, None, 0.5, all_keys)
        assert difference(ours, expected[:, queries]) < 2e-6


@pytest.mark.parametrize("arch", ["llama", "silent llama", "gpt2", "clip"])
def test_later_tokens_do_not_show(arch: str) -> None:
    """Causal without a mask, in CLIP's text tower too, whose modules do not say that they are, and where a module says
    nothing, which transformers takes for causal."""
    plain = tiny(arch.split()[-1])
    if arch == "silent llama":
        for layer in plain.model.layers:
            del layer.self_attn.is_causal
    stack = spread(Stack(plain, [NtkAttention()]))
    model = stack.model.text_model if arch == "clip" else stack.model
    for length, first in ((9, 5), (2, 1)):  # two tokens are a text too, and no step of decoding
        one = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(0))
        two = one.clone()
        two[:, first:] = 7
        with torch.no_grad():
            states = [model(input_ids=ids, output_hidden_states=True).hidden_states[-1] for ids in (one, two)]
        assert torch.equal(states[0][:, :first], states[1][:, :first])
        assert difference(states[0][:, first:], states[1][:, first:]) > 0.1


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_left_pads_are_harmless(arch: str) -> None:
    """Also where z = 0 and Z is not: a pad's denominator would be nothing."""
    model = tiny(arch)
    stack = spread(Stack(model, [NtkAttention(dropout=0.0)]))
    inputs = example_inputs(model, padding="left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    real = inputs["attention_mask"][1].bool()
    for empty in (False, True):
        for edit in edits(stack):
            edit.z.data *= 0 if empty else 1
        together = model(**inputs, position_ids=positions).logits
        alone = model(input_ids=inputs["input_ids"][1, real][None]).logits
        assert difference(together[1, real], alone[0]) < 2e-5
        together[1, real].sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in stack.ledger.parameters("ntk-attention"))


def test_trainable_count() -> None:
    layers, heads, size = 2, 4, 8  # query heads: each has its own, also where two share keys
    assert Stack(tiny("llama"), [NtkAttention()]).trainable_parameters() == layers * heads * (size**2 + size)
    one = Stack(tiny("llama"), [NtkAttention(targets="attention layers=-1")])
    assert one.trainable_parameters() == heads * (size**2 + size)
    wide = Stack(tiny("gemma"), [NtkAttention()])
    assert wide.trainable_parameters() == layers * heads * (16**2 + 16)


def test_the_kernel_is_near_for_small_entries() -> None:
    """phi(q) phi(k) / d against exp(q k / sqrt(d)), and the attention that comes of each."""
    torch.manual_seed(2)
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    k, v = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    sees = torch.ones(1, 4, 4, dtype=torch.bool)
    errors = []
    for small in (1.0, 0.3, 0.1, 0.03):
        pair = small * query, key, value, sees, (small * k, v)
        errors.append(difference(explicit(*pair, "phi"), explicit(*pair, "exp")))
    assert all(after < before / 2 for before, after in pairwise(errors))
    assert errors[-1] < 0.01


def test_stands_in_for_a_short_prefix() -> None:
    """Z and z of a given prefix come nearer to the model with that prefix than the bare model is, by far."""
    shown = Stack(tiny("llama"), [PTuningV2(length=20)])
    torch.manual_seed(0)
    prefix = []
    for part in shown.ledger.of("p-tuning-v2"):
        part.module.prompt.rows.data.normal_(std=0.3)
        prefix.append(tuple(part.module.prompt.rows.detach()))
    stack = Stack(tiny("llama"), [NtkAttention()])
    inputs = example_inputs(stack.model, length=20)
    with torch.no_grad():
        wanted = shown.model(**inputs).logits.log_softmax(-1)
        bare = stack.model(**inputs).logits.log_softmax(-1)
        set_prefix(stack, prefix)
        found = stack.model(**inputs).logits.log_softmax(-1)
    distances = [float((wanted.exp() * (wanted - other)).sum(-1).mean()) for other in (bare, found)]
    assert distances[1] < distances[0] / 20


def test_z_counts_by_its_size_and_leaves_zero() -> None:
    stack = Stack(tiny("llama"), [NtkAttention()])
    inputs = example_inputs(stack.model)
    stack.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(float(edit.z.grad.abs().min()) > 0 for edit in edits(stack))
    spread(stack)
    with torch.no_grad():
        before = output_of(stack.model, inputs)
        for edit in edits(stack):
            edit.z.neg_()
        assert torch.equal(output_of(stack.model, inputs), before)


def test_large_scores_stay_finite() -> None:
    edit = filled(2, 4)
    query = 1000 * torch.randn(1, 2, 3, 4)
    for sign in (1, -1):
        key = (sign * query.mean(2, keepdim=True).expand(-1, -1, 3, -1)).requires_grad_()
        out = edit.replace(query, key, torch.randn(1, 2, 3, 4), None, 0.5, softmax_attention)
        out.sum().backward()
        assert bool(out.isfinite().all())
        assert bool(key.grad.isfinite().all())


def test_the_cache_does_not_grow() -> None:
    lengths = []
    for plugins in ([], [NtkAttention()]):
        model = tiny("llama")
        stack = Stack(model, plugins)
        if plugins:
            spread(stack)
        cache = DynamicCache()
        with torch.no_grad():
            model(**example_inputs(model), past_key_values=cache)
        lengths.append(cache.get_seq_length())
    assert lengths == [9, 9]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_cached_generation_equals_uncached(arch: str) -> None:
    model = tiny(arch)
    spread(Stack(model, [NtkAttention()]))
    inputs = example_inputs(model, padding="left" if arch != "t5" else "right")
    inputs.pop("decoder_input_ids", None)
    kept = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    cached, uncached = (model.generate(**inputs, use_cache=use, **kept) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_dropout_acts_on_phi_while_training() -> None:
    edit = Prefix(sizes(1, 2), dropout=0.5, causal=False)
    edit.Z.data, edit.z.data = torch.ones(1, 2, 2), torch.zeros(1, 2)
    zeros = torch.zeros(1, 1, 400, 2)  # phi(0) = 1, L = 0

    def nothing(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return torch.zeros(1, 400, 1, 2)

    arguments = zeros, zeros[:, :, :1], zeros, None, 0.7, nothing
    # None, one or both entries, doubled.
    assert edit.replace(*arguments).detach().unique().tolist() == [0, 2, 4]
    edit.eval()
    assert edit.replace(*arguments).detach().unique().tolist() == [2]


def test_beside_lora_and_a_prefix() -> None:
    """Other plugins' rows in front of the keys are keys like the rest."""
    model = tiny("llama")
    stack = Stack(model, [PTuningV2(length=4), NtkAttention(dropout=0.0), Lora(rank=2)])
    inputs = example_inputs(model, padding="left")
    base = model(**inputs).logits
    with stack.disabled("ntk-attention"):
        assert torch.equal(model(**inputs).logits, base)
    spread(stack)
    assert difference(model(**inputs).logits, base) > 0.05
    with pytest.raises(ConflictError, match="both compute the attention"):
        Stack(tiny("llama"), [NtkAttention(), ("again", NtkAttention())])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_trained_saved_and_loaded_computes_the_same_bits(arch: str, tmp_path: Path) -> None:
    """L is a product with the keys, which rounds otherwise if they come out of a cache: both must use one, or none."""
    stack = Stack(tiny(arch), [NtkAttention()], tokenizer=tiny_tokenizer())
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
    stack.train(rows, steps=4, batch_size=2, learning_rate=1e-2)
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle", model=tiny(arch), tokenizer=tiny_tokenizer())
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs).logits, stack.model(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": "layers=1"}, "targets"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"NtkAttention: {match}") as caught:
        NtkAttention(**options)
    assert "dropout, targets" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("arch", "options", "match"),
    [
        ("llama", {"targets": "attention layers=2"}, "layer 2 does not exist"),
        ("llama", {"targets": "cross_attention"}, "'cross_attention'"),
        ("mamba", {}, "has no attention"),
        ("gptj", {}, "does not look its attention up"),
        ("gemma2", {}, "caps its scores"),
    ],
)
def test_what_does_not_fit_the_model(arch: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"ntk-attention: .*{match}"):
        Stack(tiny(arch), [NtkAttention(**options)])


def gpt_oss() -> GptOssForCausalLM:
    """It adds a trained score to each query's sum, which L does not hold."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, pad_token_id=2))


def test_attention_sinks_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="ntk-attention: gpt_oss has attention sinks"):
        Stack(gpt_oss(), [NtkAttention()])


@pytest.mark.parametrize("make", [gpt_oss, partial(tiny, "gemma2")])
def test_where_the_sum_is_not_known_a_prefix_of_rows_helps(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    with pytest.raises(ArchitectureError, match="so the sum of its scores is not known here") as caught:
        Stack(model, [NtkAttention()])
    assert "p-tuning-v2" in str(caught.value.hint)
    inputs = example_inputs(model)
    with torch.no_grad():
        base = output_of(model, inputs)
        Stack(model, [PTuningV2(length=4)])
        assert difference(output_of(model, inputs), base) > 1e-3


def test_a_mask_of_another_kind() -> None:
    one = torch.zeros(1, 2, 3, 4)
    with pytest.raises(PeftxError, match="ntk-attention: this attention makes no 4-D masks"):
        filled(2, 4).replace(one, one, one, torch.ones(1, 3), 0.5, lambda q, k, v, m: q.transpose(1, 2))


def test_a_prefix_that_does_not_fit() -> None:
    stack = Stack(tiny("llama"), [NtkAttention()])
    good = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with pytest.raises(PeftxError, match="ntk-attention: the prefix has 1 layers, the stack 2"):
        set_prefix(stack, [good])
    for bad in (torch.randn(3, 5, 8), torch.randn(2, 5, 4), torch.randn(5, 8)):
        with pytest.raises(PeftxError, match="ntk-attention: prefix of layer 1 has shapes"):
            set_prefix(stack, [good, (bad, bad)])
    assert not any(edit.Z.any() for edit in edits(stack))  # nothing was written
