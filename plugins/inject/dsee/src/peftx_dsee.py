"""DSEE: a low-rank update with a few free entries beside it, on weights that are pruned while they are tuned.

"DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models" (arXiv:2111.00160). W: [m, n] is
frozen; A: [r, n], B: [m, r] and the values of S train, at N places Omega that never change:

    W' = M * W + s (B A + S)                  s = alpha / r;  A ~ N(0, 0.02**2), B = 0, S = 0, M = 1: W' = W

Omega is where a low-rank matrix fits W worst: the N largest |W - U V| of a greedy decomposition W = U V + S, which
takes turns, k rows of V more each round, and R in the end,

    U = Q of (W - S) V^T,   V = U^T (W - S),   S = W - U V where that is 0.01 or more, else 0
    V with the first k rows of R, of W - U V - S = Q R, below it;   S = 0

M is chosen once in training, by W' as it is then, and after that A, B and S train on. There are two kinds of masks:

    unstructured   the share p of the entries of all pruned matrices together, those of the smallest |W'|, in W alone
    structured     a share of each layer's heads, and of its neurons, those of the smallest sum of |W'| over their rows
                   of queries and values, or into the feed-forward part: their columns of W_o and W_down

Structured masks make a smaller model: `compress` folds the updates into the weights, and takes the rows and columns of
these heads and neurons out for good.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from math import prod
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from peftx import (
    Claim,
    Delta,
    Evaluation,
    ModelView,
    Phase,
    Plugin,
    PluginConfig,
    Site,
    SparseDelta,
    Stack,
    Targets,
    TrainStep,
    add_low_rank,
    hookimpl,
)
from peftx.errors import ConflictError, OptionError, StackError
from peftx.kernel.parts import DeltaPart
from peftx.toolkits.compression.pruning import (
    Blocks,
    check_heads,
    check_into,
    check_layers,
    check_masked,
    check_shrinks,
    heads_and_neurons,
    put_in_place,
    share_left,
    train_again,
)
from peftx.toolkits.injecting import check_share
from peftx.toolkits.options import whole_steps

ROUNDS = 20
"""Of the decomposition."""
HEADS, NEURONS = 0.25, 0.4
"""Shares that go with structured masks, where none is given: 3 of 12 heads, as in the paper's BERT."""


class DseeConfig(PluginConfig):
    """Options of DSEE; the paper's BERT has r = 16 and 16 to 64 entries, and trains at 2e-4 to 6e-4."""

    rank: int = Field(16, ge=1, description="r, rank of B A")
    entries: int = Field(64, ge=0, description="N, entries of S in each matrix; 0: none")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="alpha; s = alpha / r")
    background: float = Field(
        0.65,
        gt=0,
        lt=1,
        description="R, rank of the matrix that says where W is fitted worst; a share of its smaller side",
    )
    masks: Literal["unstructured", "structured"] = Field(
        "unstructured", description="of single entries, or of whole heads and neurons"
    )
    sparsity: float = Field(
        0.5, ge=0, lt=1, description="p, share of all pruned matrices' entries that goes; 0: none"
    )
    heads: float | None = Field(
        None, ge=0, lt=1, description="structured: share of a layer's heads that goes; 0.25 if left out"
    )
    neurons: float | None = Field(
        None, ge=0, lt=1, description="structured: share of a layer's neurons that goes; 0.4 if left out"
    )
    prune: float = Field(
        0.5,
        ge=0,
        description="steps before the pruning: a share of the run's, or from 1 on their number; 0: none",
    )
    targets: Targets = Field(Targets("attention.q,v"), description="linear layers to update")
    pruned: Targets = Field(Targets("all"), description="linear layers to prune")

    _whole = field_validator("prune")(whole_steps)

    @model_validator(mode="after")
    def _of_one_kind(self) -> DseeConfig:
        if self.masks == "unstructured" and not self.heads is self.neurons is None:
            raise ValueError("heads and neurons go with structured masks: set masks, or drop them")
        known = type(self).model_fields
        for name in ("sparsity", "pruned") if self.masks == "structured" else ():
            if getattr(self, name) != known[name].default:
                raise ValueError(f"{name} goes with unstructured masks: drop it, or set heads and neurons")
        return self


