"""Delta-CoMe: a fine-tuned model is its base and singular vectors of the difference, the first ones in more bits.

"Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large Language Models" (arXiv:2406.08903). The
whole model is fine-tuned here, or was elsewhere (`finetuned`). Then, for each matrix of the blocks,

    D = W_f - W_b = U S V^T [out, in], singular values falling; groups g: the first 2 in 8 bits, the next 32 in 3,
    as many as the budget has room for in 2, the rest is dropped
    V_g^ = GPTQ(V_g; X^T X);   U_g^ = GPTQ(U_g; Y^T Y), Y = X V_g^ S_g         X: the layer's input on calibration text
    y = W_b x + b + sum_g U_g^ (S_g (V_g^^T x))

    GPTQ(W; H): one column after another, of the largest H_jj first, is rounded, and what that costs is made up for by
    the columns that are left: W_j' -= (w_j - w_j^) C_jj' / C_jj, C the upper Cholesky factor of the inverse of H

A matrix takes at most `alpha` of its bytes in half precision, scales and zero points counted in. Embeddings, head,
norms and biases keep the fine-tuned values as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import (
    BoundSite,
    Claim,
    Delta,
    Evaluation,
    ModelView,
    Plugin,
    PluginConfig,
    Stack,
    Targets,
    companion,
    hookimpl,
)
from peftx.errors import ArchitectureError, ConflictError
from peftx.kernel.parts import DeltaPart
from peftx.kernel.trained import Trained
from peftx.toolkits.compression import (
    BlockInputs,
    Calibration,
    Quantized,
    adopt,
    dequantize,
    differences,
    entering,
    pack_bits,
    quantize,
    text_blocks,
    unpack_bits,
)


class DeltaComeConfig(PluginConfig):
    """Options of Delta-CoMe; the paper calibrates on 128 sequences of C4."""

    finetuned: str | None = Field(
        None, description="a model that is fine-tuned already: a folder, a hub id or a bundle"
    )
    targets: Targets = Field(Targets("all"), description="matrices whose difference is packed")
    alpha: float = Field(
        1 / 16, gt=0, description="bytes of a difference, of those of its matrix in half precision"
    )
    bits: tuple[int, ...] = Field(
        (8, 3, 2), min_length=1, description="bits of each group of vectors, the first first"
    )
    vectors: tuple[int, ...] = Field(
        (2, 32), description="vectors in each group but the last, which fills the budget"
    )
    group_size: int = Field(128, ge=1, description="numbers of a vector that share a scale and a zero point")

    @model_validator(mode="after")
    def _groups_fit(self) -> DeltaComeConfig:
        if len(self.bits) != len(self.vectors) + 1 or min(self.vectors, default=0) < 0:
            raise ValueError(
                f"{len(self.bits)} bit widths go with {len(self.bits) - 1} numbers of vectors, from 0 on"
            )
        if not all(2 <= b <= 8 for b in self.bits):
            raise ValueError("bits are from 2 to 8")
        return self


@torch.no_grad()
def gptq(W: Tensor, H: Tensor, s: Tensor, z: Tensor, bits: int) -> Tensor:
    """Codes of W [rows, n], uint8 [rows, n], for inputs with H = X^T X [n, n] and scales and zero points [rows, n]."""
    H = H / H.diagonal().mean().clamp_min(torch.finfo(H.dtype).tiny)
    order = H.diagonal().argsort(descending=True, stable=True)
    H = H[order][:, order] + 0.01 * torch.eye(len(H), dtype=H.dtype, device=H.device)
    C = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    left, q = W[:, order].clone(), torch.empty_like(W)
    for i, j in enumerate(order.tolist()):
        q[:, j] = (torch.round(left[:, i] / s[:, j]) + z[:, j]).clamp(0, 2**bits - 1)
        lost = (left[:, i] - (q[:, j] - z[:, j]) * s[:, j]) / C[i, i]
        left[:, i + 1 :] -= lost[:, None] * C[i, i + 1 :]
    return q.to(torch.uint8)


class Vectors(nn.Module):
    """Packed vectors [count, size]. Buffers: q [count, ceil(size bits / 8)] and zero [count, groups] uint8, scale
    [count, groups] int16: the bits of a float16, since a cast of the model would round a float."""

    def __init__(self, count: int, size: int, bits: int, group_size: int) -> None:
        super().__init__()
        self.size, self.bits, self.group_size = size, bits, group_size
        groups = (count, -(-size // group_size))
        self.register_buffer("q", torch.zeros(count, -(-size * bits // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(groups, dtype=torch.int16))
        self.register_buffer("zero", torch.zeros(groups, dtype=torch.uint8))

    def take(self, vectors: Tensor, H: Tensor, *, mixed: bool) -> Tensor:
        """Round [count, size] float32, and give what became of them. H is of the numbers of a vector, [size, size], or
        (`mixed`) of the vectors, [count, count]."""
        form = {"bits": self.bits, "group_size": self.group_size}
        start = quantize(vectors, symmetric=False, scale_dtype=torch.float16, **form)
        assert start.zero is not None
        spread = [
            t.float().repeat_interleave(self.group_size, 1)[:, : self.size] for t in (start.scale, start.zero)
        ]
        W, s, z = (t.mT if mixed else t for t in (vectors, *spread))
        q = gptq(W, H, s, z, self.bits)
        self.q.copy_(pack_bits((q.mT if mixed else q).contiguous(), self.bits))
        self.scale.copy_(start.scale.view(torch.int16))
        self.zero.copy_(start.zero)
        return self()

    def forward(self) -> Tensor:
        """[count, size] float32."""
        q = unpack_bits(self.q, self.bits, size=self.size, signed=False)
        scale = self.scale.view(torch.float16)
        form = {"bits": self.bits, "group_size": self.group_size}
        return dequantize(Quantized(q=q, scale=scale, zero=self.zero, **form), torch.float32)


class VectorDelta(Delta):
    """y + sum_g U_g (S_g (V_g^T x)): S float32 [rank] of all groups, and `Vectors` of each for U^T and V^T."""

    full_precision = True
    S: Tensor

    def __init__(self, shape: tuple[int, ...], groups: Iterable[tuple[int, int]], group_size: int) -> None:
        super().__init__()
        (out, width), groups = shape, [(n, bits) for n, bits in groups if n]
        self.register_buffer("S", torch.zeros(sum(n for n, _ in groups)))
        self.U = nn.ModuleList(Vectors(n, out, bits, group_size) for n, bits in groups)
        self.V = nn.ModuleList(Vectors(n, width, bits, group_size) for n, bits in groups)

    def take(self, D: Tensor, H: Tensor) -> None:
        """Pack D [out, in] float32 for inputs with H = X^T X [in, in]."""
        U, S, V = torch.linalg.svd(D, full_matrices=False)  # V is V^T
        self.S.copy_(S[: len(self.S)])
        at = 0
        for u, v in zip(self.U, self.V, strict=True):
            g = slice(at, at := at + len(v.q))
            A = S[g, None] * v.take(V[g], H, mixed=False)
            u.take(U[:, g].mT.contiguous(), A @ H @ A.mT, mixed=True)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """S V^T [rank, in] and U [out, rank]."""
        U, V = (torch.cat([vectors() for vectors in side]) for side in (self.U, self.V))
        return (self.S.float()[:, None] * V).to(dtype), U.mT.to(dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self.factors(y.dtype)
        return y + x.to(y.dtype) @ A.mT @ B.mT

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.factors(torch.float32)
        return weight + (B @ A).to(weight.dtype), bias


class DeltaCome(Plugin):
    """See the module; `identity-at-start` without `finetuned`."""

    Config = DeltaComeConfig
    claims = {
        Claim.TRAINS_BASE,
        Claim.IDENTITY_AT_START,
        Claim.MERGEABLE,
        Claim.NEEDS_CALIBRATION,
        Claim.TAKES_WEIGHTS,
    }
    example = {"alpha": 0.5, "bits": (8, 4), "vectors": (2,), "group_size": 32}
    refuses = {"t5": "calibration text feeds an encoder alone"}
    config: DeltaComeConfig
    places: Mapping[str, Trained] = {}

    def suits(self, model: ModelView) -> None:
        text_blocks(model, self.matrices(model))
        for site in self.matrices(model):
            if not any(n for n, _ in self.groups(site.shape)):
                said = f"{site.path} ({'x'.join(map(str, site.shape))}) has no room for a vector in alpha"
                said = f"{model.owner}: {model.config.model_type}: {said} = {self.config.alpha}"
                raise ArchitectureError(said, hint="a larger alpha, or fewer bits")

    def check(self, stack: Stack) -> None:
        own = stack.id_of(self)
        for other in () if stack.standing[own].compressed else stack.members:
            if other.claims(Claim.WHOLE_CALLS):
                raise ConflictError(
                    f"'{own}' runs layers one by one to calibrate, and '{other.id}' works in calls of the whole model",
                    hint=f"inject '{own}', train and compress it, and inject '{other.id}' then",
                )

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        self.places = differences(model, self.matrices(model))
        if (source := self.config.finetuned) and not model.restoring and model.module.device.type != "meta":
            adopt(model, self.places, companion(stack, source), source)
            del stack.companions[source]

    @hookimpl
    def compress(self, model: ModelView, calibration: Calibration) -> None:
        if not self.places:
            said = "there is no fine-tuned model yet, before `inject`"
            raise ConflictError(f"{model.owner}: {said}", hint="phase: after-training beside `use`")
        sites, tuned, squares = self.matrices(model), [], torch.zeros(2)

        def on_block(layer: int, block: nn.Module, inputs: BlockInputs) -> None:
            own = [site for site in sites if site.layer == layer]
            for site, H in zip(own, hessians(own, block, inputs), strict=True):
                place = self.places[f"{site.path}.{site.parameter}"]
                tuned.append((place, place.theta.clone()))
                D = place.theta.float() - place.theta_0.float()
                D = D.mT if site.turned else D
                delta = VectorDelta(site.shape, self.groups(site.shape), self.config.group_size).to(D.device)
                delta.take(D, H)
                site.attach(delta)
                place.rewind()
                left, _ = delta.fold(-D, None)
                squares.add_(torch.stack((left.square().sum(), D.square().sum())).to(squares))

        try:
            calibration.walk(model.module, [site.module for site in model.blocks("layer")], on_block)
        except BaseException:  # Ctrl-C too
            for place, theta in tuned:
                place.theta.copy_(theta)
            raise
        self.state["error"] = float((squares[0] / squares[1].clamp_min(1e-30)).sqrt())

    def restore(self, model: ModelView, stack: Stack) -> None:
        for site in self.matrices(model):
            site.attach(VectorDelta(site.shape, self.groups(site.shape), self.config.group_size))

    def finished(self) -> Iterable[nn.Parameter]:
        return [place.theta for place in self.places.values()] if self.state else ()

    def matrices(self, model: ModelView) -> list[BoundSite]:
        return model.linears(self.config.targets, whole=True)

    def groups(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """How many vectors in how many bits, as far as rank and budget go."""
        room, rank, found = int(self.config.alpha * 2 * shape[0] * shape[1]), min(shape), []
        for bits, most in zip(self.config.bits, (*self.config.vectors, rank), strict=True):
            cost = 4 + sum(-(-n * bits // 8) + 3 * -(-n // self.config.group_size) for n in shape)
            found.append((min(most, rank, room // cost), bits))
            room, rank = room - cost * found[-1][0], rank - found[-1][0]
        return found

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Bytes of the vectors, as a bundle holds them, and how much of the differences is lost, by their norm; 0
        before there are any."""
        parts = evaluation.stack.ledger.of(evaluation.stack.id_of(self), DeltaPart)
        size = sum(tensor.nbytes for part in parts for tensor in part.tensors().values())
        evaluation.add("packed_bytes", size, unit="bytes")
        evaluation.add("lost", self.state.get("error", 0.0))


def hessians(sites: list[BoundSite], block: nn.Module, inputs: BlockInputs) -> list[Tensor]:
    """X^T X of each site's inputs in this block, [in, in] float32; of one that no text comes to, the unit matrix."""
    found: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        found[module] = found.get(module, 0) + x.mT @ x

    with entering([site.module for site in sites], see):
        for _ in inputs.replay(block):
            pass
    return [found.get(site.module, torch.eye(site.in_features, device=site.weight.device)) for site in sites]
