from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftx import Stack
from peftx.errors import PeftxError
from peftx.kernel.parts import DeltaPart
from peftx.testing import conformance, tiny
from peftx.testing.models import example_inputs, output_of
from peftx_lokr import LohaDelta, Lokr, LokrConfig, LokrDelta, split

test_conformance = conformance("lokr")
test_conformance_of_both_decomposed = conformance(
    "lokr", options={"rank": 1, "factor": 4, "decompose_both": True}, models=["llama", "gpt2"]
)
test_conformance_of_hadamard = conformance(
    "lokr", options={"rank": 2, "form": "hadamard"}, models=["llama", "mixtral"]
)

NAMES = {  # where our targets stand, for PEFT
    "llama": ("all", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    "bert": ("attention.q,v mlp.up", "query value intermediate.dense"),
}
FORMS = {"kronecker": LokrDelta, "hadamard": LohaDelta}


def filled(delta: nn.Module, std: float = 0.5) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in delta.double().parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return delta


def lokr(fan_in: int, out: int, *, scale: float = 1.0, batch: tuple[int, ...] = (), **options: Any) -> Any:
    """A delta with random parameters, in float64."""
    config = LokrConfig(**options)
    return filled(FORMS[config.form](fan_in, out, config, scale=scale, batch=batch))


def product_of(delta: Any, prefix: str) -> tuple[Tensor, Tensor]:
    """w1 and w2 in their plainest form."""
    own = {name: p.detach() for name, p in delta.named_parameters()}
    return tuple(
        own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"]
        for name in (f"{prefix}_w1", f"{prefix}_w2")
    )


@pytest.mark.parametrize("arch", list(NAMES))
@pytest.mark.parametrize(
    ("ours", "peft"),
    [
        ({}, {}),  # whole matrices: the tiny ones are smaller than twice the rank
        ({"rank": 2}, {"r": 2, "alpha": 2}),
        ({"rank": 2, "alpha": 5.0}, {"r": 2, "alpha": 5}),
        ({"rank": 1, "decompose_both": True}, {"r": 1, "alpha": 1, "decompose_both": True}),
        ({"rank": 2, "factor": 4}, {"r": 2, "alpha": 2, "decompose_factor": 4}),
        ({"rank": 2, "factor": 7}, {"r": 2, "alpha": 2, "decompose_factor": 7}),
        ({"form": "hadamard", "rank": 4}, {"r": 4, "alpha": 4}),
        ({"form": "hadamard", "rank": 2, "alpha": 3.0}, {"r": 2, "alpha": 3}),
    ],
    ids=["whole", "low", "alpha", "both", "factor", "nearest", "loha", "loha-alpha"],
)
def test_equals_lokr_and_loha_of_peft(arch: str, ours: dict[str, Any], peft: dict[str, Any]) -> None:
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    targets, names = NAMES[arch]
    config = LoHaConfig if ours.get("form") == "hadamard" else LoKrConfig
    torch.manual_seed(3)
    theirs = get_peft_model(
        tiny(arch), config(target_modules=names.split(), init_weights=False, **peft)
    ).eval()
    stack = Stack(tiny(arch), [Lokr(targets=targets, **ours)])
    found = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    for part in stack.ledger.of("lokr", DeltaPart):
        for name, parameter in part.module.named_parameters():
            parameter.data.copy_(found.pop(f"base_model.model.{part.path}.{name}"))
    assert not found
    inputs = example_inputs(stack.model)
    base = output_of(tiny(arch), inputs)
    for dtype, most in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        with torch.no_grad():
            mine, wanted = output_of(stack.model.to(dtype), inputs), output_of(theirs.to(dtype), inputs)
        assert (wanted - base).abs().max() > 0.02
        assert float((mine - wanted).abs().max() / wanted.abs().max()) < most


@pytest.mark.parametrize("decompose_both", [False, True])
def test_trains_as_lokr_of_peft_does(decompose_both: bool) -> None:
    """The same gradients: four steps of SGD end in the same numbers."""
    from peft import LoKrConfig, get_peft_model

    targets, names = NAMES["llama"]
    options = {"target_modules": names.split(), "init_weights": False, "decompose_both": decompose_both}
    theirs = get_peft_model(tiny("llama"), LoKrConfig(r=1, alpha=2, **options))
    stack = Stack(tiny("llama"), [Lokr(rank=1, alpha=2, decompose_both=decompose_both, targets=targets)])
    found = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    pairs = [
        (parameter, found[f"base_model.model.{part.path}.{name}"])
        for part in stack.ledger.of("lokr", DeltaPart)
        for name, parameter in part.module.named_parameters()
    ]
    for ours, other in pairs:
        ours.data.copy_(other)
    start = torch.cat([ours.detach().flatten() for ours, _ in pairs])
    batch = dict(example_inputs(stack.model))
    batch["labels"] = batch["input_ids"]
    optimizers = [torch.optim.SGD(group, lr=0.1) for group in zip(*pairs, strict=True)]
    for _ in range(4):
        stack.train_step(batch, optimizer=optimizers[0])
        theirs(**batch).loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert all(torch.allclose(ours, other, atol=1e-6) for ours, other in pairs)
    assert (torch.cat([ours.detach().flatten() for ours, _ in pairs]) - start).abs().max() > 1e-2


def test_splits_as_peft_does() -> None:
    from peft.tuners.lokr.layer import factorization

    for dimension in (1, 2, 7, 12, 36, 48, 127, 128, 688, 768, 11008):
        for factor in (None, 1, 2, 3, 4, 5, 7, 8, 16, 200):
            assert split(dimension, factor) == factorization(dimension, factor or -1)


def test_kronecker_by_hand() -> None:
    delta = LokrDelta(4, 4, LokrConfig(factor=2), scale=3.0)
    with torch.no_grad():
        delta.lokr_w1.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        delta.lokr_w2.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    expected = 3 * torch.tensor([[0, 1, 0, 2], [1, 0, 2, 0], [0, 0, 0, -1], [0, 0, -1, 0]])
    assert torch.equal(delta.fold(torch.zeros(4, 4), None)[0], expected.float())
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    assert delta(x, torch.ones(1, 4)).tolist() == [[6031.0, 604.0, -2999.0, -299.0]]


@pytest.mark.parametrize(("fan_in", "out"), [(12, 12), (12, 8), (6, 35), (7, 16)])
@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"rank": 1, "decompose_both": True}, {"factor": 2}])
def test_is_the_kronecker_product(fan_in: int, out: int, options: dict[str, Any]) -> None:
    delta = lokr(fan_in, out, scale=1.5, **options)
    w1, w2 = product_of(delta, "lokr")
    assert (len(w1), w1.shape[1]) == (
        split(out, options.get("factor"))[0],
        split(fan_in, options.get("factor"))[0],
    )
    W = 1.5 * torch.kron(w1, w2)
    weight, bias = torch.randn(out, fan_in, dtype=torch.float64), torch.randn(out)
    new, same = delta.fold(weight, bias)
    assert torch.allclose(new, weight + W)
    assert same is bias
    x, y = torch.randn(2, 3, fan_in, dtype=torch.float64), torch.randn(2, 3, out, dtype=torch.float64)
    assert torch.allclose(delta(x, y), y + x @ W.mT)


