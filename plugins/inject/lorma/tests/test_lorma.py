from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peftx import Stack
from peftx.errors import ConflictError, PeftxError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny
from peftx.toolkits.compression.linear import QuantLinear
from peftx_lorma import Lorma, MultiplyInput, MultiplyOutput, Pi, Plus

test_conformance = conformance("lorma")
test_conformance_pi_post = conformance(
    "lorma",
    options={"inflation": "pi", "mode": "post", "targets": "all", "rank": 2},
    models=["llama", "gpt2", "bert"],
    not_on={"mixtral": "stacked experts have no input that a delta could edit"},
)

W = torch.tensor([[0.5, -1.0, 0.25, 2.0], [1.5, 0.75, -0.5, 0.1], [-0.3, 0.2, 1.0, -0.7]])
BIAS = torch.tensor([0.1, -0.2, 0.3])
X = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.5, -0.5, 3.0, 1.0]])
G = torch.tensor([[1.0, -2.0, 0.5], [0.5, 3.0, -1.0]])  # gradient of the loss in y

# What the official layers (`LormaLinear_plus`, `LormaLinear_pi`; r = 2, alpha = 3) give for W, BIAS, X, G and the
# factors of `layer` below, float32: y, then the gradients of B, A and x. Made once by running those classes outside
# this repository; the README says which commit.
OFFICIAL = {
    ("plus", "pre"): (
        [[-1.1590533, 3.32867, -0.4231935], [5.0264421, -1.5960188, 1.2323544]],
        [[-0.0877322, 0.530254], [7.9352083, 4.308403], [-2.468786, -1.4126577]],
        [[4.6880569, -1.1736869, 2.6973596], [-5.3171973, 7.2600698, -4.5026226]],
        [[-2.2081439, -3.5023706, 1.293551, 3.6568906], [4.8027215, 1.2871844, -2.2040269, 2.1971226]],
    ),
    ("plus", "post"): (
        [[-3.0305517, 3.2749431, -0.3911055], [6.9794073, -0.2647731, 0.9518071]],
        [[-3.6951551, 16.5854015], [-2.6828322, 8.1834669], [2.2294827, -8.7819757], [0.97628, 1.6960748]],
        [[0.5517887, -7.9634528, 20.6046162, 4.8094096], [2.5371735, -1.7445436, 13.3735714, 4.6780319]],
        [[-3.9044988, -1.9967886, 2.6689084, 0.2819871], [7.7416272, -1.6149175, -2.4324861, 5.2127628]],
    ),
    ("pi", "pre"): (
        [[-0.4090537, -1.1562412, 1.8981187], [1.5264417, 0.7769559, -0.397342]],
        [[-0.0877322, 0.5302537], [-16.2137947, -15.8228741], [-2.1694748, -3.2655325]],
        [[1.4780233, 5.6193657, -0.8856592], [7.0178995, -2.0262117, -7.5514388]],
        [[1.0170292, -0.1557464, -0.8912864, 1.2113304], [-1.3061919, -1.5169594, 0.9997127, 1.2369087]],
    ),
    ("pi", "post"): (
        [[-0.6141345, -1.0032954, 0.5132859], [1.6417743, 1.8017917, -0.9963923]],
        [
            [-3.6951554, 16.5854015],
            [-7.7234154, -3.7733555],
            [-3.0882418, 2.7491577],
            [3.6242189, -0.1700519],
        ],
        [[7.0566101, -1.9062082, 11.8023415, 1.0496182], [6.9609947, -7.2057438, 13.2324181, 5.8565674]],
        [[-1.0770035, 0.4712274, -0.9206371, 0.4260213], [0.1856954, -0.8038481, 2.1388717, 1.1612674]],
    ),
}


