from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftx import Claim, Stack
from peftx.errors import PeftxError, UnsupportedError
from peftx.testing import conformance, tiny
from peftx.testing.models import example_inputs, output_of
from peftx.toolkits.compression import QuantLinear
from peftx_ia3 import Ia3, ScaleInput, ScaleOutput

test_conformance = conformance("ia3")
test_conformance_without_inputs = conformance("ia3", options={"inputs": None}, models=["llama"])


@torch.no_grad()
def moved(stack: Stack) -> Stack:
    """The stack with every vector away from one."""
    generator = torch.Generator().manual_seed(1)
    for l in stack.ledger.parameters("ia3"):  # noqa: E741
        l.add_(torch.randn(l.shape, generator=generator, dtype=l.dtype), alpha=0.4)
    return stack


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = output_of(model, example_inputs(model))
    return found


# ---------------------------------------------------------------------------------------------------------- equations
def test_by_hand() -> None:
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0])
    x, l = torch.tensor([[1.0, 10.0]]), torch.tensor([2.0, 3.0])  # noqa: E741
    y = x @ weight.T + bias  # [22, 42]
    output, inputs = ScaleOutput(2), ScaleInput(2)
    output.l.data, inputs.l.data = l.clone(), l.clone()
    assert output(x, y).tolist() == [[44.0, 126.0]]
    assert [t.tolist() for t in output.fold(weight, bias)] == [[[2.0, 4.0], [9.0, 12.0]], [2.0, -3.0]]
    assert inputs.pre(x).tolist() == [[2.0, 30.0]]
    folded, same = inputs.fold(weight, bias)
    assert folded.tolist() == [[2.0, 6.0], [6.0, 12.0]]
    assert same is bias
    assert output.fold(weight, None)[1] is None


def test_keys_and_values_are_scaled_before_the_attention_sees_them() -> None:
    """The bias of BERT's keys is part of K."""
    stack = moved(Stack(tiny("bert"), [Ia3()]))
    plain, attention = tiny("bert"), stack.model.bert.encoder.layer[0].attention.self
    x = torch.randn(1, 5, 32)
    for name in ("key", "value"):
        layer = getattr(attention, name)
        expected = getattr(plain.bert.encoder.layer[0].attention.self, name)(x) * layer.peftx["ia3"].l
        assert torch.allclose(layer(x), expected, atol=1e-6)
    down = stack.model.bert.encoder.layer[0].output.dense
    x = torch.randn(1, 5, down.in_features)
    assert torch.allclose(
        down(x), plain.bert.encoder.layer[0].output.dense(x * down.peftx["ia3"].l), atol=1e-6
    )


def test_all_vectors_start_at_one() -> None:
    assert all((p == 1).all() for p in Stack(tiny("llama"), [Ia3()]).ledger.parameters("ia3"))


@pytest.mark.parametrize("arch", ["llama", "t5", "bert", "gpt2", "whisper"])
def test_number_of_parameters_is_one_for_each_key_value_and_inner_activation(arch: str) -> None:
    """Of encoder, decoder and the attention between them."""
    stack = Stack(tiny(arch), [Ia3()])
    expected = 0
    for site in stack.anatomy.sites:
        if site.role in ("attention.k", "attention.v", "cross_attention.k", "cross_attention.v"):
            expected += site.out_features
        elif site.role == "mlp.down":
            expected += site.in_features
    assert stack.trainable_parameters() == expected


def test_named_targets_are_those_alone() -> None:
    stack = Stack(tiny("t5"), [Ia3(targets="attention.q", inputs="attention.o")])
    kinds = {type(part.module).__name__: set() for part in stack.ledger.of("ia3")}
    for part in stack.ledger.of("ia3"):
        kinds[type(part.module).__name__].add(part.path.rsplit(".", 2)[-2:][0] + "." + part.path[-1])
    assert kinds == {"ScaleOutput": {"SelfAttention.q"}, "ScaleInput": {"SelfAttention.o"}}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_merged_is_exact(arch: str) -> None:
    stack = moved(Stack(tiny(arch).double(), [Ia3()]))
    before = logits(stack.model)
    stack.merge()
    assert torch.allclose(logits(stack.model), before, atol=1e-12)
    assert not torch.allclose(before, logits(tiny(arch).double()), atol=1e-2)


# ------------------------------------------------------------------------------------------------------------ HF PEFT
PEERS: dict[str, dict[str, Any]] = {
    "llama": {},  # PEFT's own choice of layers is the same
    "t5": {},
    "bert": {  # PEFT's `output.dense` is the attention's last map as well
        "target_modules": r".*\.(key|value)|.*layer\.\d+\.output\.dense",
        "feedforward_modules": r".*layer\.\d+\.output\.dense",
    },
    "gpt2": {"fan_in_fan_out": True},
}


