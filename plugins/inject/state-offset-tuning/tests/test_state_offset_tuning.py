from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

import peftx
from peftx import Stack
from peftx.errors import ArchitectureError, PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.toolkits.compression import QuantLinear
from peftx_lora import Lora
from peftx_state_offset_tuning import Call, Gate, OutputOffset, Readout, StateOffset, StateOffsetTuning

test_conformance = conformance("state-offset-tuning")

VARIANTS = [{"variant": "h"}, {"variant": "h", "rank": 2}, {"variant": "y"}]

# What the official `SuffixTuningBiasProcessor` gives for Z, C, X, G and the offsets below (float32): its output, then
# the gradients of z, of C and of its parameters. Made once by running that class outside this repository; the README
# says which commit.
Z = torch.tensor([[[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]]])
C = torch.tensor([[[1.0, -0.5], [0.25, 2.0]]])
X = torch.tensor([[[0.1, 0.2, 0.3], [-0.4, 0.5, -0.6]]])
G = torch.tensor([[[1.0, -2.0, 0.5], [0.25, 1.0, -1.0]]])
H = torch.tensor([[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]])
OFFICIAL = {
    "h": (
        [[0.16224593, 0.17310585, -1.1092753], [-0.85988557, 0.62297612, -0.85866219]],
        [[0.14799224, -0.0144659, -0.43631372], [-0.09762133, 0.54574627, -0.16920505]],
        [[-0.24791068, 0.68138546], [-0.0474857, 0.13926916]],
        [[[0.38787729, 0.45756596], [0.57301891, 0.01214683], [0.94095099, 0.04083341]]],
    ),
    "low rank": (
        [[0.4890371, 0.36808839, 4.70398521], [-1.31977117, 0.55270404, -0.23907602]],
        [[0.92495149, 0.09041186, 1.36348033], [-0.19524266, 0.23389126, 0.23610006]],
        [[1.80388236, -0.90194118], [0.71755028, -0.35877514]],
        [[[0.99163491, 0.26657969]], [[0.31818861], [1.13389099], [1.84106851]]],
    ),
    "y": (
        [[0.13112298, 0.11931757, -0.58079702], [-0.27736384, 0.54216325, -0.47969204]],
        [[0.07399612, -0.04339769, -0.27269608], [0.02603236, 0.18711302, 0.07870002]],
        None,
        [[0.61782008, 0.67842697, 1.12141299]],
    ),
}


def close(one: Tensor, two: Tensor | list[object], tolerance: float = 2e-6) -> bool:
    return torch.allclose(one, torch.as_tensor(two), rtol=tolerance, atol=tolerance)


def stack(spread: float = 0.5, seed: int = 1, **options: object) -> Stack:
    """On a tiny Mamba, with offsets far from their start."""
    built = Stack(tiny("mamba"), [StateOffsetTuning(**options)])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.ledger.parameters("state-offset-tuning"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return built


def mixer(layer: nn.Module, x: Tensor, offset: Tensor | float = 0.0, first: Tensor | float = 0.0) -> Tensor:
    """The layer by its equations, step by step: x [T, hidden], offset and first state [d, n]."""
    u, z = layer.in_proj(x).chunk(2, -1)  # [T, d]
    k = layer.conv_kernel_size
    padded = F.pad(u.t(), (k - 1, 0))  # [d, T + k - 1]
    u = F.silu(F.conv1d(padded, layer.conv1d.weight, layer.conv1d.bias, groups=len(padded))).t()
    low, B, read = layer.x_proj(u).split(
        (layer.time_step_rank, layer.ssm_state_size, layer.ssm_state_size), -1
    )
    dt = F.softplus(F.linear(low, layer.dt_proj.weight, layer.dt_proj.bias))
    A, h, ys = -layer.A_log.exp(), first, []
    for t in range(len(x)):
        h = (dt[t, :, None] * A).exp() * h + dt[t, :, None] * B[t] * u[t, :, None]
        ys.append((h + offset) @ read[t] + layer.D * u[t])
    return layer.out_proj(torch.stack(ys) * F.silu(z))


@pytest.mark.parametrize("case", OFFICIAL)
def test_equals_the_official_class(case: str) -> None:
    call = Call()
    offset = (
        OutputOffset(call, 3) if case == "y" else StateOffset(call, 3, 2, rank=None if case == "h" else 1)
    )
    values = {"h": [H], "low rank": [torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5], [-0.25], [1.0]])]}
    for parameter, value in zip(offset.parameters(), values.get(case, [H[:, 0]]), strict=True):
        parameter.data = value.clone()
    z, read = Z.clone().requires_grad_(), C.clone().requires_grad_()
    Gate(call)(X, torch.cat((torch.zeros_like(z), z), -1))  # [u ; z]
    if case != "y":
        Readout(call, 2)(X, torch.cat((torch.zeros(1, 2, 7), read), -1))  # [dt ; B ; C]
    out = offset.pre(X)
    out.backward(G)
    y, grad_z, grad_C, grads = OFFICIAL[case]
    assert close(out[0], y)
    assert close(z.grad[0], grad_z)
    assert read.grad is None if grad_C is None else close(read.grad[0], grad_C)
    assert all(close(p.grad, grad) for p, grad in zip(offset.parameters(), grads, strict=True))


