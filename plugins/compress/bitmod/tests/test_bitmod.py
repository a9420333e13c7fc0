from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, MergeError, PeftxError, PluginError
from peftx.kernel.parts import DeltaPart, ReplacedPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.compression import dequantize, quantize, unpack_bits
from peftx_bitmod import SPECIAL, BitMoD, BitModLinear, choose, nearest, types
from peftx_lora import Lora
from peftx_prefixquant import PrefixQuant

test_conformance = conformance("bitmod")


def packed(
    weight: Tensor, bias: Tensor | None = None, *, bits: int = 4, size: int = 128, int8: bool = False
) -> BitModLinear:
    options = {"bits": bits, "group_size": size, "int8_scales": int8, "bias": bias is not None}
    options |= {"dtype": str(weight.dtype).removeprefix("torch."), "out_features": len(weight)}
    return BitModLinear(in_features=weight.shape[1], **options).take(weight, bias)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def codes(layer: BitModLinear) -> Tensor:
    return unpack_bits(layer.qweight, layer.bits, size=layer.in_features, signed=False)


def layers(stack: Stack) -> dict[str, BitModLinear]:
    return {part.key: part.module for part in stack.ledger.of("bitmod", ReplacedPart)}


def logits(stack: Stack) -> Tensor:
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model))


def compressed(arch: str = "llama", *behind: object, **options: object) -> Stack:
    plugins = [BitMoD(**{"group_size": 16, **options}), *behind]
    stack = Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(ids=["bitmod"])
    return stack


def by_one(groups: Tensor, values: Tensor) -> Tensor:
    """w_t of a single type."""
    s = groups.abs().amax(-1, keepdim=True) / values.abs().max()
    return s * values[(groups[..., None] / s[..., None] - values).abs().argmin(-1)]


# -------------------------------------------------------------------------------------------------------------- types
def test_the_types() -> None:
    """All codes are spent: no value stands twice. The special one is inside, or beyond; of both signs."""
    assert types(3).tolist() == [
        [-4, -2, -1, 0, 1, 2, 3, 4],
        [-4, -3, -2, -1, 0, 1, 2, 4],
        [-4, -2, -1, 0, 1, 2, 4, 6],
        [-6, -4, -2, -1, 0, 1, 2, 4],
    ]
    base = {0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12}
    assert [set(row) - base for row in types(4).tolist()] == [{10}, {-10}, {16}, {-16}]
    for bits in (3, 4):
        assert types(bits).shape == (4, 2**bits)
        assert bool((types(bits).diff() > 0).all())


def test_the_nearest_value() -> None:
    x, values = torch.linspace(-20, 20, 3001), types(4)[2]
    torch.testing.assert_close((x - values[nearest(x, values)]).abs(), (x[:, None] - values).abs().amin(1))
    assert nearest(torch.tensor([5.0, -5.0]), values).tolist() == [values.tolist().index(v) for v in (4, -6)]


@pytest.mark.parametrize("bits", [3, 4])
def test_no_single_type_is_better_anywhere(bits: int) -> None:
    groups = normal(40, 3, 32)
    kind, s = choose(groups, bits)
    errors = torch.stack([(by_one(groups, v) - groups).square().mean(-1) for v in types(bits)])
    assert torch.equal(kind, errors.argmin(0))
    assert kind.unique().numel() == 4
    top = types(bits).abs().amax(1)[kind]
    torch.testing.assert_close(s, groups.abs().amax(-1) / top)
    found = packed(groups.flatten(1), bits=bits, size=32).weight.view_as(groups)
    torch.testing.assert_close((found - groups).square().mean(-1), errors.amin(0))


