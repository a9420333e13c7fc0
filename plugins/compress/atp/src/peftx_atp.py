"""ATP: a small network makes the masks of a structural pruning while LoRA tunes what they leave.

"All-in-One Tuning and Structural Pruning for Domain-Specific LLMs" (arXiv:2412.14426). A layer has three structures:
the dimensions of its heads, of queries and keys together and of values, with a mask that is the same in all heads, and
the channels of its gated feed-forward part. The residual stream stays whole. Outputs of the matrices into a structure
are masked; what LoRA adds is not:

    y = d * (W x) + B A dropout(x)        d: 0 or 1 for each output; A: [r, in], B: [out, r], B = 0 at first

One generator makes the masks of all N dimensions:

    o = U_l LayerNorm(Transformer(e_1 .. e_L))_l      e: [L, 64], orthogonal, frozen; U_l: [dimensions of layer l, 64]
    s = sigmoid((o + g + b) / T)                      g: Gumbel noise; b = 3 keeps nearly all at first; T = 0.4
    d = 1[s >= 0.5], with the gradient of s           of each structure the largest s stays in any case

In each step of the first phase it learns from a batch of other rows, `validation`, and draws the d of this step:

    loss = task(d) + 5 R,   R = ln(max(P, p) / min(P, p))       P: share of the masked layers' weights that d leaves

Then d stays, and LoRA tunes on. Of a dimension j with d_j = 0, what LoRA has of it (its rows of B into the structure,
its columns of A out of it; n their norm together) is drawn to 0, after every update of both phases:

    n -> max(n - eta, 0),   eta = beta lr (e^(t/T) - 1) / (e - 1) * share of this structure in all that is removed

`compress` adds B A to W, leaves these dimensions out of the matrices, and drops the generator. Queries, keys and values
still come out in their old width, with zeros, since positions turn dimensions in pairs. Where another plugin is to pack
their matrices afterwards, these keep the zeros too, and only the feed-forward part is smaller.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator as Steps
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftx import (
    BoundSite,
    Claim,
    Delta,
    Evaluation,
    ModelView,
    Phase,
    Plugin,
    PluginConfig,
    Site,
    TrainStep,
    add_low_rank,
    dropout_linear,
    hookimpl,
)
from peftx.copies import Reader
from peftx.errors import ArchitectureError, ConflictError, OptionError, StackError
from peftx.kernel.modes import eval_mode
from peftx.kernel.slots import kind_of
from peftx.kernel.stack import Stack
from peftx.toolkits.compression import Narrow, NarrowLinear, pruning
from peftx.toolkits.compression.names import dtype_name
from peftx.toolkits.injecting import at_rates, lent
from peftx.toolkits.options import whole_steps

ROLES = (*(f"attention.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
WIDTH, HEADS, CHANNELS, DEPTH = 64, 4, 256, 2
"""Of the generator's Transformer."""


class AtpConfig(PluginConfig):
    """Options of ATP; the release trains LoRA at 1e-4 for ten epochs."""

    density: float = Field(0.5, gt=0, lt=1, description="p, share of the layers' weights that is to be left")
    rank: int = Field(8, ge=1, description="r")
    dropout: float = Field(0.1, ge=0, lt=1, description="before A, while training")
    control: float = Field(
        0.4, gt=0, description="steps in which masks change: below 1 a share of the run, else their number"
    )
    match: float = Field(5.0, gt=0, allow_inf_nan=False, description="weight of R")
    shift: float = Field(3.0, allow_inf_nan=False, description="b")
    temperature: float = Field(0.4, gt=0, description="T")
    beta: float = Field(5e4, ge=0, allow_inf_nan=False, description="how fast LoRA leaves what is removed")
    generator_rate: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="the generator's rate, over the run's; paper: 1e-3 over 1e-4"
    )  # fmt: skip

    _whole = field_validator("control")(whole_steps)


class Structure(NamedTuple):
    """What one mask is about.

    Attributes:
        size: dimensions. into, out: the matrices into it, and out of it; of heads they have each dimension several
            times, one head behind the other.
    """

    size: int
    into: list[BoundSite]
    out: list[BoundSite]

    @property
    def sites(self) -> list[BoundSite]:
        return self.into + self.out

    @property
    def cost(self) -> int:
        """Weights that go with one dimension."""
        return sum(site.weight.numel() for site in self.sites) // self.size