@pytest.mark.parametrize("length", [1, 7])
def test_a_layer_is_its_equations(length: int) -> None:
    plain = tiny("mamba").backbone.layers[1].mixer
    built = stack()
    (_, offset) = built.ledger.parameters("state-offset-tuning")
    x = torch.randn(length, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = built.model.backbone.layers[1].mixer(x[None])[0]
        assert close(found, mixer(plain, x, offset), 1e-5)
        assert not close(found, mixer(plain, x), 1e-2)


def test_the_effect_of_an_offset_stays_and_that_of_a_first_state_fades() -> None:
    built = stack()
    (offset, _) = built.ledger.parameters("state-offset-tuning")
    plain, layer = tiny("mamba").backbone.layers[0].mixer, built.model.backbone.layers[0].mixer
    same = torch.randn(1, 32, generator=torch.Generator().manual_seed(2)).expand(24, -1)
    with torch.no_grad():
        stays = (layer(same[None]) - plain(same[None]))[0][3:].norm(
            dim=-1
        )  # from where the convolution is full
        fades = (mixer(plain, same, first=offset) - mixer(plain, same))[3:].norm(dim=-1)
    assert stays.min() > 0.1
    assert close(stays, stays[:1].expand(21), 1e-4)
    assert bool((fades[1:] < fades[:-1]).all())
    assert fades[-1] < 0.9 * fades[0]


@pytest.mark.parametrize("options", VARIANTS, ids=["h", "h-low-rank", "y"])
def test_steps_of_decoding_equal_the_scan(options: dict[str, object]) -> None:
    model = stack(**options).model
    ids = example_inputs(model)["input_ids"]
    with torch.no_grad():
        scan = model(ids, use_cache=False).logits
        out = model(ids[:, :2], use_cache=True)
        steps = [out.logits]
        for t in range(2, ids.shape[1]):
            out = model(ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
            steps.append(out.logits)
        base = tiny("mamba")(ids).logits
    assert close(torch.cat(steps, 1), scan, 1e-5)
    assert (scan - base).abs().max() > 0.1


def test_states_of_a_layer_are_those_of_the_base() -> None:
    """The offset is not carried on: caches of the first layer stay valid when it changes."""
    built = stack()
    ids = example_inputs(built.model)["input_ids"]
    with torch.no_grad():
        caches = [built.model(ids, use_cache=True).cache_params]
        with built.disabled():
            caches.append(built.model(ids, use_cache=True).cache_params)
    first, second = ([cache.get_recurrent_state(i, state_idx=0) for cache in caches] for i in (0, 1))
    assert torch.equal(*first)
    assert (second[0] - second[1]).abs().max() > 1e-3


def test_A_starts_kaiming_uniform() -> None:
    A = StateOffset(Call(), 64, 16, rank=32).A.detach()  # 512 numbers
    for top in (float(A.max()), -float(A.min())):
        assert 0.9 / 16**0.5 < top <= 1 / 16**0.5


def test_one_state_that_is_read_by_one_is_variant_y() -> None:
    call = Call(z=Z, C=torch.ones(1, 2, 1))
    state, output = StateOffset(call, 3, 1, rank=None), OutputOffset(call, 3)
    state.H.data, output.y.data = H[:, :1].clone(), H[:, 0].clone()
    found = state.pre(X)
    call.z = Z
    assert torch.equal(found, output.pre(X))


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 24 * 1536 * 16), ({"rank": 4}, 24 * 4 * (1536 + 16)), ({"variant": "y"}, 24 * 1536)],
)
def test_trained_parameters_of_mamba_130m(options: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280))
    assert Stack(model, [StateOffsetTuning(**options)]).trainable_parameters() == count


def test_a_low_rank_update_of_the_input_may_come_before() -> None:
    built = Stack(tiny("mamba"), [Lora(rank=2, targets="ssm.in"), StateOffsetTuning()])
    torch.manual_seed(1)
    with torch.no_grad():
        for id in ("lora", "state-offset-tuning"):
            for parameter in built.ledger.parameters(id):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        ids = example_inputs(built.model)["input_ids"]
        beside = built.model(ids).logits
        built.merge("lora")
        assert close(built.model(ids).logits, beside, 2e-5)  # z is that of the updated layer


