from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftx import Stack
from peftx.errors import PeftxError
from peftx.testing import conformance, tiny
from peftx.testing.models import example_inputs, output_of
from peftx.toolkits.injecting import LowRankDifference, principal
from peftx_pissa import Pissa

test_conformance = conformance("pissa")

PEFT: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "gpt2": {"target_modules": ["attn.c_proj", "c_fc", "mlp.c_proj"], "fan_in_fan_out": True},
    "bert": {"target_modules": r".*layer\..*(query|value|dense)"},
}
TARGETS = {"llama": "attention.q,v mlp.down", "gpt2": "attention.o mlp", "bert": "attention.q,v,o mlp"}


def deltas_of(stack: Stack) -> dict[str, LowRankDifference]:
    return {part.path: part.module for part in stack.ledger.of("pissa")}


def both(arch: str, niter: int | None = None) -> tuple[nn.Module, Stack]:
    """PEFT's model and ours at the start."""
    from peft import LoraConfig, get_peft_model

    init: Any = "pissa" if niter is None else f"pissa_niter_{niter}"
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, **PEFT[arch])
    theirs = get_peft_model(tiny(arch), config).eval()
    return theirs, Stack(tiny(arch), [Pissa(rank=4, alpha=6, targets=TARGETS[arch], niter=niter)])


def factors_of(theirs: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name.removeprefix("base_model.model."): (m.lora_A["default"].weight, m.lora_B["default"].weight)
        for name, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }


def outputs(*models: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [output_of(model, example_inputs(tiny(model.config.model_type))) for model in models]


def delta_of(weight: Tensor, *, rank: int, scale: float = 1.0, niter: int | None = None) -> LowRankDifference:
    delta = LowRankDifference(tuple(weight.shape), rank=rank, scale=scale)
    delta.start(*principal(weight, rank, scale=scale, niter=niter))
    return delta


# ---------------------------------------------------------------------------------------------- beside PEFT
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_starts_and_trains_as_peft_does(arch: str) -> None:
    theirs, stack = both(arch)
    deltas, factors = deltas_of(stack), factors_of(theirs)
    assert deltas.keys() == factors.keys()
    for path, (A, B) in factors.items():
        assert torch.equal(deltas[path].A, A)
        assert torch.equal(deltas[path].B, B)
    inputs = example_inputs(tiny(arch))
    models = (theirs, stack.model)
    optimizers = [torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-2) for m in models]
    for _ in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            output_of(model, inputs).square().mean().backward()
            optimizer.step()
        one, two, base = outputs(theirs, stack.model, tiny(arch))
        assert torch.allclose(one, two, atol=1e-5, rtol=0)
    assert (one - base).abs().max() > 1


@pytest.mark.parametrize("niter", [None, 4])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_equals_peft_on_its_weights(arch: str, niter: int | None) -> None:
    torch.manual_seed(0)
    theirs, stack = both(arch, niter)
    deltas = deltas_of(stack)
    with torch.no_grad():
        for path, (A, B) in factors_of(theirs).items():
            deltas[path].A0.copy_(A)  # of a randomized SVD each has its own
            deltas[path].B0.copy_(B)
            for ours, p in ((deltas[path].A, A), (deltas[path].B, B)):
                p.add_(torch.randn_like(p), alpha=0.1)
                ours.copy_(p)
    one, two, base = outputs(theirs, stack.model, tiny(arch))
    assert torch.allclose(one, two, atol=5e-6, rtol=0)  # PEFT rounds what is left of W
    merged = theirs.merge_and_unload()
    for path, delta in deltas.items():
        W, left = (m.get_submodule(path).weight.detach() for m in (tiny(arch), merged))
        folded = delta.fold(W.mT if arch == "gpt2" else W, None)[0]
        assert torch.allclose(folded, left.mT if arch == "gpt2" else left, atol=1e-6, rtol=0)
    assert (one - base).abs().max() > 1


def test_a_lora_of_twice_the_rank_holds_it() -> None:
    """The factors of `low_rank`, in PEFT's LoRA on the base as it was."""
    from peft import LoraConfig, get_peft_model

    _, stack = both("llama")
    for delta in deltas_of(stack).values():
        nn.init.normal_(delta.A, std=0.2)
        nn.init.normal_(delta.B, std=0.2)
    theirs = get_peft_model(tiny("llama"), LoraConfig(r=8, lora_alpha=12, **PEFT["llama"])).eval()
    with torch.no_grad():
        for path, (A, B) in factors_of(theirs).items():
            found = deltas_of(stack)[path].low_rank()
            assert found.scale == 1.5
            A.copy_(found.A)
            B.copy_(found.B)
    one, two = outputs(theirs, stack.model)
    assert torch.allclose(one, two, atol=5e-6, rtol=0)


