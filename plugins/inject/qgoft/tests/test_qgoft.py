from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peftx import Stack
from peftx.engines.training import TrainStep
from peftx.errors import PeftxError, UnsupportedError
from peftx.testing import conformance
from peftx.testing.models import example_inputs, tiny
from peftx_qgoft import Qgoft, Turn

test_conformance = conformance("qgoft")
test_conformance_strict = conformance(
    "qgoft", options={"form": "strict", "scale": True}, models=["llama", "gpt2", "bert"]
)

W = torch.tensor([[0.5, -1.0, 0.25, 2.0, 0.7], [1.5, 0.75, -0.5, 0.1, -0.4]])
THETA = torch.tensor([0.3, -0.2, 0.5, -0.1])
BLOCKS = torch.eye(2) + torch.sin(1 + torch.arange(16.0)).view(4, 2, 2) / 2
SCALE = torch.tensor([0.5, 2.0, 1.0, -1.0, 1.5])

# W as the official layer merges it (the first release, whose stages are the tree's; d = 5). Made once by running its
# `get_delta_weight` outside this repository; the README says which commit. It turns W's rows by what is here the
# transposed planes.
OFFICIAL = {
    "strict": [
        [-0.9504681, -0.2133056, 1.2518799, 1.4823985, 1.0435047],
        [0.2424337, 1.6462463, 0.2762805, 0.3719309, -0.4989346],
    ],
    "scaled": [
        [1.4253845, -1.0211179, 1.6116384, -1.7729459, 0.6421695],
        [0.1718116, 1.508972, -0.7818182, 0.2091636, -0.6862908],
    ],
    "quasi": [
        [0.7690538, -0.5863187, -0.2370892, 3.0714815, 0.712715],
        [3.4999938, 0.572039, -1.4366976, -0.0147787, 0.6512473],
    ],
}

SIZES = [2, 3, 5, 8, 12, 13]


def random(d: int, *, strict: bool, scale: bool = False) -> Turn:
    turn = Turn(d, strict=strict, scale=scale)
    generator = torch.Generator().manual_seed(d)
    with torch.no_grad():
        for parameter in turn.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.7)
    return turn


def matrix(turn: Turn) -> Tensor:
    """R, in float64: the layer sees R x."""
    d = len(turn.planes()) + 1
    return turn.double().pre(torch.eye(d, dtype=torch.float64)).mT.detach()