def layer(inflation: str, mode: str) -> MultiplyOutput | MultiplyInput:
    """r = 2, c = 3/2, on the 3x4 matrix W."""
    d = 3 if mode == "pre" else 4
    M = (Plus if inflation == "plus" else Pi)(d, rank=2, scale=1.5)
    n = torch.arange(2.0 * d)
    M.B.data, M.A.data = torch.sin(1 + n).view(d, 2) / 2, torch.cos(2 * n).view(2, d) / 2
    return MultiplyOutput(M, bias=BIAS) if mode == "pre" else MultiplyInput(M)


def run(delta: MultiplyOutput | MultiplyInput, x: Tensor) -> Tensor:
    if isinstance(delta, MultiplyInput):
        return delta.pre(x) @ W.t() + BIAS
    return delta(x, x @ W.t() + BIAS)


def whole(M: Plus | Pi) -> Tensor:
    """The matrix M."""
    d = M.A.shape[-1]
    return (torch.eye(d) + M.left(torch.eye(d))).detach()


def moved(stack: Stack, spread: float = 0.05) -> Stack:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stack.ledger.parameters("lorma"):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)
    return stack


@pytest.mark.parametrize(("inflation", "mode"), list(OFFICIAL))
def test_equals_the_official_layer(inflation: str, mode: str) -> None:
    delta = layer(inflation, mode)
    x = X.clone().requires_grad_()
    y = run(delta, x)
    y.backward(G)
    found = (y, delta.M.B.grad, delta.M.A.grad, x.grad)
    for ours, theirs in zip(found, OFFICIAL[inflation, mode], strict=True):
        assert torch.allclose(ours, torch.tensor(theirs), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("inflation", "mode"), list(OFFICIAL))
def test_merged_weight_is_the_product(inflation: str, mode: str) -> None:
    delta = layer(inflation, mode)
    M = 1.5 * delta.M.B @ delta.M.A  # c B A, the formulas in their plainest form
    if inflation == "plus":
        M = M + torch.eye(len(M))
    else:
        M = torch.stack([row.roll(i) for i, row in enumerate(M)])
    weight, bias = delta.fold(W, BIAS)
    assert torch.allclose(weight, M @ W if mode == "pre" else W @ M, atol=1e-6)
    assert torch.equal(bias, BIAS)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 16.0, 100.0])
def test_pi_starts_as_the_identity_to_the_bit(alpha: float) -> None:
    M = Pi(12, rank=3, scale=alpha / 3)
    assert torch.equal(M.left(torch.eye(12)), torch.zeros(12, 12))
    product = M.scale * M.B @ M.A  # ones in the first column, nothing else
    assert torch.allclose(product, torch.eye(12)[:1].expand(12, 12))
    assert M.B[:, 1:].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 3.0, 16.0, 21.0, 100.0])
def test_pi_is_the_identity_to_the_bit_in_a_stack_that_is_cast(alpha: float, dtype: torch.dtype) -> None:
    M = Pi(12, rank=3, scale=alpha / 3).to(dtype)
    assert torch.equal(M.left(torch.eye(12, dtype=dtype)), torch.zeros(12, 12, dtype=dtype))


@pytest.mark.parametrize("mode", ["pre", "post"])
@pytest.mark.parametrize("rank", [1, 4])
def test_pi_has_full_rank_and_the_product_has_not(rank: int, mode: str) -> None:
    targets = "attention.q layers=0"
    stack = moved(Stack(tiny("llama"), [Lorma(rank=rank, inflation="pi", mode=mode, targets=targets)]), 0.5)
    (part,) = stack.ledger.of("lorma")
    M = part.module.M
    assert torch.linalg.matrix_rank(M.B @ M.A) == rank
    assert torch.linalg.matrix_rank(whole(M)) == 32


def test_plus_changes_a_weight_by_rank_r() -> None:
    M = Plus(12, rank=3, scale=2.0)
    nn.init.normal_(M.B)
    assert torch.linalg.matrix_rank(whole(M) - torch.eye(12), atol=1e-5) == 3
    assert torch.linalg.matrix_rank(whole(M)) == 12