# ------------------------------------------------------------------------------------------------ the start
def test_start_by_hand() -> None:
    delta = delta_of(torch.tensor([[0.0, 9.0], [1.0, 0.0]]), rank=1, scale=4.0)
    # S = (9, 1); sqrt(9 / 4) = 1.5; u = e1, v = e2, up to one sign
    assert delta.A.abs().tolist() == [[0.0, 1.5]]
    assert delta.B.abs().tolist() == [[1.5], [0.0]]
    assert torch.allclose(4.0 * delta.B @ delta.A, torch.tensor([[0.0, 9.0], [0.0, 0.0]]))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 12, 20)], ids=str)
def test_what_trains_is_the_principal_part(shape: tuple[int, ...]) -> None:
    """B0 A0 is the best approximation of W of its rank, in factors of equal size; the rest of the spectrum is left."""
    torch.manual_seed(0)
    W = torch.randn(shape)
    delta, S = delta_of(W, rank=5, scale=0.5), torch.linalg.svdvals(W)
    left = W - 0.5 * delta.B0 @ delta.A0
    assert torch.allclose(torch.linalg.svdvals(left)[..., :7], S[..., 5:], atol=1e-5)
    assert torch.allclose(delta.A.norm(dim=-1), (2 * S[..., :5]).sqrt(), atol=1e-5)
    assert torch.allclose(delta.B.norm(dim=-2), (2 * S[..., :5]).sqrt(), atol=1e-5)
    assert torch.equal(delta.A, delta.A0)
    assert torch.equal(delta.B, delta.B0)


def test_with_the_full_rank_all_of_the_weight_trains() -> None:
    torch.manual_seed(0)
    W = torch.randn(6, 9)
    delta = delta_of(W, rank=6)
    with torch.no_grad():
        delta.B.zero_()
    assert delta.fold(W, None)[0].abs().max() < 1e-5


def test_a_randomized_svd_comes_closer_with_each_iteration() -> None:
    torch.manual_seed(0)
    W = torch.randn(60, 50)
    best = torch.linalg.svdvals(W)[8:].norm()  # Eckart and Young
    left = [
        float((W - d.B0 @ d.A0).norm() / best - 1) for d in (delta_of(W, rank=8, niter=n) for n in (0, 2, 32))
    ]
    assert left[0] > left[1] > left[2] > -1e-5
    assert left[2] < 1e-3 < 0.02 < left[0]
    exact = delta_of(W, rank=8)
    assert float((W - exact.B0 @ exact.A0).norm() / best - 1) == pytest.approx(0, abs=1e-5)


def test_the_seed_of_the_stack_settles_a_randomized_svd() -> None:
    found = [deltas_of(Stack(tiny("llama"), [Pissa(rank=4, niter=1)])) for _ in range(2)]
    assert all(torch.equal(found[0][path].A, found[1][path].A) for path in found[0])


@pytest.mark.parametrize("niter", [None, 2])
def test_a_plan_on_the_meta_device(niter: int | None) -> None:
    with torch.device("meta"):
        stack = Stack(tiny("llama").to("meta"), [Pissa(rank=4, niter=niter)])
    sites = [s for s in stack.anatomy.sites if s.in_all]
    assert stack.trainable_parameters() == sum(4 * (s.in_features + s.out_features) for s in sites)


# ------------------------------------------------------------------------------------------------ the update
def moved(delta: LowRankDifference) -> LowRankDifference:
    with torch.no_grad():
        delta.A += torch.randn_like(delta.A)
        delta.B += torch.randn_like(delta.B)
    return delta