def beside_peft(arch: str, dtype: torch.dtype) -> tuple[Stack, nn.Module, dict[str, nn.Parameter]]:
    """A stack and a PEFT model with the same random vectors, and PEFT's by their names in files. GPT-2's `c_attn` has
    one vector of q, k and v in PEFT, whose part of q is one here."""
    from peft import IA3Config, get_peft_model

    theirs = get_peft_model(tiny(arch).to(dtype), IA3Config(**PEERS[arch]), autocast_adapter_dtype=False)
    named = {
        name.removeprefix("base_model.model.").removesuffix(".default"): parameter
        for name, parameter in theirs.named_parameters()
        if "ia3_l" in name
    }
    stack = moved(Stack(tiny(arch).to(dtype), [Ia3()]))
    parts = {part.key: part for part in stack.ledger.of("ia3")}
    with torch.no_grad():
        for part in parts.values():
            start = {"attention.k": 1, "attention.v": 2}.get(part.key.partition("@")[2], 0)
            own, peer = part.module.l, named[f"{part.path}.ia3_l"].data.flatten()
            peer[start * len(own) : (start + 1) * len(own)] = own
    assert len({part.path for part in parts.values()}) == len(named)
    return stack, theirs.eval(), named


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of transformers, by PEFT
@pytest.mark.parametrize("arch", list(PEERS))
def test_equals_peft(arch: str) -> None:
    """1e-6 of the largest logit in float32, and nothing but rounding."""
    for dtype, most in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        stack, theirs, _ = beside_peft(arch, dtype)
        ours, peer = logits(stack.model), logits(theirs.get_base_model())
        assert (ours - peer).abs().max() <= most * peer.abs().max()
        assert not torch.allclose(peer, logits(tiny(arch).to(dtype)), atol=0.05)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_gradients_equal_those_of_peft() -> None:
    stack, theirs, named = beside_peft("llama", torch.float64)
    inputs = example_inputs(stack.model)
    for model in (stack.model, theirs):
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for part in stack.ledger.of("ia3"):
        peer = named[f"{part.path}.ia3_l"].grad
        assert peer.abs().max() > 1e-4
        assert torch.allclose(part.module.l.grad, peer.flatten(), atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- limits
def test_half_precision_starts_unchanged_and_trains_in_float32() -> None:
    model = tiny("llama").bfloat16()
    before = logits(model)
    stack = Stack(model, [Ia3()])
    assert torch.equal(logits(stack.model), before)
    assert {p.dtype for p in stack.ledger.parameters("ia3")} == {torch.float32}
    y, x = torch.full((1, 4), 3.0).bfloat16(), torch.full((1, 4), 3.0).bfloat16()
    output, inputs = ScaleOutput(4), ScaleInput(4)
    output.l.data.fill_(1 / 3 + 1e-5), inputs.l.data.fill_(1 / 3 + 1e-5)
    for found in (output(x, y), inputs.pre(x)):  # l rounded first would give 0.9991, so 1.0 - 2^-8 at best
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.ones(1, 4).bfloat16())


def test_stacked_experts_take_no_edit_of_their_input() -> None:
    with pytest.raises(UnsupportedError, match=r"ia3: .*MixtralExperts"):
        Stack(tiny("mixtral"), [Ia3(inputs="experts.down")])
    stack = moved(Stack(tiny("mixtral"), [Ia3(targets="attention.k,v experts.up", inputs=None)]))
    before = logits(stack.model)
    stack.merge()
    assert torch.allclose(logits(stack.model), before, atol=1e-5)


def test_on_packed_layers() -> None:
    model = tiny("bert")
    layer = model.bert.encoder.layer[0]
    layer.output.dense = QuantLinear.from_linear(layer.output.dense, bits=8)
    layer.attention.self.value = QuantLinear.from_linear(layer.attention.self.value, bits=8)
    down, value = torch.randn(3, layer.output.dense.in_features), torch.randn(3, 32)
    before = layer.attention.self.value(value)
    stack = moved(Stack(model, [Ia3()]))
    own = layer.output.dense.peftx["ia3"].l
    expected = nn.functional.linear(down * own, layer.output.dense.weight, layer.output.dense.bias)
    assert torch.allclose(layer.output.dense(down), expected, atol=1e-5)
    own = layer.attention.self.value.peftx["ia3"].l
    assert torch.allclose(layer.attention.self.value(value), before * own, atol=1e-6)
    stack.remove("ia3")
    assert torch.equal(layer.attention.self.value(value), before)


def test_edits_inputs_is_claimed_where_it_does() -> None:
    assert Claim.EDITS_INPUTS in Ia3().claims
    assert Claim.EDITS_INPUTS not in Ia3(inputs=None).claims
    assert Claim.EDITS_INPUTS in Ia3.claims


def test_a_layer_on_both_sides_is_refused() -> None:
    with pytest.raises(
        PeftxError, match=r"ia3: model\.layers\.0\.mlp\.down_proj is in targets and in inputs"
    ):
        Stack(tiny("llama"), [Ia3(targets="mlp.down")])


@pytest.mark.parametrize("options", [{"targets": ""}, {"inputs": ""}, {"feedforward": "mlp.down"}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Ia3: {next(iter(options))}"):
        Ia3(**options)
