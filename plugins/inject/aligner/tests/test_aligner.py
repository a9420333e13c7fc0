from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Claim, Stack
from peftx.errors import ArchitectureError, MergeError, PeftxError
from peftx.kernel.parts import DeltaPart, FreePart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_aligner import Aligner, Projection, Read, Shift, Tokens
from peftx_lora import Lora

test_conformance = conformance("aligner")

WHY = "several tokens weigh their values by the query, so nothing folds"
test_conformance_of_several_tokens = conformance(
    "aligner",
    options={"tokens": 4, "gate": "head"},
    models=["llama", "qwen3", "t5"],
    expected_failures=dict.fromkeys(
        (
            "effects_match_claims",
            "merge_equals_unmerged",
            "merge_in_bfloat16",
            "merge_rounds_once",
            "unmerge_is_exact",
        ),
        WHY,
    ),
)

ARCHES = ["llama", "gpt2", "bert", "t5", "qwen3"]


def tokens_of(stack: Stack) -> Tokens:
    return next(part.module for part in stack.ledger.of("aligner", FreePart))


def readers(stack: Stack) -> list[Shift | Read]:
    return [part.module for part in stack.ledger.of("aligner") if not isinstance(part, FreePart)]


def spread(stack: Stack) -> Stack:
    """Open the gates, each by another number."""
    torch.manual_seed(3)
    with torch.no_grad():
        for reader in readers(stack):
            reader.g.normal_()
    return stack


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


@pytest.mark.parametrize("tokens", [1, 10])
@pytest.mark.parametrize("arch", ARCHES)
def test_closed_gates_give_the_base_bit_for_bit(arch: str, tokens: int) -> None:
    model = tiny(arch)
    inputs = example_inputs(model, padding="right")
    with torch.no_grad():
        before = output_of(model, inputs)
        stack = Stack(model, [Aligner(tokens=tokens)])
        assert torch.equal(output_of(model, inputs), before)
        spread(stack)
        assert difference(output_of(model, inputs), before) > 0.05


@pytest.mark.parametrize("tokens", [1, 10])
def test_trainable_count(tokens: int) -> None:
    layers, width, heads = 2, 32, 4
    assert Stack(tiny("llama"), [Aligner(tokens=tokens)]).trainable_parameters() == tokens * width + layers
    each = Stack(tiny("llama"), [Aligner(tokens=tokens, gate="head")])
    assert each.trainable_parameters() == tokens * width + layers * heads
    last = Stack(tiny("llama"), [Aligner(tokens=tokens, targets="attention layers=-1")])
    assert last.trainable_parameters() == tokens * width + 1


class Fixed:
    """Keys or values in a projection's place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.heads = tensor, tensor.shape[0]

    def __call__(self) -> Tensor:
        return self.tensor


def test_reading_is_the_formula() -> None:
    """Two query heads on one key-value head, two tokens: softmax(q K^T / sqrt(4)) V, times each head's gate."""
    key = torch.tensor([[[2.0, 0, 0, 0], [0, 2.0, 0, 0]]])  # [1, N = 2, 4]
    value = torch.tensor([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    edit = Read(key=Fixed(key), value=Fixed(value), norm=None, gates=2, heads=2)
    edit.g.data = torch.tensor([10.0, 100.0])
    query = torch.tensor([[[[0.0, 0, 0, 9]], [[1.0986123, 0, 0, 0]]]])  # scores 0, 0 and log 3, 0
    out = edit.heads(torch.zeros(1, 1, 2, 4), query)
    assert torch.allclose(out[0, 0], torch.tensor([[5.0, 5, 0, 0], [75.0, 25, 0, 0]]))


def test_keys_and_values_go_through_the_layer() -> None:
    """P W_k without rotation or input norm, by key-value head; a fused matrix gives its own rows."""
    model = tiny("llama")
    stack = Stack(model, [Aligner(tokens=3)])
    P, edit = tokens_of(stack).P, readers(stack)[1]
    attention = model.model.layers[1].self_attn
    assert torch.equal(edit.key(), (P @ attention.k_proj.weight.t()).view(3, 2, 8).transpose(0, 1))
    assert torch.equal(edit.value(), (P @ attention.v_proj.weight.t()).view(3, 2, 8).transpose(0, 1))
    model = tiny("gpt2")
    stack = Stack(model, [Aligner(tokens=3)])
    P, edit = tokens_of(stack).P, readers(stack)[0]
    fused = model.transformer.h[0].attn.c_attn
    _, k, v = (P @ fused.weight + fused.bias).split(32, -1)
    assert difference(edit.key(), k.view(3, 4, 8).transpose(0, 1)) < 1e-6
    assert difference(edit.value(), v.view(3, 4, 8).transpose(0, 1)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 3])
def test_each_layer_has_heads_of_its_own(tokens: int) -> None:
    stack = Stack(tiny("llama"), [Aligner(tokens=tokens, gate="head")], inject=False)
    facts = stack.anatomy.main
    fewer = replace(facts.by_layer[0], heads=2, kv_heads=1, head_dim=16, value_dim=16)
    stack.anatomy.towers["decoder"] = replace(facts, by_layer=(fewer, facts.by_layer[1]))
    stack.inject()
    assert [len(edit.g) for edit in readers(stack)] == [2, 4]
    assert [tuple(edit.value().shape) for edit in readers(stack)] == [(1, tokens, 16), (2, tokens, 8)]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("arch", "options", "layer", "hint"),
    [
        ("gemma3n", {}, 2, "targets: 'attention layers=0,1'"),
        ("gemma4", {}, 2, "targets: 'attention layers=0,1'"),
        ("gemma4", {"attention_k_eq_v": True}, 1, "targets: 'attention layers=0'"),
        ("deepseek_v3", {}, 0, "Llama, Mistral, Qwen, GPT-2 and their kin have them"),
    ],
)
def test_layers_without_projections_of_their_own(
    arch: str, options: dict[str, object], layer: int, hint: str, tokens: int
) -> None:
    """Gemma 3n and 4 share keys and values between layers, or take keys for values; DeepSeek-V3 has latents."""
    with pytest.raises(ArchitectureError, match=f"aligner: layer {layer} of {arch}.* of its own") as caught:
        Stack(tiny(arch, **options), [Aligner(tokens=tokens)])
    assert caught.value.hint == hint
    if hint.startswith("targets"):
        model = tiny(arch, **options)
        inputs = example_inputs(model)
        with torch.no_grad():
            before = output_of(model, inputs)
            stack = Stack(model, [Aligner(tokens=tokens, targets=hint.split("'")[1])])
            assert torch.equal(output_of(model, inputs), before)
            spread(stack)
            assert difference(output_of(model, inputs), before) > 0.05


