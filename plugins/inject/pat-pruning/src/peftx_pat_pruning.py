"""PAT: channels of the whole residual stream go by one mask while a model is tuned, and it becomes narrower.

"PAT: Pruning-Aware Tuning for Large Language Models" (arXiv:2408.14721). A hybrid sparsification module stands behind
the embedding, and behind the attention and the feed-forward part of every layer before the residual is added. All have
the mask m of one set of logits p in R^d, and each an A: [r, d], a B: [d, r] and a scale v in R^d:

    u = x + B A x;   y = v * m(t) * u                        B = 0, v = 1, p = 0 at the start, where y = x
    m(t) = sigmoid(tau p) + max(1/2 - t/T, 0)                tau = 1 / (1 - log t / log T)
    loss = task + L_mask + sum over the modules of mean (A A^T - I)**2
    L_mask = 10 |n - d'| / d' + mean over p > 0 of (p - 1/2)**2 + mean over p <= 0 of (p + 1/2)**2

with n = sum 1[p >= 0], whose gradient is passed through to p, and d' channels that are to be left. From 0.8 T on tau
stays as it is, and the task no longer moves p. Behind T the mask is 1 for the d' largest p and 0 for the others; the
rest trains on. Channels at 0 are then 0 in the whole stream, so `compress` folds every module into the matrix before it
and takes them out of all that writes or reads the stream. A norm over d' numbers instead of d has another mean:

    w x / sqrt(sum x**2 / d + eps) = (w sqrt(d/d')) x / sqrt(sum x**2 / d' + eps d/d')

An embedding that is the head too has the mask alone, so that both are one matrix still.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from pydantic import Field
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
    Stack,
    TrainStep,
    add_low_rank,
    hookimpl,
)
from peftx.errors import ArchitectureError, ConflictError, OptionError, StackError
from peftx.kernel.chain import is_ours
from peftx.kernel.parts import BasePart, ContextPart, DeltaPart, ReplacedPart
from peftx.kernel.slots import base_class, kind_of
from peftx.kernel.vocabulary import scale_of
from peftx.toolkits.compression import NarrowLinear
from peftx.toolkits.compression.names import dtype_name, float_dtype
from peftx.toolkits.compression.pruning import bytes_left, check_not_packed, check_runs, check_unpacked, wide

WRITE = ("attention.o", "mlp.down")
FROZEN = 0.8
"""Of T: from there on tau stays, and the task leaves p alone."""
WORK = "Llama, Mistral, Qwen 2 and 3, Gemma and Phi-3 work"


class PatPruningConfig(PluginConfig):
    """Options of PAT; the paper leaves 75% of the width, and the released code has r = 200."""

    width: float = Field(0.75, gt=0, le=1, description="d' / d, share of the channels that is left")
    rank: int = Field(200, ge=1, description="r of A and B")
    prune: float = Field(
        0.9, gt=0, description="T: below 1 a share of the run, else steps; the rest trains on narrow"
    )


class Mask(nn.Module):
    """The one mask of all modules.

    Attributes:
        p: logits, [d]. tau, b: of m(t), 0-d. settled: 0-d bool, m is 0 and 1 from now on; kept: [d] bool, where 1.
        rests: the task leaves p alone.
    """

    tau: Tensor
    b: Tensor
    settled: Tensor
    kept: Tensor
    rests = False

    def __init__(self, width: int, left: int) -> None:
        super().__init__()
        self.left = left
        self.p = nn.Parameter(torch.zeros(width))
        self.register_buffer("tau", torch.tensor(1.0))
        self.register_buffer("b", torch.tensor(0.5))
        self.register_buffer("settled", torch.tensor(False))
        self.register_buffer("kept", torch.ones(width, dtype=torch.bool))

    def m(self) -> Tensor:
        """m(t), [d]."""
        p = self.p.detach() if self.rests else self.p
        return torch.where(self.settled, self.kept.to(p.dtype), torch.sigmoid(self.tau * p) + self.b)

    def at(self, t: int, T: int) -> None:
        """Where the run is: step t of T, from 0."""
        self.rests = t >= int(FROZEN * T)
        since = max(min(t, int(FROZEN * T)), 1)
        self.tau.fill_(1 / (1 - math.log(since) / math.log(max(T, 2))))
        self.b.fill_(max(0.5 - t / T, 0.0))

    def settle(self) -> None:
        self.kept.zero_()[self.p.topk(self.left).indices] = True
        self.settled.fill_(True)

    def loss(self) -> Tensor:
        """L_mask, 0-d."""
        p, on = self.p, self.p > 0
        n = ((p >= 0).to(p.dtype) + p - p.detach()).sum()
        pull = [(part**2).mean() for part in (p[on] - 0.5, p[~on] + 0.5) if part.numel()]
        return 10 * (n - self.left).abs() / self.left + torch.stack(pull).sum()


class Hsm(Delta):
    """v * m * (y + B A y), on what a layer gives, [..., d].

    Args:
        mask: of all of them. width: d. rank: r; 0: nothing but the mask.
    """

    full_precision = True  # a scale near 1 would not feel small steps

    def __init__(self, mask: Mask, width: int, rank: int) -> None:
        super().__init__()
        self.mask, self.rank = (mask,), rank
        if rank:
            self.A = nn.Parameter(torch.empty(rank, width))
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
            self.B = nn.Parameter(torch.zeros(width, rank))
            self.v = nn.Parameter(torch.ones(width))

    def gain(self) -> Tensor:
        return self.v * self.mask[0].m() if self.rank else self.mask[0].m()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u = add_low_rank(y, y, self.A, self.B, 1.0) if self.rank else y
        return u * self.gain().to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        columns = weight if bias is None else torch.cat((weight, bias[:, None]), 1)
        if self.rank:
            columns = columns + self.B.to(weight.dtype) @ (self.A.to(weight.dtype) @ columns)
        columns = columns * self.gain().to(weight.dtype)[:, None]
        return (columns, None) if bias is None else (columns[:, :-1], columns[:, -1])

    def identity(self) -> Tensor:
        """mean (A A^T - I)**2, 0-d."""
        return (self.A @ self.A.T - torch.eye(self.rank).to(self.A)).square().mean()


class NarrowEmbedding(nn.Embedding):
    """A frozen embedding of in_features tokens in out_features channels, which multiplies its rows by `scale`."""

    def __init__(
        self, *, in_features: int, out_features: int, scale: float, dtype: str, device: Any = None
    ) -> None:
        super().__init__(in_features, out_features, dtype=float_dtype(dtype, "dtype"), device=device)
        self.scale = scale
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """The values follow."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.weight.new_tensor(self.scale)

    def geometry(self) -> dict[str, Any]:
        sizes = {"in_features": self.num_embeddings, "out_features": self.embedding_dim}
        return sizes | {"scale": self.scale, "dtype": dtype_name(self.weight.dtype)}