def test_rank_is_the_product_of_the_ranks() -> None:
    assert torch.linalg.matrix_rank(lokr(36, 36).update()) == 36  # whole, with 72 numbers
    assert torch.linalg.matrix_rank(lokr(36, 36, rank=2).update()) == 6 * 2
    assert torch.linalg.matrix_rank(lokr(36, 36, rank=2, decompose_both=True).update()) == 2 * 2


def test_rank_of_hadamard_is_up_to_r_squared() -> None:
    delta = lokr(24, 20, form="hadamard", rank=3, scale=2.0)
    first, second = product_of(delta, "hada")
    assert torch.linalg.matrix_rank(first) == 3
    assert torch.linalg.matrix_rank(delta.update()) == 9
    assert torch.allclose(delta.update(), 2.0 * first * second)
    x, y = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64)
    assert torch.allclose(delta(x, y), y + 2.0 * x @ (first * second).mT)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"rank": 8}, {"lokr_w1": (4, 4), "lokr_w2_a": (32, 8), "lokr_w2_b": (8, 32)}),
        ({"rank": 15}, {"lokr_w1": (4, 4), "lokr_w2_a": (32, 15), "lokr_w2_b": (15, 32)}),
        ({"rank": 16}, {"lokr_w1": (4, 4), "lokr_w2": (32, 32)}),  # half of it
        ({"rank": 2, "decompose_both": True}, {"lokr_w1": (4, 4), "lokr_w2_a": (32, 2), "lokr_w2_b": (2, 32)}),
        (
            {"rank": 1, "decompose_both": True},
            {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (32, 1), "lokr_w2_b": (1, 32)},
        ),
    ],
)  # fmt: skip
def test_what_is_whole_and_what_has_low_rank(
    options: dict[str, Any], names: dict[str, tuple[int, ...]]
) -> None:
    delta = LokrDelta(128, 128, LokrConfig(factor=4, **options), scale=1.0)
    assert {name: tuple(p.shape) for name, p in delta.named_parameters()} == names
    wide = LokrDelta(128, 16, LokrConfig(factor=4, rank=8), scale=1.0)  # w2: 4 x 32, the longer side counts
    assert "lokr_w2_a" in dict(wide.named_parameters())


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("rank", [2, 100])
def test_starts_kaiming_but_the_last_factor(form: str, rank: int) -> None:
    torch.manual_seed(0)
    delta = FORMS[form](64 * 64, 64 * 64, LokrConfig(form=form, rank=rank), scale=1.0)
    own = dict(delta.named_parameters())
    last = "hada_w2_b" if form == "hadamard" else "lokr_w2_b" if rank == 2 else "lokr_w2"
    assert not own.pop(last).any()
    for parameter in own.values():
        bound = 1 / math.sqrt(parameter.shape[1])
        assert float(parameter.detach().abs().max()) <= bound
        assert float(parameter.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_number_of_parameters() -> None:
    """KronA's: whole factors, a c + b d."""
    stack = Stack(tiny("llama"), [Lokr(rank=64, targets="attention.q")])
    assert stack.trainable_parameters() == 2 * (4 * 4 + 8 * 8)  # 32 = 4 * 8
    stack = Stack(tiny("llama"), [Lokr(rank=3, form="hadamard", targets="attention.q")])
    assert stack.trainable_parameters() == 2 * (2 * 3 * (32 + 32))


def test_alpha_is_the_rank_by_default() -> None:
    (part,) = Stack(tiny("llama"), [Lokr(rank=4, targets="attention.q layers=0")]).ledger.of("lokr")
    assert part.module.scale == 1.0
    (part,) = Stack(tiny("llama"), [Lokr(rank=4, alpha=2, targets="attention.q layers=0")]).ledger.of("lokr")
    assert part.module.scale == 0.5


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 1, "decompose_both": True}, {"form": "hadamard"}])
def test_each_stacked_expert_has_its_own_factors(options: dict[str, Any]) -> None:
    delta = lokr(12, 6, batch=(4,), **options)
    update = delta.update()
    assert update.shape == (4, 6, 12)
    for expert in range(4):
        single = lokr(12, 6, **options)
        for name, parameter in single.named_parameters():
            parameter.data.copy_(getattr(delta, name)[expert])
        assert torch.allclose(update[expert], single.update())
    stack = Stack(tiny("mixtral"), [Lokr(**({"rank": 1} | options), targets="experts.down")])
    assert len(next(iter(stack.ledger.parameters("lokr")))) == 4


def test_factor_without_a_kronecker_product_is_refused() -> None:
    for options in ({"factor": 4}, {"decompose_both": True}):
        with pytest.raises(PeftxError, match="lokr: form hadamard has no Kronecker product"):
            Stack(tiny("llama"), [Lokr(form="hadamard", rank=2, **options)])


def test_rank_of_hadamard_above_the_matrix_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"lokr: rank 17 exceeds the 16x32 matrix") as caught:
        Stack(tiny("llama"), [Lokr(form="hadamard", rank=17, targets="attention.k")])
    assert "'!attention.k'" in str(caught.value.hint)
    Stack(tiny("llama"), [Lokr(form="hadamard", rank=16, targets="attention.k")])


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.inf}, {"form": "tensor"}, {"factor": 0}, {"targets": ""}, {"r": 8}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Lokr: {next(iter(options))}"):
        Lokr(**options)
