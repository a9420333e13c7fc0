from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, MergeError, PeftxError
from peftx.kernel.parts import DeltaPart, ReplacedPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.subject import TEXTS
from peftx.toolkits.compression import dequantize, quantize, unpack_bits
from peftx_lora import Lora
from peftx_nf4 import GROUP, NF4, NF4Linear, NF4Storage, fp8, nearest
from peftx_prefixquant import PrefixQuant

test_conformance = conformance("nf4")


def packed(weight: Tensor, bias: Tensor | None = None, *, size: int = 64, double: bool = True) -> NF4Linear:
    out, width = weight.shape
    options = {"block_size": size, "double_quant": double, "bias": bias is not None}
    dtype = str(weight.dtype).removeprefix("torch.")
    return NF4Linear(in_features=width, out_features=out, dtype=dtype, **options).take(weight, bias)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def codes(layer: NF4Linear) -> Tensor:
    size = layer.in_features * layer.out_features
    return unpack_bits(layer.qweight, 4, size=size, signed=False)


def bundled(*plugins: object, **options: object) -> Stack:
    stack = Stack("peftx:tiny", [NF4Storage(**options), *plugins], inject=False)
    stack.compress(ids=["nf4"])
    return stack


def layers(stack: Stack) -> dict[str, NF4Linear]:
    return {part.key: part.module for part in stack.ledger.of("nf4", ReplacedPart)}


def logits(stack: Stack) -> Tensor:
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model))


# ------------------------------------------------------------------------------------------------------ the two types
def test_the_values_are_quantiles_of_a_normal() -> None:
    """Eight shares of its positive half, seven of the negative one, and zero, scaled to [-1, 1]."""
    end = torch.tensor(
        (31 / 32 + 29 / 30) / 2, dtype=torch.float64
    )  # the middle of two: neither half is infinite
    sides = [torch.special.ndtri(torch.linspace(0.5, float(end), n, dtype=torch.float64)) for n in (9, 8)]
    values = torch.cat((-sides[1][1:].flip(0), sides[0]))
    torch.testing.assert_close(torch.tensor(NF4), (values / values.max()).float(), atol=3e-7, rtol=0)
    assert len(NF4) == 16
    assert NF4[7] == 0


def test_the_type_of_constants() -> None:
    values = fp8()
    assert values.shape == (256,)
    assert bool((values.diff() > 0).all())
    assert values[-1] == 1
    assert values[127] == 0
    # One middle of one part at 1e-6, two at 1e-5: 0.1 + 0.9 / 4 and 0.1 + 0.9 * 3 / 4.
    assert values[128:131].tolist() == pytest.approx([0.55e-6, 0.325e-5, 0.775e-5])
    assert values[126].item() == pytest.approx(-0.55e-6)
    assert values[-2].item() == pytest.approx(0.1 + 0.9 * 127 / 128)


def test_the_nearest_value() -> None:
    x = torch.linspace(-1.2, 1.2, 3001)
    for values in (torch.tensor(NF4), fp8()):
        found = (x - values[nearest(x, values)]).abs()
        torch.testing.assert_close(found, (x[:, None] - values).abs().amin(1))


# -------------------------------------------------------------------------------------------------------- the algebra
def test_blocks_by_hand() -> None:
    """Two blocks of four, flat: the second one begins in the first row."""
    weight = torch.tensor([[2.0, -2.0, 1.0, 0.0, 0.08, 0.001], [-0.1, 0.1 * 0.72, 0.0, 0.0, 0.0, 0.0]])
    layer = packed(weight, size=4, double=False)
    assert layer.scale.tolist() == [2.0, pytest.approx(0.1), 0.0]
    assert codes(layer).tolist() == [15, 0, 12, 7, 14, 7, 0, 14, 7, 7, 7, 7]
    expected = [2.0, -2.0, 2 * NF4[12], 0.0, 0.1 * NF4[14], 0.0, -0.1, 0.1 * NF4[14], 0, 0, 0, 0]
    torch.testing.assert_close(layer.weight.flatten(), torch.tensor(expected))


