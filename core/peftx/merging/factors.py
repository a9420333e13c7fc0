"""Differences of low rank as factors: D = B A, without D where it is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """D = B A of one matrix, or of stacked ones."""

    A: Tensor
    """[..., rank, in]"""
    B: Tensor
    """[..., out, rank]"""

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def dense(self) -> Tensor:
        return self.B @ self.A

    def norm(self) -> float:
        """||B A|| by Frobenius: the trace of (BᵀB)(AAᵀ)."""
        return float(((self.B.mT @ self.B) * (self.A @ self.A.mT)).sum().clamp(min=0).sqrt())

    def padded(self, rank: int) -> Factors:
        """The same D by factors of a higher rank."""
        more = rank - self.rank
        A = torch.cat((self.A, self.A.new_zeros(*self.A.shape[:-2], more, self.A.shape[-1])), -2)
        return Factors(A, torch.cat((self.B, self.B.new_zeros(*self.B.shape[:-1], more)), -1))


def beside(factors: Sequence[tuple[float, Factors]]) -> Factors:
    """Σ w B A by factors that lie beside each other: of the ranks' sum, and exact."""
    return Factors(
        torch.cat([pair.A for _, pair in factors], -2),
        torch.cat([weight * pair.B for weight, pair in factors], -1),
    )


def nearest_to(factors: Factors, rank: int) -> Factors:
    """The nearest D of a rank, by Frobenius (Eckart and Young). The factors are reduced, D is not made."""
    Q, R = torch.linalg.qr(factors.B)
    P, S = torch.linalg.qr(factors.A.mT)
    small = split(R @ S.mT, rank)
    return Factors(small.A @ P.mT, Q @ small.B)


def split(dense: Tensor, rank: int) -> Factors:
    """The same of a dense D, [..., out, in]; each factor takes the root of the singular values."""
    U, s, V = torch.linalg.svd(dense, full_matrices=False)
    root = s[..., :rank].sqrt()
    return Factors(root.unsqueeze(-1) * V[..., :rank, :], U[..., :, :rank] * root.unsqueeze(-2))