def test_a_low_rank_update_of_everything_may_come_before() -> None:
    built = Stack(tiny("mamba"), [Lora(rank=2), StateOffsetTuning()])
    torch.manual_seed(1)
    with torch.no_grad():
        for id in ("lora", "state-offset-tuning"):
            for parameter in built.ledger.parameters(id):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        ids = example_inputs(built.model)["input_ids"]
        beside = built.model(ids).logits
        built.merge("lora")
        assert close(built.model(ids).logits, beside, 2e-5)


@pytest.mark.parametrize("target", ["ssm.in", "ssm.x", "ssm.out"])
@pytest.mark.parametrize("first", [False, True])
def test_beside_a_low_rank_update_training_and_evaluation_compute_the_same(first: bool, target: str) -> None:
    """Where no gradient is recorded, the update writes into what `Gate` and `Readout` have seen."""
    plugins = [StateOffsetTuning(), Lora(rank=2, targets=target)]
    built = Stack(tiny("mamba"), plugins if first else plugins[::-1])
    torch.manual_seed(1)
    with torch.no_grad():
        for id in built.plugins:
            for parameter in built.ledger.parameters(id):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ids = example_inputs(built.model)["input_ids"]
    recorded = built.model(ids).logits
    with torch.no_grad():
        assert close(built.model(ids).logits, recorded, 1e-5)


@pytest.mark.parametrize("packs", [False, True])
def test_a_fused_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    """Where mamba-ssm is installed, training computes the layer from its weights in one kernel."""
    monkeypatch.setattr(
        modeling_mamba, "mamba_inner_fn", lambda xz, *_, **__: xz.transpose(1, 2)[..., :32].contiguous()
    )
    model = Stack(packed(), [StateOffsetTuning()]).model if packs else stack().model
    ids = example_inputs(model)["input_ids"]
    assert model(ids).logits.isfinite().all()
    with pytest.raises(UnsupportedError, match="state-offset-tuning: a fused kernel"):
        model.train()(ids)


def packed(*, keep: bool = False) -> MambaForCausalLM:
    """A tiny Mamba on weights of 8 bits; `keep`: rounded and not packed."""
    model = tiny("mamba")
    for layer in model.backbone.layers:
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            linear = layer.mixer.get_submodule(name)
            integers = QuantLinear.from_linear(linear, bits=8)
            if keep:
                linear.weight.data = integers.weight.clone()
            else:
                setattr(layer.mixer, name, integers)
    return model


@pytest.mark.parametrize("options", VARIANTS, ids=["h", "h-low-rank", "y"])
def test_over_packed_weights(options: dict[str, object], tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
    stacks = [
        Stack(packed(keep=keep), [StateOffsetTuning(**options)], tokenizer=tiny_tokenizer())
        for keep in (False, True)
    ]
    inputs = example_inputs(stacks[0].model, padding="left")
    with torch.no_grad():
        assert torch.equal(output_of(stacks[0].model, inputs), output_of(packed(), inputs))
    for one in stacks:
        one.train(rows, steps=3, batch_size=4, learning_rate=1e-1)
    ours, plain = (list(one.ledger.parameters("state-offset-tuning")) for one in stacks)
    assert all(close(a.detach(), b.detach(), 1e-4) for a, b in zip(ours, plain, strict=True))
    with torch.no_grad():
        found = output_of(stacks[0].model, inputs)
        assert close(found, output_of(stacks[1].model, inputs), 1e-3)
        assert not close(found, output_of(packed(), inputs), 1e-2)
        whole, steps = (
            stacks[0].generate("1 + 1 =", max_new_tokens=6, use_cache=use) for use in (False, True)
        )
    assert whole == steps
    bundle = stacks[0].save(tmp_path / "bundle")
    again = peftx.load(bundle, model=packed(), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        assert torch.equal(output_of(again.model, inputs), found)
    stacks[0].remove("state-offset-tuning")
    with torch.no_grad():
        assert torch.equal(output_of(stacks[0].model, inputs), output_of(packed(), inputs))


def test_models_without_a_state_are_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"state-offset-tuning: llama has no 'ssm\.in'"):
        Stack(tiny("llama"), [StateOffsetTuning()])


@pytest.mark.parametrize(
    ("options", "match"),
    [({"variant": "x"}, "variant"), ({"rank": 0}, "rank"), ({"targets": "ssm"}, "targets")],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"StateOffsetTuning: {match}"):
        StateOffsetTuning(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 5}, "rank 5 exceeds the 64x4 state"),
        ({"variant": "y", "rank": 2}, "rank 2 with variant y"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(PeftxError, match=f"state-offset-tuning: {match}"):
        stack(**options)


def test_a_rank_may_be_that_of_the_state() -> None:
    assert stack(rank=4).trainable_parameters()  # of 64x4