def test_constants_by_hand() -> None:
    """a^ = m + b FP8_j, with one b for 256 blocks; the codes of the weights know the exact a."""
    weight = normal(300, 64) * torch.linspace(0.1, 5, 300)[:, None]
    layer, plain = packed(weight), packed(weight, double=False)
    a = weight.abs().amax(1)
    assert torch.equal(plain.scale, a)
    assert torch.equal(codes(layer), codes(plain))
    rest = a - a.mean()
    b = torch.stack((rest[:GROUP].abs().max(), rest[GROUP:].abs().max()))
    torch.testing.assert_close(layer.scale, torch.cat((a.mean()[None], b)))
    steps = b.repeat_interleave(GROUP)[:300]
    j = (rest[:, None] / steps[:, None] - fp8()).abs().argmin(1)
    torch.testing.assert_close(layer.scales(), a.mean() + steps * fp8()[j])
    assert layer.absmax.tolist() == j.tolist()
    values = torch.tensor(NF4)[codes(layer).int()].view(300, 64)
    torch.testing.assert_close(layer.weight, values * layer.scales()[:, None])


@pytest.mark.parametrize("shape", [(8, 64), (3, 7), (5, 200), (1, 1)])
def test_no_weight_is_further_off_than_half_a_gap(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    found = packed(weight, double=False).weight
    tops = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1).repeat_interleave(64)
    gap = max(b - a for a, b in itertools.pairwise(NF4))
    assert bool(((found - weight).abs().flatten() <= gap / 2 * tops[: weight.numel()] + 1e-7).all())


def test_values_of_the_type_and_zeros_are_kept() -> None:
    exact = torch.tensor(NF4).repeat(4, 4) * torch.tensor([0.5, 2.0, 1e-30, 3.0])[:, None]
    torch.testing.assert_close(packed(exact, double=False).weight, exact)
    for double in (True, False):
        assert torch.equal(packed(torch.zeros(4, 64), double=double).weight, torch.zeros(4, 64))
    same = torch.tensor(NF4).repeat(6, 4)  # constants all alike: none of them is off
    torch.testing.assert_close(packed(same).weight, same)


def test_better_than_integers_on_normal_weights() -> None:
    """What the type is for: the same 16 codes and constants at equal distances lose more; and so do larger blocks."""
    weight = normal(64, 1024)
    even = dequantize(quantize(weight, bits=4, group_size=64, symmetric=True))
    lost = [float((packed(weight, size=n, double=False).weight - weight).square().sum()) for n in (64, 256)]
    assert lost[0] < 0.85 * float((even - weight).square().sum())
    assert lost[0] < lost[1]
    double = float((packed(weight).weight - weight).square().sum())
    assert double < 1.01 * lost[0]


# ------------------------------------------------------------------------------------------------------- bitsandbytes
def wave() -> Tensor:
    """[48, 128] of no library's random numbers."""
    n = torch.arange(48 * 128, dtype=torch.float64)
    return (torch.sin(n * n * 0.37) * torch.cos(n * 0.011)).float().view(48, 128)


BNB = {
    "codes": [7, 11, 15, 5, 3, 9, 14, 1, 0, 0, 1, 14, 9, 4, 4, 15, 12, 8, 12, 15, 4, 5, 7, 14],
    "sum": 44262,
    "absmax": [213, 61, 27, 197, 214, 201, 20, 82, 211, 212, 60, 34],
    "constants": [0.7956213355064392, 0.477251797914505],
    "weights": [0.7244064211845398, -0.7244064211845398, 0.7244064211845398, -0.3803662955760956],
}


