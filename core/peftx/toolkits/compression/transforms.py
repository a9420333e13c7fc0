"""Hadamard transforms: orthogonal rotations with entries +-1/sqrt(n).

A matrix of order n exists here for n = 2^k * m, where m is 1 or an order of Paley's over a prime field: q + 1 for a
prime q = 3 (mod 4) (12, 20, 24, 44, 48, ...), or 2(q + 1) for a prime q = 1 (mod 4) (12, 28, 36, 60, 76, ...). That
is every power of two and every multiple of 4 up to 200, but for 52, 92, 100, 116, 156, 172, 184 and 188.

    H_{2n} = [[H_n, H_n], [H_n, -H_n]];   H = H_{2^k} (x) H_m;   H H^T = n I
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftx.errors import UnsupportedError

__all__ = ["fwht", "hadamard", "hadamard_exists", "hadamard_signs"]

_MOST_FACTOR = 64
_SIGNS: dict[int, Tensor] = {}


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = +1, -1 or 0 as i - j is a square, a non-square or 0 modulo the prime q: [q, q] int8."""
    character = torch.full((q,), -1, dtype=torch.int8)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    return character[(torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q]


def _paley_kind(m: int) -> int:
    """1 or 2 where Paley's first or second construction gives order m over a prime field, else 0."""
    if m % 4 == 0 and _is_prime(m - 1):
        return 1
    half = m // 2 - 1
    return 2 if m % 4 == 0 and half % 4 == 1 and _is_prime(half) else 0


def _paley(m: int) -> Tensor:
    """[m, m] int8 of +-1 with H H^T = m I."""
    if _paley_kind(m) == 1:
        # H = I + S with S skew: S = [[0, 1^T], [-1, Q]], and Q is skew for q = 3 (mod 4).
        skew = torch.zeros(m, m, dtype=torch.int8)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(m - 1)
        return torch.eye(m, dtype=torch.int8) + skew
    # C = [[0, 1^T], [1, Q]] is symmetric for q = 1 (mod 4), and
    # H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]].
    n = m // 2
    conference = torch.zeros(n, n, dtype=torch.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(n - 1)
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    on = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, off) + torch.kron(torch.eye(n, dtype=torch.int8), on)


def _split(n: int) -> tuple[int, int] | None:
    """n = 2^k * m with the least m that exists: (2^k, m), or None."""
    if n < 1:
        return None
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return n, 1
    m = odd * 4
    while n % m == 0:
        if _paley_kind(m):
            return n // m, m
        m *= 2
    return None


def hadamard_exists(n: int) -> bool:
    """Whether `hadamard(n)` can be built here."""
    return _split(n) is not None


def _need_split(n: int) -> tuple[int, int]:
    split = _split(n)
    if split is None:
        below = next(size for size in range(n - 1, 0, -1) if _split(size)) if n > 1 else 1
        above = next(size for size in range(max(n, 0) + 1, 2 * max(n, 1) + 1) if _split(size))
        raise UnsupportedError(
            f"no Hadamard matrix of order {n} is known here; the nearest orders are {below} and {above}",
            hint="a block size that divides the dimension (the largest power of two always does)",
        )
    return split


def hadamard_signs(n: int) -> Tensor:
    """[n, n] int8 of +-1 with H H^T = n I, exactly.

    Raises:
        UnsupportedError: an order that the module's constructions do not reach.
    """
    power, m = _need_split(n)
    signs = torch.ones(1, 1, dtype=torch.int8)
    double = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while signs.shape[0] < power:
        signs = torch.kron(double, signs)
    return torch.kron(signs, _paley(m)) if m > 1 else signs


def hadamard(
    n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The orthogonal matrix H / sqrt(n): [n, n]."""
    return (hadamard_signs(n).to(torch.float64) / math.sqrt(n)).to(dtype=dtype, device=device)


def _factors(power: int, m: int) -> tuple[list[int], int]:
    """Orders, at most 64 where m is, whose matrices give that of 2^k * m as a Kronecker product; m is in the last."""
    last = m
    while power > 1 and 2 * last <= _MOST_FACTOR:
        power, last = power // 2, 2 * last
    orders = []
    while power > 1:
        orders.append(min(power, _MOST_FACTOR))
        power //= orders[-1]
    return orders, last


def _factor(n: int, like: Tensor) -> Tensor:
    """`hadamard_signs(n)`, made once."""
    if n not in _SIGNS:
        with torch.device("cpu"):  # also where a caller plans on the meta device
            _SIGNS[n] = hadamard_signs(n)
    return _SIGNS[n].to(like)


def fwht(x: Tensor, *, block_size: int | None = None, inverse: bool = False) -> Tensor:
    """Rotate every vector of the last dimension: x @ hadamard(n).T, by factors of the matrix.

    Args:
        x: [..., n] floating; differentiable.
        block_size: rotate blocks of this many neighbours on their own (block-diagonal); it divides n. None = n.
        inverse: x @ hadamard(n) instead, the transposed and thus inverse rotation.

    Returns:
        [..., n] in the dtype of x (half precision is computed in float32).

    Raises:
        UnsupportedError: a block size that does not divide n, or an order that does not exist here.
    """
    size = x.shape[-1]
    block = size if block_size is None else block_size
    if block < 1 or size % block:
        raise UnsupportedError(f"block_size={block} does not divide the last dimension {size}")
    orders, last = _factors(*_need_split(block))
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # Products of small matrices are three times faster than as many additions, pass by pass.
    signs = _factor(last, work)
    work = work.reshape(-1, last) @ (signs if inverse else signs.T)
    behind = last
    for order in orders:  # of powers of two, whose matrices are symmetric: inverse and forward agree
        work = work.view(-1, order, behind)
        work = torch.bmm(_factor(order, work).expand(len(work), order, order), work)
        behind *= order
    return (work / math.sqrt(block)).view(x.shape).to(x.dtype)
