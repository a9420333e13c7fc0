"""OFT: the input of a frozen layer is turned by a block-diagonal orthogonal matrix.

"Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv:2306.07280):

    h = W R x + b                                W: [out, d], frozen; R: [d, d]
    R = diag(R_1, ..., R_r)                      r blocks of b x b, r b = d
    R_i = (I + Q_i) (I - Q_i)^-1                 Cayley; Q_i = -Q_i^T, from its upper triangle, starts at 0

R is orthogonal with determinant 1, so the angles between the rows of W (its hyperspherical energy) stay. With `scale` a
factor for each output trains too, h = diag(s) W R x + b. The constrained form COFT keeps R near I:
|Q_i| <= eps / sqrt(r) (Frobenius), by projection after each update.

"Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (arXiv:2311.06243) makes a dense R of m sparse
factors, each block-diagonal in another order of the coordinates:

    R = B_1 B_2 ... B_m                          B_m first; m = 1 is OFT
    B_i = P_i^T diag(R_i1, ..., R_ir) P_i        P_i brings half blocks (b / 2 coordinates) 2^(i-1) apart together

so that with m = 1 + log2 r every output depends on every input. Merged, W' = diag(s) W R costs nothing.

The code computes C = R - I = 2 Q (I - Q)^-1 of the blocks, which is zero to the last bit at the start, or the first
terms of its Neumann series 2 (Q + Q^2 + ...) ("Orthogonal Finetuning Made Scalable", arXiv:2506.19847), without a solve
and orthogonal only about. The series is that of -Q, as in HF PEFT, whose parameters fit these in name, shape and sign.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from functools import partial
from typing import Any

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from peftx import (
    Claim,
    Delta,
    ModelView,
    PeftFormat,
    Plugin,
    PluginConfig,
    Site,
    Targets,
    TrainStep,
    hookimpl,
)
from peftx.errors import AdapterError, OptionError
from peftx.kernel.parts import DeltaPart
from peftx.peft_format import Settings, most_common, targets_of

BLOCK = 32


class OftConfig(PluginConfig):
    """Options of OFT; the paper turns the inputs of the attention's layers."""

    block_size: int | None = Field(
        None, ge=2, description=f"b, size of a block; {BLOCK} if blocks is left out too"
    )
    blocks: int | None = Field(None, ge=1, description="r, number of blocks, in the place of their size")
    share: bool = Field(False, description="one block for all r places")
    eps: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="COFT: how far R may go from I (released code: 6e-5); anywhere if left out",
    )
    butterfly: int | None = Field(
        None, ge=1, description="BOFT: m, number of butterfly factors; OFT if left out"
    )
    scale: bool = Field(False, description="also train a factor for each output feature")
    neumann: int | None = Field(
        None, ge=4, description="terms of the Neumann series in the place of the exact inverse (HF PEFT: 5)"
    )
    targets: Targets = Field(Targets("attention"), description="linear layers whose input to turn")

    @field_validator("blocks")
    @classmethod
    def _one_of_both(cls, blocks: int | None, info: ValidationInfo) -> int | None:
        if blocks is not None and info.data.get("block_size") is not None:
            raise ValueError("block_size is given too, and follows from it: leave one of them out")
        return blocks


