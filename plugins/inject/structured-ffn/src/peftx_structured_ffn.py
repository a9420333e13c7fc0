"""Structured feed-forward layers: two small or block-diagonal matrices for each dense one, trained with a dense guide.

"Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers" (arXiv:2406.16450).
For W: [o, i], with b blocks and m = min(o, i):

    low-rank        y = U V x            V: [r, i], U: [o, r]
    block-dense     y = U D x            D: b blocks [r/b, i/b], U: [o, r]
    block-shuffle   y = P L P R x        R: b blocks [m/b, i/b], L: b blocks [o/b, m/b], P interleaves the blocks

All three are one map: x in q parts, each through its block of D; what comes out, interleaved, in p parts, each through
its block of U; and that, interleaved. (p, q) is (1, 1), (1, b) or (b, b). Then output k mod p reads part j of x through
a product of rank m' / p, m' rows in a block of D, so the nearest such map to a trained W is a truncated SVD of each of
its p q blocks.

Self-guided training: a dense W_g, at first the product of the factors, trains with them and goes,

    y = a_t W_g x + (1 - a_t) y          a_t = (1 + cos(pi t / T)) / 2 while t < T, 0 from then on

`compress` puts U, D and b in the place of W, which is then in no bundle.

Pre-merge: while a call has few tokens, two small products take longer than a dense one, so they are multiplied once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from peftx import (
    BoundSite,
    Claim,
    Delta,
    ModelView,
    Plugin,
    PluginConfig,
    Site,
    Stack,
    Targets,
    TrainStep,
    hookimpl,
)
from peftx.copies import Reader
from peftx.engines.training.updates import drop
from peftx.errors import ArchitectureError, OptionError
from peftx.kernel.parts import DeltaPart
from peftx.kernel.phases import Phase
from peftx.kernel.slots import kind_of, packed
from peftx.toolkits.compression.names import dtype_name, float_dtype
from peftx.toolkits.injecting import Kept

LOG = logging.getLogger("peftx")

DENSITY = 0.32
"""Parameters of a layer, as a share of the dense one's, where no rank is given."""


class StructuredFfnConfig(PluginConfig):
    """Options of structured feed-forward layers; the paper has 32% or 63% of the dense parameters, and b = 2 or 4."""

    form: Literal["low-rank", "block-dense", "block-shuffle"] = Field(
        "low-rank", description="of the two matrices"
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="r of low-rank and block-dense; if left out, such that 32% of the parameters are left",
    )
    blocks: int | None = Field(None, ge=1, description="b of block-dense and block-shuffle; 4 if left out")
    start: Literal["weights", "random"] = Field(
        "weights", description="nearest to the trained weights, or as the paper starts from nothing"
    )
    guided: float = Field(
        0.5, ge=0, allow_inf_nan=False, description="T: below 1 a share of the run, else steps; 0: no guide"
    )
    premerge: int = Field(
        0,
        ge=0,
        description="most tokens of a call that goes through the product, in evaluation; 0: none does",
    )
    targets: Targets = Field(Targets("mlp"), description="linear layers to replace")

    @model_validator(mode="after")
    def _fit(self) -> StructuredFfnConfig:
        if self.form == "low-rank" and self.blocks is not None:
            raise ValueError(f"low-rank has one block, and blocks is {self.blocks}: drop it")
        if self.form == "block-shuffle" and self.rank is not None:
            raise ValueError(
                f"the rank of block-shuffle follows from its blocks, and rank is {self.rank}: drop it"
            )
        return self


def blockwise(x: Tensor, W: Tensor) -> Tensor:
    """Parts [..., n, in], each through its block of [n, out, in]: [..., out, n], interleaved."""
    if len(W) == 1:
        return F.linear(x, W[0]).mT
    return torch.einsum("...ni,noi->...on", x, W)


def through(x: Tensor, D: Tensor, U: Tensor) -> Tensor:
    """U D x, [..., o], of D [q, m', i / q] and U [p, o / p, q m' / p]."""
    middle = blockwise(x.unflatten(-1, (len(D), -1)), D).flatten(-2)  # [..., m' q]
    return blockwise(middle.unflatten(-1, (len(U), -1)), U).flatten(-2)


