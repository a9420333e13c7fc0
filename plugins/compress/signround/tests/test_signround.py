from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftx
import peftx.toolkits.compression as packing
from peftx import Stack
from peftx.errors import ArchitectureError, ConflictError, PluginError
from peftx.kernel.parts import DeltaPart, ReplacedPart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny, tiny_tokenizer
from peftx.testing.subject import TEXTS
from peftx_lora import Lora
from peftx_prefixquant import PrefixQuant
from peftx_signround import Rounding, SignRound, nearest

test_conformance = conformance("signround")

TWO = {"samples": 2, "length": 24}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def trained(arch: str = "llama", **options: object) -> Stack:
    stack = Stack(tiny(arch), [SignRound(**{"group_size": 16, **options})], tokenizer=tiny_tokenizer())
    stack.compress(TEXTS, **TWO)
    return stack


def layers(stack: Stack) -> dict[str, packing.QuantLinear]:
    return {part.key: part.module for part in stack.ledger.of("signround", ReplacedPart)}


def errors(stack: Stack) -> list[list[float]]:
    return stack.plugins["signround"].state["errors"]


def logits(stack: Stack) -> Tensor:
    with torch.no_grad():
        return output_of(stack.model, example_inputs(stack.model))


@torch.no_grad()
def perturbed(weight: Tensor, bits: int, size: int, *, seed: int = 1) -> Rounding:
    """V, alpha and beta anywhere inside of their bounds."""
    rounding, generator = Rounding(weight, bits, size), torch.Generator().manual_seed(seed)
    rounding.V.copy_(torch.rand(rounding.V.shape, generator=generator) - 0.5)
    for p in (rounding.alpha, rounding.beta):
        p.copy_(torch.rand(p.shape, generator=generator) * 0.4 + 0.6)
    return rounding


# -------------------------------------------------------------------------------------------------------- the algebra
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "size"), [((6, 32), 8), ((5, 19), 8), ((3, 7), 128)])
def test_the_start_is_rounding_to_the_nearest(bits: int, shape: tuple[int, int], size: int) -> None:
    """To the bit: V = 0, alpha = beta = 1; a last group may be short, and one longer than a row is the row."""
    weight = normal(*shape)
    weight[0, :8] = 0
    weight[1], weight[2] = (
        weight[1].abs() + 0.01,
        -weight[2].abs() - 0.01,
    )  # 0 is a number of their groups all the same
    found = Rounding(weight, bits, size).packed()
    expected = packing.quantize(weight, bits=bits, group_size=min(size, shape[1]), symmetric=False)
    assert torch.equal(found.q, expected.q)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)
    torch.testing.assert_close(
        Rounding(weight, bits, size)(), packing.dequantize(expected), atol=1e-8, rtol=1e-6
    )


@torch.no_grad()
def test_codes_by_hand() -> None:
    """Two bits, one group: alpha 0.5 and beta 1 give s = (0.5 * 4 + 1) / 3 = 1, z = 1."""
    rounding = Rounding(torch.tensor([[4.0, -1.0, 0.4, 0.6]]), 2, 4)
    rounding.alpha.fill_(0.5)
    rounding.V.copy_(torch.tensor([[[0.0, 0.3, 0.2, -0.2]]]))
    q, s, z = rounding.codes()
    assert (float(s), float(z)) == (1.0, 1.0)
    assert q.tolist() == [[[3.0, 0.0, 2.0, 1.0]]]  # 5 is clamped; -0.7, 0.6 and 0.4 go to -1, 1 and 0
    assert rounding().tolist() == [[2.0, -1.0, 1.0, 0.0]]
    rounding.beta.fill_(0.5)  # s = 2.5 / 3, z = round(0.6)
    _, s, z = rounding.codes()
    assert float(s) == pytest.approx(2.5 / 3)
    assert float(z) == 1.0


@torch.no_grad()
def test_a_code_moves_by_one_at_most() -> None:
    weight = normal(16, 64)
    plain, moved = Rounding(weight, 4, 16), perturbed(weight, 4, 16)
    moved.alpha.fill_(1.0)
    moved.beta.fill_(1.0)
    steps = moved.codes()[0] - plain.codes()[0]
    assert steps.abs().max() == 1
    moved.V.fill_(0.5)
    assert bool((moved.codes()[0] >= plain.codes()[0]).all())


