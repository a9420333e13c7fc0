"""LoRMA: a frozen weight is multiplied by a matrix that two small factors make.

"LoRMA: Low-Rank Multiplicative Adaptation for LLMs" (arXiv:2506.07621):

    h = M W x + b        mode pre,  M: [out, out]        W: [out, in], frozen
    h = W M x + b        mode post, M: [in, in]

    plus:  M = I + c B A                  B: [d, r], A: [r, d], c = alpha / r; B starts at 0
    pi:    M = c Pi(B A)                  Pi(N)[i, j] = N[i, (j - i) mod d]: row i turns by i places

B A alone has rank r, and so would M W. `plus` adds the identity; `pi` turns the rows, after which even r = 1 gives full
rank: B starts with a column of ones (the rest random) and A with a single one, so c B A is a column of ones and
Pi makes it the identity. Merged, W' = M W or W M, the factors cost nothing.

The code computes M - I, which is zero to the last bit at the start, and applies it to the columns of W or to vectors:
B (A z), never (B A) z, in `plus`; `pi` has to form the product, a d x d matrix.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Site, Targets, hookimpl
from peftx.errors import OptionError


class LormaConfig(PluginConfig):
    """Options of LoRMA; the paper adapts the attention's q and v of RoBERTa and GPT-2."""

    rank: int = Field(8, ge=1, description="r, the columns of B and rows of A")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="alpha; twice the rank if left out, so c = 2"
    )
    inflation: Literal["plus", "pi"] = Field(
        "plus", description="what lifts the rank of B A: plus adds the identity, pi turns row i by i places"
    )
    mode: Literal["pre", "post"] = Field(
        "pre", description="pre: M W, on the output; post: W M, on the input"
    )
    targets: Targets = Field(Targets("attention.q,v"), description="linear layers to adapt")


class Plus(nn.Module):
    """M - I = c B A.

    Args:
        features: d. rank: r. scale: c. batch: leading dimensions of stacked experts' weights.
    """

    def __init__(self, features: int, *, rank: int, scale: float, batch: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.scale = scale
        self.B = nn.Parameter(torch.zeros(*batch, features, rank))
        self.A = nn.Parameter(torch.empty(*batch, rank, features))
        nn.init.uniform_(self.A, -1 / math.sqrt(features), 1 / math.sqrt(features))  # Kaiming, a = sqrt(5)

    def left(self, z: Tensor) -> Tensor:
        """(M - I) z, z: [..., d, m]."""
        return self.scale * (self.B.to(z.dtype) @ (self.A.to(z.dtype) @ z))

    def right(self, z: Tensor) -> Tensor:
        """z (M - I), z: [..., m, d]."""
        return self.scale * ((z @ self.B.to(z.dtype)) @ self.A.to(z.dtype))


class Pi(nn.Module):
    """M - I = c Pi(B A) - I.

    Args:
        features: d. rank: r. scale: c. batch: leading dimensions of stacked experts' weights.
    """

    def __init__(self, features: int, *, rank: int, scale: float, batch: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.scale = scale
        root = torch.tensor(1 / math.sqrt(scale), device="cpu")  # half of 1/c for B, half for A
        self.root = float(root)
        self.B = nn.Parameter(torch.empty(*batch, features, rank))
        self.A = nn.Parameter(torch.zeros(*batch, rank, features))
        with torch.no_grad():
            self.B.uniform_(-1 / math.sqrt(rank), 1 / math.sqrt(rank)).mul_(root)  # Kaiming, a = sqrt(5)
            self.B[..., 0] = root
            self.A[..., 0, 0] = root

    def change(self) -> Tensor:
        """M - I, [..., d, d] in the dtype of B and A, float32 unless the whole stack was cast."""
        product = self.scale * (self.B @ self.A)  # c B A
        root = torch.tensor(self.root, dtype=product.dtype, device="cpu")
        one = float(self.scale * (root * root))  # c B A at the start: 1, but for the dtype's rounding
        i = torch.arange(product.shape[-1], device=product.device)
        turned = product.gather(-1, ((i - i[:, None]) % len(i)).expand_as(product))  # [i, (j - i) mod d]
        return turned - one * torch.eye(len(i), dtype=product.dtype, device=product.device)

    def left(self, z: Tensor) -> Tensor:
        return self.change().to(z.dtype) @ z

    def right(self, z: Tensor) -> Tensor:
        return z @ self.change().to(z.dtype)


class MultiplyOutput(Delta):
    """Mode pre: W' = M W, so y' = M (y - b) + b.

    Args:
        multiplier: M. bias: b of the layer, which M leaves alone.
    """

    full_precision = True  # a step of B and A is far below bfloat16's rounding of the ones in `pi`

    def __init__(self, multiplier: Plus | Pi, *, bias: Tensor | None) -> None:
        super().__init__()
        self.M = multiplier
        self.register_buffer("b", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = y if self.b is None else y - self.b.to(y.dtype)  # W x
        return y + apply(self.M, z)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.M.left(weight), None if bias is None else self(bias, bias)


class MultiplyInput(Delta):
    """Mode post: W' = W M, so the layer sees M x.

    Args:
        multiplier: M.
    """

    full_precision = True

    def __init__(self, multiplier: Plus | Pi) -> None:
        super().__init__()
        self.M = multiplier

    def pre(self, x: Tensor) -> Tensor:
        return x + apply(self.M, x)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.M.right(weight), bias


def apply(multiplier: Plus | Pi, z: Tensor) -> Tensor:
    """(M - I) z for every vector z: [..., d]."""
    return multiplier.left(z.reshape(-1, z.shape[-1]).mT).mT.reshape(z.shape)


class Lorma(Plugin):
    """See the module."""

    Config = LormaConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE}
    architectures = ("mixtral",)
    config: LormaConfig

    def claimed(self) -> frozenset[Claim]:
        return self.claims | {Claim.EDITS_INPUTS} if self.config.mode == "post" else self.claims

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if self.config.mode == "pre":
            for site in model.linears(self.config.targets):
                multiplier = self.multiplier(site, site.out_features)
                site.attach(MultiplyOutput(multiplier, bias=site.bias))
        else:
            chosen = {(site.path, site.role) for site in model.linears(self.config.targets)}
            for site in model.linears(self.config.targets, whole=True):
                left_out = [role for role in site.fused if (site.path, role) not in chosen]
                if left_out:
                    raise OptionError(
                        f"lorma: mode post multiplies the input of {site.path}, which {', '.join(left_out)} shares",
                        hint="add it to targets, or mode: pre",
                    )
                site.attach(MultiplyInput(self.multiplier(site, site.in_features)))

    def multiplier(self, site: Site, features: int) -> Plus | Pi:
        """M for one layer; `features` is its d."""
        rank, alpha = self.config.rank, self.config.alpha
        if rank > features:
            raise OptionError(
                f"lorma: rank {rank} exceeds the {features}x{features} matrix M of {site.path}",
                hint=f"rank at most {features}, or leave it out of targets: '!{site.role}'",
            )
        kind = Plus if self.config.inflation == "plus" else Pi
        return kind(features, rank=rank, scale=2.0 if alpha is None else alpha / rank, batch=site.batch)