@pytest.mark.parametrize("bits", [3, 4])
def test_values_of_each_type_are_kept(bits: int) -> None:
    values = types(bits).repeat(1, 2) * torch.tensor([0.5, 3.0, 1e-6, 2e3])[:, None]
    layer = packed(values, bits=bits, size=64)
    torch.testing.assert_close(layer.weight, values, atol=0, rtol=1e-6)
    assert layer.kinds()[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits", [3, 4])
def test_a_sign_changes_sides(bits: int) -> None:
    plus, minus = (packed(sign * normal(30, 64), bits=bits, size=32) for sign in (1, -1))
    torch.testing.assert_close(plus.weight, -minus.weight, atol=1e-8, rtol=1e-6)
    changed = (
        plus.kinds() != minus.kinds()
    )  # a group that has no use for either special value takes the first type
    assert torch.equal((plus.kinds() ^ 1)[changed], minus.kinds()[changed])
    assert changed.float().mean() > 0.8


def test_which_groups_take_which_type() -> None:
    """One outlier on one side: extra asymmetry. Even up to both ends: extra resolution."""
    skewed = torch.tensor([[6.0, -4.0, 4.0, 2.0, -2.0, 1.0, -1.0, 0.0]])
    even = torch.tensor([[4.0, -4.0, 3.0, 2.0, -2.0, 1.0, -1.0, 0.0]])
    near = torch.tensor([[0.02, -0.01, 0.03, 0.0, -0.02, 0.01, 0.01, -0.03]])
    kinds = [int(choose(g + near, 3)[0]) for g in (even, -even, skewed, -skewed)]
    assert kinds == [0, 1, 2, 3]


def test_codes_by_hand() -> None:
    """Two groups of four and a short one: s = 2 / 4 with the value 3, s = 1 / 6, s = 0."""
    layer = packed(torch.tensor([[2.0, 1.5, -0.9, 0.1, 1.0, -0.65, 0.3, 0.0, 0.0]]), bits=3, size=4)
    assert layer.kinds().tolist() == [[0, 2, 0]]
    torch.testing.assert_close(layer.scales(), torch.tensor([[0.5, 1 / 6, 0.0]]))
    assert codes(layer)[0, :8].tolist() == [7, 6, 1, 3, 7, 0, 5, 3]
    expected = torch.tensor([[2.0, 1.5, -1.0, 0.0, 1.0, -4 / 6, 2 / 6, 0.0, 0.0]])
    torch.testing.assert_close(layer.weight, expected)


# ------------------------------------------------------------------------------------------------------------- scales
def test_scales_in_eight_bits() -> None:
    weight = normal(20, 256) * torch.linspace(0.5, 3, 256)
    exact, layer = packed(weight, size=32), packed(weight, size=32, int8=True)
    assert torch.equal(layer.kinds(), exact.kinds())
    s = exact.scales()
    S = s.amax(1, keepdim=True) / 127
    assert torch.equal(layer.scale, S)
    torch.testing.assert_close(layer.scales(), S * (s / S).round())
    assert layer.steps.amax(1).tolist() == [127] * 20
    # Codes know the scale that is kept: every weight is at the nearest of its values.
    w, kept = weight.view(20, 8, 32), layer.scales()[..., None]
    values = types(4)[layer.kinds().int()]  # [20, 8, 16]
    best = (w[..., None] - kept[..., None] * values[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((layer.weight.view_as(w) - w).abs(), best)
    lost = [float((found.weight - weight).square().sum()) for found in (exact, layer)]
    assert lost[1] == pytest.approx(lost[0], rel=0.02)


def test_a_group_far_below_its_row() -> None:
    """Its scale would round to nothing: the least step is kept, and no weight is further off than that allows."""
    weight = torch.cat((normal(4, 16), normal(4, 16) * 1e-3, torch.zeros(4, 16)), 1)
    layer = packed(weight, size=16, int8=True)
    assert layer.steps[:, 1].tolist() == [1] * 4
    assert torch.equal(layer.weight[:, 32:], weight[:, 32:])
    assert bool((layer.weight - weight)[:, 16:32].abs().amax() <= layer.scale.max() * 2)
    assert torch.equal(packed(torch.zeros(2, 32), int8=True).weight, torch.zeros(2, 32))


def test_better_than_integers_and_plain_floats() -> None:
    weight = normal(64, 512)
    for bits, share in ((3, 0.85), (4, 0.97)):
        found = packed(weight, bits=bits, int8=True).weight
        even = dequantize(quantize(weight, bits=bits, group_size=128, symmetric=False))
        plain = types(bits)[0][types(bits)[0] != SPECIAL[bits][0]]
        others = (even, by_one(weight.view(64, 4, 128), plain).flatten(1))
        least = min(float((w - weight).square().sum()) for w in others)
        assert float((found - weight).square().sum()) < share * least


# ------------------------------------------------------------------------------------------------------ official code
def wave() -> Tensor:
    """[24, 256] of no library's random numbers."""
    n = torch.arange(24 * 256, dtype=torch.float64)
    return (torch.sin(n * n * 0.37) * torch.cos(n * 0.011)).float().view(24, 256)


OFFICIAL = {
    3: ([0, 0, 0, 3, 1, 2, 0, 0, 1, 0, 3, 0], 55, -52.05224221944809, 2496.5157701075077),
    4: ([0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0], 22, -55.96243531256914, 2501.9586013555527),
}


@pytest.mark.parametrize("bits", [3, 4])
def test_numbers_of_the_official_code(bits: int) -> None:
    """BitMoD-HPCA-25 at e445a5f, `search_datatype(wave(), bits, "mixed_bitmod", 128)`, in float32: see the README."""
    layer, (kinds, sum_of_kinds, total, size) = packed(wave(), bits=bits), OFFICIAL[bits]
    assert layer.kinds().flatten()[:12].tolist() == kinds
    assert int(layer.kinds().sum()) == sum_of_kinds
    assert float(layer.weight.double().sum()) == pytest.approx(total, abs=1e-4)
    assert float(layer.weight.double().abs().sum()) == pytest.approx(size, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- the layer
def test_products_and_gradients_are_those_of_the_weight() -> None:
    weight, bias, x = normal(24, 40), normal(24), normal(5, 3, 40, seed=1)
    layer = packed(weight, bias, size=16, int8=True)
    for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3)):
        one = x.to(dtype).clone().requires_grad_()
        y = layer(one)
        assert y.dtype == dtype
        expected = F.linear(one, layer.weight.to(dtype), bias.to(dtype))
        torch.testing.assert_close(y, expected, atol=near, rtol=0)
        y.sum().backward()
        expected = layer.weight.to(dtype).sum(0).expand_as(one)
        torch.testing.assert_close(one.grad, expected, atol=10 * near, rtol=0)
    assert not list(layer.parameters())


@pytest.mark.parametrize("int8", [True, False])
def test_a_cast_leaves_the_weight(int8: bool) -> None:
    layer = packed(normal(8, 64), normal(8), size=16, int8=int8)
    weight = layer.weight
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight.bfloat16())
    again = BitModLinear(**layer.geometry())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


# ------------------------------------------------------------------------------------------------------------ on disk
@pytest.mark.parametrize(("bits", "int8"), [(3, True), (4, True), (4, False)])
def test_bits_on_disk(bits: int, int8: bool, tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [BitMoD(bits=bits, int8_scales=int8, targets="attention")])
    told = dict(stack.plugins["bitmod"].planned(stack.view("bitmod")))
    assert stack.evaluate(["a text"], metrics=["bitmod"])["bits_per_weight"].value == 0
    stack.compress()
    file = stack.save(tmp_path / "bundle") / "bitmod.safetensors"
    scores = stack.evaluate(["a text"], metrics=["bitmod"])
    # Rows of 256: two groups, whose types take a byte; scales of 8 bits and one of 32, or two of 32.
    expected = bits + (8 + (2 * 8 + 32 if int8 else 64)) / 256
    assert scores["bits_per_weight"].value == pytest.approx(expected)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == scores["packed_bytes"].value == sum(told.values())
    kinds = torch.cat([layer.kinds().flatten() for layer in layers(stack).values()])
    assert scores["asymmetric"].value == pytest.approx(float((kinds > 1).float().mean()))


# ---------------------------------------------------------------------------------------------------------- in stacks
def test_lora_trains_on_it(tmp_path: Path) -> None:
    stack = compressed("llama", Lora(rank=2), bits=3)
    before, kept = logits(stack), {key: layer.weight for key, layer in layers(stack).items()}
    stack.inject(["lora"])
    assert torch.equal(logits(stack), before)
    stack.train([{"prompt": "a", "completion": "b"}] * 4, steps=2, learning_rate=1e-2)
    assert not torch.equal(logits(stack), before)
    assert all(torch.equal(layer.weight, kept[key]) for key, layer in layers(stack).items())
    trained = logits(stack)
    with pytest.raises(MergeError, match="is quantized"):
        stack.merge("lora")
    stack.save(tmp_path / "both")
    assert torch.equal(logits(peftx.load(tmp_path / "both")), trained)
    stack.remove("lora")
    stack.remove("bitmod")
    assert torch.equal(logits(stack), logits(Stack(tiny("llama"), [])))


def test_an_adapter_before_it_is_packed_with_it() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2), BitMoD()], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.1)
    stack.merge("lora")
    merged = {site.path: site.weight.clone() for site in stack.view("bitmod").linears("all", whole=True)}
    stack.unmerge()
    stack.compress(ids=["bitmod"])
    assert not stack.ledger.of("lora", DeltaPart)
    for key, layer in layers(stack).items():
        assert torch.equal(layer.weight, packed(merged[key], int8=True).weight)


