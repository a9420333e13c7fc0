from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import peftx
from peftx import Stack
from peftx.errors import PeftxError
from peftx.kernel.parts import DeltaPart, FreePart
from peftx.testing import conformance
from peftx.testing.models import example_inputs, output_of, tiny
from peftx_compacter import LPHM, Adapter, Compacter, Slow

test_conformance = conformance("compacter")
test_conformance_plus_plus = conformance(
    "compacter", options={"variant": "compacter++", "bottleneck": 8}, models=["llama", "bert"]
)

# What the official adapter (shared slow weights, factorized fast ones, gelu_new; d = 8, k = 4, n = 2, r = 1) gives for
# the weights of `official_weights`: y, then the gradients of A, of its input, of D's t and of U's s. Made once by
# running `AdapterController` outside this repository; the README says which commit. Its slow weights are ours
# transposed.
X = (torch.arange(16.0) / 8 - 1).view(2, 8)
G = torch.cos(torch.arange(16.0)).view(2, 8)
OFFICIAL_Y = [
    [-1.0738226, -0.8602037, -0.7521279, -0.6420958, -0.1448185, -0.0526814, 0.0189362, 0.2110531],
    [0.0782999, -0.3669253, -0.4518162, 0.1085395, 0.7247016, 0.3258613, 0.4778662, 1.2478279],
]
OFFICIAL_A = [
    [[0.6210228, -0.1705982], [0.3128031, 0.683247]],
    [[0.0532364, -0.0285602], [0.9738761, 0.0340237]],
]
OFFICIAL_X = [
    [0.266104, 0.2751059, 0.0311767, -0.2414162, 0.0023052, 0.4618225, 0.4967424, 0.0749596],
    [-0.0199071, -0.7485462, -0.7889755, -0.1040243, 0.3941623, 0.7054568, 0.3681574, -0.3076241],
]
OFFICIAL_T = [0.1577615, 0.1191535, 0.0805453, 0.0419374, -0.0356682, -0.0178486, -0.0000289, 0.0177907]
OFFICIAL_S = [-0.1475866, -0.1746022, -0.0410893, 0.1302009, -0.4985264, -0.1424626, 0.3445807, 0.514818]


def official_weights() -> Adapter:
    slow = Slow(n=2, std=1.0)
    slow.A.data = torch.sin(1 + torch.arange(8.0)).view(2, 2, 2).mT.contiguous()
    adapter = Adapter(slow, 8, bottleneck=4, n=2, rank=1)
    for j, matrix in enumerate((adapter.D, adapter.U)):
        matrix.t.data = torch.cos(j + torch.arange(float(matrix.t.numel()))).view_as(matrix.t)
        matrix.s.data = torch.sin(2 * j + torch.arange(float(matrix.s.numel()))).view_as(matrix.s)
        matrix.b.data = torch.arange(float(len(matrix.b))) / 10 - 0.2
    return adapter


def dense(matrix: LPHM) -> Tensor:
    """W by the definition: the sum of explicit Kronecker products."""
    (slow,) = matrix.slow
    return sum(torch.kron(A, s @ t.mT) for A, s, t in zip(slow.A, matrix.s, matrix.t, strict=True))


def slow_of(stack: Stack) -> Slow:
    (part,) = stack.ledger.of("compacter", FreePart)
    return part.module


def adapters_of(stack: Stack) -> list[Adapter]:
    return [part.module for part in stack.ledger.of("compacter", DeltaPart)]