def stage_matrices(turn: Turn) -> list[Tensor]:
    """S_1, S_2, ... as d x d matrices: the planes (2^t k, 2^t k + 2^(t-1)) of the paper, one after another."""
    G = turn.planes().detach().double()
    d = len(G) + 1
    stages, alive, stride, used = [], d, 1, 0
    while alive > 1:
        S = torch.eye(d, dtype=torch.float64)
        for pair in range(alive // 2):
            i, j = 2 * stride * pair, 2 * stride * pair + stride
            S[i, i], S[i, j], S[j, i], S[j, j] = G[used].flatten()
            used += 1
        stages.append(S)
        alive, stride = alive - alive // 2, 2 * stride
    assert used == d - 1
    return stages


@pytest.mark.parametrize("kind", list(OFFICIAL))
def test_equals_the_official_merge(kind: str) -> None:
    turn = Turn(5, strict=kind != "quasi", scale=kind == "scaled")
    if kind == "quasi":
        turn.G.data = BLOCKS.mT.clone()
    else:
        turn.theta.data = -THETA
    if kind == "scaled":
        turn.m.data = SCALE.clone()
    assert torch.allclose(turn.fold(W, None)[0], torch.tensor(OFFICIAL[kind]), atol=2e-6)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("d", SIZES)
def test_is_the_product_of_the_stages(d: int, strict: bool) -> None:
    turn = random(d, strict=strict)
    stages = stage_matrices(turn)
    assert len(stages) == math.ceil(math.log2(d))
    product = torch.linalg.multi_dot(stages) if len(stages) > 1 else stages[0]
    assert torch.allclose(matrix(turn), product, atol=1e-6)


@pytest.mark.parametrize("d", SIZES)
def test_strict_is_a_rotation(d: int) -> None:
    R = matrix(random(d, strict=True))
    assert (R.mT @ R - torch.eye(d)).abs().max() < 1e-5
    assert abs(torch.linalg.det(R) - 1) < 1e-5
    assert (R - torch.eye(d)).abs().max() > 0.1


@pytest.mark.parametrize("d", SIZES)
def test_the_planes_can_take_any_vector_to_the_first_axis(d: int) -> None:
    """The pivot of the paper's proof: stage after stage the second of each pair is turned to zero."""
    torch.manual_seed(d)
    x = torch.randn(d, dtype=torch.float64)
    angles: list[Tensor] = []
    alive = x
    while len(alive) > 1:
        pairs = alive[: len(alive) // 2 * 2].unflatten(0, (-1, 2))
        angles.append(torch.atan2(pairs[:, 1], pairs[:, 0]))
        alive = torch.cat((pairs.norm(dim=1), alive[len(alive) // 2 * 2 :]))
    turn = Turn(d, strict=True)
    turn.theta.data = torch.atanh(torch.cat(angles) / math.pi * (1 - 1e-12))
    axis = torch.zeros(d, dtype=torch.float64)
    axis[0] = x.norm()
    assert torch.allclose(matrix(turn).mT @ x, axis, atol=1e-6)  # R^T x, as W's rows are turned
    assert torch.allclose(turn.pre(axis), x, atol=1e-6)


def test_strict_keeps_lengths_and_angles_of_the_rows() -> None:
    weight = torch.randn(6, 13, generator=torch.Generator().manual_seed(0))
    gram = weight @ weight.mT
    turned, _ = random(13, strict=True).fold(weight, None)
    scaled, _ = random(13, strict=True, scale=True).fold(weight, None)
    free, _ = random(13, strict=False).fold(weight, None)
    assert torch.allclose(turned @ turned.mT, gram, atol=1e-5)
    assert (scaled @ scaled.mT - gram).abs().max() > 0.1
    assert (free @ free.mT - gram).abs().max() > 0.1


def test_angles_stay_within_half_a_turn() -> None:
    turn = Turn(2, strict=True)
    assert [name for name, _ in turn.named_parameters()] == ["theta"]  # m is there where it is asked for
    turn.theta.data = torch.tensor([0.5])
    angle = math.pi * math.tanh(0.5)
    expected = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    assert torch.allclose(turn.planes()[0], expected)


@pytest.mark.parametrize("scale", [False, True])
def test_scale_acts_between_R_and_the_weight(scale: bool) -> None:
    turn = random(8, strict=True, scale=scale)
    R = torch.linalg.multi_dot(stage_matrices(turn)).float()
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    m = turn.m if scale else torch.ones(8)
    assert torch.allclose(turn.fold(weight, None)[0], weight @ torch.diag(m) @ R, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({}, lambda d: 4 * (d - 1)),
        ({"form": "strict"}, lambda d: d - 1),
        ({"form": "strict", "scale": True}, lambda d: 2 * d - 1),
    ],
    ids=["quasi", "strict", "scaled"],
)
def test_number_of_parameters(options: dict[str, object], each: object) -> None:
    stack = Stack(tiny("llama"), [Qgoft(**options)])
    sizes = [s.in_features for s in stack.anatomy.sites if s.role.startswith(("attention.", "mlp."))]
    assert len(sizes) == 14
    assert stack.trainable_parameters() == sum(each(d) for d in sizes)


def test_defect_is_zero_for_rotations_alone() -> None:
    assert random(13, strict=True).defect() < 1e-10
    G = BLOCKS[0]
    turn = Turn(2, strict=False)
    turn.G.data = G[None].clone()
    first, second = G[:, 0], G[:, 1]
    expected = (first @ first - 1) ** 2 + (second @ second - 1) ** 2 + 2 * (first @ second) ** 2
    assert torch.allclose(turn.defect(), expected)


@pytest.mark.parametrize(("options", "weight"), [({}, 0.01), ({"penalty": 3.0}, 3.0)])
def test_penalty_is_in_the_loss(options: dict[str, float], weight: float) -> None:
    stack = Stack(tiny("llama"), [("turn", Qgoft(**options))])
    with torch.no_grad():
        for parameter in stack.ledger.parameters("turn"):
            parameter.mul_(1.5)
    batch = dict(example_inputs(stack.model))
    batch["labels"] = batch["input_ids"]
    step = TrainStep(stack, batch)
    total = stack.run_train_step(step)
    planes = sum(len(p) for p in stack.ledger.parameters("turn"))
    assert step.losses["turn"] == pytest.approx(planes * 2 * 1.25**2, rel=1e-5)  # (1.5^2 - 1)^2 twice a plane
    assert float(total) == pytest.approx(step.losses["task"] + weight * step.losses["turn"], rel=1e-5)


@pytest.mark.parametrize("options", [{"penalty": 0.0}, {"form": "strict"}], ids=["zero", "strict"])
def test_no_penalty_where_there_is_none(options: dict[str, object]) -> None:
    stack = Stack(tiny("llama"), [Qgoft(**options)])
    batch = dict(example_inputs(stack.model))
    step = TrainStep(stack, batch | {"labels": batch["input_ids"]})
    stack.run_train_step(step)
    assert set(step.losses) == {"task"}


def test_a_large_penalty_holds_the_blocks_near_rotations() -> None:
    """lambda -> infinity: what is left of the task's gradient moves G along the rotations only."""
    defects = {}
    for penalty in (0.0, 100.0):
        stack = Stack(tiny("llama"), [Qgoft(penalty=penalty)])
        optimizer = torch.optim.SGD(stack.ledger.parameters("qgoft"), lr=1e-3)
        batch = dict(example_inputs(stack.model))
        batch["labels"] = batch["input_ids"]
        for _ in range(10):
            stack.train_step(batch, optimizer=optimizer)
        defects[penalty] = float(Qgoft.defect(stack, "qgoft").detach())
    start = torch.eye(2)
    moved = max(float((p - start).detach().abs().max()) for p in stack.ledger.parameters("qgoft"))
    assert defects[100.0] < 0.05 * defects[0.0]
    assert moved > 1e-3  # 0.6 of the way without a penalty


def test_bfloat16_rotations_keep_lengths() -> None:
    turn = random(256, strict=True)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    turned = turn.pre(x)
    assert turned.dtype == torch.bfloat16
    assert torch.allclose(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=2e-3)


def test_a_fused_matrix_has_one_R() -> None:
    stack = Stack(tiny("gpt2"), [Qgoft(form="strict", targets="attention.q,k,v")])
    assert stack.trainable_parameters() == 2 * 31
    with pytest.raises(PeftxError, match=r"c_attn, which attention\.k, attention\.v shares"):
        Stack(tiny("gpt2"), [Qgoft(targets="attention.q")])


def test_stacked_experts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"qgoft: .*MixtralExperts"):
        Stack(tiny("mixtral"), [Qgoft()])
    Stack(tiny("mixtral"), [Qgoft(targets="attention")])


@pytest.mark.parametrize(
    "options",
    [
        {"form": "hard"},
        {"penalty": -1.0},
        {"penalty": math.inf},
        {"scale": "much"},
        {"targets": ""},
        {"strict": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(PeftxError, match=f"Qgoft: {next(iter(options))}"):
        Qgoft(**options)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(PeftxError, match=r"qgoft: penalty 0\.5, but strict"):
        Stack(tiny("llama"), [Qgoft(form="strict", penalty=0.5)])
    with pytest.raises(PeftxError, match="qgoft: scale, but the blocks"):
        Stack(tiny("llama"), [Qgoft(scale=True)])


def test_the_head_of_a_classifier_is_no_turn() -> None:
    """It trains with the plugin, and the penalty is of the turns alone."""
    from transformers import AutoModelForSequenceClassification

    config = tiny("bert").config
    config.num_labels = 3
    stack = Stack(AutoModelForSequenceClassification.from_config(config), [Qgoft(targets="attention")])
    batch = {"input_ids": torch.tensor([[1, 5, 7]]), "labels": torch.tensor([2])}
    assert torch.isfinite(stack.train_step(batch))