class NarrowNorm(nn.Module):
    """w x / sqrt(mean x**2 + eps) of fewer channels, in float32; w: [out_features]. in_features: 1, as of a column."""

    def __init__(
        self, *, in_features: int, out_features: int, eps: float, dtype: str, device: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.eps = in_features, eps
        ones = torch.ones(out_features, dtype=float_dtype(dtype, "dtype"), device=device)
        self.weight = nn.Parameter(ones, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return h.to(x.dtype)

    def geometry(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": len(self.weight)}
        return sizes | {"eps": self.eps, "dtype": dtype_name(self.weight.dtype)}


def eps_of(norm: nn.Module) -> Any:
    """None where an RMS norm has none of its own."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def gain_of(norm: nn.Module, width: int) -> Tensor:
    """What an RMS norm multiplies by, [d] float32: its weight, or 1 + its weight."""
    ones = torch.ones(width, device=next(norm.parameters()).device)
    return copy.deepcopy(norm).float()(ones) * math.sqrt(1 + eps_of(norm))


def shell(site: BoundSite, how: str, n: int, device: Any) -> nn.Module:
    """What stands in a module's place when n channels are left, without its values."""
    dtype = dtype_name(site.dtype)
    if how == "norm":
        eps = eps_of(site.module) * len(site.weight) / n
        return NarrowNorm(in_features=1, out_features=n, eps=eps, dtype=dtype, device=device)
    if how == "embedding":
        sizes = {"in_features": site.shape[0], "out_features": n, "device": device}
        scale = 1.0 if site.weight.is_meta else scale_of(site.module)
        return NarrowEmbedding(**sizes, scale=scale, dtype=dtype)
    o, i = (n, site.shape[1]) if how == "write" else (site.shape[0], n)
    return NarrowLinear(in_features=i, out_features=o, bias=site.bias is not None, dtype=dtype, device=device)


def ends(model: ModelView) -> list[str]:
    """Paths of the embedding and the head, if there is one."""
    return [model.embedding().path, *(site.path for site in model.anatomy.sites if site.role == "head")]


def tied(model: ModelView) -> bool:
    """Are these one matrix."""
    matrices = [model.module.get_submodule(path)._parameters["weight"] for path in ends(model)]
    return len(matrices) == 2 and matrices[0] is matrices[1]


class PatPruning(Plugin):
    """See the module."""

    Config = PatPruningConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.NEEDS_GRADIENTS, Claim.FOLDS_PREVIOUS, Claim.TAKES_WEIGHTS, Claim.NARROWS,
    }  # fmt: skip
    architectures = ("phi3", "gemma2")
    example = {"rank": 4, "prune": 1}  # a loop of one's own has no length that T could be a share of
    refuses = {"t5": "an encoder and a decoder"}
    refuses |= dict.fromkeys(("gpt2", "bert"), "its norms take the mean over all channels")
    config: PatPruningConfig
    hsms: dict[str, Hsm] = {}

    def left(self, model: ModelView) -> int:
        """d'."""
        return round(self.config.width * model.hidden_size)

    def suits(self, model: ModelView) -> None:
        d, places = model.hidden_size, self.places(model)
        if not self.left(model):
            said = f"width {self.config.width:g} of {d} channels leaves none"
            raise ArchitectureError(f"{model.owner}: {said}", hint=f"{1 / d:.3g} at least")
        if self.config.rank > d:
            said = f"rank {self.config.rank} exceeds the {d} channels"
            raise OptionError(f"{model.owner}: {said}", hint=f"at most {d}")
        shells = {site.path: shell(site, how, max(d - 1, 1), "meta") for site, how in places}
        said = "has more that is as wide as its residual stream"
        check_runs(model, shells, said, WORK)  # with one channel less

    def places(self, model: ModelView) -> list[tuple[BoundSite, str]]:
        """All that writes or reads the stream, each module once, and how.

        Raises:
            ArchitectureError: what is no plain linear layer, no RMS norm and no embedding, or not of one tower of text.
        """
        d, found = model.hidden_size, dict[str, tuple[BoundSite, str]]()
        if len(model.towers) > 1 or model.module.main_input_name != "input_ids":
            said = f"{model.config.model_type} is not one tower of text"
            raise ArchitectureError(f"{model.owner}: {said}", hint=WORK)
        for site in (s for s in model.anatomy.sites if s.kind != "block"):
            check_not_packed(model, site, "cannot be narrowed")
            module, how = site.module, "embedding" if site.role == "embedding" else ""
            if "RMSNorm" in base_class(module).__name__ and site.shape and isinstance(eps_of(module), float):
                how = "norm"
            elif site.kind == "linear" and not site.read and kind_of(module) == "plain":
                how = "write" if site.role in WRITE else "read"
            if not how:
                said = f"{site.path} is no plain linear layer, RMS norm or embedding of tokens, and cannot be narrowed"
                raise ArchitectureError(f"{model.owner}: {said}", hint=WORK)
            if site.shape[-2 if how == "write" else -1] == d:
                found[site.path] = model.bound(dataclasses.replace(site, rows=None, fused=())), how
        return list(found.values())

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if "kept" in self.state:  # all of it is in the weights
            return
        d = model.hidden_size
        self.mask = model.keep("mask", Mask(d, self.left(model)), full_precision=True)
        self.hsms = {}
        for site, how in self.places(model):
            if how in ("write", "embedding"):
                rank = 0 if how == "embedding" and tied(model) else self.config.rank
                self.hsms[site.path] = site.attach(Hsm(self.mask, d, rank))

    def check(self, stack: Stack) -> None:
        id, order = stack.id_of(self), list(stack.plugins)
        done, place = stack.standing[id].compressed, order.index(id)
        mine = {part.key for part in stack.ledger.of(id, ReplacedPart)}
        way = f"what folds goes before '{id}'; adapters of linear layers behind its compression as well"
        if not done:
            check_unpacked(stack, id, "narrow")
        for part in stack.ledger.parts:
            if part.owner == id or isinstance(part, ContextPart | ReplacedPart):
                continue
            trains, merges = isinstance(part, BasePart), stack.member(part.owner).claims(Claim.MERGEABLE)
            on_linear = isinstance(part, DeltaPart) and issubclass(base_class(part.place), nn.Linear)
            fits = on_linear or (trains and part.key not in mine)
            if not (fits if done else (trains or merges) and order.index(part.owner) < place):
                said = f"'{part.owner}' ({part.what} at {part.key}) stays at the full width, which '{id}' narrows"
                raise ConflictError(said, hint=way)

    def phases(self) -> Sequence[Phase]:
        if "kept" in self.state:
            return ()
        prune = () if self.state.get("settled") else (Phase("prune", self.config.prune),)
        return (*prune, Phase("settled"))

    def finished(self) -> Iterable[nn.Parameter]:
        return [self.mask.p] if self.state.get("settled") and "kept" not in self.state else ()

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if "kept" not in self.state:
            span, id = step.phase(self), step.stack.id_of(self)
            step.add_loss(f"{id} identity", lambda _: self.identity(), over="step")
            if span.name == "prune":
                assert span.end is not None
                self.state["settled"] = False
                self.mask.at(step.index, span.end)
                step.add_loss(f"{id} mask", lambda _: self.mask.loss(), over="step")
                if step.index + 1 == span.end:
                    step.after_update(lambda _: self.settle(step.stack))
        return (yield)

    def identity(self) -> Tensor:
        return torch.stack([hsm.identity() for hsm in self.hsms.values() if hsm.rank]).sum()

    @torch.no_grad()
    def settle(self, stack: Stack) -> None:
        """The mask is 0 and 1 from here on."""
        self.mask.settle()
        self.state["settled"] = True
        stack.settle()

    @hookimpl
    def compress(self, model: ModelView, stack: Stack) -> None:
        id = model.owner
        if not stack.ledger.of(id, DeltaPart):
            said = "there is no mask on the model yet, before `inject`"
            raise ConflictError(f"{id}: {said}", hint="phase: after-training beside `use`")
        if self.state.get("settled") is False:
            said = "the mask has not settled yet, so that no channel is 0"
            raise StackError(f"{id}: {said}", hint="train to the end of `prune`")
        self.mask.settled.fill_(True)  # also before any training, with all channels
        self.state["tied"], kept, new = tied(model), self.mask.kept, []
        for site, how in self.places(model):
            layer = shell(site, how, int(kept.sum()), site.weight.device)
            for name, value in self.values(site, how, kept).items():
                layer.get_parameter(name).copy_(value)
            new.append((site, layer))
        stack.ledger.remove(id)
        for site, layer in new:
            site.replace(layer)
        self.state["kept"], self.hsms = kept.nonzero()[:, 0].tolist(), {}
        self.restore(model, stack)

    def values(self, site: BoundSite, how: str, kept: Tensor) -> dict[str, Tensor]:
        """Parameters of the narrow module, with the module of this plugin folded in."""
        if how == "norm":
            return {"weight": gain_of(site.module, len(kept))[kept] * math.sqrt(len(kept) / int(kept.sum()))}
        weight, bias = wide(site)
        if hsm := self.hsms.get(site.path):
            weight, bias = hsm.fold(weight.mT if how == "embedding" else weight, bias)
            weight = weight[kept].mT if how == "embedding" else weight[kept]
            return {"weight": weight} if bias is None else {"weight": weight, "bias": bias[kept]}
        return {"weight": weight[:, kept]} if bias is None else {"weight": weight[:, kept], "bias": bias}

    def restore(self, model: ModelView, stack: Stack) -> None:
        if self.state["tied"]:  # as one matrix they were
            embedding, head = (model.module.get_submodule(path) for path in ends(model))
            head.weight = embedding.weight

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        return bytes_left((site for site, _ in self.places(model)), self.config.width)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Which share of the channels is left, and numbers in the model, each tied matrix once."""
        d, model = evaluation.stack.anatomy.hidden_size, evaluation.stack.model
        now = int(self.mask.kept.sum()) if self.hsms else d  # before `inject` all of them
        evaluation.add("width", len(self.state["kept"]) / d if "kept" in self.state else now / d)
        own = [p for name, p in model.named_parameters() if not is_ours(name)]
        evaluation.add("parameters", sum(p.numel() for p in own))