def test_keys_are_normalised_where_the_layer_does_so() -> None:
    """Qwen3 scales each head's keys; K_p goes through the same norm."""
    stack = spread(Stack(tiny("qwen3"), [Aligner(tokens=3)]))
    edit, attention = readers(stack)[0], stack.model.model.layers[0].self_attn
    query = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        P = tokens_of(stack).P
        K = (P @ attention.k_proj.weight.t()).view(3, 2, 8)
        K = (
            attention.k_norm.weight
            * K
            / (K.square().mean(-1, keepdim=True) + attention.k_norm.variance_epsilon).sqrt()
        )
        V = (P @ attention.v_proj.weight.t()).view(3, 2, 8)
        K, V = (part.transpose(0, 1).repeat_interleave(2, 0) for part in (K, V))
        expected = edit.g * ((query @ K.mT / 8**0.5).softmax(-1) @ V)
        assert difference(edit.heads(torch.zeros(2, 5, 4, 8), query), expected.transpose(1, 2)) < 1e-5


@pytest.mark.parametrize("arch", ARCHES)
def test_one_token_is_a_bias(arch: str) -> None:
    """What attention adds is b_l = W_o (g V_p) at every position, and folded it is that bias."""
    model = tiny(arch)
    stack = spread(Stack(model, [Aligner()]))
    inputs = example_inputs(model)
    for part in (part for part in stack.ledger.of("aligner", DeltaPart)):
        linear, x = part.place, torch.randn(2, 5, part.module.shift().numel())
        with torch.no_grad():
            with_it = linear(x)
            with stack.disabled():
                added = with_it - linear(x)
                constant = linear(part.module.shift()) - linear(torch.zeros_like(x[0, 0]))
        assert difference(added, constant.expand_as(added)) < 2e-5
        assert constant.abs().max() > 0.05
    with torch.no_grad():
        before = output_of(model, inputs)
        stack.merge()
        assert difference(output_of(model, inputs), before) < 1e-5


@pytest.mark.parametrize("gate", ["layer", "head"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_the_bias_form_equals_the_attention_form(arch: str, gate: str) -> None:
    """Ten equal tokens weigh their equal values alike, whatever the query, so they do what one does."""
    one = spread(Stack(tiny(arch), [Aligner(tokens=1, gate=gate)]))
    ten = spread(Stack(tiny(arch), [Aligner(tokens=10, gate=gate)]))
    with torch.no_grad():
        tokens_of(ten).P.copy_(tokens_of(one).P.expand(10, -1))
        inputs = example_inputs(one.model)
        assert difference(output_of(one.model, inputs), output_of(ten.model, inputs)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 3])
def test_gradient_of_the_tokens_is_the_sum_over_layers(tokens: int) -> None:
    tied, untied = (spread(Stack(tiny("llama"), [Aligner(tokens=tokens)])) for _ in range(2))
    copies = []
    for reader in readers(untied):
        own = Tokens(tokens, 32)
        own.load_state_dict(tokens_of(tied).state_dict())
        copies.append(own)
        for name in ("key", "value") if tokens > 1 else ("value",):
            old = getattr(reader, name)
            setattr(reader, name, Projection(own, old.holder, old.name, old.rows, old.heads))
    inputs = example_inputs(tied.model)
    for stack in (tied, untied):
        F.cross_entropy(
            output_of(stack.model, inputs).flatten(0, 1), inputs["input_ids"].flatten()
        ).backward()
    parts = [copy.P.grad for copy in copies]
    assert min(float(part.abs().max()) for part in parts) > 1e-4
    assert difference(tokens_of(tied).P.grad, sum(parts)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 4])