@pytest.mark.parametrize("inflation", ["plus", "pi"])
@pytest.mark.parametrize("mode", ["pre", "post"])
def test_number_of_parameters_is_2_d_r(mode: str, inflation: str) -> None:
    stack = Stack(tiny("llama"), [Lorma(rank=3, mode=mode, inflation=inflation, targets="all")])
    sites = [s for s in stack.anatomy.sites if s.role.startswith(("attention.", "mlp."))]
    sizes = [s.out_features if mode == "pre" else s.in_features for s in sites]
    assert stack.trainable_parameters() == sum(2 * 3 * d for d in sizes)


def test_A_of_plus_starts_kaiming_uniform() -> None:
    A = Plus(64, rank=8, scale=2.0).A.detach()  # 512 numbers
    for top in (float(A.max()), -float(A.min())):
        assert 0.9 / math.sqrt(64) < top <= 1 / math.sqrt(64)


@pytest.mark.parametrize("mode", ["pre", "post"])
def test_factors_stay_in_full_precision(mode: str) -> None:
    stack = Stack(tiny("llama").to(torch.bfloat16), [Lorma(mode=mode)])
    assert {p.dtype for p in stack.ledger.parameters("lorma")} == {torch.float32}


def test_plus_never_forms_a_square_matrix() -> None:
    d, m, r = 64, 64, 2
    M = Plus(d, rank=r, scale=2.0)
    nn.init.normal_(M.B)
    weight = torch.randn(d, m)
    with FlopCounterMode(display=False) as counter:
        found = M.left(weight)
    assert counter.get_total_flops() == 2 * (2 * r * d * m)  # B (A W), and not 2 d^2 m for (B A) W
    assert torch.allclose(found, 2.0 * (M.B @ M.A) @ weight, atol=1e-4)


def test_bias_stays_outside_the_product() -> None:
    model = tiny("bert")
    stack = moved(Stack(model, [Lorma(rank=2, targets="attention.q layers=0")]))
    dense = model.bert.encoder.layer[0].attention.self.query
    (part,) = stack.ledger.of("lorma")
    x = torch.randn(3, 32)
    expected = x @ (whole(part.module.M) @ dense.weight).t() + dense.bias
    assert torch.allclose(dense(x), expected, atol=1e-5)
    assert (dense.bias @ whole(part.module.M).t() - dense.bias).abs().max() > 1e-3  # it would show


def test_bias_of_a_quantized_layer_stays_outside_too() -> None:
    model = tiny("gpt2")
    mlp = model.transformer.h[0].mlp
    mlp.c_fc = QuantLinear.from_linear(mlp.c_fc, bits=8)
    stack = moved(Stack(model, [Lorma(rank=2, inflation="pi", targets="mlp.up layers=0")]))
    (part,) = stack.ledger.of("lorma")
    x = torch.randn(3, 32)
    expected = x @ (whole(part.module.M) @ mlp.c_fc.weight).t() + mlp.c_fc.bias
    assert torch.allclose(mlp.c_fc(x), expected, atol=1e-4)


