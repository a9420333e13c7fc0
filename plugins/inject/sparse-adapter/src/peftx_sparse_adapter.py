"""SparseAdapter: prune the adapters of a stack before they train, and train what is left.

"SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters" (arXiv:2210.04284). Of the N
entries w of all matrices that the plugins before this one attached, floor((1 - s) N) are kept: those with the largest
scores z,

    random      z ~ U(0, 1)
    magnitude   z = |w|
    er          random, with d_l ~ (in_l + out_l) / (in_l out_l) of matrix l kept, at most all (Erdos-Renyi)
    snip        z = |w g|                        g = dL/dw, of the rows of the first step
    grasp       z = w (H g)                      H = d2L/dw2, of the same rows
    synflow     z = |w dR/dw|                    R = sum over deltas of sum D(1, 1), with |w| in the place of w

    m = 1[z among the largest],  w <- w m,  dL/dw <- m dL/dw

in all matrices together, or in each. Biases and gains are not pruned, and the base stays frozen. Matrices that start at
zero (LoRA's B) would give themselves and their partners scores of zero; they start from N(0, init**2) where the score
looks at weights. Large-Sparse is an adapter of k times the rank at s = 1 - 1 / k: as many numbers, of more directions.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Generator, Iterable, Sequence
from fractions import Fraction
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftx import Claim, ModelView, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.engines.training.step import swapped
from peftx.errors import ConflictError, PeftxError, UnsupportedError
from peftx.kernel.heads import Head
from peftx.kernel.modes import eval_mode
from peftx.kernel.parts import BasePart, DeltaPart, Part, ReplacedPart, VocabularyPart
from peftx.kernel.stack import Stack


class SparseAdapterConfig(PluginConfig):
    """Options of SparseAdapter; by the paper SNIP at 40% is best on average, and 80% is as good as a dense adapter."""

    score: Literal["random", "magnitude", "er", "snip", "grasp", "synflow"] = Field(
        "snip", description="z, what an entry is kept for"
    )
    sparsity: float = Field(0.4, ge=0, lt=1, description="s, share of the entries that is removed")
    scope: Literal["global", "local"] = Field(
        "global", description="the largest of all matrices together, or of each matrix"
    )
    init: float = Field(
        0.02,
        ge=0,
        allow_inf_nan=False,
        description="standard deviation from which matrices that are zero start, where the score looks at weights",
    )

    @model_validator(mode="after")
    def _fits(self) -> SparseAdapterConfig:
        if (self.score, self.scope) == ("er", "local"):
            raise ValueError("er says how much of each matrix is kept: scope global")
        return self


class Mask(nn.Module):
    """m of N entries, eight in a byte; all 0 as long as nothing is chosen."""

    bits: Tensor

    def __init__(self, N: int) -> None:
        super().__init__()
        self.N = N
        self.register_buffer("bits", torch.zeros(-(-N // 8), dtype=torch.uint8))

    def put(self, m: Tensor) -> None:
        """m: bool [N]."""
        rows = nn.functional.pad(m.to(torch.uint8), (0, -self.N % 8)).view(-1, 8)
        self.bits.copy_((rows << torch.arange(8, device=m.device, dtype=torch.uint8)).sum(1))

    def forward(self) -> Tensor:
        shifts = torch.arange(8, device=self.bits.device, dtype=torch.uint8)
        return (self.bits[:, None] >> shifts & 1).flatten()[: self.N].bool()


class SparseAdapter(Plugin):
    """See the module."""

    Config = SparseAdapterConfig
    claims = {Claim.IDENTITY_AT_START, Claim.NEEDS_GRADIENTS}
    config: SparseAdapterConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        self.steps: list[TrainStep] = []
        self.sizes = [w.numel() for _, w in matrices(stack, model.owner)]
        if self.sizes:
            self.mask = model.keep("mask", Mask(sum(self.sizes)))

    def check(self, stack: Stack) -> None:
        if stack.ledger.parts and not self.sizes:
            owner, others = stack.id_of(self), ", ".join(stack.plugins)
            raise ConflictError(
                f"{owner} prunes matrices of adapters that stand before it, and in the order {others} there are none",
                hint=f"put an adapter such as lora before '{owner}'",
            )

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        owner, score = step.stack.id_of(self), self.config.score
        found = matrices(step.stack, owner)
        ws = [w for _, w in found]
        if [w.numel() for w in ws] != self.sizes:
            raise PeftxError(f"{owner}: other adapters stand before it than did at first", hint="a new stack")
        if step.first_micro and not self.mask.bits.any():
            self.steps = []
            for i, w in enumerate(ws):
                if score not in ("random", "er") and not w.any():
                    start = torch.randn(w.shape, generator=random_of(step, str(i)))
                    w.data.copy_(start * self.config.init)
            if score not in ("snip", "grasp"):
                self.choose(owner, ws, self.scores(step, found))
        waits = not self.mask.bits.any()
        if waits and not all(w.requires_grad for w in ws):
            raise PeftxError(f"{owner}: {score} needs gradients of frozen adapters", hint="stack.unfreeze()")
        self.steps = [*self.steps, step] if waits else []
        loss = yield
        if waits and step.last_micro:
            self.choose(owner, ws, self.scores(step, found))
            for p in step.parameters():
                p.grad = None
            for each in self.steps:  # the gradients of this step once more, of what is left
                each.backward(each.total_loss())
        if self.mask.bits.any():
            step.on_gradients(lambda _: self.hold(w.grad for w in ws))
        return loss

    def scores(self, step: TrainStep, found: list[tuple[Part, nn.Parameter]]) -> list[Tensor]:
        """z of each matrix."""
        ws = [w for _, w in found]
        match self.config.score:
            case "random":
                return [torch.rand(w.shape, generator=random_of(step, f"z{i}")) for i, w in enumerate(ws)]
            case (
                "er"
            ):  # the n-th of a matrix has -n / (in + out): of each matrix as many as fit its share come first
                places = [
                    torch.randperm(w.numel(), generator=random_of(step, f"z{i}")) for i, w in enumerate(ws)
                ]
                sides = [sum(w.shape[-2:]) * math.prod(w.shape[:-2]) for w in ws]
                return [-(n + 0.5) / side for n, side in zip(places, sides, strict=True)]
            case "magnitude":
                return [w.detach().abs() for w in ws]
            case "snip":
                g = derivatives(self.steps, ws)
                return [(w * each).detach().abs() for w, each in zip(ws, g, strict=True)]
            case "grasp":
                Hg = derivatives(self.steps, ws, derivatives(self.steps, ws))
                return [(w * each).detach() for w, each in zip(ws, Hg, strict=True)]
            case "synflow":
                return synflow(step.stack, found)

    def choose(self, owner: str, ws: list[nn.Parameter], z: list[Tensor]) -> None:
        """m, and w <- w m."""
        flat = [each.flatten().to(self.mask.bits.device, torch.float32) for each in z]
        tied = next((i for i, each in enumerate(flat) if not each.isfinite().all() or not each.any()), None)
        if tied is not None and self.config.sparsity:
            raise PeftxError(
                f"{owner}: matrix {tied} of the adapters, {tuple(ws[tied].shape)}, has {self.config.score} scores that "
                "are all 0, or no numbers: nothing tells its entries apart",
                hint="init above 0, rows that reach it, or score: random",
            )
        groups = [torch.cat(flat)] if self.config.scope == "global" else flat
        self.mask.put(torch.cat([largest(each, kept(len(each), self.config.sparsity)) for each in groups]))
        if not self.mask.bits.any():
            raise PeftxError(f"{owner}: sparsity {self.config.sparsity} leaves nothing", hint="a lower one")
        self.hold(ws)
        gone = sum(not m.any() for m in self.mask().split(self.sizes))
        if 2 * gone >= len(ws):  # as all of LoRA's B
            warnings.warn(
                f"{owner}: nothing is left of {gone} of {len(ws)} matrices; scope: local?", stacklevel=2
            )

    @torch.no_grad()
    def hold(self, tensors: Iterable[Tensor | None]) -> None:
        """Zero what is not left, in the matrices or in their gradients."""
        at, m = 0, self.mask()
        for x, size in zip(tensors, self.sizes, strict=True):
            if x is not None:
                x.masked_fill_(~m[at : at + size].view(x.shape), 0)
            at += size


def matrices(stack: Stack, owner: str) -> list[tuple[Part, nn.Parameter]]:
    """Matrices that the plugins before `owner` attached, each once, with the part that it is of."""
    others = list(stack.plugins)[: list(stack.plugins).index(owner)]
    found: dict[int, tuple[Part, nn.Parameter]] = {}
    for part in (part for other in others for part in stack.ledger.of(other)):
        base = isinstance(part, BasePart | ReplacedPart | VocabularyPart) or isinstance(part.module, Head)
        for _, module, leaf in () if base else part.places():
            w = module._parameters.get(leaf)
            if w is not None and w.ndim > 1 and w.is_floating_point():
                found.setdefault(id(w), (part, w))
    return list(found.values())


def kept(N: int, s: float) -> int:
    """floor((1 - s) N), of s as it is written: 0.8 of 10 leaves 2."""
    return math.floor((1 - Fraction(str(s))) * N)


def largest(z: Tensor, k: int) -> Tensor:
    """bool [N], True for the k largest."""
    return torch.zeros_like(z, dtype=torch.bool).index_fill(0, z.topk(k).indices, True)


def random_of(step: TrainStep, purpose: str) -> torch.Generator:
    """Of the stack's seed alone, so that all processes draw the same."""
    return torch.Generator().manual_seed(zlib.crc32(f"sparse-adapter:{step.stack.seed}:{purpose}".encode()))