def test_equals_the_official_adapter() -> None:
    adapter = official_weights()
    h = X.clone().requires_grad_()
    y = adapter(torch.zeros(0), h)
    y.backward(G)
    (slow,) = adapter.D.slow
    found = (y, slow.A.grad.mT, h.grad, adapter.D.t.grad.flatten(), adapter.U.s.grad.flatten())
    expected = (OFFICIAL_Y, OFFICIAL_A, OFFICIAL_X, OFFICIAL_T, OFFICIAL_S)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, torch.tensor(theirs), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_is_the_sum_of_kronecker_products(n: int, rank: int) -> None:
    torch.manual_seed(n)
    matrix = LPHM(Slow(n=n, std=1.0), 24, 12, n=n, rank=rank)
    nn.init.normal_(matrix.b)
    x = torch.randn(2, 5, 24)
    assert dense(matrix).shape == (12, 24)
    assert torch.allclose(matrix(x), x @ dense(matrix).mT + matrix.b, atol=1e-5)


def test_n_of_one_is_a_scaled_matrix_of_rank_r() -> None:
    matrix = LPHM(Slow(n=1, std=1.0), 24, 12, n=1, rank=2)
    scaled = matrix.slow[0].A.squeeze() * matrix.s[0] @ matrix.t[0].mT
    assert torch.allclose(dense(matrix), scaled, atol=1e-6)
    assert torch.linalg.matrix_rank(dense(matrix)) == 2
    assert torch.linalg.matrix_rank(dense(LPHM(Slow(n=4, std=1.0), 24, 12, n=4, rank=1))) > 2


@pytest.mark.parametrize(("n", "rank"), [(4, 1), (2, 3)])
@pytest.mark.parametrize(("variant", "adapters"), [("compacter", 4), ("compacter++", 2)])
def test_number_of_parameters(variant: str, adapters: int, n: int, rank: int) -> None:
    options = {"variant": variant, "n": n, "rank": rank, "bottleneck": 8}
    stack = Stack(tiny("llama"), [Compacter(train_norms=False, **options)])
    fast, biases = 2 * (8 + 32) * rank, 8 + 32  # D and U; k + d each
    assert stack.trainable_parameters() == adapters * (fast + biases) + n**3
    with_norms = Stack(tiny("llama"), [Compacter(**options)])
    assert with_norms.trainable_parameters() == stack.trainable_parameters() + 5 * 32


@pytest.mark.parametrize(("variant", "percent"), [("compacter", 0.073), ("compacter++", 0.047)])
def test_share_of_t5_base_is_the_papers(variant: str, percent: float) -> None:
    config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        stack = Stack(T5ForConditionalGeneration(config), [Compacter(variant=variant)])
    assert stack.base_parameters() == 222_903_552
    assert round(100 * stack.trainable_parameters() / stack.base_parameters(), 3) == percent


def test_slow_gradient_is_the_sum_over_all_matrices() -> None:
    model = tiny("t5")
    stack = Stack(model, [Compacter()])
    shared = slow_of(stack)
    nn.init.normal_(shared.A, std=0.3)
    inputs = dict(example_inputs(model))
    batch = inputs | {"labels": inputs.pop("decoder_input_ids")}
    model(**batch).loss.backward()
    together = shared.A.grad.clone()
    own = []
    for adapter in adapters_of(stack):  # the same values, but a copy for each matrix
        for matrix in (adapter.D, adapter.U):
            copy = Slow(n=4, std=1.0)
            copy.A.data = shared.A.detach().clone()
            matrix.slow = (copy,)
            own.append(copy)
    model(**batch).loss.backward()
    assert len(own) == 2 * 2 * 4
    assert torch.allclose(sum(copy.A.grad for copy in own), together, atol=1e-6)
    assert min(float(copy.A.grad.abs().max()) for copy in own) > 0


def test_slow_weights_of_zero_are_the_identity() -> None:
    model = tiny("bert")
    inputs = example_inputs(model)
    base = output_of(model, inputs)
    stack = Stack(model, [Compacter()])
    start = output_of(model, inputs)
    nn.init.zeros_(slow_of(stack).A)
    assert torch.equal(output_of(model, inputs), base)
    assert 0 < (start - base).abs().max() < 0.05 * base.abs().max()  # near the identity at the start