def test_equals_the_llama_adapter_of_peft_with_tied_prompts(tokens: int) -> None:
    """HF PEFT's `AdaptedAttention` holds a prompt for each layer; filled with one prompt it is the same function."""
    from peft import AdaptionPromptConfig, get_peft_model

    ours = spread(Stack(tiny("llama", num_key_value_heads=4), [Aligner(tokens=tokens)]))
    config = AdaptionPromptConfig(adapter_layers=2, adapter_len=tokens, task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny("llama", num_key_value_heads=4), config).eval()
    with torch.no_grad():
        for layer, reader in zip(theirs.base_model.model.model.layers, readers(ours), strict=True):
            layer.self_attn.adaption_prompt.copy_(tokens_of(ours).P[None])
            layer.self_attn.adaption_gate.copy_(reader.g)
        inputs = example_inputs(ours.model)
        assert difference(theirs(**inputs).logits, ours.model(**inputs).logits) < 1e-5


@pytest.mark.parametrize("tokens", [1, 4])
def test_cached_generation_equals_uncached(tokens: int) -> None:
    model = tiny("llama")
    spread(Stack(model, [Aligner(tokens=tokens)]))
    inputs = example_inputs(model, padding="left")
    kept = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    cached, uncached = (model.generate(**inputs, use_cache=use, **kept) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_over_a_quantized_projection_it_reads_inside_attention() -> None:
    plain, packed = tiny("llama"), tiny("llama")
    for layer in range(2):
        linear = plain.model.layers[layer].self_attn.o_proj
        quantized = QuantLinear.from_linear(linear, bits=8)
        packed.model.layers[layer].self_attn.o_proj = quantized
        linear.weight.data = quantized.weight.clone()
    stacks = [spread(Stack(model, [Aligner()])) for model in (plain, packed)]
    assert [type(readers(stack)[0]) for stack in stacks] == [Shift, Read]
    inputs = example_inputs(plain)
    with torch.no_grad():
        assert difference(*(output_of(stack.model, inputs) for stack in stacks)) < 1e-5
    with pytest.raises(MergeError, match="'aligner' cannot be merged"):
        stacks[1].merge("aligner")


@pytest.mark.parametrize("first", [True, False])
def test_merges_beside_lora_on_the_values(first: bool) -> None:
    plugins = [Aligner(), Lora(rank=2, targets="attention.v,o")]
    stack = spread(Stack(tiny("llama"), plugins if first else plugins[::-1]))
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.3)
        before = output_of(stack.model, inputs)
        stack.merge()
        assert difference(output_of(stack.model, inputs), before) < 2e-5


def test_several_tokens_do_not_merge() -> None:
    stack = Stack(tiny("llama"), [Aligner(tokens=2)])
    assert Claim.MERGEABLE not in stack.plugins["aligner"].claims
    assert Claim.MERGEABLE in Aligner.claims
    with pytest.raises(MergeError, match="'aligner' cannot be merged"):
        stack.merge("aligner")


def test_bundle_keeps_several_tokens(tmp_path: Path) -> None:
    stack = spread(Stack(tiny("llama"), [Aligner(tokens=3, gate="head")], tokenizer=tiny_tokenizer()))
    again = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"))
    inputs = example_inputs(stack.model)
    with torch.no_grad():
        assert torch.equal(output_of(again.model, inputs), output_of(stack.model, inputs))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"tokens": 0}, "tokens"), ({"gate": "model"}, "gate"), ({"targets": "layers=1"}, "targets")],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"Aligner: {match}") as caught:
        Aligner(**options)
    assert "tokens, gate, targets" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("arch", "options", "match"),
    [
        ("llama", {"targets": "attention layers=2"}, "aligner: .*layer 2 does not exist"),
        ("llama", {"targets": "mlp"}, "aligner: .*'mlp'"),
        ("mamba", {}, "aligner: mamba has no attention"),
        ("bloom", {"tokens": 2}, "aligner: .*does not look its attention up"),
    ],
)
def test_models_and_targets_that_do_not_fit(arch: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=match):
        Stack(tiny(arch), [Aligner(**options)])


def test_one_token_needs_no_dispatch() -> None:
    model = tiny("bloom")
    inputs = example_inputs(model)
    with torch.no_grad():
        base = output_of(model, inputs)
        stack = spread(Stack(model, [Aligner()]))
        before = output_of(model, inputs)
        stack.merge()
        assert difference(output_of(model, inputs), before) < 1e-5
    assert difference(before, base) > 0.05