def test_equals_the_papers_residual_and_its_gradients() -> None:
    """(W - s B0 A0) x + s B A x, where W is edited as in the paper."""
    torch.manual_seed(0)
    W, x = torch.randn(7, 9, dtype=torch.float64), torch.randn(2, 3, 9, dtype=torch.float64)
    delta = moved(delta_of(W, rank=3, scale=0.7).double())
    A, B = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B))
    paper = x @ (W - 0.7 * delta.B0 @ delta.A0).t() + 0.7 * x @ A.t() @ B.t()
    ours = delta(x, x @ W.t())
    assert torch.allclose(ours, paper, atol=1e-12)
    g = torch.randn_like(ours)
    expected = torch.autograd.grad(paper, (A, B), g)
    for found, wanted in zip(torch.autograd.grad(ours, (delta.A, delta.B), g), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)
    folded, bias = delta.fold(W, None)
    assert torch.allclose(x @ folded.t(), paper, atol=1e-12)
    assert bias is None


def test_both_factors_have_gradients_at_the_start() -> None:
    """Unlike those of LoRA, whose B is 0."""
    torch.manual_seed(0)
    delta = delta_of(torch.randn(7, 9), rank=3)
    delta(torch.randn(2, 9), torch.zeros(2, 7)).sum().backward()
    assert delta.A.grad.abs().max() > 0.1
    assert delta.B.grad.abs().max() > 0.1


def test_the_update_has_twice_the_rank() -> None:
    torch.manual_seed(0)
    delta = moved(delta_of(torch.randn(20, 30), rank=3, scale=2.0))
    A, B, scale = delta.low_rank()
    assert (A.shape, B.shape, scale) == ((6, 30), (20, 6), 2.0)
    assert torch.allclose(B @ A, delta.B @ delta.A - delta.B0 @ delta.A0, atol=1e-5)
    assert torch.linalg.matrix_rank(B @ A) == 6


def test_identity_at_the_start_to_the_bit_and_the_base_untouched() -> None:
    model = tiny("llama")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    (base,) = outputs(model)
    stack = Stack(model, [Pissa(rank=4)])
    assert torch.equal(outputs(stack.model)[0], base)
    inputs = example_inputs(model)
    stack.model.train()
    with stack.disabled():
        plain = output_of(model, inputs)
    assert torch.equal(output_of(model, inputs), plain)  # where gradients are recorded too
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in weights.items())


def test_a_small_step_counts_in_half_precision() -> None:
    """A0 is 40 here, and bfloat16 would round a step of 0.01 away."""
    model = tiny("llama").to(torch.bfloat16)
    stack = Stack(model, [Pissa(rank=4, targets="attention.v")])
    delta = next(iter(deltas_of(stack).values()))
    assert {t.dtype for t in (*delta.parameters(), *delta.buffers())} == {torch.float32}
    with torch.no_grad():
        delta.A0.fill_(40.0)
        delta.A.fill_(40.01)
        delta.B0.fill_(1.0)
        delta.B.fill_(1.0)
    x, y = torch.ones(1, 32, dtype=torch.bfloat16), torch.zeros(1, len(delta.B), dtype=torch.bfloat16)
    assert torch.allclose(delta(x, y).float(), torch.tensor(4 * 32 * 0.01), rtol=0.01)


# --------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8.0, 2.0)])
def test_scale(alpha: float | None, scale: float) -> None:
    stack = Stack(tiny("llama"), [Pissa(rank=4, alpha=alpha, targets="mlp.up")])
    assert {delta.low_rank().scale for delta in deltas_of(stack).values()} == {scale}


def test_defaults_are_the_papers() -> None:
    config = Pissa().config
    assert (config.rank, config.alpha, config.niter, config.targets.text) == (128, None, None, "all")


def test_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"pissa: rank 33 exceeds the 32x32 matrix model\.layers\.0"):
        Stack(tiny("llama"), [Pissa(rank=33, targets="attention.q")])
    assert Stack(tiny("llama"), [Pissa(rank=32, targets="attention.q")])


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("inf")}, {"niter": -1}, {"targets": 3}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftxError, match=f"Pissa: {next(iter(options))}"):
        Pissa(**options)


@pytest.mark.parametrize("options", [{"rank": 1, "alpha": 0.5, "niter": 0}, {"rank": 1}], ids=str)
def test_the_least_that_options_may_be(options: dict[str, Any]) -> None:
    """On a model in half precision too, of which no SVD is taken."""
    stack = Stack(tiny("llama").to(torch.bfloat16), [Pissa(targets="mlp.up", **options)])
    for delta in deltas_of(stack).values():
        assert delta.A.shape == (1, 32)
        assert delta.A.any()