def factors(i: int, o: int, grid: Sequence[int], middle: int) -> dict[str, tuple[int, int, int]]:
    """Shapes of D and U."""
    p, q = grid
    return {"D": (q, middle, i // q), "U": (p, o // p, q * middle // p)}


@packed
class StructuredLinear(nn.Module):
    """y = U D x + b in the place of a dense layer, frozen. Buffers: D, U and b [out] or none.

    Args:
        in_features, out_features, bias: as in `nn.Linear`. grid, middle: as in `Structured`. dtype: by name.
    """

    D: Tensor
    U: Tensor
    bias: Tensor | None

    def __init__(
        self, *, in_features: int, out_features: int, grid: Sequence[int], middle: int, bias: bool, dtype: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, kind = in_features, out_features, float_dtype(dtype, "dtype")
        for name, size in factors(in_features, out_features, grid, middle).items():
            self.register_buffer(name, torch.zeros(*size, dtype=kind))
        self.register_buffer("bias", torch.zeros(out_features, dtype=kind) if bias else None)

    def geometry(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        form = {"grid": [len(self.U), len(self.D)], "middle": self.D.shape[1]}
        return sizes | form | {"bias": self.bias is not None, "dtype": dtype_name(self.D.dtype)}

    @property
    def weight(self) -> Tensor:
        """U D, [out, in]."""
        return through(
            torch.eye(self.in_features, dtype=self.D.dtype, device=self.D.device), self.D, self.U
        ).mT

    def forward(self, x: Tensor) -> Tensor:
        y = through(x, self.D, self.U)
        return y if self.bias is None else y + self.bias


class Structured(Delta):
    """The layer itself: y = a W_g x + (1 - a) U D x + b, with the layer's own bias b.

    Args:
        weight: W, [o, i]; what other plugins merge into it is added. grid: p, q. middle: m', rows in a block of D.
        premerge: see the option.
    """

    def __init__(
        self, weight: Tensor, grid: tuple[int, int], middle: int, *, guided: bool, premerge: int
    ) -> None:
        super().__init__()
        o, i = weight.shape
        sizes = factors(i, o, grid, middle)
        self.own, self.premerge = (weight,), premerge
        self.a, self.product = float(guided), Kept()
        self.D, self.U = (nn.Parameter(torch.zeros(sizes[name])) for name in ("D", "U"))
        self.W_g = nn.Parameter(torch.zeros(o, i)) if guided else None

    def structured(self, x: Tensor) -> Tensor:
        """U D x, [..., o]."""
        return through(x, self.D, self.U)

    def matrix(self) -> Tensor:
        """What the layer multiplies by, [o, i]."""
        dense = self.structured(torch.eye(self.own[0].shape[1], dtype=self.D.dtype, device=self.D.device)).mT
        return dense if self.W_g is None or self.a == 0 else torch.lerp(dense, self.W_g, self.a)

    def approximate(self, weight: Tensor) -> None:
        """The factors whose product is nearest to a matrix [o, i]: of each block k, j the truncated SVD."""
        (q, middle, _), p = self.D.shape, len(self.U)
        parts = (
            weight.float().unflatten(0, (-1, p)).unflatten(-1, (q, -1)).permute(1, 2, 0, 3)
        )  # [p, q, o/p, i/q]
        u, s, v = torch.linalg.svd(parts, full_matrices=False)
        rank, root = middle // p, s.sqrt()
        u, v = (u * root[..., None, :])[..., :rank], (root[..., None] * v)[..., :rank, :]
        self.U.copy_(u.permute(0, 2, 3, 1).flatten(-2))  # interleaved: rank t of part j is row t q + j
        self.D.copy_(v.transpose(0, 1).flatten(1, 2))  # [q, p rank, i/q]

    @torch.no_grad()
    def begin(self, weight: Tensor | None) -> None:
        """First values: near a matrix, or the paper's, low-rank from the SVD of a random matrix, orthogonal blocks."""
        if weight is None and len(self.D) == 1:
            weight = torch.randn(self.own[0].shape, device=self.D.device) / math.sqrt(self.own[0].shape[1])
        if weight is not None:
            self.approximate(weight)
        else:
            for block in (*self.D, *self.U):
                nn.init.orthogonal_(block)
        if self.W_g is not None:
            self.a = 0.0
            self.W_g.copy_(self.matrix())
            self.a = 1.0

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled() and x[..., 0].numel() <= self.premerge:
            y = F.linear(x, self.multiplied())
        else:
            y = self.structured(x)
            if self.W_g is not None and self.a > 0:
                y = torch.lerp(y, F.linear(x, self.W_g), self.a)
        if weight is not self.own[0]:  # others are merged into it
            y = y + F.linear(x, weight - self.own[0].to(weight))
        return y if bias is None else y + bias

    def multiplied(self) -> Tensor:
        """`matrix()`, made anew where a factor changed."""
        found: Tensor = self.product.of((self.D, self.U, self.W_g), self.matrix, about=self.a)
        return found

    def alone(self, bias: Tensor | None) -> StructuredLinear:
        """The factors as a layer."""
        o, i = self.own[0].shape
        form = {"grid": (len(self.U), len(self.D)), "middle": self.D.shape[1], "bias": bias is not None}
        new = StructuredLinear(in_features=i, out_features=o, **form, dtype=dtype_name(self.D.dtype))  # type: ignore[arg-type]
        new = new.to(self.D.device)
        for name, value in {"D": self.D, "U": self.U, "bias": bias}.items():
            if value is not None:
                getattr(new, name).copy_(value)
        return new

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.matrix() + weight - self.own[0].to(weight), bias


class StructuredFfn(Plugin):
    """See the module."""

    Config = StructuredFfnConfig
    claims = {Claim.MERGEABLE, Claim.COMPUTES_LAYERS, Claim.NARROWS}
    config: StructuredFfnConfig
    example = {"rank": 4, "guided": 0}  # a loop of one's own has no length that T could be a share of
    refuses = {"gpt2": "its matrices lie the other way round"}
    layers: list[Structured]

    def suits(self, model: ModelView) -> None:
        for site in self.sites(model):
            self.shape_of(site)

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if not model.restoring:
            self.state = {}
        c, known, self.layers = self.config, self.state.get("a", 1.0), []
        guided = c.guided > 0 and not self.state.get("dropped")
        for site in self.sites(model):
            weight = site.module._parameters["weight"]
            grid, middle = self.shape_of(site)
            layer = Structured(weight, grid, middle, guided=guided, premerge=c.premerge)
            if not model.restoring and not weight.is_meta:
                layer.begin(weight if c.start == "weights" else None)
            layer.a *= known
            self.layers.append(site.attach(layer))

    def phases(self) -> Sequence[Phase]:
        if not self.config.guided:
            return ()
        alone = (Phase("alone"),)
        return alone if self.state.get("a") == 0 else (Phase("guided", self.config.guided), *alone)

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if self.phases():
            span = step.phase(self)
            a = (
                0.0
                if span.end is None or span.name == "alone"
                else (1 + math.cos(math.pi * step.index / span.end)) / 2
            )
            self.state["a"] = a
            for layer in self.layers:
                layer.a = a
            if a == 0 and not self.state.get("dropped"):
                step.after_update(self.drop)
        return (yield)

    def drop(self, optimizer: Optimizer) -> None:
        """W_g is gone, from the layers and from what trains them."""
        drop(optimizer, [layer.W_g for layer in self.layers if layer.W_g is not None])
        for layer in self.layers:
            layer.W_g = None
            layer.product.forget()
        self.state["dropped"] = True

    @hookimpl
    def compress(self, model: ModelView, stack: Stack) -> None:
        """Leave a layer as it is where the factors are not all that it computes, or where others go on with W'."""
        id, ledger = model.owner, stack.ledger
        behind = stack.members[stack.members.index(stack.member(id)) + 1 :]
        works = {m.id for m in behind if m.implements("compress")}
        works |= {p.owner for p in ledger.parts if any(isinstance(m, Reader) for m in p.module.modules())}
        reads = next((m.id for m in behind if m.id in works), "")
        stands = {part.key.partition("@")[0]: part.owner for part in ledger.parts if part.owner != id}
        why = {
            part.path: "they are merged" if id in ledger.merged()
            else f"'{reads}' behind it works on the products" if reads
            else "the guide has not faded" if part.module.a > 0
            else f"'{stands[part.path]}' stands on {part.path}" if part.path in stands
            else ""
            for part in ledger.of(id, DeltaPart)
        }  # fmt: skip
        if kept := [said for said in why.values() if said]:
            LOG.warning("%s: %d of %d layers stay as they are, since %s", id, len(kept), len(why), kept[0])
        sites = {site.path: site for site in self.sites(model)}
        for part in ledger.of(id, DeltaPart):
            if not why[part.path]:
                part.undo()
                ledger.parts.remove(part)
                site = sites[part.path]
                site.replace(part.module.alone(site.bias))
                self.layers.remove(part.module)
                self.state.setdefault("packed", []).append(part.path)

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        for site in self.sites(model):
            sizes = factors(site.in_features, site.out_features, *self.shape_of(site)).values()
            yield site, sum(map(math.prod, sizes)) * site.weight.element_size()

    def sites(self, model: ModelView) -> list[BoundSite]:
        """The targets, fused ones whole, but for those that were replaced."""
        found = model.linears(self.config.targets, whole=True)
        found = [site for site in found if site.path not in self.state.get("packed", ())]
        for site in found:
            if site.kind != "linear" or kind_of(site.module) != "plain":
                raise ArchitectureError(
                    f"{model.owner}: {site.path} ({site.role}) is no plain nn.Linear, which two matrices could replace",
                    hint=f"leave it out of targets: '!{site.role}'; Llama, Qwen, Mistral, BERT, T5 and their kin work",
                )
        return found

    def shape_of(self, site: BoundSite) -> tuple[tuple[int, int], int]:
        """(p, q) and m' of a layer.

        Raises:
            PeftxError: blocks that do not divide, or a rank that the matrix does not have.
        """
        c, o, i = self.config, site.out_features, site.in_features
        b = 1 if c.form == "low-rank" else c.blocks or 4
        if c.form == "block-shuffle":
            divides, middle, grid = (
                {"inputs": i, "outputs": o, "rows of a block": min(i, o) // b},
                min(i, o) // b,
                (b, b),
            )
        else:
            rank = c.rank or max(int(DENSITY * i * o / (i / b + o)) // b, 1) * b
            site.check_rank(rank)
            divides, middle, grid = {"inputs": i, "rank": rank}, rank // b, (1, b)
        if said := next((f"the {n} {name}" for name, n in divides.items() if n % b), None):
            raise OptionError(
                f"{site.owner.id}: {b} blocks do not divide {said} of {site.path} ({o}x{i})",
                hint=f"`blocks` that do, or leave it out of targets: '!{site.role}'",
            )
        return grid, middle
