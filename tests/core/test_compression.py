"""Packed integers, quantized layers and caches, calibration, rotations."""

from __future__ import annotations

import copy
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.pytorch_utils import Conv1D

from peftx import Claim, ModelView, Plugin, Registry, Stack, hookimpl
from peftx.errors import ArchitectureError, DataError, UnsupportedError
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.toolkits.compression import (
    BlockInputs,
    Calibration,
    Narrow,
    NarrowLinear,
    QuantLinear,
    dequantize,
    entering,
    fake_quantize,
    fwht,
    hadamard,
    hadamard_exists,
    hadamard_signs,
    mse_clip_scale,
    observe,
    observing,
    pack_bits,
    quantize,
    unpack_bits,
    walk_blocks,
)
from peftx.toolkits.compression.kernels import int8_matmul
from peftx.toolkits.compression.packing import from_integer, integer_range, packed_width, to_integer

ALL_BITS = range(2, 9)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def llama(**changes: Any) -> nn.Module:
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**(settings | changes))).eval()


# -- packing ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    shape=st.lists(st.integers(0, 5), max_size=2),
    size=st.integers(0, 35),
    signed=st.booleans(),
)
def test_unpack_undoes_pack(bits: int, shape: list[int], size: int, signed: bool) -> None:
    low, high = integer_range(bits, symmetric=signed)
    q = torch.randint(low, high + 1, (*shape, size)).to(torch.int8 if signed else torch.uint8)
    packed = pack_bits(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, -(-size * bits // 8))
    unpacked = unpack_bits(packed, bits, size=size, signed=signed)
    assert unpacked.dtype == q.dtype
    assert torch.equal(unpacked, q)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_bit_stream_is_little_endian(bits: int) -> None:
    _, high = integer_range(bits, symmetric=False)
    q = torch.randint(0, high + 1, (13,), dtype=torch.uint8)
    number = sum(int(value) << (bits * i) for i, value in enumerate(q))
    assert bytes(pack_bits(q, bits).tolist()) == number.to_bytes(packed_width(13, bits), "little")


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(UnsupportedError, match=r"do not fit 3 bits: \[-4, 3\]"):
        pack_bits(torch.tensor([4], dtype=torch.int8), 3)
    with pytest.raises(UnsupportedError, match="int8 or uint8"):
        pack_bits(torch.tensor([1]), 3)
    with pytest.raises(UnsupportedError, match=r"outside 2\.\.8"):
        pack_bits(torch.tensor([1], dtype=torch.int8), 9)
    with pytest.raises(UnsupportedError, match="take 4 uint8 a row"):
        unpack_bits(torch.zeros(5, dtype=torch.uint8), 4, size=7, signed=True)


def test_symmetric_by_hand() -> None:
    made = quantize(torch.tensor([[-7.0, 3.4, 0.0, 1.6], [0.0, 0.0, 0.0, 0.0]]), bits=4)
    assert made.q.tolist() == [[-7, 3, 0, 2], [0, 0, 0, 0]]
    assert made.scale.tolist() == [[1.0], [1.0]]
    assert dequantize(made).tolist() == [[-7.0, 3.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]


def test_asymmetric_by_hand() -> None:
    # span 15 in 15 steps: s = 1, z = 5. A row above zero keeps zero in its range: s = 30 / 15, z = 0.
    made = quantize(torch.tensor([[-5.0, 10.0, 0.0], [30.0, 20.9, 4.0]]), bits=4, symmetric=False)
    assert made.zero is not None
    assert made.zero.tolist() == [[5], [0]]
    assert made.scale.tolist() == [[1.0], [2.0]]
    assert made.q.tolist() == [[0, 15, 5], [15, 10, 2]]
    assert dequantize(made)[0].tolist() == [-5.0, 10.0, 0.0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8, 7])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_rounding_error_is_at_most_half_a_step(bits: int, group_size: int | None, symmetric: bool) -> None:
    weight = torch.randn(5, 24)
    made = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    assert made.scale.shape == (5, 1 if group_size is None else -(-24 // group_size))
    step = made.scale.repeat_interleave(group_size or 24, dim=1)[:, :24]
    # An asymmetric range rounds its zero point, so its end may be off by half a step more.
    allowed = 0.5 if symmetric else 1.0
    assert ((dequantize(made) - weight).abs() <= allowed * step * 1.0001).all()
    assert (dequantize(quantize(torch.zeros(2, 24), bits=bits, symmetric=symmetric)) == 0).all()


def test_quantizing_again_changes_nothing_and_leading_dimensions_are_free() -> None:
    experts = torch.randn(3, 4, 16)
    made = quantize(experts, bits=4, group_size=8)
    assert made.scale.shape == (3, 4, 2)
    again = quantize(dequantize(made), bits=4, group_size=8, scale=made.scale)
    assert torch.equal(again.q, made.q)
    one = quantize(experts[1], bits=4, group_size=8)
    assert torch.equal(one.q, made.q[1])


def test_scales_are_rounded_before_the_integers() -> None:
    weight = torch.randn(4, 32)
    made = quantize(weight, bits=6, scale_dtype=torch.bfloat16)
    assert made.scale.dtype == torch.bfloat16
    assert torch.equal(made.q, to_integer(weight, made.scale, None, bits=6))


def test_quantize_refuses() -> None:
    weight = torch.randn(2, 4)
    with pytest.raises(UnsupportedError, match="NaN"):
        quantize(weight.index_fill(0, torch.tensor([1]), float("nan")), bits=4)
    with pytest.raises(UnsupportedError, match="NaN, infinite"):
        quantize(weight * float("inf"), bits=4)
    with pytest.raises(UnsupportedError, match="floating"):
        quantize(weight.long(), bits=4)
    with pytest.raises(UnsupportedError, match="group_size=0"):
        quantize(weight, bits=4, group_size=0)
    with pytest.raises(UnsupportedError, match="positive"):
        quantize(weight, bits=4, scale=torch.zeros(2, 1))
    with pytest.raises(UnsupportedError, match="symmetric=False"):
        quantize(weight, bits=4, symmetric=False, scale=torch.ones(2, 1))


@pytest.mark.parametrize("zero", [None, 3])
def test_fake_quantize_has_the_values_and_the_gradients_of_its_formula(zero: int | None) -> None:
    x = torch.tensor([-9.0, -1.2, 0.4, 2.6, 40.0], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    z = None if zero is None else torch.tensor(zero, dtype=torch.uint8)
    low, high = (-4, 3) if zero is None else (0 - zero, 7 - zero)
    y = fake_quantize(x, scale, z, bits=3)
    with torch.no_grad():
        assert torch.equal(y, from_integer(to_integer(x, scale, z, bits=3), scale, z, x.dtype))
        assert torch.equal(y, fake_quantize(x, scale, z, bits=3))
    y.sum().backward()
    rounded = torch.round(x.detach() / 2)
    inside = (rounded >= low) & (rounded <= high)
    assert inside.tolist() != [True] * 5
    assert torch.equal(x.grad, inside.float())
    by_hand = torch.where(inside, rounded - x.detach() / 2, rounded.clamp(low, high)).sum()
    torch.testing.assert_close(scale.grad, by_hand)


# -- QuantLinear --------------------------------------------------------------------------------------------

WEIGHT_ONLY = [
    {"bits": bits, "group_size": group, "symmetric": symmetric}
    for bits, group, symmetric in [
        (2, 8, True),
        (3, None, True),
        (4, 8, False),
        (5, None, False),
        (8, None, True),
    ]
]
WITH_ACTIVATIONS = [
    {
        "bits": bits,
        "symmetric": symmetric,
        "activation": activation,
        "act_bits": act_bits,
        "act_symmetric": act_sym,
    }
    for bits, symmetric in [(8, True), (8, False), (4, True), (3, False)]
    for activation in ["dynamic-token", "static-tensor"]
    for act_bits, act_sym in [(8, True), (8, False), (4, True)]
]


def made_from(linear: nn.Module, **options: Any) -> QuantLinear:
    if options.get("activation") == "static-tensor":
        options |= {"input_scale": 6.0 / 2 ** options["act_bits"]}
        if not options["act_symmetric"]:
            options |= {"input_zero": 2 ** (options["act_bits"] - 1)}
    return QuantLinear.from_linear(linear, **options)


def reference(module: QuantLinear, x: Tensor) -> Tensor:
    """The layer in plain floats, written out from its definition, in float64."""
    x = x.double()
    weight = dequantize(module.quantized(), torch.float32).double()
    if module.activation is not None:
        top = 2 ** (module.act_bits - 1) - 1 if module.act_symmetric else 2**module.act_bits - 1
        bottom = -top - 1 if module.act_symmetric else 0
        if module.activation == "static-tensor":
            scale = module.input_scale.double()
            zero = 0.0 if module.input_zero is None else module.input_zero.double()
        elif module.act_symmetric:
            scale, zero = x.abs().amax(-1, keepdim=True) / top, 0.0
        else:
            least = x.amin(-1, keepdim=True).clamp_max(0)
            scale = (x.amax(-1, keepdim=True).clamp_min(0) - least) / top
            zero = torch.round(-least / scale)
        x = ((torch.round(x / scale) + zero).clamp(bottom, top) - zero) * scale
    y = x @ weight.T
    return y if module.bias is None else y + module.bias.double()


@pytest.mark.parametrize("options", WEIGHT_ONLY + WITH_ACTIVATIONS, ids=str)
def test_forward_is_the_float_layer_it_stands_for(options: dict[str, Any]) -> None:
    linear = nn.Linear(24, 16)
    module = made_from(linear, **options)
    x = torch.randn(2, 5, 24)
    assert module.kernel == ("int8-matmul" if "activation" in options else "table")
    torch.testing.assert_close(module(x).double(), reference(module, x), rtol=1e-5, atol=1e-5)
    assert module(x).dtype == torch.float32


@pytest.mark.parametrize("options", WITH_ACTIVATIONS, ids=str)
def test_integers_equal_the_emulation_of_the_same_quantizer(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made_from(nn.Linear(24, 16), **options)
    x = torch.randn(9, 24)
    integers = module(x)
    monkeypatch.setattr("peftx.toolkits.compression.kernels.int8_matmul_fits", lambda *a, **k: False)
    assert module.kernel == "emulate"
    torch.testing.assert_close(module(x), integers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "inside", "out"), [(0, 8, 8), (1, 1, 1), (1, 65, 3), (3, 7, 5), (17, 33, 16)]
)
def test_the_integer_product_is_exact_at_odd_shapes(rows: int, inside: int, out: int) -> None:
    x = torch.randint(-128, 128, (rows, inside), dtype=torch.int8)
    weight = torch.randint(-128, 128, (out, inside), dtype=torch.int8)
    assert torch.equal(int8_matmul(x, weight), x.int() @ weight.int().T)
    module = QuantLinear.from_linear(nn.Linear(inside, out), bits=8, activation="dynamic-token")
    assert module.kernel == "int8-matmul"
    floats = torch.randn(rows, inside)
    torch.testing.assert_close(module(floats).double(), reference(module, floats), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8, 32, 48, 300])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_float32_input_meets_the_stored_integers(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    """Few rows and many, one block of outputs and several, groups that do not divide the input."""
    long = (
        [(2048, 600)] if group_size is None else []
    )  # a sum of so many products in float32 alone misses the limit
    for inside, out in [(200, 300), (64, 7), (513, 256), *long]:
        linear = nn.Linear(inside, out)
        module = QuantLinear.from_linear(linear, bits=bits, group_size=group_size, symmetric=symmetric)
        assert module.kernel == "table"
        for rows in (0, 1, 2, 9, 17, 40):
            x = torch.randn(rows, inside)
            y, expected = module(x), reference(module, x)
            assert y.is_contiguous()
            error = (y.double() - expected).abs().amax() / expected.abs().amax() if rows else 0.0
            assert error < 2e-6, (inside, out, rows)


def test_a_float32_input_needs_no_float_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is unpacked at a call, and nothing dequantized whole; the layer that keeps no layout does as before."""
    linear, x = nn.Linear(320, 300), torch.randn(3, 320)
    module = QuantLinear.from_linear(linear, bits=4, group_size=64)
    frugal = QuantLinear.from_linear(linear, bits=4, group_size=64, cache_kernel_weight=False)
    assert frugal.kernel == "dequantize"
    torch.testing.assert_close(module(x), frugal(x))
    assert frugal.nbytes_resident == frugal.nbytes_packed
    assert module.kernel_for(torch.device("cpu"), torch.float64) == "dequantize"
    assert module.kernel_for(torch.device("meta"), torch.float32) == "dequantize"
    monkeypatch.setattr("peftx.toolkits.compression.linear.dequantize", lambda *a: pytest.fail("dequantized"))
    monkeypatch.setattr(
        "peftx.toolkits.compression.linear.unpack_bits", lambda *a, **k: pytest.fail("unpacked")
    )
    module(x)
    module(torch.randn(70, 320))


def test_the_second_layout_is_made_late_and_kept_to_itself() -> None:
    module = QuantLinear.from_linear(nn.Linear(256, 512), bits=8)
    x = torch.randn(2, 256)
    assert module.nbytes_resident == module.nbytes_packed
    names, expected = list(module.state_dict()), module(x)
    table, numbers, scales = 2 * 256 * (256 + 8), 4 * (2 * 256 + 2), 4 * 512
    assert module.nbytes_resident == module.nbytes_packed + table + numbers + scales
    assert list(module.state_dict()) == names
    for other in (copy.deepcopy(module), copy.copy(module)):  # both by the state that a pickle would hold
        assert other.nbytes_resident == other.nbytes_packed
        assert torch.equal(other(x), expected)
    for move in (lambda: module.to("cpu"), lambda: module.bfloat16(), lambda: module.to("meta")):
        move()
        assert module.nbytes_resident == module.nbytes_packed
        if not module.scale.is_meta:
            torch.testing.assert_close(module(x), expected, atol=1e-2, rtol=0)


def test_each_dtype_has_the_layout_of_its_kernel() -> None:
    module = QuantLinear.from_linear(nn.Linear(64, 32), bits=4, group_size=32)
    x = torch.randn(2, 64)
    expected = module(x)
    half = module(x.bfloat16())
    assert module.kernel_for(x.device, torch.bfloat16) == "int4-pack"
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.02, rtol=0.02)
    assert torch.equal(module(x), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x.bfloat16()), half)


@pytest.mark.parametrize("rows", [1, 30])
def test_a_table_gives_gradients_and_sees_what_changes(rows: int) -> None:
    module = QuantLinear.from_linear(nn.Linear(96, 40, bias=False), bits=4, group_size=32)
    x, upstream = torch.randn(rows, 96, requires_grad=True), torch.randn(rows, 40)
    y = module(x)
    with torch.inference_mode():
        assert torch.equal(module(x), y)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ module.weight)
    module.scale.mul_(2)
    assert torch.equal(module(x), y * 2)
    module.qweight = torch.zeros_like(module.qweight)
    assert not module(x).any()


def test_w8a8_is_close_to_the_float_layer_and_4_bits_are_farther() -> None:
    linear = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(50, 64)
    errors = []
    for bits in (8, 4, 2):
        module = QuantLinear.from_linear(linear, bits=bits, activation="dynamic-token", act_bits=8)
        errors.append(float((module(x) - linear(x)).norm() / linear(x).norm()))
    assert errors[0] < 0.015 < errors[1] < 0.2 < errors[2]


def test_grouped_weights_with_activations_are_emulated() -> None:
    module = made_from(nn.Linear(24, 16), bits=4, group_size=8, activation="dynamic-token")
    x = torch.randn(3, 24)
    assert module.kernel == "emulate"
    torch.testing.assert_close(module(x).double(), reference(module, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inside", "group_size"), [(64, 32), (128, 64), (96, None), (256, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_kernel_in_bfloat16(inside: int, group_size: int | None, symmetric: bool) -> None:
    linear = nn.Linear(inside, 32).bfloat16()
    module = QuantLinear.from_linear(linear, bits=4, group_size=group_size, symmetric=symmetric)
    x = torch.randn(3, inside, dtype=torch.bfloat16)
    assert module.kernel == "int4-pack"
    expected = reference(module, x)
    assert (module(x).double() - expected).abs().max() < 0.02 * expected.abs().max()
    assert module.nbytes_resident > module.nbytes_packed


@pytest.mark.parametrize(("inside", "out", "group_size"), [(64, 8, 32), (48, 16, 16), (40, 16, None)])
def test_shapes_that_the_int4_kernel_refuses_are_dequantized(
    inside: int, out: int, group_size: int | None
) -> None:
    module = QuantLinear.from_linear(nn.Linear(inside, out).bfloat16(), bits=4, group_size=group_size)
    x = torch.randn(2, inside, dtype=torch.bfloat16)
    assert module.kernel == "dequantize"
    expected = reference(module, x)
    assert (module(x).double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_conv1d_is_stored_out_by_in() -> None:
    conv = Conv1D(12, 8)  # 8 in, 12 out, weight [8, 12]
    nn.init.normal_(conv.bias)
    module = QuantLinear.from_linear(conv, bits=8)
    assert module.weight.shape == (12, 8)
    x = torch.randn(4, 8)
    torch.testing.assert_close(module(x), conv(x), atol=2e-3, rtol=0)


@pytest.mark.parametrize("options", [WEIGHT_ONLY[2], *WITH_ACTIVATIONS[:2], WITH_ACTIVATIONS[8]], ids=str)
def test_the_input_gets_the_gradient_of_the_dequantized_weight(options: dict[str, Any]) -> None:
    module = made_from(nn.Linear(24, 16), **options)
    x = (torch.randn(2, 5, 24) * 2).requires_grad_()
    upstream = torch.randn(2, 5, 16)
    y = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), y)
    y.backward(upstream)
    expected = upstream @ module.weight
    if module.activation == "static-tensor":
        top = 2 ** (module.act_bits - 1)
        q = torch.round(x.detach() / module.input_scale)
        clipped = (q < -top) | (q > top - 1)
        assert clipped.any()
        expected = expected.masked_fill(clipped, 0)
    torch.testing.assert_close(x.grad, expected)


def test_an_adapter_in_front_of_a_quantized_layer_learns() -> None:
    module = QuantLinear.from_linear(nn.Linear(16, 16), bits=4, activation="dynamic-token")
    adapter = nn.Linear(16, 16, bias=False)
    x, target = torch.randn(32, 16), torch.randn(32, 16)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(module(x + adapter(x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not list(module.parameters())


@pytest.mark.parametrize("options", WEIGHT_ONLY + WITH_ACTIVATIONS[::5], ids=str)
def test_rebuilt_from_geometry_and_file_it_is_the_same_layer(options: dict[str, Any], tmp_path: Path) -> None:
    module = made_from(nn.Linear(23, 16, bias=options["bits"] != 3), **options)
    x = torch.randn(3, 23)
    expected = module(x)
    save_file(module.state_dict(), tmp_path / "layer.safetensors")
    geometry = json.loads(json.dumps(module.geometry()))
    rebuilt = QuantLinear(**geometry)
    assert rebuilt.geometry() == module.geometry()
    rebuilt.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(rebuilt(x), expected)
    on_meta = QuantLinear(**geometry, device="meta")
    on_meta.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert torch.equal(on_meta(x), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_bytes_on_disk_are_the_bytes_reported(bits: int, tmp_path: Path) -> None:
    linear = nn.Linear(37, 10)
    module = QuantLinear.from_linear(linear, bits=bits, group_size=16, activation="dynamic-token")
    module(torch.randn(2, 37))
    save_file(module.state_dict(), tmp_path / "layer.safetensors")
    data = (tmp_path / "layer.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    assert len(data) - 8 - header == module.nbytes_packed
    assert module.nbytes_packed == 10 * -(-37 * bits // 8) + 10 * 3 * 4 + 10 * 4


def test_a_loaded_weight_replaces_the_kernels_copy() -> None:
    one, other = (
        QuantLinear.from_linear(nn.Linear(16, 8), bits=4, activation="dynamic-token") for _ in range(2)
    )
    x = torch.randn(3, 16)
    first = one(x)
    assert one.nbytes_resident == one.nbytes_packed + 16 * 8 + 8 * 4
    clone = copy.deepcopy(one)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))
    assert torch.equal(clone(x), first)
    frugal = QuantLinear(**(one.geometry() | {"cache_kernel_weight": False}))
    frugal.load_state_dict(other.state_dict())
    assert torch.equal(frugal(x), other(x))
    assert frugal.nbytes_resident == frugal.nbytes_packed


def test_a_scale_changed_in_place_is_seen_by_the_kernels() -> None:
    module = QuantLinear.from_linear(nn.Linear(64, 16, bias=False).bfloat16(), bits=4, group_size=32)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    before = module(x)
    assert module.kernel == "int4-pack"
    module.scale.mul_(2)
    assert torch.equal(module(x), before * 2)


def test_a_cast_leaves_the_quantized_weight_alone() -> None:
    module = QuantLinear.from_linear(nn.Linear(16, 8), bits=4, activation="static-tensor", input_scale=0.03)
    before = dequantize(module.quantized(), torch.float32)
    input_scale = module.input_scale.clone()
    module.bfloat16()
    assert torch.equal(dequantize(module.quantized(), torch.float32), before)
    assert torch.equal(module.input_scale, input_scale)
    assert module.weight.dtype == module.bias.dtype == module.dtype == torch.bfloat16
    assert module.geometry()["dtype"] == "bfloat16"
    assert module(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    module.to("meta")
    assert module.scale.is_meta
    assert module.input_scale.is_meta


def test_first_call_in_inference_mode_then_training() -> None:
    module = QuantLinear.from_linear(nn.Linear(16, 8), bits=4, activation="dynamic-token")
    x = torch.randn(2, 16)
    with torch.inference_mode():
        expected = module(x).clone()
    y = module(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y.detach(), expected)
    assert x.grad.abs().sum() > 0


# torch 2.13 warns about its own way of tracing an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("options", [WEIGHT_ONLY[2], WITH_ACTIVATIONS[16]], ids=str)
def test_torch_compile_traces_it_whole(options: dict[str, Any], called_before: bool) -> None:
    module, other = made_from(nn.Linear(24, 16), **options), made_from(nn.Linear(24, 16), **options)
    x = torch.randn(3, 24)
    expected = module(x) if called_before else copy.deepcopy(module)(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    trained = x.clone().requires_grad_()
    compiled(trained).sum().backward()
    torch.testing.assert_close(trained.grad, torch.autograd.functional.vjp(module, x, torch.ones(3, 16))[1])
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))


def test_autocast_gives_what_linear_would() -> None:
    module = QuantLinear.from_linear(nn.Linear(16, 8), bits=8, activation="dynamic-token")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 16)).dtype == torch.bfloat16


def test_quantlinear_refuses() -> None:
    linear = nn.Linear(8, 8)
    with pytest.raises(UnsupportedError, match="did you mean 'dynamic-token'"):
        QuantLinear.from_linear(linear, bits=8, activation="dynamic_token")
    with pytest.raises(UnsupportedError, match="one needs the other"):
        QuantLinear.from_linear(linear, bits=8, activation="static-tensor")
    with pytest.raises(UnsupportedError, match="one needs the other"):
        QuantLinear.from_linear(linear, bits=8, input_scale=0.1)
    with pytest.raises(UnsupportedError, match="not positive"):
        QuantLinear.from_linear(linear, bits=8, activation="static-tensor", input_scale=0.0)
    with pytest.raises(UnsupportedError, match="neither"):
        QuantLinear.from_linear(nn.Embedding(4, 4), bits=8)
    with pytest.raises(UnsupportedError, match="7 features, the layer takes 8"):
        QuantLinear.from_linear(linear, bits=8)(torch.randn(2, 7))
    with pytest.raises(UnsupportedError, match="act_symmetric=False, input_zero=None"):
        QuantLinear.from_linear(
            linear, bits=8, activation="static-tensor", act_symmetric=False, input_scale=0.1
        )
    linear.add_module("peftx", nn.ModuleList())
    with pytest.raises(UnsupportedError, match="carries peftx"):
        QuantLinear.from_linear(linear, bits=8)


# -- calibration --------------------------------------------------------------------------------------------


def tiny_models() -> dict[str, tuple[nn.Module, list[nn.Module], list[dict[str, Tensor]]]]:
    torch.manual_seed(0)
    ids = [torch.randint(1, 97, (2, n)) for n in (6, 6, 9)]
    plain = [{"input_ids": i} for i in ids]
    padded = [
        {"input_ids": i, "attention_mask": (torch.arange(i.shape[1]) > 1).long().expand(i.shape)} for i in ids
    ]
    size = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": None}
    first = llama()
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(**size, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    )
    gemma = AutoModelForCausalLM.from_config(
        Gemma3TextConfig(
            **size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    )
    t5 = T5EncoderModel(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4))
    return {
        "llama": (first, list(first.model.layers), plain),
        "llama-padded": (first, list(first.model.layers), padded),
        "gpt2": (gpt2, list(gpt2.transformer.h), padded),
        "gemma3-mixed": (gemma, list(gemma.model.layers), padded),
        "t5-encoder": (t5, list(t5.encoder.block), padded),
    }


@pytest.mark.parametrize("name", ["llama", "llama-padded", "gpt2", "gemma3-mixed", "t5-encoder"])
def test_a_walk_gives_every_block_what_the_changed_model_gives_it(name: str) -> None:
    model, blocks, batches = tiny_models()[name]
    model.train()  # a walk must switch dropout off, and the mode comes back
    outputs: list[list[Tensor]] = []

    def shrink(number: int, block: nn.Module, inputs: BlockInputs) -> None:
        assert block is blocks[number]
        assert len(inputs) == len(batches)
        before = list(inputs.replay(block))
        with torch.no_grad():
            for module in block.modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    module.weight.mul_(0.9)
        after = list(inputs.replay(block))
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        outputs.append(after)

    walk_blocks(model, blocks, batches, on_block=shrink)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)

    model.eval()
    seen: list[list[Tensor]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        block.register_forward_hook(
            lambda m, a, out, n=number: seen[n].append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for got, want in zip(outputs, seen, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_walk_runs_the_model_once_and_then_stops_at_the_first_block() -> None:
    model, blocks, batches = tiny_models()["llama"]
    calls = [0] * len(blocks)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda m, a, o, n=number: calls.__setitem__(n, calls[n] + 1))
    told: list[tuple[int, int]] = []
    calibration = Calibration(batches=batches, progress=lambda done, of: told.append((done, of)))
    calibration.walk(model, blocks, lambda number, block, inputs: None)
    # One full pass, then each block but the last is run on the three batches.
    assert calls == [4, 4, 1]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert calibration.tokens == 2 * (6 + 6 + 9)


def test_a_block_that_is_advanced_runs_no_more() -> None:
    model, blocks, batches = tiny_models()["llama"]
    found: dict[bool, list[Tensor]] = {}
    calls = [0] * len(blocks)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda m, a, o, n=number: calls.__setitem__(n, calls[n] + 1))
    for advancing in (False, True):
        outputs = found.setdefault(advancing, [])

        def look(
            number: int, block: nn.Module, inputs: BlockInputs, out: list = outputs, go: bool = advancing
        ) -> None:
            if number == 1:  # a walk goes on where it was left
                out.append(next(inputs.advance(block) if go else inputs.replay(block)).clone())
                return
            out.extend(output.clone() for output in (inputs.advance(block) if go else inputs.replay(block)))
            if go:
                with pytest.raises(UnsupportedError, match="inputs of batch 0 are gone"):
                    next(inputs.replay(block))

        calls[:] = [0] * len(blocks)
        walk_blocks(model, blocks, batches, on_block=look)
        assert calls == ([4, 4, 4] if advancing else [7, 5, 4])
    assert all(map(torch.equal, found[True], found[False]))


def test_on_block_may_train_the_block() -> None:
    model, blocks, batches = tiny_models()["llama"]

    def train(number: int, block: nn.Module, inputs: BlockInputs) -> None:
        for args, kwargs in inputs:
            block(*args, **kwargs).square().mean().backward()
        assert all(p.grad is not None for p in block.parameters())
        model.zero_grad()

    walk_blocks(model, blocks, batches, on_block=train)


def test_a_walk_refuses_what_is_no_chain() -> None:
    model, blocks, batches = tiny_models()["llama"]

    def nothing(number: int, block: nn.Module, inputs: BlockInputs) -> None:
        pass

    with pytest.raises(ArchitectureError, match="block 1 ran as number 0"):
        walk_blocks(model, [blocks[1], blocks[0], blocks[2]], batches, on_block=nothing)
    with pytest.raises(ArchitectureError, match="block 1 does not get what block 0 returned"):
        walk_blocks(model, [blocks[0], blocks[2]], batches, on_block=nothing)
    with pytest.raises(ArchitectureError, match="called 0 of its 1"):
        walk_blocks(model, [copy.deepcopy(blocks[0])], batches, on_block=nothing)
    with pytest.raises(DataError, match="got none"):
        walk_blocks(model, blocks, [], on_block=nothing)
    with pytest.raises(UnsupportedError, match="no blocks"):
        walk_blocks(model, [], batches, on_block=nothing)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_observed_extremes_and_no_hook_left_behind() -> None:
    layer = nn.Linear(3, 2, bias=False)
    nn.init.ones_(layer.weight)
    first, second = torch.tensor([[[1.0, -4.0, 0.5]]]), torch.tensor([[2.0, 3.0, -0.25], [0.0, 0.0, 0.0]])
    stats = observe({"layer": layer, "idle": nn.Linear(3, 3)}, lambda: (layer(first), layer(second)))
    seen = stats["layer"]
    assert seen.tokens == 3
    assert float(seen.absmax) == 4.0
    assert seen.channel_absmax.tolist() == [2.0, 4.0, 0.5]
    assert seen.channel_min.tolist() == [0.0, -4.0, -0.25]
    assert seen.channel_max.tolist() == [2.0, 3.0, 0.5]
    assert seen.token_absmax.tolist() == [4.0, 3.0, 0.0]
    assert stats["idle"].tokens == 0
    with pytest.raises(UnsupportedError, match="'idle' saw no tokens"):
        _ = stats["idle"].absmax
    out = observe({"layer": layer}, lambda: layer(first), of="output")["layer"]
    assert out.channel_absmax.tolist() == [2.5, 2.5]
    with pytest.raises(RuntimeError, match="shapes"), observing({"layer": layer}):
        layer(torch.randn(2, 5))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_what_enters_layers_is_seen_as_it_is_and_no_hook_left_behind() -> None:
    first, second, x = nn.Linear(3, 2), nn.Linear(2, 2), torch.randn(4, 3)
    expected, seen = second(first(x)), []

    def see(module: nn.Module, rows: Tensor) -> Tensor:
        seen.append((module, rows))
        return rows * 2

    with entering([second, first], see):
        y = second(first(x))
    assert torch.equal(y, expected)  # what the function returns changes nothing
    assert [module for module, _ in seen] == [first, second]
    assert seen[0][1] is x
    with pytest.raises(RuntimeError, match="shapes"), entering([first], lambda *_: None):
        first(torch.randn(4, 5))
    first(x)
    assert len(seen) == 2
    assert not first._forward_pre_hooks


def test_clipping_scale_is_the_best_of_the_grid() -> None:
    x = torch.cat([torch.randn(2000), torch.tensor([30.0])])

    def error(scale: Tensor) -> float:
        return float((x - scale * torch.round(x / scale).clamp(-8, 7)).square().sum())

    scale = mse_clip_scale(x, bits=4, grid=50)
    candidates = [30.0 / 7 * i / 50 for i in range(1, 51)]
    best = min(error(torch.tensor(c)) for c in candidates)
    assert error(scale) == pytest.approx(best, rel=1e-5)
    assert float(scale) < 0.5 * 30 / 7  # one outlier is worth clipping
    # On a grid of its own steps nothing is gained by clipping.
    assert float(mse_clip_scale(torch.arange(-7.0, 8.0), bits=4)) == 1.0
    assert float(mse_clip_scale(torch.zeros(3), bits=4)) == 1.0


def test_clipping_scale_by_rows_and_by_histogram() -> None:
    x = torch.randn(3, 40)
    by_rows = mse_clip_scale(x, bits=3, per_row=True)
    assert torch.equal(by_rows, torch.stack([mse_clip_scale(row, bits=3) for row in x]))
    values, counts = torch.tensor([-2.0, 0.3, 1.0, 5.0]), torch.tensor([3, 50, 4, 1])
    spelled = values.repeat_interleave(counts)
    weighted = mse_clip_scale(values, bits=3, counts=counts)
    torch.testing.assert_close(weighted, mse_clip_scale(spelled, bits=3))
    assert float(weighted) != float(mse_clip_scale(values, bits=3))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_leaves_out_what_cannot_win(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and stopped early, it finds what trying each scale on each row finds."""
    x = torch.randn(7, 300) * torch.logspace(-3, 3, 7)[:, None]
    x[2, 5], x[3], x[4, :] = 900.0, 0.0, torch.randint(-1, 2, (300,)).float()
    x[5] = x[5] ** 3
    counts = torch.rand(300) ** 4
    low, high = integer_range(bits, symmetric=True)

    def error(row: Tensor, scale: Tensor) -> float:
        return float((counts * (row - scale * torch.round(row / scale).clamp(low, high)).square()).sum())

    module = sys.modules["peftx.toolkits.compression.observe"]  # its function of that name hides it
    monkeypatch.setattr(module, "_CHUNK", 700)  # two rows and a half
    tried: list[Tensor] = []
    addcmul = torch.addcmul
    monkeypatch.setattr(torch, "addcmul", lambda x, *a, **k: (tried.append(x), addcmul(x, *a, **k))[1])
    found = mse_clip_scale(x, bits=bits, counts=counts, per_row=True)
    for row, scale in zip(x, found, strict=True):
        top = row.abs().max() / high if row.any() else torch.tensor(1.0)
        errors = [error(row, top * (i / 100)) for i in range(1, 101)]
        assert error(row, scale) <= min(errors) * (1 + 1e-5)
        assert float(scale / top * 100) == pytest.approx(round(float(scale / top * 100)), abs=1e-3)
    assert float(found[3]) == 1.0
    assert len(tried) < 4 * 100


# -- rotations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 56, 60, 64, 96, 112, 192, 448])
def test_hadamard_is_exact(n: int) -> None:
    signs = hadamard_signs(n).int()
    assert set(signs.unique().tolist()) <= {-1, 1}
    assert torch.equal(signs @ signs.T, n * torch.eye(n, dtype=torch.int32))
    rotation = hadamard(n, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 12, 16, 20, 28, 40, 64, 96, 192, 768, 2048])
def test_fwht_is_the_matrix(n: int) -> None:
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    rotation = hadamard(n, dtype=torch.float64)
    torch.testing.assert_close(fwht(x), x @ rotation.T)
    torch.testing.assert_close(fwht(x, inverse=True), x @ rotation)
    torch.testing.assert_close(fwht(fwht(x), inverse=True), x)
    upstream = torch.randn_like(x)
    fwht(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ rotation)


def test_fwht_is_no_other_after_a_plan_or_a_trace() -> None:
    """The matrices are kept from call to call, whoever called first."""
    x = torch.randn(3, 44 * 8)
    with torch.device("meta"):
        assert fwht(torch.randn(3, 44 * 8)).is_meta
    expected = x @ hadamard(44 * 8).T
    torch.testing.assert_close(torch.compile(fwht, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(fwht(x), expected)
    with torch.inference_mode():
        fwht(torch.randn(2, 48))
    y = fwht(torch.randn(2, 48, requires_grad=True))
    y.sum().backward()
    assert fwht(torch.randn(0, 48)).shape == (0, 48)


def test_fwht_by_hand_and_in_blocks() -> None:
    assert fwht(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5.0, -1.0, -2.0, 0.0]
    x = torch.randn(5, 52, dtype=torch.float64)
    block = torch.block_diag(*[hadamard(4, dtype=torch.float64)] * 13)
    torch.testing.assert_close(fwht(x, block_size=4), x @ block.T)
    assert fwht(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="does not divide"):
        fwht(x, block_size=8)


def test_orders_that_do_not_exist_are_named_with_their_neighbours() -> None:
    missing = [n for n in range(4, 201, 4) if not hadamard_exists(n)]
    assert missing == [52, 92, 100, 116, 156, 172, 184, 188]
    with pytest.raises(UnsupportedError, match=r"order 52 .* nearest orders are 48 and 56"):
        hadamard(52)
    for n in (0, 3, 6, 14):
        with pytest.raises(UnsupportedError, match=f"order {n} "):
            hadamard(n)


def test_a_rotation_moves_between_weight_and_input() -> None:
    """W x = (W R^T)(R x): the use that rotations have before quantization."""
    linear = nn.Linear(24, 6, bias=False).double()
    x = torch.randn(4, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(F.linear(fwht(x), fwht(linear.weight)), linear(x))


class Rounds(Plugin):
    """Changes the model at once, and looks at no text."""

    claims = {Claim.TRAINS_BASE}

    @hookimpl
    def compress(self, model: ModelView) -> None:
        for site in model.linears("mlp.down"):
            site.replace(NarrowLinear.of(site.weight.round(decimals=1), None))


@pytest.mark.parametrize("name", ["signround", "prefixquant", "cfsp", "c-rome", "longrope"])
def test_too_little_text_is_refused_before_anything_is_compressed(name: str) -> None:
    """By the claim alone: no method has to ask. A token less than it needs is refused, whoever stands before."""
    cls = Registry().load(name)
    assert Claim.NEEDS_CALIBRATION in cls.claims, "else take another"
    stack = Stack(tiny("llama"), [Rounds(), cls(**cls.example)], tokenizer=tiny_tokenizer())
    before = {key: tensor.clone() for key, tensor in stack.model.state_dict().items()}
    least, text = (
        cls.least_tokens,
        "Once upon a time there was a film that was good, and long enough for two.",
    )
    with pytest.raises(DataError, match=f"{name}: {least - 1} tokens .* too few, it needs at least {least}"):
        stack.compress([text], samples=1, length=least - 1)
    after = stack.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("part", [{"rows": [0, 3]}, {"columns": [1, 2, 4]}, {}])
def test_a_layer_without_some_rows_or_columns_is_one_with_zeros(
    part: dict[str, list[int]], bias: bool
) -> None:
    rows, columns = part.get("rows", range(4)), part.get("columns", range(5))
    shape = (len(rows), len(columns))
    layer = Narrow(in_features=5, out_features=4, shape=shape, bias=bias, dtype="float64")
    layer.W.copy_(torch.randn(*shape))
    if layer.b is not None:
        layer.b.copy_(torch.randn(shape[0]))
    for name, places in part.items():
        layer.get_buffer(name).copy_(torch.tensor(places))
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.weight[list(rows)][:, list(columns)], layer.W)
    assert int((layer.weight != 0).sum()) == layer.W.numel()
    assert Narrow(**layer.geometry()).geometry() == layer.geometry()