def test_numbers_of_bitsandbytes() -> None:
    """0.50.2, its torch kernels: `quantize_4bit(wave(), blocksize=64, quant_type="nf4", compress_statistics=True)`."""
    layer = packed(wave())
    assert codes(layer)[:24].tolist() == BNB["codes"]
    assert int(codes(layer).sum()) == BNB["sum"]
    assert layer.absmax[:12].tolist() == BNB["absmax"]
    assert layer.scale.tolist() == pytest.approx(BNB["constants"], rel=1e-6)
    assert layer.weight[5, :4].tolist() == pytest.approx(BNB["weights"], abs=1e-6)


def test_blocks_are_those_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")

    weight = normal(256, 640)
    q, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    layer = packed(weight)
    assert torch.equal(torch.stack((q >> 4, q & 15), -1).flatten(), codes(layer))
    torch.testing.assert_close(layer.scale, torch.cat((state.offset[None], state.state2.absmax)))
    # Its kernel for CPUs looks the constants' codes up in a coarser table, and takes the second nearest at times.
    assert bool(((state.absmax.int() - layer.absmax.int()).abs() <= 1).all())
    assert float((state.absmax != layer.absmax).float().mean()) < 0.01


# ---------------------------------------------------------------------------------------------------------- the layer
def test_products_and_gradients_are_those_of_the_weight() -> None:
    weight, bias, x = normal(24, 40), normal(24), normal(5, 3, 40, seed=1)
    layer = packed(weight, bias)
    for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3)):
        one = x.to(dtype).clone().requires_grad_()
        y = layer(one)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y, F.linear(one, layer.weight.to(dtype), bias.to(dtype)), atol=near, rtol=0
        )
        y.sum().backward()
        expected = layer.weight.to(dtype).sum(0).expand_as(one)
        torch.testing.assert_close(one.grad, expected, atol=10 * near, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not list(layer.parameters())


@pytest.mark.parametrize("double", [True, False])
def test_a_cast_leaves_the_weight(double: bool) -> None:
    layer = packed(normal(8, 64), normal(8), double=double)
    weight = layer.weight
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight.bfloat16())
    again = NF4Linear(**layer.geometry())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


# ------------------------------------------------------------------------------------------------------------ on disk
@pytest.mark.parametrize(("double", "bits", "stored"), [(True, 4.127, 4.127), (False, 4.5, 4.25)])
def test_bits_on_disk(double: bool, bits: float, stored: float, tmp_path: Path) -> None:
    """Constants of a base in half precision are exact in it, and a file holds them so."""
    stack = bundled(double_quant=double)
    weights = sum(layer.in_features * layer.out_features for layer in layers(stack).values())
    file = stack.save(tmp_path / "bundle") / "nf4.safetensors"
    scores = stack.evaluate(["a text"], metrics=["nf4"])
    assert scores["bits_per_weight"].value == pytest.approx(bits, abs=2e-3)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == pytest.approx(stored * weights / 8, rel=1e-3)
    assert scores["packed_bytes"].value == pytest.approx(bits * weights / 8, rel=1e-3)
    plain = Stack("peftx:tiny", [NF4Storage(double_quant=double)])
    told = dict(plain.plugins["nf4"].planned(plain.view("nf4")))
    assert sum(told.values()) == scores["packed_bytes"].value
    assert plain.evaluate(["a text"], metrics=["nf4"])["bits_per_weight"].value == 0