class PrunedDelta(Delta):
    """M * W: y - ((1 - M) * W) x, a product that is made again in the backward pass.

    Args:
        site: the matrix, [..., m, n] (leading: stacked experts). pruned: is there to be a mask.

    Attributes:
        left: M, bool, of the shape of W. acts: has it been chosen.
    """

    left: Tensor

    def __init__(self, site: Site, *, pruned: bool) -> None:
        super().__init__()
        self.site, self.acts = site, False
        self.register_buffer("left", torch.ones(site.shape, dtype=torch.bool) if pruned else None)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y - checkpoint(self.gone, x, use_reentrant=False).to(y.dtype) if self.acts else y

    def gone(self, x: Tensor) -> Tensor:
        W = self.site.weight
        return linear(x.to(W.dtype), W * ~self.left)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (weight * self.left if self.acts else weight), bias


class DseeDelta(PrunedDelta):
    """M * W + s (B A + S).

    Args:
        rank: r. scale: s. at: Omega, in the flat W, [N] (of stacked experts [E N]).
    """

    full_precision = True  # as the entries of S

    def __init__(self, site: Site, *, pruned: bool, rank: int, scale: float, at: Tensor) -> None:
        super().__init__(site, pruned=pruned)
        *batch, m, n = site.shape
        self.scale = scale
        self.A = nn.Parameter(torch.randn(*batch, rank, n) * 0.02)
        self.B = nn.Parameter(torch.zeros(*batch, m, rank))
        self.S = SparseDelta(at, site.shape)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = add_low_rank(x, super().forward(x, y), self.A, self.B, self.scale)
        return self.S(self.scale * x, y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().fold(weight, bias)
        return weight + self.scale * (self.B @ self.A + self.S.matrix(self.B.dtype)).to(weight.dtype), bias


class Dsee(Plugin):
    """See the module.

    Attributes:
        state: `pruned`, once M is chosen; False while that is to come. Once heads and neurons are gone `kept`, how many
            are left by the path of W_o or W_down, `left`, their share of numbers, and `heads`, what of the base trains.
    """

    Config = DseeConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NARROWS}
    architectures = ("mixtral", "phi3")
    # A loop of one's own does not know its length, of which 0.5 is a half; and of random matrices a high rank leaves
    # what bfloat16 rounds away, so that Omega is another one.
    example = {"rank": 4, "entries": 8, "background": 0.05, "prune": 1}
    config: DseeConfig
    deltas: dict[str, PrunedDelta] = {}
    updates: dict[str, DseeDelta] = {}
    blocks: Sequence[Blocks] = ()

    @property
    def structured(self) -> bool:
        return self.config.masks == "structured"

    def share(self, blocks: Blocks) -> float:
        """Of these that goes."""
        heads, c = blocks.out.role == "attention.o", self.config
        given, default = (c.heads, HEADS) if heads else (c.neurons, NEURONS)
        return default if given is None else given

    def suits(self, model: ModelView) -> None:
        if not self.structured or "kept" in self.state:
            return
        found = heads_and_neurons(model)
        for b in found:
            if 0 < self.share(b) * b.count < 1:
                what = "heads" if b.out.role == "attention.o" else "neurons"
                said = f"{what} {self.share(b):g} of the {b.count} of a layer is less than one"
                raise OptionError(f"{model.owner}: {said}", hint=f"{1 / b.count:.3g} at least, or 0")
        check_into(model, found, self.config.targets, "an update there would see those that go")
        check_shrinks(model, found)

    def phases(self) -> Sequence[Phase]:
        if "kept" in self.state or not (self.config.sparsity or self.structured):
            return ()
        waits = self.config.prune and not self.state.get("pruned")
        return [*([Phase("tune", self.config.prune)] if waits else []), Phase("recover")]

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if "kept" in self.state:  # in the weights, but for a new head that trained along
            return train_again(model, self.state["heads"])
        config, plain = self.config, {site.key: site for site in model.anatomy.sites if site.kind != "block"}
        updated = {site.key: site for site in model.linears(config.targets)}
        self.blocks = heads_and_neurons(model) if self.structured else ()
        pruned = {b.out.key: b.out for b in self.blocks}
        if config.sparsity and not self.structured:
            pruned = {site.key: site for site in model.linears(config.pruned)}
            size, of = sum(prod(site.shape) for site in pruned.values()), f"{len(pruned)} matrices"
            check_share(f"{model.owner}: sparsity", config.sparsity, size, of, goes=True, least=len(pruned))
        r, self.deltas, self.updates = config.rank, {}, {}
        for key, site in (pruned | updated).items():
            delta = PrunedDelta(plain[key], pruned=key in pruned)
            if key in updated:
                site.check_rank(r)
                at = self.places(site, known=model.restoring)
                delta = DseeDelta(plain[key], pruned=key in pruned, rank=r, scale=config.alpha / r, at=at)
                self.updates[site.path] = delta
            if key in pruned:
                self.deltas[key] = delta
            site.attach(delta)
        self.act()

    def places(self, site: Site, *, known: bool) -> Tensor:
        """Omega of a matrix; with `known`, or on the meta device, any N places."""
        N, size, count = self.config.entries, prod(site.shape[-2:]), prod(site.batch)
        if size < N:
            raise OptionError(f"dsee: {N} entries of {site.path}, which has {size}", hint=f"at most {size}")
        found = torch.arange(N).expand(count, N)
        if not (known or site.weight.is_meta):
            worst = residual(site.weight.detach(), self.config.background).reshape(count, size)
            found = worst.topk(N).indices.cpu()
        return (found + torch.arange(count)[:, None] * size).flatten()

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if self.deltas and not self.state.get("pruned"):
            self.state["pruned"] = step.phase(self).name == "recover"
            if self.state["pruned"]:
                self.prune(step)
        self.act()  # a checkpoint may have brought a mask
        return (yield)

    def prune(self, step: TrainStep) -> None:
        """Choose M."""
        if self.structured:
            for b in self.blocks:
                kept = keep(b, self.updates, int(self.share(b) * b.count))
                self.deltas[b.out.key].left.copy_(kept.repeat_interleave(b.width))
        else:
            choose(list(self.deltas.values()), self.config.sparsity)
            if gone := [key for key, delta in self.deltas.items() if not delta.left.any()]:
                told = f"nothing is left of {len(gone)} of {len(self.deltas)} matrices, first {gone[0]}"
                warnings.warn(f"{step.stack.id_of(self)}: {told}; a lower sparsity?", stacklevel=3)

    def act(self) -> None:
        for delta in self.deltas.values():
            delta.acts = bool(self.state.get("pruned"))

    def check(self, stack: Stack) -> None:
        id, order = stack.id_of(self), list(stack.plugins)
        if self.structured:
            check_heads(stack, id)
            return check_layers(stack, id, {site.path for b in self.blocks for site in b.sites}, folds=False)
        mine = {delta.site.path for delta in self.deltas.values()}
        for part in stack.ledger.all(DeltaPart):
            inside = order.index(part.owner) < order.index(id) or part.module.has_base()
            if part.owner != id and inside and part.path in mine:
                raise ConflictError(
                    f"{id} prunes the weights of {part.key} as they are, and {part.owner} changes what they give",
                    hint=f"put {part.owner} behind {id} if it leaves the layer's own product alone, or leave the layer "
                    "out of one of them",
                )

    @hookimpl
    def compress(self, model: ModelView, stack: Stack) -> None:
        """Take out heads and neurons; with unstructured masks nothing becomes smaller."""
        id = model.owner
        if not self.structured:
            return
        check_masked(stack, id)
        if self.state.get("pruned") is False:
            said = "no heads and neurons were chosen yet"
            raise StackError(f"{id}: {said}", hint="train on into `recover`")
        kept = {b.out.path: self.left(b) for b in self.blocks}
        layers = [pair for b in self.blocks for pair in b.cut(kept[b.out.path], self.updates)]
        self.state["left"] = self.share_left()
        self.state["kept"] = {path: [int(left.sum()), len(left)] for path, left in kept.items()}
        self.state["heads"] = put_in_place(stack, id, layers)
        self.deltas, self.updates, self.blocks = {}, {}, ()

    def left(self, b: Blocks) -> Tensor:
        """Which blocks stay, [count] bool."""
        return self.deltas[b.out.key].left[0].unflatten(0, (-1, b.width))[:, 0]

    def share_left(self) -> float:
        """Of the numbers that M is about."""
        if self.blocks:
            return share_left((b, self.left(b)) for b in self.blocks)
        masks = [delta.left for delta in self.deltas.values()]
        return sum(int(m.sum()) for m in masks) / max(sum(m.numel() for m in masks), 1) if masks else 1.0

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        for b in heads_and_neurons(model) if self.structured else ():
            for site in b.sites:
                yield site, site.weight.nbytes * (b.count - int(self.share(b) * b.count)) // b.count

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Which share of the numbers is left that M is about, and numbers in the model."""
        evaluation.add("left", self.state["left"] if "left" in self.state else self.share_left())
        evaluation.add("parameters", evaluation.stack.base_parameters())


@torch.no_grad()
def residual(W: Tensor, background: float) -> Tensor:
    """|W - U V| of the greedy decomposition, [..., m, n] float32; R = background min(m, n)."""
    W = W.float()
    R = max(1, int(background * min(W.shape[-2:])))
    k = -(-R // ROUNDS)
    V = torch.randn(*W.shape[:-2], 1, W.shape[-1], device=W.device)
    while True:
        S = torch.zeros_like(W)
        for _ in range(2):
            U = torch.linalg.qr((W - S) @ V.mT).Q
            V = U.mT @ (W - S)
            E = W - U @ V
            S = E.where(E.abs() >= 0.01, 0.0)
        if V.shape[-2] >= R:
            return E.abs()
        V = torch.cat([V, torch.linalg.qr(E - S).R[..., : min(k, R - V.shape[-2]), :]], -2)


@torch.no_grad()
def choose(deltas: list[PrunedDelta], p: float) -> None:
    """M: of all matrices together round(p of the entries) go, those with the smallest |W'|; of equal ones any."""
    size, device = [delta.left.numel() for delta in deltas], deltas[0].left.device
    W = [delta.fold(delta.site.weight.float(), None)[0] for delta in deltas]  # nothing is gone yet
    smallest = torch.cat([each.abs().flatten().to(device) for each in W])
    gone = smallest.topk(round(p * sum(size)), largest=False, sorted=False).indices
    left = torch.ones(sum(size), dtype=torch.bool, device=device).index_fill(0, gone, False)
    for delta, mine in zip(deltas, left.split(size), strict=True):
        delta.left.copy_(mine.view_as(delta.left))


@torch.no_grad()
def keep(b: Blocks, updates: Mapping[str, DseeDelta], gone: int) -> Tensor:
    """M of a layer's heads or neurons, [count] bool: without those of the smallest sum of |W'| over their rows."""
    size = b.out.weight.new_zeros(b.count, dtype=torch.float32)
    for site, _ in b.into:
        if site.role != "attention.k":
            W = site.weight.float()
            W = updates[site.path].fold(W, None)[0] if site.path in updates else W
            size += W.abs().sum(1).unflatten(0, (b.count, -1)).sum(1).to(size)
    smallest = size.topk(gone, largest=False).indices
    return torch.ones(b.count, dtype=torch.bool, device=size.device).index_fill(0, smallest, False)
