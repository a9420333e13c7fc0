"""qGOFT: a frozen layer's input is turned by a tree of d - 1 plane rotations.

"Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation" (arXiv:2404.04316):

    h = W R x + b                    W: [out, d], frozen; R: [d, d]
    R = S_1 S_2 ... S_T              T = ceil(log2 d) stages, S_T first

Stage S_t turns the pairs of neighbours among the indices 0, 2^(t-1), 2 * 2^(t-1), ... that are still alive, each in its
plane, all at once; an odd one out passes. The first of a pair stays alive for S_(t+1). That is d/2 + d/4 + ... + 1
= d - 1 planes for any d, and they can take any vector to the first axis: the pivot of the paper's proof.

    strict (GOFT)    G_i = [[cos a, -sin a], [sin a, cos a]], a = pi tanh(theta_i); theta: [d - 1], starts at 0
    quasi (qGOFT)    G_i in R^(2 x 2), free; G: [d - 1, 2, 2], starts at I;
                     loss = task + lambda * sum_i |G_i^T G_i - I|^2

A strict R is orthogonal with determinant 1, so the lengths of W's rows and the angles between them stay; `scale` adds a
factor for each input, W diag(m) R. Merged, W' = W R, the planes cost nothing.

Only alive indices are touched, so R x takes about 4 d multiplications and not d log d.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, Stack, Targets, TrainStep, hookimpl
from peftx.errors import OptionError
from peftx.kernel.parts import DeltaPart

PENALTY = 0.01


class QgoftConfig(PluginConfig):
    """Options of qGOFT."""

    form: Literal["quasi", "strict"] = Field(
        "quasi", description="quasi: free 2x2 blocks, kept near rotations by a penalty; strict: rotations"
    )
    penalty: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description=f"lambda of the quasi form's penalty; {PENALTY} if left out",
    )
    scale: bool = Field(False, description="strict form: also train a factor for each input feature")
    targets: Targets = Field(Targets("all"), description="linear layers whose input to turn")


class Turn(Delta):
    """The layer sees R x, or diag(m) R x.

    Args:
        features: d. strict: rotations, not free blocks. scale: whether m trains.
    """

    full_precision = True  # log2 d roundings in a row, and orthogonality is the point

    def __init__(self, features: int, *, strict: bool, scale: bool = False) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(features - 1)) if strict else None
        self.G = None if strict else nn.Parameter(torch.eye(2).repeat(features - 1, 1, 1))
        self.m = nn.Parameter(torch.ones(features)) if scale else None

    def planes(self) -> Tensor:
        """All G_i, [d - 1, 2, 2]: those of S_1, then those of S_2, ..."""
        if self.theta is None:
            return self.G
        a = math.pi * torch.tanh(self.theta)
        return torch.stack((a.cos(), -a.sin(), a.sin(), a.cos()), dim=-1).unflatten(-1, (2, 2))

    def pre(self, x: Tensor) -> Tensor:
        turned = tree(x, self.planes())  # R x
        return (turned if self.m is None else turned * self.m).to(x.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        basis = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
        return weight @ self.pre(basis).mT, bias  # W R: the rows of pre(basis) are R's columns

    def defect(self) -> Tensor:
        """sum_i |G_i^T G_i - I|^2."""
        G = self.planes()
        return (G.mT @ G - torch.eye(2, dtype=G.dtype, device=G.device)).square().sum()


def tree(x: Tensor, G: Tensor) -> Tensor:
    """S_1 S_2 ... S_T x for every vector x: [..., d]; G: [d - 1, 2, 2]."""
    d = x.shape[-1]
    if d == 1:
        return x
    alive = tree(x[..., ::2], G[d // 2 :])  # S_2 ... S_T, on [..., ceil(d / 2)]
    first, second = alive[..., : d // 2], x[..., 1::2]
    (g00, g01), (g10, g11) = G[: d // 2].permute(1, 2, 0)
    pairs = torch.stack((g00 * first + g01 * second, g10 * first + g11 * second), dim=-1)  # S_1
    return torch.cat((pairs.flatten(-2), alive[..., d // 2 :].to(pairs.dtype)), dim=-1)


class Qgoft(Plugin):
    """See the module."""

    Config = QgoftConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.EDITS_INPUTS}
    config: QgoftConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        strict = self.config.form == "strict"
        if strict and self.config.penalty is not None:
            raise OptionError(
                f"qgoft: penalty {self.config.penalty:g}, but strict rotations have nothing to penalise",
                hint="leave penalty out, or form: quasi",
            )
        if self.config.scale and not strict:
            raise OptionError(
                "qgoft: scale, but the blocks of the quasi form scale already",
                hint="leave scale out, or form: strict",
            )
        chosen = {(site.path, site.role) for site in model.linears(self.config.targets)}
        for site in model.linears(self.config.targets, whole=True):
            left_out = [role for role in site.fused if (site.path, role) not in chosen]
            if left_out:
                raise OptionError(
                    f"qgoft: R turns the input of {site.path}, which {', '.join(left_out)} shares",
                    hint="add it to targets",
                )
            site.attach(Turn(site.in_features, strict=strict, scale=self.config.scale))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        weight = PENALTY if self.config.penalty is None else self.config.penalty
        if self.config.form == "quasi" and weight > 0:
            id = step.stack.id_of(self)
            step.add_loss(id, lambda _: self.defect(step.stack, id), weight=weight, over="step")
        return (yield)

    @staticmethod
    def defect(stack: Stack, id: str) -> Tensor:
        """sum over all layers and planes of |G^T G - I|^2."""
        return torch.stack([part.module.defect() for part in stack.ledger.of(id, DeltaPart)]).sum()