class Turn(Delta):
    """diag(s) W R x + b.

    Args:
        features: d. size: b of a block. config: share, eps, butterfly (m; None for OFT's own parameters), neumann.
        out_features: of s, None for no s. bias: b, which s leaves alone.
    """

    full_precision = True  # orthogonality is the point, and a step of Q is far below the ones in I

    def __init__(
        self,
        features: int,
        size: int,
        config: OftConfig,
        *,
        out_features: int | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.neumann = size, config.eps, config.neumann
        blocks, m = 1 if config.share else features // size, config.butterfly
        shape = (m, blocks, size, size) if m else (blocks, size * (size - 1) // 2)
        self.key = "boft_R" if m else "oft_R"
        self.register_parameter(self.key, nn.Parameter(torch.zeros(shape)))
        self.boft_s = nn.Parameter(torch.ones(out_features, 1)) if out_features else None
        self.register_buffer("b", None if bias is None else bias.detach().clone())

    def free(self) -> Tensor:
        """Q as the parameters say it, [m, r, b, b]."""
        R: Tensor = getattr(self, self.key)
        if R.ndim == 4:
            return (R - R.mT) / 2  # the skew part
        Q = R.new_zeros(1, len(R), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=R.device)
        Q[..., rows, columns] = R
        return Q - Q.mT

    @torch.no_grad()
    def into_ball(self, Q: Tensor) -> Tensor:
        """The factor that brings each block of Q into COFT's ball, [m, r, 1, 1]; 1 for what is in it."""
        radius = math.inf if self.eps is None else self.eps / math.sqrt(Q.shape[1])
        return (radius / torch.linalg.matrix_norm(Q, keepdim=True)).clamp(max=1)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the parameters into the ball: they scale as Q does."""
        R, factor = getattr(self, self.key), self.into_ball(self.free())
        R.mul_(factor if R.ndim == 4 else factor[0, ..., 0])

    def change(self) -> Tensor:
        """R_i^T - I of all blocks, [m, r, b, b]: a row vector x becomes x + x change."""
        Q = self.free()
        Q = Q * self.into_ball(Q)  # parameters that were loaded may lie outside
        identity = torch.eye(self.size, dtype=Q.dtype, device=Q.device)
        if self.neumann is None:
            return torch.linalg.solve(identity + Q, -2 * Q)
        series = Q
        for _ in range(self.neumann - 2):
            series = Q @ (2 * identity + series)  # 2 Q + 2 Q^2 + ... + Q^(n - 1)
        return series

    def pre(self, x: Tensor) -> Tensor:
        return through(x, reversed(list(enumerate(self.change()))))  # R x: the last factor first

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.boft_s is None:
            return y
        b = 0 if self.b is None else self.b.to(y.dtype)
        return y + (y - b) * (self.boft_s[:, 0] - 1).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turned = through(weight, enumerate(self.change().mT))  # W R
        turned = turned if self.boft_s is None else turned * self.boft_s.to(turned.dtype)
        return turned, None if bias is None else self(bias, bias)


def through(x: Tensor, factors: Iterable[tuple[int, Tensor]]) -> Tensor:
    """x + x C for one factor after another, for every vector x: [..., d].

    Args:
        factors: i, and C: [r, b, b] ([1, b, b] if shared), whose blocks act on half blocks that stand 2^i apart.
    """
    dtype = x.dtype
    for i, C in factors:
        b = C.shape[-1]
        apart = (-1, 2, 2**i, b // 2) if i else (-1, 1, 1, b)
        halves = x.to(C.dtype).unflatten(-1, apart).transpose(-3, -2)
        added = torch.einsum("...rb,rbc->...rc", halves.reshape(*x.shape[:-1], -1, b), C)
        x = x + added.reshape(halves.shape).transpose(-3, -2).reshape(x.shape)
    return x.to(dtype)


def oft_options(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says of OFT; the tensors say how large the blocks are."""
    settings["r"], settings["oft_block_size"], settings["init_weights"], settings["module_dropout"]
    shapes = settings.adapted("oft_R.weight")
    sizes = {path: (1 + math.isqrt(1 + 8 * shape[-1])) // 2 for path, shape in shapes.items()}
    share, eps = bool(settings["block_share"]), settings["eps"]
    terms = settings.get("num_cayley_neumann_terms", 5)
    neumann = terms if settings.get("use_cayley_neumann", False) else None
    if neumann is not None and neumann < 4:
        raise AdapterError(
            f"oft: the adapter has num_cayley_neumann_terms={neumann}, and the plugin 4 or more",
            hint="load it with PEFT, and merge it into the base: PeftModel.merge_and_unload",
        )
    return {
        **_sizes(sizes, {path: shape[0] for path, shape in shapes.items()}, settings["r"] if share else None),
        "share": share,
        "eps": eps if settings["coft"] else None,
        "neumann": neumann,
        "targets": targets_of(shapes),
    }


def boft_options(settings: Settings) -> dict[str, Any]:
    """What `adapter_config.json` says of BOFT, and its tensors [m, r, b, b]."""
    for name in (
        "boft_block_size",
        "boft_block_num",
        "boft_n_butterfly_factor",
        "boft_dropout",
        "init_weights",
    ):
        settings[name]
    if settings.get("bias", "none") != "none":
        raise AdapterError(
            "oft: the adapter trained biases as well, which the scale of BOFT leaves alone as they were at its start",
            hint="load it with PEFT, and merge it into the base: PeftModel.merge_and_unload",
        )
    shapes = settings.adapted("boft_R", dimensions=4)
    sizes, blocks = ({path: shape[at] for path, shape in shapes.items()} for at in (-1, 1))
    return {
        **_sizes(sizes, blocks, None),
        "butterfly": most_common({path: shape[0] for path, shape in shapes.items()}),
        "scale": True,
        "targets": targets_of(shapes),
    }


def _sizes(sizes: dict[str, int], blocks: dict[str, int], shared: int | None) -> dict[str, int]:
    """One size for all layers, or one number of blocks."""
    if len(set(sizes.values())) < 2:
        return {"block_size": most_common(sizes)}
    if len(set(blocks.values())) == 1:
        return {"blocks": shared or most_common(blocks)}
    named = ", ".join(map(str, sorted(set(sizes.values()))))
    raise AdapterError(
        f"oft: the adapter has blocks of {named}, and the plugin one size, or one number of blocks",
        hint="load it with PEFT, and merge it into the base: PeftModel.merge_and_unload",
    )


def oft_settings(config: OftConfig) -> dict[str, Any]:
    """For `adapter_config.json`."""
    found: dict[str, Any] = {
        "r": config.blocks or 0,
        "oft_block_size": 0 if config.blocks else config.block_size or BLOCK,
        "block_share": config.share,
        "coft": config.eps is not None,
        "use_cayley_neumann": config.neumann is not None,
    }
    found |= {} if config.eps is None else {"eps": config.eps}
    return found | ({} if config.neumann is None else {"num_cayley_neumann_terms": config.neumann})


def boft_settings(config: OftConfig) -> dict[str, Any]:
    """For `adapter_config.json`."""
    return {
        "boft_block_size": 0 if config.blocks else config.block_size or BLOCK,
        "boft_block_num": config.blocks or 0,
        "boft_n_butterfly_factor": config.butterfly,
    }


def is_boft(config: OftConfig) -> bool:
    """PEFT's BOFT has a scale always, each block is its own, and its inverse exact."""
    return bool(config.butterfly and config.scale) and not (config.share or config.eps or config.neumann)


class Oft(Plugin):
    """See the module."""

    Config = OftConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.EDITS_INPUTS}
    config: OftConfig
    example = {"block_size": 4}
    peft = (
        PeftFormat(
            "OFT",
            tensors={"oft_R": "oft_R.weight"},
            options=oft_options,
            settings=oft_settings,
            written=lambda config: not config.butterfly and not config.scale,
        ),
        PeftFormat(
            "BOFT",
            tensors={"boft_R": "boft_R", "boft_s": "boft_s"},
            own=frozenset({"b"}),
            options=boft_options,
            settings=boft_settings,
            written=is_boft,
        ),
    )

    @hookimpl
    def inject(self, model: ModelView) -> None:
        chosen = {(site.path, site.role) for site in model.linears(self.config.targets)}
        for site in model.linears(self.config.targets, whole=True):
            left_out = [role for role in site.fused if (site.path, role) not in chosen]
            if left_out:
                raise OptionError(
                    f"oft: R turns the input of {site.path}, which {', '.join(left_out)} shares",
                    hint="add it to targets",
                )
            scaled = {"out_features": site.out_features, "bias": site.bias} if self.config.scale else {}
            site.attach(Turn(site.in_features, self.size(site), self.config, **scaled))

    def size(self, site: Site) -> int:
        """b for one layer."""
        d, r, apart = site.in_features, self.config.blocks, 2 ** ((self.config.butterfly or 1) - 1)
        b = (self.config.block_size or BLOCK) if r is None else d // r
        fitting = [n for n in range(2, d + 1) if d % (n * apart) == 0 and (apart == 1 or n % 2 == 0)]
        if b not in fitting or r not in (None, d // b):
            raise OptionError(
                f"oft: {f'{r} blocks' if r else f'blocks of {b}'} and {self.config.butterfly or 1} factors do not fit "
                f"the {d} inputs of {site.path}",
                hint=f"a block_size of {fitting}, or leave it out of targets: '!{site.role}'",
            )
        return b

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if self.config.eps is not None:
            step.after_update(partial(project, step.stack.ledger.of(step.stack.id_of(self), DeltaPart)))
        return (yield)


def project(parts: list[DeltaPart], _: Any) -> None:
    """Bring all layers into COFT's ball."""
    for part in parts:
        part.module.project()
