"""Low-rank updates that start elsewhere than at 0, on a model that starts unchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftx.kernel.slots import LowRank
from peftx.toolkits.injecting.low_rank import LowRankDelta


class LowRankDifference(LowRankDelta):
    """y + s (B A - B0 A0) x, in factors beside each other that cancel nothing and are 0 to the bit at the start:

        B A - B0 A0 = [B - B0, B0] [A; A - A0]

    Args:
        shape: of the weight, [..., out, in] (leading: stacked experts). rank: r. scale: s.
    """

    full_precision = True  # what A and B have moved is small beside them: bfloat16 would round it away
    A0: Tensor
    B0: Tensor

    def __init__(self, shape: tuple[int, ...], *, rank: int, scale: float) -> None:
        super().__init__()
        *batch, out_features, in_features = shape
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(*batch, rank, in_features))
        self.B = nn.Parameter(torch.zeros(*batch, out_features, rank))
        self.register_buffer("A0", torch.zeros(*batch, rank, in_features))
        self.register_buffer("B0", torch.zeros(*batch, out_features, rank))

    @torch.no_grad()
    def start(self, A0: Tensor, B0: Tensor) -> None:
        """Start from A0 [..., r, in] and B0 [..., out, r]."""
        for A, B in ((self.A, self.B), (self.A0, self.B0)):
            A.copy_(A0)
            B.copy_(B0)

    def low_rank(self) -> LowRank:
        A = torch.cat((self.A, self.A - self.A0), -2)  # [..., 2 r, in]
        B = torch.cat((self.B - self.B0, self.B0), -1)  # [..., out, 2 r]
        return LowRank(A, B, self.scale)


@torch.no_grad()
def principal(
    weight: Tensor, rank: int, *, scale: float = 1.0, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """The r largest singular values of a weight [..., out, in] = U S V^T in two factors of equal size: of PiSSA
    (arXiv:2404.02948).

    Args:
        scale: s, which multiplies their product.
        niter: subspace iterations of a randomized SVD (Halko et al., arXiv:0909.4061); an exact one if left out.

    Returns:
        A = sqrt(S_r / s) V_r^T [..., r, in] and B = U_r sqrt(S_r / s) [..., out, r], in float32.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight.float(), rank, niter=niter)
        Vh = V.mT
    root = (S[..., :rank] / scale).sqrt()
    return root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)
