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
from peftx_alphatuning import AlphaDelta, AlphaTuning, CodedLinear, fit, greedy, least_squares, nearest
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_prompt_tuning import PromptTuning

test_conformance = conformance("alphatuning")

ROWS = [{"prompt": "a", "completion": "b"}] * 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def back(B: Tensor, a: Tensor) -> Tensor:
    return (a.unsqueeze(-1) * B).sum(-2)


def lost(w: Tensor, B: Tensor, a: Tensor) -> Tensor:
    return (back(B, a) - w).square().sum(-1)


def packed(
    weight: Tensor, bias: Tensor | None = None, *, bits: int = 3, size: int | None = None, rounds: int = 15
) -> CodedLinear:
    options = {"dtype": str(weight.dtype).removeprefix("torch."), "bias": bias is not None, "bits": bits}
    options |= {"in_features": weight.shape[1], "out_features": len(weight)}
    return CodedLinear(group_size=size or weight.shape[1], **options).take(weight, bias, rounds)


def compressed(arch: str = "llama", *behind: object, **options: object) -> Stack:
    plugins = [AlphaTuning(**options), *behind]
    stack = Stack(tiny(arch), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(ids=["alphatuning"])
    return stack


def layers(stack: Stack) -> dict[str, CodedLinear]:
    return {part.key: part.module for part in stack.ledger.of("alphatuning", ReplacedPart)}


def deltas(stack: Stack) -> dict[str, AlphaDelta]:
    return {part.key: part.module for part in stack.ledger.of("alphatuning", DeltaPart)}


def logits(stack: Stack) -> Tensor:
    stack.model.eval()
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model))


# --------------------------------------------------------------------------------------------------------------- codes
def test_the_start_by_hand() -> None:
    B, a = greedy(torch.tensor([[3.0, -1.0, 0.0, -4.0]]), 2)
    assert a.tolist() == [[2.0, 1.5]]
    assert B.tolist() == [[[1, -1, 1, -1], [1, 1, -1, -1]]]


@pytest.mark.parametrize("rounds", [0, 15])
def test_one_code_is_the_sign_and_the_mean_magnitude(rounds: int) -> None:
    w = normal(20, 64)
    B, a = fit(w, 1, rounds)
    assert torch.equal(B[:, 0], w.sign())
    torch.testing.assert_close(a[:, 0], w.abs().mean(1))


def test_least_squares() -> None:
    """No other scales of these codes are better; they come out positive and falling, and mean the same."""
    w, B = normal(10, 32), normal(10, 3, 32, seed=1).sign()
    turned, a = least_squares(w, B)
    exact = torch.linalg.lstsq(B.mT, w.unsqueeze(-1)).solution
    torch.testing.assert_close(back(turned, a), (B.mT @ exact).squeeze(-1), atol=1e-6, rtol=1e-4)
    assert bool((a >= 0).all())
    assert bool((a.diff(dim=-1) <= 0).all())
    assert turned.unique().tolist() == [-1, 1]
    same = torch.ones(1, 2, 8)  # of codes that are alike no more than the sum is settled
    turned, a = least_squares(torch.full((1, 8), 3.0), same)
    assert float(a.sum()) == pytest.approx(3)


def test_the_nearest_codes() -> None:
    w, a = normal(10, 50), normal(10, 3, seed=1).abs().sort(dim=-1, descending=True)[0]
    found = nearest(w, a)
    signs = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])
    best = (w[..., None] - (a @ signs.T)[:, None]).abs().amin(-1)
    torch.testing.assert_close((back(found, a) - w).abs(), best)
    assert found.shape == (10, 3, 50)
    assert found.unique().tolist() == [-1, 1]


def test_it_gets_better_with_rounds_and_codes() -> None:
    w = normal(40, 96)
    errors = torch.stack(
        [torch.stack([lost(w, *fit(w, q, r)) for r in (0, 1, 2, 5, 15)]) for q in (1, 2, 3, 4)]
    )
    assert bool((errors.diff(dim=1) <= 1e-7).all())
    assert bool((errors.diff(dim=0) < 0).all())
    assert float(errors[2, -1].sum()) < 0.8 * float(errors[2, 0].sum())