@pytest.mark.parametrize("arch", ["gpt2", "t5", "bert", "phi3", "mamba"])
def test_layers_of_every_kind(arch: str, tmp_path: Path) -> None:
    """Fused, stored the other way round, of two towers: each as [out, in]."""
    plain = Stack(tiny(arch), [BitMoD()]).view("bitmod").linears("all", whole=True)
    weights = {site.path: (site.weight.detach(), site.bias) for site in plain}
    stack = compressed(arch)
    assert layers(stack).keys() == weights.keys()
    for key, layer in layers(stack).items():
        assert torch.equal(layer.weight, packed(weights[key][0], size=16, int8=True).weight)
        assert (layer.bias is None) == (weights[key][1] is None)
        assert layer.bias is None or torch.equal(layer.bias, weights[key][1])
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_zeros_of_a_pruned_model_stay() -> None:
    weight = normal(16, 64) * (normal(16, 64, seed=1) > 0)
    assert bool((packed(weight, bits=3, int8=True).weight[weight == 0] == 0).all())


def test_targets_choose() -> None:
    assert {key.split(".")[3] for key in layers(compressed(targets="mlp"))} == {"mlp"}


def test_refused() -> None:
    for bits in (2, 5, 8):
        with pytest.raises(PluginError, match=r"BitMoD: bits: Input should be 3 or 4"):
            BitMoD(bits=bits)
    with pytest.raises(ArchitectureError, match=r"bitmod: .*gate_up_proj holds experts") as caught:
        Stack(tiny("mixtral"), [BitMoD()], tokenizer=tiny_tokenizer())
    assert "targets: 'all !experts" in str(caught.value.hint)
    assert layers(compressed("mixtral", targets="all !experts"))
    with pytest.raises(ConflictError, match="integers"):
        Stack(tiny("llama"), [BitMoD(), PrefixQuant()], tokenizer=tiny_tokenizer())
    broken = tiny("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    stack = Stack(broken, [BitMoD()], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match=r"bitmod: .*layers.1.mlp.up_proj holds numbers that are not finite"):
        stack.plugins["bitmod"].compress(stack.view("bitmod"))
    assert not stack.ledger.parts
    stack = Stack(tiny("llama"), [BitMoD(), Lora()], tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match="stands already on layers"):
        stack.compress(ids=["bitmod"])