@pytest.mark.parametrize("inflation", ["plus", "pi"])
def test_each_stacked_expert_has_its_own_M(inflation: str) -> None:
    model = tiny("mixtral")
    inputs = example_inputs(model)
    with torch.no_grad():
        base = output_of(model, inputs)
        stack = Stack(model, [Lorma(rank=2, inflation=inflation, targets="mlp")])
        assert torch.equal(output_of(model, inputs), base)
        wrapped = output_of(moved(stack).model, inputs)
        part = stack.ledger.of("lorma")[0]
        assert len(part.module.M.A) == 4
        before = part.place.down_proj.detach().clone()
        stack.merge()
        assert torch.allclose(output_of(model, inputs), wrapped, atol=1e-4)
    assert (wrapped - base).abs().max() > 0.01
    changes = (part.place.down_proj - before).flatten(1)
    assert (changes[0] - changes[1]).abs().max() > 1e-3


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("inflation", "mode"), list(OFFICIAL))
def test_order_in_a_stack_is_the_order_of_the_maths(inflation: str, mode: str, first: bool) -> None:
    from peftx_lora import Lora

    targets = "attention.q layers=0"
    ours = Lorma(rank=2, inflation=inflation, mode=mode, targets=targets)
    pair = [ours, Lora(rank=2, targets=targets)] if first else [Lora(rank=2, targets=targets), ours]
    stack = moved(Stack(tiny("llama"), pair))
    (lora,), (lorma,) = stack.ledger.of("lora"), stack.ledger.of("lorma")
    nn.init.normal_(lora.module.B)
    M, low = whole(lorma.module.M), (lora.module.scale * lora.module.B @ lora.module.A).detach()
    dense = stack.model.model.layers[0].self_attn.q_proj

    def times(weight: Tensor) -> Tensor:
        return M @ weight if mode == "pre" else weight @ M

    x = torch.randn(3, 32)
    expected = x @ (times(dense.weight) + low if first else times(dense.weight + low)).t()
    assert torch.allclose(dense(x), expected, atol=1e-4)
    stack.merge()
    assert torch.allclose(dense(x), expected, atol=1e-4)


def test_what_the_first_step_moves() -> None:
    model = tiny("llama")
    inputs = example_inputs(model)
    base = output_of(model, inputs)
    for inflation in ("plus", "pi"):
        stack = Stack(tiny("llama"), [Lorma(rank=1, inflation=inflation)])
        before = stack.model(**inputs, labels=inputs["input_ids"]).loss
        before.backward()
        assert torch.equal(output_of(stack.model, inputs), base)
        still = {n.rsplit(".", 1)[1] for n, p in stack.ledger.tensors("lorma").items() if not p.grad.any()}
        # B = 0 holds A still; pi trains both at once.
        assert still == ({"A"} if inflation == "plus" else set())


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"inflation": "none"},
        {"mode": "both"},
        {"targets": ""},
        {"dropout": 0.1},
        {"alpha": math.inf},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(PeftxError, match=f"Lorma: {next(iter(options))}"):
        Lorma(**options)


@pytest.mark.parametrize(("mode", "size", "role"), [("pre", 16, "attention.k"), ("post", 32, "attention.q")])
def test_rank_above_the_matrix_is_refused(mode: str, size: int, role: str) -> None:
    Stack(tiny("llama"), [Lorma(rank=size, mode=mode, targets=role)])
    with pytest.raises(
        PeftxError, match=rf"lorma: rank {size + 1} exceeds the {size}x{size} matrix"
    ) as caught:
        Stack(tiny("llama"), [Lorma(rank=size + 1, mode=mode, targets=role)])
    assert f"'!{role}'" in str(caught.value.hint)


def test_post_beside_a_plugin_that_needs_adapters_is_refused_before_anything_is_built() -> None:
    from peftx_ist import Ist

    with pytest.raises(
        ConflictError, match=r"'ist' works on what adapters add .* and 'lorma' adds nothing there"
    ):
        Stack(tiny("llama"), [Lorma(rank=2, mode="post"), Ist()])
    Stack(tiny("llama"), [Lorma(rank=2), Ist()])
    assert Lorma(mode="pre").claims == Lorma.claims


def test_post_on_a_part_of_a_fused_matrix_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"c_attn, which attention\.k shares"):
        Stack(tiny("gpt2"), [Lorma(rank=2, mode="post")])
    stack = Stack(tiny("gpt2"), [Lorma(rank=2, mode="post", targets="attention.q,k,v")])
    assert stack.trainable_parameters() == 2 * (2 * 32 * 2)  # one M for q, k and v of each of 2 layers