def test_sums_of_codes_are_kept() -> None:
    """What is a sum of signs and scales already comes out as it is; and rows of zeros, and of one magnitude."""
    a, B = torch.tensor([1.0, 0.3]), normal(6, 2, 32, seed=3).sign()
    for w in (back(B, a.expand(6, 2)), torch.zeros(6, 32), torch.full((6, 32), 0.7)):
        torch.testing.assert_close(packed(w, bits=2).weight, w, atol=1e-6, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- the layer
@pytest.mark.parametrize(("shape", "size"), [((8, 32), None), ((5, 19), None), ((6, 24), 12)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_what_is_packed_is_what_was_fitted(shape: tuple[int, int], size: int | None, bits: int) -> None:
    weight = normal(*shape)
    layer = packed(weight, bits=bits, size=size)
    groups = weight.unflatten(1, (-1, size or shape[1]))
    B, a = fit(groups, bits, 15)
    for i in range(bits):
        assert torch.equal(layer.code(i, torch.float32), B[:, :, i])
    assert torch.equal(layer.scale, a)
    torch.testing.assert_close(layer.weight, back(B, a).flatten(1))
    assert layer.qweight.shape == (shape[0], bits, -(-shape[1] // 8))
    assert bool((layer.scale.diff(dim=-1) <= 0).all())


def test_products_gradients_and_casts() -> None:
    weight, bias, x = normal(24, 40), normal(24), normal(5, 3, 40, seed=1)
    layer = packed(weight, bias)
    for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3)):
        one = x.to(dtype).clone().requires_grad_()
        y = layer(one)
        torch.testing.assert_close(
            y, F.linear(one, layer.weight.to(dtype), bias.to(dtype)), atol=near, rtol=0
        )
        y.sum().backward()
        torch.testing.assert_close(
            one.grad, layer.weight.to(dtype).sum(0).expand_as(one), atol=10 * near, rtol=0
        )
    weight = layer.weight
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight.bfloat16())
    again = CodedLinear(**layer.geometry())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


@pytest.mark.parametrize("size", [None, 8])
def test_a_task_changes_the_first_scales(size: int | None) -> None:
    """The layer with a_1 + d in place of a_1; and dL/dd is the sum of dL/dW B_1 over the weights of the scale."""
    layer, x = packed(normal(12, 24), size=size), normal(7, 24, seed=1).requires_grad_()
    delta, other = AlphaDelta(layer), packed(normal(12, 24), size=size)
    assert torch.equal(delta(x, layer(x)), layer(x))
    with torch.no_grad():
        delta.d.copy_(normal(*delta.d.shape, seed=2))
        other.scale[..., 0] += delta.d
        torch.testing.assert_close(delta(x, layer(x)), other(x), atol=1e-6, rtol=1e-5)
    W = other.weight.requires_grad_()
    given = x.detach().clone().requires_grad_()
    F.linear(given, W).square().sum().backward()
    delta(x, layer(x)).square().sum().backward()
    expected = (W.grad.unflatten(1, (-1, size or 24)) * layer.code(0, torch.float32)).sum(-1)
    torch.testing.assert_close(delta.d.grad, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(x.grad, given.grad, atol=1e-6, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- tuning
def test_only_the_scales_train(tmp_path: Path) -> None:
    stack = compressed()
    found = layers(stack)
    assert stack.trainable_parameters() == sum(layer.out_features for layer in found.values())
    assert {n for n, p in stack.model.named_parameters() if p.requires_grad} == {
        f"{key}.peftx.alphatuning.d" for key in found
    }
    kept = {key: {n: t.clone() for n, t in layer.named_buffers()} for key, layer in found.items()}
    rest = {n: p.clone() for n, p in stack.model.named_parameters() if not p.requires_grad}
    before = logits(stack)
    dense = Stack(tiny("llama"), [])
    with torch.no_grad():
        for key, layer in found.items():
            dense.model.get_parameter(f"{key}.weight").copy_(layer.weight)
    torch.testing.assert_close(before, logits(dense), atol=1e-5, rtol=1e-5)
    stack.train(ROWS, steps=3, learning_rate=1e-2)
    assert not torch.equal(logits(stack), before)
    assert all(bool(delta.d.any()) for delta in deltas(stack).values())
    assert all(
        torch.equal(t, dict(layer.named_buffers())[n])
        for k, layer in found.items()
        for n, t in kept[k].items()
    )
    assert all(torch.equal(p, stack.model.get_parameter(n)) for n, p in rest.items())
    stack.save(tmp_path / "bundle")
    loaded = peftx.load(tmp_path / "bundle")
    assert torch.equal(logits(loaded), logits(stack))
    assert loaded.trainable_parameters() == stack.trainable_parameters()
    loaded.train(ROWS, steps=1)
    stack.remove("alphatuning")
    assert torch.equal(logits(stack), logits(Stack(tiny("llama"), [])))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_divided_by_the_group(accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once an update, however many micro-batches there are."""
    plain = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "weight_decay": 0.0}
    stacks = [compressed(targets="mlp", group_size=16) for _ in range(2)]
    for stack in stacks:
        stack.train(ROWS, steps=1, batch_size=1, gradient_accumulation=accumulation, **plain)
        monkeypatch.setattr(AlphaTuning, "normalize", lambda self, step: None)
    for divided, whole in zip(*(deltas(stack).values() for stack in stacks), strict=True):
        torch.testing.assert_close(16 * divided.d, whole.d, atol=1e-7, rtol=1e-4)
        assert bool(whole.d.any())


def test_a_task_is_its_numbers() -> None:
    """The same codes serve another task with other numbers."""
    one, two = compressed(), compressed()
    one.train(ROWS, steps=2, learning_rate=1e-2)
    assert not torch.equal(logits(one), logits(two))
    with torch.no_grad():
        for key, delta in deltas(one).items():
            deltas(two)[key].d.copy_(delta.d)
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize(("bits", "size"), [(3, None), (1, None), (4, 64)])
def test_bits_on_disk(bits: int, size: int | None, tmp_path: Path) -> None:
    stack = Stack("peftx:tiny", [AlphaTuning(bits=bits, group_size=size, targets="attention", rounds=1)])
    told = dict(stack.plugins["alphatuning"].planned(stack.view("alphatuning")))
    assert stack.evaluate(["a text"], metrics=["alphatuning"])["bits_per_weight"].value == 0
    stack.compress()
    scores = stack.evaluate(["a text"], metrics=["alphatuning"])
    assert scores["bits_per_weight"].value == pytest.approx(bits + 32 * bits / (size or 256))
    assert scores["packed_bytes"].value == sum(told.values())
    assert scores["task_bytes"].value == 4 * stack.trainable_parameters()
    file = stack.save(tmp_path / "bundle") / "alphatuning.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - 8 - header == scores["packed_bytes"].value + scores["task_bytes"].value


@pytest.mark.parametrize("arch", ["gpt2", "t5", "bert", "phi3", "mamba"])
def test_layers_of_every_kind(arch: str, tmp_path: Path) -> None:
    targets = "re:in_proj$" if arch == "mamba" else "all"  # kernels read the others past what stands there
    plain = Stack(tiny(arch), [AlphaTuning(targets=targets)]).view("alphatuning").linears(targets, whole=True)
    weights = {site.path: (site.weight.detach(), site.bias) for site in plain}
    stack = compressed(arch, targets=targets)
    assert layers(stack).keys() == weights.keys()
    assert layers(stack).keys() == deltas(stack).keys()
    for key, layer in layers(stack).items():
        assert torch.equal(layer.weight, packed(weights[key][0]).weight)
        assert layer.bias is None or torch.equal(layer.bias, weights[key][1])
    with torch.no_grad():
        for delta in deltas(stack).values():
            delta.d.normal_(std=0.01)
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


# -------------------------------------------------------------------------------------------------------------- stacks
def test_others_on_it_and_before_it(tmp_path: Path) -> None:
    stack = compressed("llama", Lora(rank=2), PromptTuning())
    stack.inject()
    stack.train(ROWS, steps=2)
    with pytest.raises(MergeError, match="is quantized"):
        stack.merge("lora")
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))
    stack = Stack(tiny("llama"), [Lora(rank=2), AlphaTuning()], tokenizer=tiny_tokenizer())
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lora"):
            parameter.normal_(std=0.1)
    stack.merge("lora")
    merged = {site.path: site.weight.clone() for site in stack.view("alphatuning").linears("all", whole=True)}
    stack.unmerge()
    stack.compress()
    assert not stack.ledger.of("lora", DeltaPart)
    assert all(torch.equal(layer.weight, packed(merged[key]).weight) for key, layer in layers(stack).items())


def test_refused() -> None:
    for bits in (0, 5, 8):
        with pytest.raises(PluginError, match="AlphaTuning: bits: Input should be"):
            AlphaTuning(bits=bits)
    with pytest.raises(
        ArchitectureError, match=r"alphatuning: .*gate_up_proj .*experts.* is not called"
    ) as caught:
        Stack(tiny("mixtral"), [AlphaTuning()], tokenizer=tiny_tokenizer())
    assert "targets: 'all !experts" in str(caught.value.hint)
    with pytest.raises(ArchitectureError, match=r"down_proj have 48 weights, no multiple of 32"):
        Stack(tiny("llama"), [AlphaTuning(group_size=32)], tokenizer=tiny_tokenizer())
    with pytest.raises(ArchitectureError, match=r"ssm.* is not called as a linear layer"):
        Stack(tiny("mamba"), [AlphaTuning()], tokenizer=tiny_tokenizer())
    assert compressed(group_size=16).trainable_parameters() > compressed().trainable_parameters()
    with pytest.raises(ConflictError, match="integers"):
        Stack(tiny("llama"), [AlphaTuning(), NF4Storage()], tokenizer=tiny_tokenizer())
    broken = tiny("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    stack = Stack(broken, [AlphaTuning()], tokenizer=tiny_tokenizer())
    with pytest.raises(
        PeftxError, match=r"alphatuning: .*layers.1.mlp.up_proj holds numbers that are not finite"
    ):
        stack.compress()
    assert not stack.ledger.parts
    stack = Stack(tiny("llama"), [AlphaTuning(), Lora()], tokenizer=tiny_tokenizer())
    with pytest.raises(ConflictError, match="stands already on layers"):
        stack.compress(ids=["alphatuning"])