# ---------------------------------------------------------------------------------------------------------- in stacks
def test_lora_trains_on_it(tmp_path: Path) -> None:
    """QLoRA: the packed weights stay to the bit, and the adapter goes where it goes on the dense W^."""
    stack = bundled(Lora(rank=2, alpha=4))
    before, kept = logits(stack), {k: v.state_dict() for k, v in layers(stack).items()}
    kept = {key: {n: t.clone() for n, t in state.items()} for key, state in kept.items()}
    dense = Stack("peftx:tiny", [Lora(rank=2, alpha=4)])
    with torch.no_grad():
        for key, layer in layers(stack).items():
            dense.model.get_parameter(f"{key}.weight").copy_(layer.weight)
    stack.inject(["lora"])
    assert torch.equal(logits(stack), before)
    rows = [{"prompt": "a", "completion": "b"}] * 4
    for one in (stack, dense):
        one.train(rows, steps=2, learning_rate=1e-2)
    assert not torch.equal(logits(stack), before)
    torch.testing.assert_close(logits(stack), logits(dense), atol=2e-3, rtol=1e-3)
    for key, layer in layers(stack).items():
        state = layer.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in kept[key].items())
    trained = logits(stack)
    for keep in (True, False):
        with pytest.raises(MergeError, match="is quantized, and a delta does not fold"):
            stack.merge("lora", keep=keep)
    stack.save(tmp_path / "both")
    loaded = peftx.load(tmp_path / "both")
    assert torch.equal(logits(loaded), trained)
    assert loaded.trainable_parameters() == loaded.plugin_parameters("lora")
    stack.remove("lora")
    stack.remove("nf4")
    assert torch.equal(logits(stack), logits(Stack("peftx:tiny", [])))


def test_an_adapter_before_it_is_packed_with_it() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2), NF4Storage()], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.1)
    merged = Stack(tiny("llama"), [Lora(rank=2)], tokenizer=tiny_tokenizer())
    for theirs, own in zip(merged.ledger.parameters("lora"), stack.ledger.parameters("lora"), strict=True):
        theirs.data.copy_(own)
    merged.merge("lora", keep=False)
    stack.compress(ids=["nf4"])
    assert not stack.ledger.of("lora", DeltaPart)
    for key, layer in layers(stack).items():
        assert torch.equal(layer.weight, packed(merged.model.get_submodule(key).weight).weight)


@pytest.mark.parametrize("arch", ["gpt2", "t5", "bert", "phi3", "mamba"])
def test_layers_of_every_kind(arch: str, tmp_path: Path) -> None:
    """Fused, stored the other way round, of two towers: each as [out, in]."""
    stack = Stack(tiny(arch), [NF4Storage()], tokenizer=tiny_tokenizer())
    plain = {site.path: site.weight.detach() for site in stack.view("nf4").linears("all", whole=True)}
    stack.compress()
    found = layers(stack)
    assert found.keys() == plain.keys()
    assert all(torch.equal(layer.weight, packed(plain[key]).weight) for key, layer in found.items())
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle")
    assert torch.equal(logits(loaded), logits(stack))


def test_targets_choose() -> None:
    stack = Stack(tiny("llama"), [NF4Storage(targets="mlp", block_size=32)], tokenizer=tiny_tokenizer())
    stack.compress()
    assert {key.split(".")[3] for key in layers(stack)} == {"mlp"}
    assert {layer.block_size for layer in layers(stack).values()} == {32}


def test_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"nf4: .*gate_up_proj holds experts") as caught:
        Stack(tiny("mixtral"), [NF4Storage()], tokenizer=tiny_tokenizer())
    assert "targets: 'all !experts" in str(caught.value.hint)
    stack = Stack(tiny("mixtral"), [NF4Storage(targets="all !experts")], tokenizer=tiny_tokenizer())
    stack.compress()
    assert layers(stack)
    with pytest.raises(ConflictError, match="integers"):
        Stack(tiny("llama"), [NF4Storage(), PrefixQuant()], tokenizer=tiny_tokenizer())
    broken = tiny("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    stack = Stack(broken, [NF4Storage()], tokenizer=tiny_tokenizer())
    with pytest.raises(PeftxError, match=r"nf4: .*up_proj holds numbers that are not finite"):
        stack.compress()
    stack = Stack(tiny("llama"), [NF4Storage(), Lora()], tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match="stands already on layers"):
        stack.compress(TEXTS, ["nf4"])
