"""Low-rank updates that start elsewhere than at 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftx import LowRank
from peftx.toolkits.injecting import LowRankDelta, LowRankDifference, principal

SHAPES = [(6, 9), (9, 6), (3, 6, 9)]
"""Of a weight; the last of stacked experts."""


def moved(shape: tuple[int, ...], *, rank: int = 2, scale: float = 1.5) -> tuple[Tensor, LowRankDifference]:
    """A weight, and an update that started at its principal part and trained since."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    delta = LowRankDifference(shape, rank=rank, scale=scale).double()
    A, B = principal(W, rank, scale=scale)
    delta.start(A, B)
    with torch.no_grad():
        delta.A += torch.randn(delta.A.shape, generator=generator)
        delta.B += torch.randn(delta.B.shape, generator=generator)
    return W, delta


@pytest.mark.parametrize("shape", SHAPES)
def test_starts_at_exactly_nothing_wherever_it_starts(shape: tuple[int, ...]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    delta = LowRankDifference(shape, rank=2, scale=3.0)
    A, B = principal(W, 2, scale=3.0)
    delta.start(A, B)
    assert delta.A.abs().sum() > 0
    assert torch.equal(delta.fold(W, None)[0], W)
    if W.ndim == 2:
        x = torch.randn(4, W.shape[1])
        assert torch.equal(delta(x, x @ W.t()), x @ W.t())


@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_difference_of_two_products(shape: tuple[int, ...]) -> None:
    W, delta = moved(shape)
    wanted = W + 1.5 * (delta.B @ delta.A - delta.B0 @ delta.A0)
    assert (wanted - W).abs().max() > 0.1
    torch.testing.assert_close(delta.fold(W, None)[0], wanted)
    if W.ndim == 2:
        x = torch.randn(4, W.shape[1], dtype=torch.float64)
        torch.testing.assert_close(delta(x, x @ W.t()), x @ wanted.t())


def test_by_hand() -> None:
    W = torch.diag(torch.tensor([8.0, 3.0]))
    delta = LowRankDifference((2, 2), rank=1, scale=2.0)
    delta.start(*principal(W, 1, scale=2.0))
    assert torch.allclose(2.0 * delta.B0 @ delta.A0, torch.diag(torch.tensor([8.0, 0.0])), atol=1e-6)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 2.0]]))
        delta.B.copy_(torch.tensor([[1.0], [-1.0]]))
    x, y = torch.tensor([[5.0, 1.0]]), torch.tensor([[10.0, 10.0]])
    # s B A x = 2 * 7 * (1, -1); s B0 A0 x = (40, 0)
    assert torch.allclose(delta(x, y), torch.tensor([[10 + 14 - 40.0, 10 - 14.0]]), atol=1e-5)
    folded, _ = delta.fold(W, None)
    assert torch.allclose(folded, torch.tensor([[2.0, 4.0], [-2.0, -4.0 + 3.0]]), atol=1e-5)


def test_both_factors_learn_from_the_first_step_on() -> None:
    W = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    delta = LowRankDifference((6, 9), rank=2, scale=1.0)
    delta.start(*principal(W, 2))
    x = torch.randn(4, 9)
    delta(x, x @ W.t()).square().sum().backward()
    assert delta.A.grad.abs().max() > 0
    assert delta.B.grad.abs().max() > 0


@pytest.mark.parametrize("niter", [None, 8])
def test_what_is_principal_leaves_the_rest_of_the_spectrum(niter: int | None) -> None:
    W = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    A, B = principal(W, 3, scale=0.5, niter=niter)
    assert torch.allclose(A.norm(dim=1), B.norm(dim=0), atol=1e-4)  # of equal size
    left = torch.linalg.svdvals(W - 0.5 * B @ A)
    torch.testing.assert_close(left[:5], torch.linalg.svdvals(W)[3:], rtol=1e-3, atol=1e-4)


class Given(LowRankDelta):
    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.factors = LowRank(A, B, 0.5)

    def low_rank(self) -> LowRank:
        return self.factors


def test_factors_fold_into_what_they_add() -> None:
    W, A, B, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 7), (2, 7), (5, 2), (3, 7)))
    delta = Given(A, B)
    folded, bias = delta.fold(W, None)
    assert bias is None
    torch.testing.assert_close(delta(x, x @ W.T), x @ folded.T)


@pytest.mark.parametrize("of_factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_weight", [torch.bfloat16, torch.float32])
def test_factors_are_multiplied_in_the_more_exact_dtype(
    of_factors: torch.dtype, of_weight: torch.dtype
) -> None:
    A, B = torch.randn(16, 7).to(of_factors), torch.randn(5, 16).to(of_factors)
    exact = torch.promote_types(of_factors, of_weight)
    folded, _ = Given(A, B).fold(torch.zeros(5, 7, dtype=of_weight), None)
    assert torch.equal(folded, 0.5 * (B.to(exact) @ A.to(exact)).to(of_weight))
