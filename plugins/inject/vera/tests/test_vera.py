from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import peftx
from peftx import Stack
from peftx.errors import PeftxError
from peftx.kernel.slots.delta import dropout_mask
from peftx.testing import conformance, tiny
from peftx.toolkits.compression import QuantLinear
from peftx_vera import Projection, Vera, VeraDelta

test_conformance = conformance("vera")
test_conformance_without_projection = conformance(
    "vera",
    options={"rank": 8, "save_projection": False},
    models=["llama"],
    expected_failures={
        "merge_rounds_once": "it copies saved tensors into a float32 stack, which draws A and B unrounded"
    },
)

IDS = torch.arange(3, 27).reshape(2, 12)
V_PROJ = "model.layers.1.self_attn.v_proj"


@torch.no_grad()
def moved(stack: Stack) -> Stack:
    """The stack with every trained number away from its start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in stack.ledger.parameters("vera"):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.3)
    return stack


def deltas(stack: Stack) -> dict[str, VeraDelta]:
    parts = stack.ledger.of("vera")
    return {part.path: part.module for part in parts if isinstance(part.module, VeraDelta)}


def projection_of(stack: Stack) -> Projection:
    found: Projection = stack.model.peftx_parts["vera"]["projection"]
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


# ---------------------------------------------------------------------------------------------------------- equations
@pytest.mark.parametrize("training", [False, True])
def test_output_is_that_of_the_equation(training: bool) -> None:
    stack = moved(Stack(tiny("llama").double(), [Vera(rank=5, targets="attention mlp")]))
    for path in (V_PROJ, "model.layers.0.mlp.down_proj"):
        layer, delta = stack.model.get_submodule(path).train(training), deltas(stack)[path]
        W, shared = layer.weight, projection_of(stack)
        A, B = shared.A[:, : W.shape[1]], shared.B[: W.shape[0]]
        update = torch.diag(delta.lambda_b) @ B @ torch.diag(delta.lambda_d) @ A
        x = torch.randn(3, W.shape[1], dtype=torch.float64)
        assert torch.allclose(layer(x), x @ (W + update).T, atol=1e-12)
        folded, bias = delta.fold(W, None)
        assert torch.allclose(folded, W + update, atol=1e-12)
        assert bias is None


def test_starts_of_the_vectors() -> None:
    for d_initial in (0.1, 0.7):
        stack = Stack(tiny("llama"), [Vera(rank=3, d_initial=d_initial)])
        for delta in deltas(stack).values():
            assert not delta.lambda_b.any()
            assert torch.equal(delta.lambda_d, torch.full((3,), d_initial))


def test_A_and_B_are_kaiming_uniform() -> None:
    """U(-sqrt(6 / fan), sqrt(6 / fan)), fan = in of A and r of B; standard deviation sqrt(2 / fan)."""
    shared = Projection(64, 400, 300, key=0, saved=True)
    for matrix, fan, shape in ((shared.A, 400, (64, 400)), (shared.B, 64, (300, 64))):
        assert matrix.shape == shape
        assert 0.999 * math.sqrt(6 / fan) < float(matrix.abs().max()) <= math.sqrt(6 / fan)
        assert float(matrix.std()) == pytest.approx(math.sqrt(2 / fan), rel=0.02)
        assert abs(float(matrix.mean())) < 0.02 * math.sqrt(6 / fan)


def test_one_frozen_pair_for_all_layers_as_large_as_the_largest() -> None:
    stack = Stack(tiny("llama"), [Vera(rank=3, targets="attention mlp")])
    shared = projection_of(stack)
    assert shared.A.shape == (3, 48)
    assert shared.B.shape == (48, 3)
    assert not list(shared.parameters())
    assert {delta.projection[0] for delta in deltas(stack).values()} == {shared}


def test_number_of_parameters_is_out_and_r_for_each_layer() -> None:
    stack = Stack(tiny("llama"), [Vera(rank=7, targets="attention mlp")])
    sites = [s for s in stack.anatomy.sites if s.role.startswith(("attention.", "mlp."))]
    assert len(sites) == 14
    assert stack.trainable_parameters() == sum(s.out_features + 7 for s in sites)


def test_a_rank_above_the_layers_sizes_is_fine() -> None:
    stack = moved(Stack(tiny("llama"), [Vera(rank=100)]))
    delta = deltas(stack)[V_PROJ]
    update = (delta.fold(torch.zeros(delta.sizes[1], delta.sizes[0]), None)[0]).detach()
    assert torch.linalg.matrix_rank(update) == min(update.shape)


def test_stacked_experts_share_it_too() -> None:
    stack = moved(Stack(tiny("mixtral"), [Vera(rank=4, targets="experts.up")]))
    before = logits(stack.model)
    stack.merge()
    assert torch.allclose(logits(stack.model), before, atol=1e-5)
    assert not torch.allclose(before, logits(tiny("mixtral")), atol=1e-2)


def test_on_a_packed_layer() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = QuantLinear.from_linear(attention.v_proj, bits=8)
    x = torch.randn(3, 32)
    before = attention.v_proj(x)
    stack = Stack(model, [Vera(rank=4)])
    assert torch.equal(attention.v_proj(x), before)
    delta = deltas(moved(stack))[V_PROJ]
    update = delta.fold(torch.zeros(delta.sizes[1], delta.sizes[0]), None)[0]
    assert torch.allclose(attention.v_proj(x), before + x @ update.T, atol=1e-5)


def test_part_of_a_fused_matrix() -> None:
    stack = moved(Stack(tiny("gpt2"), [Vera(rank=4)]))
    layer, shared = stack.model.transformer.h[0].attn.c_attn, projection_of(stack)
    assert shared.B.shape == (32, 4)
    x = torch.randn(3, 32)
    plain = tiny("gpt2").transformer.h[0].attn.c_attn(x)
    for part, name in ((0, "attention_q"), (2, "attention_v")):
        delta = layer.peftx[f"vera@{name}"]
        update = torch.diag(delta.lambda_b) @ shared.B @ torch.diag(delta.lambda_d) @ shared.A
        rows = slice(32 * part, 32 * (part + 1))
        assert torch.allclose(layer(x)[:, rows], plain[:, rows] + x @ update.T, atol=1e-5)
    assert torch.equal(layer(x)[:, 32:64], plain[:, 32:64])


# ---------------------------------------------------------------------------------------------------------- the seed
def test_the_pair_follows_from_its_own_seed_alone() -> None:
    one = projection_of(Stack(tiny("llama"), [Vera(rank=3)], seed=0))
    torch.rand(3)
    two = projection_of(Stack(tiny("llama"), [Vera(rank=3)], seed=1))
    other = projection_of(Stack(tiny("llama"), [Vera(rank=3, projection_prng_key=1)]))
    wide = projection_of(Stack(tiny("llama").double(), [Vera(rank=3)]))
    assert Vera(projection_prng_key=2**63 - 1).config.projection_prng_key == 2**63 - 1
    for name in "AB":
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(getattr(one, name).double(), getattr(wide, name))


@pytest.mark.parametrize("saved", [True, False])
def test_bundles_hold_the_pair_or_draw_it_again(tmp_path: Path, saved: bool) -> None:
    stack = moved(Stack(tiny("llama"), [Vera(rank=64, save_projection=saved, projection_prng_key=5)]))
    before = logits(stack.model)
    with safe_open(stack.save(tmp_path / "bundle") / "vera.safetensors", "pt") as file:
        held = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118  it is no dict
    assert held == {"lambda_b", "lambda_d"} | ({"A", "B"} if saved else set())
    loaded = peftx.load(tmp_path / "bundle", model=tiny("llama"))
    assert torch.equal(logits(loaded.model), before)


def test_a_bundle_that_holds_the_pair_does_not_draw_it(tmp_path: Path) -> None:
    stack = moved(Stack(tiny("llama"), [Vera(rank=4)]))
    projection_of(stack).A.mul_(2)
    before = logits(stack.model)
    loaded = peftx.load(stack.save(tmp_path / "bundle"), model=tiny("llama"))
    assert torch.equal(logits(loaded.model), before)


def test_half_precision_keeps_the_vectors_in_float32() -> None:
    model = tiny("llama").bfloat16()
    before = logits(model)
    stack = Stack(model, [Vera(rank=4)])
    assert torch.equal(logits(stack.model), before)
    assert {p.dtype for delta in deltas(stack).values() for p in delta.parameters()} == {torch.float32}
    assert projection_of(stack).A.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ HF PEFT
PEERS = {
    "llama": ("attention.q,v mlp.down", ["q_proj", "v_proj", "down_proj"]),
    "bert": ("attention.q,v mlp.up", ["query", "value", "intermediate.dense"]),
    "gpt2": ("mlp", ["mlp.c_fc", "mlp.c_proj"]),
}


def beside_peft(arch: str, dtype: torch.dtype) -> tuple[Stack, nn.Module, dict[str, nn.Parameter]]:
    """A stack and a PEFT model of one seed with the same random vectors, and PEFT's by their names in files."""
    from peft import VeraConfig, get_peft_model

    targets, names = PEERS[arch]
    config = VeraConfig(r=6, target_modules=names, projection_prng_key=3, fan_in_fan_out=arch == "gpt2")
    theirs = get_peft_model(tiny(arch).to(dtype), config, autocast_adapter_dtype=False).to(dtype).eval()
    stack = moved(Stack(tiny(arch).to(dtype), [Vera(rank=6, targets=targets, projection_prng_key=3)]))
    named = {
        name.removeprefix("base_model.model.").removesuffix(".default"): parameter
        for name, parameter in theirs.named_parameters()
    }
    with torch.no_grad():
        for path, delta in deltas(stack).items():
            for name in ("lambda_b", "lambda_d"):
                named[f"{path}.vera_{name}"].copy_(getattr(delta, name))
    return stack, theirs, named


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of transformers, by PEFT
@pytest.mark.parametrize("arch", list(PEERS))
def test_equals_peft(arch: str) -> None:
    """A and B are not copied: one seed draws the same ones, to the bit. 1e-6 of the largest logit in float32."""
    for dtype, most in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        stack, theirs, _ = beside_peft(arch, dtype)
        for name in "AB":
            peer = getattr(theirs.base_model, f"vera_{name}")["default"]
            assert torch.equal(getattr(projection_of(stack), name), peer)
        ours, peer = logits(stack.model), logits(theirs)
        assert (ours - peer).abs().max() <= most * peer.abs().max()
        assert not torch.allclose(peer, logits(tiny(arch).to(dtype)), atol=0.05)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradients_equal_those_of_peft(arch: str) -> None:
    stack, theirs, named = beside_peft(arch, torch.float64)
    for model in (stack.model, theirs):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    for path, delta in deltas(stack).items():
        for name in ("lambda_b", "lambda_d"):
            peer = named[f"{path}.vera_{name}"].grad
            assert peer.abs().max() > 1e-4
            assert torch.allclose(getattr(delta, name).grad, peer, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- options
def test_dropout_is_of_the_input_of_A() -> None:
    stack = moved(Stack(tiny("llama").double(), [Vera(rank=5, dropout=0.5)]))
    layer, delta = stack.model.get_submodule(V_PROJ), deltas(stack)[V_PROJ]
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    update = delta.fold(torch.zeros_like(layer.weight), None)[0]
    layer.train()
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    mask, scale = dropout_mask(x, 0.5, int(torch.randint(2**62, ()).item()))
    assert torch.allclose(found, x @ layer.weight.T + (x * mask * scale) @ update.T, atol=1e-12)
    layer.eval()
    assert torch.allclose(layer(x), x @ (layer.weight + update).T, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"dropout": 1.0}, {"d_initial": math.inf}, {"projection_prng_key": -1}, {"targets": ""}],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Vera: {next(iter(options))}"):
        Vera(**options)