def test_adapters_stand_before_the_residual_sum() -> None:
    model = tiny("t5")
    stack = Stack(model, [Compacter()])
    paths = {part.path for part in stack.ledger.of("compacter", DeltaPart)}
    assert "encoder.block.0.layer.0.SelfAttention" in paths
    assert "decoder.block.1.layer.2.DenseReluDense" in paths
    assert not any("EncDecAttention" in path for path in paths)
    assert len(paths) == 8
    nn.init.normal_(slow_of(stack).A)
    block = model.encoder.block[0].layer[1]
    h = torch.randn(1, 3, 32)
    plain = block.DenseReluDense.wo(F.gelu(block.DenseReluDense.wi_0(n := block.layer_norm(h)), approximate="tanh")
                                    * block.DenseReluDense.wi_1(n))  # fmt: skip
    adapter = block.DenseReluDense.peftx["compacter@block_mlp"]
    hidden = F.gelu(plain @ dense(adapter.D).mT + adapter.D.b, approximate="tanh")
    expected = h + plain + hidden @ dense(adapter.U).mT + adapter.U.b
    assert torch.allclose(block(h), expected, atol=1e-5)


def test_norms_train_and_come_back() -> None:
    model = tiny("llama")
    before = model.model.norm.weight.detach().clone()
    stack = Stack(model, [Compacter()])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "norm" in name}
    assert len(trained) == 5
    nn.init.zeros_(model.model.norm.weight)
    stack.remove("compacter")
    assert torch.equal(model.model.norm.weight, before)


def test_start_of_the_factors() -> None:
    torch.manual_seed(0)
    slow = Slow(n=8, std=0.01)
    assert float(slow.A.detach().std()) == pytest.approx(0.01, rel=0.15)
    matrix = LPHM(slow, 256, 64, n=8, rank=1)
    for factor in (matrix.s, matrix.t):
        bound = (6 / (factor.shape[1] + 1)) ** 0.5  # Glorot, fan of one [size, 1] slice
        assert 0.9 * bound < float(factor.detach().abs().max()) <= bound
    assert not matrix.b.any()


@pytest.mark.parametrize("train_norms", [True, False])
def test_a_bundle_of_a_stack_that_was_cast(train_norms: bool, tmp_path: Path) -> None:
    """Its base is the one in that dtype, whether or not the base's own norms train."""
    stack = Stack(tiny("llama"), [Compacter(train_norms=train_norms)])
    stack.model.to(torch.bfloat16)
    base = tiny("llama").to(torch.bfloat16)
    loaded = peftx.load(stack.save(tmp_path / "bundle"), model=base)
    inputs = example_inputs(stack.model)
    assert torch.equal(output_of(loaded.model, inputs), output_of(stack.model, inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"rank": 0},
        {"bottleneck": 0},
        {"variant": "compacter+"},
        {"slow_std": 0.0},
        {"train_norms": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(PeftxError, match=f"Compacter: {next(iter(options))}"):
        Compacter(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 5}, r"n = 5 does not divide the bottleneck 24"),
        ({"bottleneck": 30}, r"n = 4 does not divide the bottleneck 30"),
        ({"n": 3}, r"n = 3 does not divide the width of model\.layers\.0\.self_attn, 32"),
        ({"rank": 7}, r"rank 7 exceeds the 6x8 matrices"),
    ],
    ids=["n-k", "k", "n-d", "rank"],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], match: str) -> None:
    with pytest.raises(PeftxError, match=f"compacter: {match}"):
        Stack(tiny("llama"), [Compacter(**options)])


def test_a_rank_may_be_that_of_the_matrices() -> None:
    assert Stack(tiny("llama"), [Compacter(rank=6)]).trainable_parameters()  # of 6x8


def test_a_model_without_the_blocks_is_refused() -> None:
    with pytest.raises(PeftxError, match=r"compacter: .*'block\.attention' matches nothing"):
        Stack(tiny("mamba"), [Compacter()])