def test_what_is_packed_is_what_was_trained() -> None:
    for bits in (2, 3, 4, 8):
        rounding = perturbed(normal(6, 20), bits, 8)
        torch.testing.assert_close(packing.dequantize(rounding.packed()), rounding(), atol=1e-8, rtol=1e-6)


def test_a_model_in_half_precision_is_trained_in_float32() -> None:
    rounding = Rounding(normal(2, 8).bfloat16(), 4, 8)
    assert rounding().dtype == rounding.packed().scale.dtype == rounding.V.dtype == torch.float32
    stack = Stack(tiny("llama").bfloat16(), [SignRound(steps=2)], tokenizer=tiny_tokenizer())
    stack.compress(TEXTS, **TWO)
    assert {layer.weight.dtype for layer in layers(stack).values()} == {torch.bfloat16}
    assert all(0 < after <= before for before, after in errors(stack))


def test_a_group_that_is_clipped_to_nothing() -> None:
    rounding = Rounding(normal(2, 8), 4, 8)
    with torch.no_grad():
        rounding.alpha.zero_()
        rounding.beta.zero_()
    assert bool(rounding().isfinite().all())
    assert bool((rounding.packed().scale > 0).all())


def test_gradients_go_straight_through() -> None:
    """dW^/dV = s inside of the range and 0 outside; alpha and beta get theirs through s and z."""
    rounding = perturbed(normal(4, 16), 3, 8)
    rounding().sum().backward()
    q, s, z = rounding.codes()
    free = nearest(rounding.groups / s + rounding.V) + z
    inside = (free >= 0) & (free <= 7)
    torch.testing.assert_close(rounding.V.grad, (inside * s).detach())
    alpha = (rounding.alpha * rounding.high - rounding.beta * rounding.low).detach() / 7
    # W^ = s (q - z): by s directly, and through w / s; z cancels where nothing is clamped.
    x = rounding.groups
    dz = rounding.beta * rounding.low / alpha**2
    ds = torch.where(inside, (q - z) - x / alpha, (q - z) - alpha * dz)
    expected = (ds.sum(2, keepdim=True) * rounding.high / 7).detach()
    torch.testing.assert_close(rounding.alpha.grad, expected, atol=1e-5, rtol=1e-4)
    assert bool(rounding.beta.grad.abs().sum() > 0)


# ------------------------------------------------------------------------------------------------ the official training
OFFICIAL = [
    [0.01151857, 0.04607429, 0.02303715, -0.03455572, -0.03455572, 0.02303715, 0.04607429, 0.01151857],
    [-0.05177065, -0.03882799, 0.02588532, 0.03882799, 0.0, -0.05177065, -0.02588532, 0.03882799],
    [0.03711307, -0.01237103, -0.0494841, -0.01237103, 0.03711307, 0.03711307, -0.02474205, -0.0494841],
    [0.0, 0.04968163, 0.02484081, -0.03726122, -0.03726122, 0.01242041, 0.04968163, 0.01242041],
]
"""W^ of Auto-Round 0.16.1 (its `WrapperLinear` and `SignSGD`, as its `quantize_block` calls them), of `layer(4, 8)`."""