def derivatives(
    steps: Sequence[TrainStep], ws: list[nn.Parameter], along: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """dL/dw of the loss of all of these micro-batches; with `along` = v instead d(v . dL/dw)/dw, which is H v."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UnsupportedError(
            "sparse-adapter: every process would score other rows", hint="score: magnitude"
        )
    total = [torch.zeros_like(w) for w in ws]
    with eval_mode(steps[0].module), sdpa_kernel(SDPBackend.MATH):
        for step in steps:
            value, more = (
                step.total_loss(),
                {"allow_unused": True, "materialize_grads": True},
            )
            if along is not None:
                g = torch.autograd.grad(value, ws, create_graph=True, **more)
                value = torch.stack([(v * each).sum() for v, each in zip(along, g, strict=True)]).sum()
            for sum_, each in zip(total, torch.autograd.grad(value, ws, **more), strict=True):
                sum_ += each
    return total


def synflow(stack: Stack, found: list[tuple[Part, nn.Parameter]]) -> list[Tensor]:
    """|w dR/dw|: the sum of all paths through an entry, from ones at what its delta reads to any output."""
    sites = {site.key: site for site in stack.anatomy.sites if site.kind == "linear"}
    z: dict[int, Tensor] = {}
    for part in {id(part): part for part, _ in found}.values():
        site = sites.get(part.key)
        if site is None or not isinstance(part, DeltaPart) or not part.module.has_forward():
            raise UnsupportedError(
                f"sparse-adapter: synflow needs the output of linear layers edited, and {part.owner} does "
                f"something else at {part.key}",
                hint="another score, such as snip or magnitude",
            )
        ws = [w for other, w in found if other is part]
        positive = [(p, p.detach().abs()) for p in part.module.parameters()]
        with swapped(positive), eval_mode(part.module), torch.enable_grad():
            D = part.module(ws[0].new_ones(1, site.in_features), ws[0].new_ones(1, site.out_features))
            z |= zip(map(id, ws), torch.autograd.grad(D.sum(), ws), strict=True)
    return [(w * z[id(w)]).detach().abs() for _, w in found]