class Generator(nn.Module):
    """Makes d.

    Args:
        layers: the structures of each. config: b and T.

    Attributes:
        d: the masks of all structures, one behind the other, [N]. live: in their place while it learns.
    """

    d: Tensor
    e: Tensor
    cost: Tensor

    def __init__(self, layers: Sequence[Sequence[Structure]], config: AtpConfig) -> None:
        super().__init__()
        every = [each for layer in layers for each in layer]
        self.config, self.sizes = config, [each.size for each in every]
        self.live: Tensor | None = None
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, CHANNELS, batch_first=True)
        self.transformer = nn.TransformerEncoder(block, DEPTH, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        widths = [sum(each.size for each in layer) for layer in layers]
        self.U = nn.ModuleList(nn.Linear(WIDTH, n, bias=False) for n in widths)
        self.register_buffer("e", nn.init.orthogonal_(torch.empty(len(layers), WIDTH)))
        self.register_buffer("d", torch.ones(sum(self.sizes)))
        cost = torch.cat([torch.full((each.size,), float(each.cost)) for each in every])
        self.register_buffer("cost", cost, persistent=False)

    def forward(self, random: torch.Generator | None = None) -> Tensor:
        """s, [N]."""
        h = self.norm(self.transformer(self.e))
        o = torch.cat([U(row) for U, row in zip(self.U, h, strict=True)])
        uniform = torch.rand(len(o), generator=random, device="cpu").clamp(1e-7, 1 - 1e-7)
        g = -(-uniform.log()).log().to(o)
        return torch.sigmoid((o + g + self.config.shift) / self.config.temperature)

    def hard(self, s: Tensor) -> Tensor:
        """d of s, with the gradient of s."""
        kept = torch.cat([part >= part.max().clamp(max=0.5) for part in s.split(self.sizes)])
        return kept.to(s) + s - s.detach()

    def share(self, d: Tensor) -> Tensor:
        """P."""
        return (self.cost * d).sum() / self.cost.sum()


def mismatch(P: Tensor, p: float) -> Tensor:
    """R."""
    return (P.log() - math.log(p)).abs()


class MaskedLora(Delta):
    """y = d * y + B A dropout(x).

    Args:
        site: the layer. config: r, and what is dropped. generator: who has d; None: 1. part: which of it.
    """

    def __init__(self, site: Site, config: AtpConfig, generator: Generator | None, part: slice) -> None:
        super().__init__()
        self.dropout, self.generator, self.part = config.dropout, (generator,), part
        bound = 1 / math.sqrt(site.in_features)
        self.A = nn.Parameter(torch.empty(config.rank, site.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(site.out_features, config.rank))

    def d(self, like: Tensor) -> Tensor:
        """[out], or [1] where nothing is masked."""
        (g,) = self.generator
        if g is None:
            return like.new_ones(1)
        part = (g.d if g.live is None else g.live)[self.part]
        return part.repeat(len(self.B) // len(part)).to(like)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = y * self.d(y)
        if self.dropout and self.training:
            A, B = self.A.to(y.dtype), self.B.to(y.dtype)
            return y + dropout_linear(x.to(y.dtype), A, self.dropout) @ B.t()
        return add_low_rank(x, y, self.A, self.B, 1.0)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d, change = self.d(weight), (self.B @ self.A).to(weight.dtype)
        return weight * d[:, None] + change, None if bias is None else bias * d


def narrow(site: BoundSite, delta: MaskedLora, at: Tensor, *, into: bool) -> Narrow:
    """A matrix of heads with LoRA in it, of whose rows (`into`) or columns those `at` are left."""
    inner = pruning.cut(site, delta, **{"rows" if into else "columns": at})
    out, width = site.shape
    sizes = {"in_features": width, "out_features": out, "shape": inner.weight.shape}
    new = Narrow(**sizes, bias=inner.bias is not None, dtype=dtype_name(inner.weight.dtype)).to(at.device)
    places = {"rows": at} if into else {"columns": at}
    for name, value in {"W": inner.weight, "b": inner.bias, **places}.items():
        if (buffer := getattr(new, name)) is not None:
            buffer.copy_(value)
    return new


def proximal(parts: Sequence[Tensor], gone: Tensor, eta: float | Tensor) -> None:
    """n -> max(n - eta, 0) where `gone`, [size], of parts [size, ..., ...] that share their dimensions; in place."""
    n = torch.stack([part.float().square().sum((1, 2)) for part in parts]).sum(0).sqrt()
    factor = torch.where(gone, (1 - eta / n.clamp_min(1e-20)).clamp_min(0), 1.0)
    for part in parts:
        part.mul_(factor[:, None, None].to(part))


class Atp(Plugin):
    """See the module.

    Attributes:
        state: `fixed`, once masks change no more; once the model is narrow `kept`, of each structure, `left`, P, and
            `heads`, what of the base trains.
    """

    Config = AtpConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_GRADIENTS, Claim.TAKES_WEIGHTS, Claim.NARROWS,
    }  # fmt: skip
    architectures = ("mistral", "qwen3")
    refuses = {
        "gpt2": "its projections are one matrix",
        "bert": "an encoder",
        "t5": "an encoder and a decoder",
    }
    exempt = {"accumulation_makes_the_same_step": "the generator sees other rows in each micro-batch"}
    example = {"rank": 2, "control": 1}  # a loop of one's own has no length that 0.4 could be a share of
    sources = {"validation": ({"text": "Rain fell."}, {"text": "The sun came out, and it was warm."})}
    config: AtpConfig
    generator: Generator | None = None

    def layers(self, model: ModelView) -> list[list[Structure]]:
        """The structures of each: queries and keys, values, channels."""
        found: list[list[Structure]] = []
        known = {(s.role, s.layer): model.bound(s) for s in model.anatomy.sites
                 if kind_of(s.module) == "plain" and not (s.rows or s.read)}  # fmt: skip
        for layer in range(model.num_layers if len(model.towers) == 1 and model.anatomy.is_decoder else 0):
            sites = [known[role, layer] for role in ROLES if (role, layer) in known]
            if len(sites) == len(ROLES):
                (q, k, v, o, gate, up, down), n = sites, model.heads_of(sites[0])
                sizes = q.out_features, k.out_features, v.out_features, o.in_features
                n_k, n_v = n.head_dim, n.value_dim
                if sizes == (n.heads * n_k, n.kv_heads * n_k, n.kv_heads * n_v, n.heads * n_v):
                    heads = [Structure(n_k, [q, k], []), Structure(n_v, [v], [o])]
                    found.append([*heads, Structure(down.in_features, [gate, up], [down])])
        if len(found) < model.num_layers:
            parts = "layers have q, k, v, o, gate, up and down as plain linear layers of their own"
            said = f"{model.config.model_type} has {len(found)} such layers of {model.num_layers}"
            hint = "Llama, Mistral, Qwen 2 and 3 and their kin, before anything is packed"
            raise ArchitectureError(f"{model.owner} narrows decoders whose {parts}, and {said}", hint=hint)
        return found

    def suits(self, model: ModelView) -> None:
        if "kept" in self.state:
            return
        every = [each for layer in self.layers(model) for each in layer]
        least = sum(each.cost for each in every) / sum(each.cost * each.size for each in every)
        if self.config.density < least:
            said = f"density {self.config.density} leaves no dimension of a head and no channel in some layer"
            hint = f"one of each in all layers are {least:.2%} of the weights: a larger density"
            raise OptionError(f"{model.owner}: {said}", hint=hint)

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        if "kept" in self.state:  # a bundle that is narrow
            self.sources = {}  # type: ignore[misc]
            pruning.train_again(model, self.state.get("heads", ()))  # of 0.2.0 none
            return
        pruning.check_unpacked(stack, model.owner, "narrow")
        layers, at = self.layers(model), 0
        self.generator = model.keep("generator", Generator(layers, self.config), full_precision=True)
        self.deltas: dict[str, MaskedLora] = {}
        self.structures = [each for layer in layers for each in layer]
        for each in self.structures:
            part = slice(at, at := at + each.size)
            for site in each.sites:
                site.check_rank(self.config.rank)
                delta = MaskedLora(site, self.config, self.generator if site in each.into else None, part)
                self.deltas[site.path] = site.attach(delta)

    def check(self, stack: Stack) -> None:
        id, order = stack.id_of(self), list(stack.plugins)
        if stack.standing[id].folded:
            return
        done = stack.standing[id].compressed
        pruning.check_layers(stack, id, () if done else self.deltas, folds=False)
        if done:
            return
        for other in stack.members:
            after, why = order.index(other.id) > order.index(id), ""
            inside = (m for part in stack.ledger.of(other.id) for m in part.module.modules())
            if after and any(isinstance(m, Reader) for m in inside):
                why = "copies the model, which is narrow when a bundle is read"
                hint = f"'{other.id}' before '{id}'"
            elif not after and other.claims(Claim.OWN_LAYOUT):
                why = "lays out rows otherwise than those that masks learn from"
                hint = f"'{id}' before '{other.id}'"
            if why:
                place = "after" if after else "before"
                raise ConflictError(f"'{other.id}' stands {place} '{id}', and {why}", hint=hint)

    def phases(self) -> Sequence[Phase]:
        if "kept" in self.state:
            return ()
        return [*([] if self.state.get("fixed") else [Phase("prune", self.config.control)]), Phase("tune")]

    def finished(self) -> Iterable[nn.Parameter]:
        return self.generator.parameters() if self.generator is not None and self.state.get("fixed") else ()

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Steps[None, Tensor, Tensor]:
        if (generator := self.generator) is None:
            return (yield)
        if step.phase(self).name == "prune":
            self.learn(generator, step)
            if step.first_micro:  # of a seed of its own, so that all processes draw the same
                seed = zlib.crc32(f"atp:{step.stack.seed}:{step.index}".encode())
                with torch.no_grad(), eval_mode(generator):
                    generator.d.copy_(generator.hard(generator(torch.Generator().manual_seed(seed))))
        elif not self.state.get("fixed"):
            self.state["fixed"] = True
            step.stack.settle()
        step.after_update(lambda _: self.project(generator.d == 0, step))
        return (yield)

    def learn(self, generator: Generator, step: TrainStep) -> None:
        """The generator's gradient of this micro-batch, and its rate."""
        own, batch = list(generator.parameters()), step.batch_of("validation")
        with eval_mode(step.model):
            generator.train()
            d = generator.hard(generator())
            R = mismatch(generator.share(d), self.config.density)
            with lent([generator], "live", [d]):
                loss = step.model(**batch).loss + self.config.match * R
                gradients = torch.autograd.grad(loss / step.accumulation, own)
        for p, gradient in zip(own, gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient
        at_rates(step, [(p, self.config.generator_rate) for p in own])

    @torch.no_grad()
    def project(self, gone: Tensor, step: TrainStep) -> None:
        t = step.index / step.total if step.total else 1.0
        eta = self.config.beta * step.rate(self) * math.expm1(t) / math.expm1(1)
        for each, here in zip(self.structures, gone.split([s.size for s in self.structures]), strict=True):
            B = [self.deltas[site.path].B.unflatten(0, (-1, each.size)).movedim(1, 0) for site in each.into]
            A = [self.deltas[site.path].A.unflatten(1, (-1, each.size)).movedim(2, 0) for site in each.out]
            proximal(B + A, here, eta * here.sum() / gone.sum().clamp(min=1))

    @hookimpl
    def compress(self, model: ModelView, stack: Stack) -> None:
        if self.generator is None:
            hint = "train it, then stack.compress(); in a pipeline `phase: after-training` beside `use`"
            raise StackError(f"{model.owner}: there are no masks yet to narrow by", hint=hint)
        if model.owner in stack.ledger.merged():
            hint = "stack.unmerge() first: it adds what LoRA made by itself"
            raise StackError(f"{model.owner}: it is merged, and masks in weights narrow nothing", hint=hint)
        parts, new = self.generator.d.split(self.generator.sizes), list[tuple[BoundSite, nn.Module]]()
        behind = stack.members[stack.members.index(stack.member(model.owner)) + 1 :]
        packs = any(member.claims(Claim.QUANTIZES) for member in behind)
        for each, d in zip(self.structures, parts, strict=True):
            for site in each.sites:
                delta, into = self.deltas[site.path], site in each.into
                at = torch.arange(site.shape[0 if into else 1], device=d.device)
                at = at.view(-1, each.size)[:, d > 0].flatten()
                if site.role.startswith("mlp"):
                    new.append((site, pruning.cut(site, delta, **{"rows" if into else "columns": at})))
                    continue
                layer = narrow(site, delta, at, into=into)
                new.append((site, NarrowLinear.of(layer.weight, layer.bias) if packs else layer))
        self.state["kept"] = [[int(d.sum()), len(d)] for d in parts]
        self.state["left"] = float(self.generator.share(self.generator.d))
        self.state["heads"] = pruning.put_in_place(stack, model.owner, new)
        self.generator, self.structures, self.deltas, self.sources = None, [], {}, {}  # type: ignore[misc]

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        every = (site for layer in self.layers(model) for each in layer for site in each.sites)
        return pruning.bytes_left(every, self.config.density)

    def bytes_hang_on(self) -> str:
        return f"at least: more is left if the run ends before the masks have come to {self.config.density}"

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `left`, P."""
        g = self.generator
        evaluation.add("left", self.state.get("left", 1.0) if g is None else g.share(g.d))