def layer(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and what enters it [6, 5, in]: the same numbers with every version of torch."""
    W = torch.arange(outputs * inputs, dtype=torch.float64).view(outputs, inputs)
    x = torch.arange(30 * inputs, dtype=torch.float64).view(6, 5, inputs)
    return (0.05 * torch.sin(1.3 * W + 0.2)).float(), torch.cos(0.7 * x + 0.1 * x**1.5).float()


@torch.no_grad()
def rounded(W: Tensor, x: Tensor, *, steps: int) -> Tensor:
    """W^ as SignRound trains it, in 3 bits and groups of 8, on all texts in each step."""
    rounding = Rounding(W, 3, 8)

    def loss(some: Iterable[int]) -> Tensor:
        return torch.stack([F.mse_loss(x[i] @ rounding().T, x[i] @ W.T) for i in some]).mean()

    SignRound(bits=3, group_size=8, steps=steps, batch_size=len(x)).train([rounding], loss, len(x))
    return rounding()


def officially(W: Tensor, x: Tensor, *, steps: int) -> Tensor:
    """The same, by the official code."""
    wrapper = pytest.importorskip("auto_round.wrapper", reason="auto-round is not installed")
    descent = pytest.importorskip("auto_round.algorithms.quantization.sign_round.sign_sgd")
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W.clone()
    settings = {"bits": 3, "group_size": 8, "sym": False, "data_type": "int", "act_bits": 16}
    for name, value in (settings | {"scale_dtype": torch.float32}).items():
        setattr(linear, name, value)
    wrapped = wrapper.WrapperLinear(linear, enable_torch_compile=False, iters=steps)
    optimizer = descent.SignSGD(wrapped.params.values(), lr=1 / steps)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    lowest, best = torch.inf, {}
    for _ in range(steps):
        loss = F.mse_loss(wrapped(x), x @ W.T)
        if float(loss.detach()) < lowest:
            lowest, best = (
                float(loss.detach()),
                {name: p.detach().clone() for name, p in wrapped.params.items()},
            )
        (loss * 1000).backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    with torch.no_grad():
        return wrapped._qdq_weight(best["value"], best["min_scale"], best["max_scale"])[0].detach()


def test_numbers_of_the_official_training() -> None:
    W, x = layer(4, 8)
    torch.testing.assert_close(rounded(W, x, steps=40), torch.tensor(OFFICIAL), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [20, 100])
def test_it_trains_as_the_official_code(steps: int) -> None:
    """Weight by weight but for one in a hundred, which the sign of a gradient near 0 may part; and no worse."""
    W, x = layer(24, 32)
    ours, theirs = rounded(W, x, steps=steps), officially(W, x, steps=steps)
    assert float(((ours - theirs).abs() > 1e-6).double().mean()) < 0.01
    y, start = x @ W.T, float(F.mse_loss(x @ Rounding(W, 3, 8)().detach().T, x @ W.T))
    errors = [float(F.mse_loss(x @ found.T, y)) / start for found in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], abs=0.005)
    assert errors[0] < 0.9


# ----------------------------------------------------------------------------------------------------------- training
def rounds(*, steps: int, slope: float = 1.0, **options: object) -> tuple[Rounding, list[float]]:
    """Train on a loss that always wants every code to go up, or down."""
    rounding = Rounding(normal(4, 16), 4, 8)
    plugin = SignRound(steps=steps, **options)

    def loss(some: Iterable[int]) -> Tensor:
        return -slope * (rounding.V.sum() + 0 * rounding().sum()) + 100

    with torch.no_grad():
        return rounding, plugin.train([rounding], loss, 3)


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_the_steps_reach_either_end_and_no_further(slope: float) -> None:
    seen = []

    class Watching(Rounding):
        def forward(self) -> Tensor:
            seen.append(float(self.V.detach().abs().max()))
            return super().forward()

    rounding = Watching(normal(4, 16), 4, 8)

    def loss(some: Iterable[int]) -> Tensor:
        return -slope * (rounding.V.sum() + 0 * rounding().sum())

    with torch.no_grad():
        SignRound(steps=200).train([rounding], loss, 3)
    assert max(seen) <= 0.5
    # The best step seen is the last that was measured: all rates before that one add up to (T + 1) / 2T - 1 / T^2.
    torch.testing.assert_close(rounding.V, torch.full_like(rounding.V, 0.5 * slope), atol=1e-6, rtol=0)


def test_rates_fall_in_a_line() -> None:
    rounding, _ = rounds(steps=4)  # the start and three steps are measured, of 1/4, 3/16 and 2/16
    torch.testing.assert_close(rounding.V, torch.full_like(rounding.V, 0.5))  # 9/16, clamped
    rounding, _ = rounds(steps=4, learning_rate=0.1)
    torch.testing.assert_close(rounding.V, torch.full_like(rounding.V, 0.1 + 0.075 + 0.05))
    rounding, left = rounds(steps=0)
    assert not rounding.V.any()
    assert left[0] == left[1]


def test_the_first_rate_is_one_over_the_steps() -> None:
    rounding = Rounding(normal(4, 16), 4, 8)
    with torch.no_grad():
        SignRound(steps=4).train([rounding], lambda some: rounding.alpha.sum() + 0 * rounding.V.sum(), 3)
    torch.testing.assert_close(rounding.alpha, torch.full_like(rounding.alpha, 1 - 9 / 16))


def test_what_is_left_is_a_mean_over_blocks() -> None:
    stack = Stack(tiny("llama", num_hidden_layers=1), [SignRound(steps=0)], tokenizer=tiny_tokenizer())
    assert stack.evaluate(["a text"], metrics=["signround"])["error_left"].value == 0
    stack.compress(TEXTS, **TWO)
    assert stack.evaluate(["a text"], metrics=["signround"])["error_left"].value == 1


def test_clips_stay_in_their_bounds_or_where_they_are() -> None:
    for clips, slope in ((True, 1.0), (True, -1.0), (False, 1.0)):
        rounding = Rounding(normal(4, 16), 4, 8)

        def loss(some: Iterable[int], r: Rounding = rounding, slope: float = slope) -> Tensor:
            return slope * (r.alpha.sum() + r.beta.sum()) + 0 * r.V.sum()

        with torch.no_grad():
            SignRound(steps=3, learning_rate=0.9, clips=clips).train([rounding], loss, 3)
        expected = 0.0 if clips and slope > 0 else 1.0
        for p in (rounding.alpha, rounding.beta):
            assert p.unique().tolist() == [expected]


def test_the_best_step_is_kept_and_the_start_where_it_is_better() -> None:
    """The losses of a step are those of some texts: what is best on them may be worse on all."""
    for last, kept in ((0.5, 0.25), (2.0, 0.0)):
        rounding = Rounding(normal(2, 8), 4, 8)
        told = iter([1.0, 0.9, 0.2, 0.7, last, 1.0])  # all; three steps; all; all again

        def loss(some: Iterable[int], r: Rounding = rounding, told: Iterable[float] = told) -> Tensor:
            return next(told) - (r.V.sum() - r.V.sum().detach())

        with torch.no_grad():
            before, after = SignRound(steps=3, learning_rate=0.25).train([rounding], loss, 3)
        assert rounding.V.unique().tolist() == [kept]
        assert (before, after) == (1.0, min(last, 1.0))


def test_batches_are_drawn_from_the_texts() -> None:
    rounding, drawn = Rounding(normal(2, 8), 4, 8), []

    def loss(some: Iterable[int]) -> Tensor:
        drawn.append(list(some))
        return rounding.V.sum()

    with torch.no_grad():
        SignRound(steps=30, batch_size=2).train([rounding], loss, 5)
    assert drawn[0] == drawn[-1] == list(range(5))
    assert all(len(set(some)) == 2 for some in drawn[1:-1])
    assert {i for some in drawn[1:-1] for i in some} == set(range(5))


# ------------------------------------------------------------------------------------------------------------- blocks
def test_blocks_get_better() -> None:
    """The error of every block is below that of rounding to the nearest, and the packed block has it."""
    stack, plain = trained(bits=3, steps=20), trained(bits=3, steps=0)
    assert len(errors(stack)) == 2
    assert all(after < 0.9 * before for before, after in errors(stack))
    assert errors(stack)[0][0] == errors(plain)[0][0] == errors(plain)[0][1]
    exact, batches = tiny("llama"), packing_batches()
    for number in range(2):
        found = []
        for batch in batches:
            pair = [hidden(model, batch)[number] for model in (exact, stack.model)]
            found.append(F.mse_loss(*pair))
        assert float(torch.stack(found).mean()) == pytest.approx(errors(stack)[number][1], rel=1e-3)
    scores = stack.evaluate(["a text"], metrics=["signround"])
    assert scores["error_left"].value == pytest.approx(sum(a / b for b, a in errors(stack)) / 2)
    promised = dict(
        SignRound(bits=3, group_size=16).planned(Stack(tiny("llama"), [SignRound()]).view("signround"))
    )
    assert sum(promised.values()) == scores["packed_bytes"].value


def packing_batches() -> list[dict[str, Tensor]]:
    from peftx.toolkits.compression.batches import calibration

    holder = SimpleNamespace(tokenizer=tiny_tokenizer(), model=tiny("llama"))
    return calibration(holder, TEXTS, **TWO).batches


@torch.no_grad()
def hidden(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each block gives."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, x, y: found.append(y[0] if isinstance(y, tuple) else y))
        for layer in model.model.layers
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_eight_bits_lose_next_to_nothing() -> None:
    batch = packing_batches()[0]
    pairs = zip(hidden(trained(bits=8, steps=2).model, batch), hidden(tiny("llama"), batch), strict=True)
    lost = [float((after - before).norm() / before.norm()) for after, before in pairs]
    assert 0 < lost[0] < 1e-2
    assert lost[0] < lost[1] < 2e-2  # which is given what the first one lost


@pytest.mark.parametrize("arch", ["gpt2", "phi3", "bert", "qwen2"])
def test_layers_of_every_kind(arch: str, tmp_path: Path) -> None:
    """Fused and stored the other way round; the start is that of each as [out, in]."""
    plain = Stack(tiny(arch), [SignRound()]).view("signround").linears("all", whole=True)
    weights = {site.path: site.weight.detach() for site in plain}
    stack = trained(arch, steps=0)
    assert layers(stack).keys() == weights.keys()
    for key, layer in layers(stack).items():
        expected = packing.quantize(weights[key], bits=4, group_size=16, symmetric=False)
        assert torch.equal(layer.weight, packing.dequantize(expected))
    stack = trained(arch, steps=10, bits=2)
    assert all(after < before for before, after in errors(stack))
    stack.save(tmp_path / "bundle")
    assert torch.equal(logits(peftx.load(tmp_path / "bundle")), logits(stack))


def test_nothing_else_of_the_model_moves() -> None:
    model = tiny("qwen2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stack = Stack(model, [SignRound(steps=2, targets="mlp")], tokenizer=tiny_tokenizer())
    stack.compress(TEXTS, **TWO)
    assert {key.split(".")[3] for key in layers(stack)} == {"mlp"}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    stack.remove("signround")
    assert torch.equal(logits(stack), logits(Stack(tiny("qwen2"), [])))


def test_adapters_before_and_behind() -> None:
    stack = Stack(tiny("llama"), [Lora(rank=2), SignRound(steps=2)], tokenizer=tiny_tokenizer())
    stack.compress(TEXTS, **TWO)
    assert not stack.ledger.of("lora", DeltaPart)
    plugins = [SignRound(steps=2), Lora(rank=2)]
    stack = Stack(tiny("llama"), plugins, tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(TEXTS, ["signround"], **TWO)
    stack.inject(["lora"])
    before = {key: layer.weight for key, layer in layers(stack).items()}
    stack.train([{"prompt": "a", "completion": "b"}] * 4, steps=2)
    assert all(torch.equal(layer.weight, before[key]) for key, layer in layers(stack).items())


def test_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"signround: t5 has encoder and decoder"):
        Stack(tiny("t5"), [SignRound()])
    with pytest.raises(
        ArchitectureError, match=r"signround: mixtral has experts.*layers.0.mlp.experts"
    ) as caught:
        Stack(tiny("mixtral"), [SignRound()])
    assert "targets: 'all !experts" in str(caught.value.hint)
    with pytest.raises(ArchitectureError, match=r"signround: llama has head \(linear\) in lm_head"):
        Stack(tiny("llama"), [SignRound(targets="all head")])
    with pytest.raises(ArchitectureError, match="signround: vit"):
        Stack(tiny("vit"), [SignRound()])
    with pytest.raises(ConflictError, match="integers"):
        Stack(tiny("llama"), [SignRound(), PrefixQuant()])


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"bits": 4.5}, {"group_size": 0}])
def test_bits_that_it_cannot_do(options: dict[str, float]) -> None:
    with pytest.raises(PluginError, match=f"SignRound: {next(iter(options))}: Input should be"):
        SignRound(**options)
