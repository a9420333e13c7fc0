"""APT: heads and neurons fade out while low-rank adapters train, ranks grow where it matters, a narrower model is left.

"APT: Adaptive Pruning and Tuning Pretrained Language Models for Efficient Training and Inference" (arXiv:2401.12200).
Of every layer, heads (with grouped keys: all that share them) and neurons of the feed-forward part are blocks j with a
mask m_j in [0, 1] on what they give to W_o and W_down; other matrices have adapters of rank r, B = 0 at the start:

    y = W (m * h)                       W_o, W_down, with h the heads' outputs, or the neurons'
    y = W x + s B A x                   s = alpha / r_0, A: [r, in] normal, B: [out, r]

First the adapters tune alone. Then it prunes, t = 1 .. T. H and dL/dH are a batch's values of a block and their
gradients; what they give to the outputs is O = W_:j * H_j; B_j are the rows of adapters into the block:

    S_j = sum |dL/dH_j| sum |H_j| + sum |B_j * dL/dB_j|, smoothed by 0.85;       S_j + sqrt(excess kurtosis of O_j)
    g_t = g + (1 - g) (1 - t/T)**3      of the blocks' numbers stay: those of the highest S_j / numbers of j

Masks of the others go to 0 in N updates, and back to 1 if a block returns. The upper half of the adapters, by
I = sum |B * dL/dB|, gets rank floor(r D_t / D_old) within the budget D_t of adapters' numbers: rows of A are normal,
columns of B zero, so the function stays. The model as it was when the pruning began, on the same W with a copy of the
adapters and all masks at 1, teaches the one with masks, with trained T_i = 1 + B_i A_i that begin as 1:

    L = (1 - mu) task + mu sum_i MSE(T_i h_i, teacher's h_i)                     mu = t/T; behind T the task alone

Then `compress` folds masks and adapters into the weights, and takes rows and columns of blocks at 0 out for good.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import (
    BoundSite,
    Claim,
    Delta,
    Evaluation,
    LowRank,
    ModelView,
    Phase,
    Plugin,
    PluginConfig,
    Site,
    Stack,
    Targets,
    TrainStep,
    hookimpl,
)
from peftx.engines.training.step import swapped
from peftx.errors import ArchitectureError, ConflictError, StackError, TrainingError
from peftx.kernel.call import Call
from peftx.kernel.modes import eval_mode
from peftx.kernel.phases import Span, spans
from peftx.toolkits.compression import pruning
from peftx.toolkits.compression.pruning import Blocks, heads_and_neurons
from peftx.toolkits.injecting import LowRankDelta, lent

OTHER_LOSS = {Claim.REPLACES_LOSS, Claim.CLASSIFIES, Claim.NO_LABELS, Claim.OWN_LAYOUT}
Memory = dict[str, Tensor]
"""Key of blocks -> S, smoothed; path of an adapter -> I, smoothed; the teacher's A and B."""


class AptConfig(PluginConfig):
    """Options of APT; the paper leaves 40% of RoBERTa and T5, 70% of LLaMA."""

    density: float = Field(0.4, gt=0, le=1, description="g, share of numbers in heads and neurons left")
    rank: int = Field(8, ge=1, description="r_0, rank of an adapter at the start")
    max_rank: int = Field(64, ge=1, description="no rank grows beyond this, nor beyond the matrix's")
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False, description="s = alpha / r_0 also where ranks grow")
    grow: float = Field(4.0, ge=1, allow_inf_nan=False, description="adapters' numbers at T, over those at 0")
    tune: float = Field(0.1, ge=0, description="before T: below 1 a share of the run, else steps; 0: none")
    prune: float = Field(0.5, gt=0, description="T, likewise; masks fall on behind it")
    times: int = Field(10, ge=1, description="how often in T blocks are chosen and ranks grow")
    fade: int = Field(100, ge=1, description="N, updates in which a mask goes from 1 to 0")
    beta: float = Field(0.85, ge=0, lt=1, description="of the smoothed salience")
    distil: bool = Field(True, description="the model from before the pruning teaches")
    targets: Targets = Field(Targets("attention.q,v mlp.up"), description="layers that get adapters")

    @model_validator(mode="after")
    def _grows(self) -> AptConfig:
        if self.max_rank < self.rank:
            raise ValueError(f"max_rank {self.max_rank} is less than rank {self.rank}, and ranks grow")
        return self


class Mask(Delta):
    """What goes into W_o or W_down, [..., count * width], times m of its block.

    Attributes:
        level: int32 [count]; m = level / fade. kept: bool [count], the blocks that were chosen last.
        sums: if `watching`, of this step's values: |dL/dH|, |H|, H, H^2, H^3, H^4 and 1, [7, count * width].
        off: the teacher runs. real: tokens of the last call that are no pads, [B, T + P], None if unknown.
    """

    level: Tensor
    kept: Tensor
    off = watching = False
    real: Tensor | None = None
    sums: Tensor | None = None

    def __init__(self, call: Call, blocks: Blocks, fade: int) -> None:
        super().__init__()
        self.call, self.width, self.fade = call, blocks.width, fade
        self.register_buffer("level", torch.full((blocks.count,), fade, dtype=torch.int32))
        self.register_buffer("kept", torch.ones(blocks.count, dtype=torch.bool))

    def m(self) -> Tensor:
        """Of every column, float32 [count * width]."""
        return (self.level / self.fade).repeat_interleave(self.width)

    def pre(self, x: Tensor) -> Tensor:
        known = self.call.real
        whole = known is not None and x.shape[1] >= known.shape[1]  # else another plugin left tokens out here
        self.real = self.call.rows(known, x).bool() if whole else None
        if self.off:
            return x
        y = x * self.m().to(x.dtype)
        if self.watching and torch.is_grad_enabled():
            y = y if y.requires_grad else y.requires_grad_()  # nothing trains below it
            H = (x if self.real is None else x[self.real]).detach().float().reshape(-1, x.shape[-1])
            seen = [H.abs(), H, H**2, H**3, H**4, torch.ones_like(H)]
            y.register_hook(partial(self.note, torch.stack([power.sum(0) for power in seen])))
        return y

    def note(self, seen: Tensor, gradient: Tensor) -> None:
        """Of one call: sums of powers of H, and the gradient [..., count * width]."""
        g = gradient.detach().float().abs().flatten(0, -2).sum(0, keepdim=True)
        self.sums = torch.cat((g, seen)) + (0 if self.sums is None else self.sums)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.m().to(weight.dtype), bias


class Adapter(LowRankDelta):
    """y + s B A x, with room for the largest rank.

    Attributes:
        live: bool [max rank], the first r; rows of A behind them have no effect yet, and columns of B are 0.
    """

    live: Tensor

    def __init__(self, site: BoundSite, config: AptConfig) -> None:
        super().__init__()
        room = min(config.max_rank, site.in_features, site.out_features)
        self.scale = config.alpha / config.rank
        self.A = nn.Parameter(torch.randn(room, site.in_features) / math.sqrt(site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, room))
        self.register_buffer("live", torch.arange(room) < config.rank)

    def low_rank(self) -> LowRank:
        return LowRank(self.A * self.live[:, None], self.B, self.scale)


class Match(nn.Module):
    """T_i of every layer: A [L, r, d] normal, B [L, d, r] zero."""

    def __init__(self, layers: int, rank: int, width: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(layers, rank, width) / math.sqrt(width))
        self.B = nn.Parameter(torch.zeros(layers, width, rank))

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor | None) -> Tensor:
        """sum_i MSE(T_i h_i, h'_i) over the real tokens; h: L of [B, T, d]."""
        total = self.A.new_zeros(())
        for A, B, h, goal in zip(self.A, self.B, student, teacher, strict=True):
            error = (h.to(A.dtype) @ A.T @ B.T + h - goal).float().square().mean(-1)
            total = total + (error if real is None else error[real]).mean()
        return total


def excess_kurtosis(H: Tensor, W: Tensor, width: int) -> Tensor:
    """Of all products of a value and a weight in a block, [count] float64; 0 where they do not differ.

    Args:
        H: means of the powers 1 to 4 of the values, [4, columns]. W: the matrix that they go into, [out, columns].
    """
    powers = torch.stack([(W.double() ** k).mean(0) for k in (1, 2, 3, 4)])
    a, b, c, d = (H.double() * powers).unflatten(1, (-1, width)).mean(-1)
    spread, fourth = b - a**2, d - 4 * a * c + 6 * a**2 * b - 3 * a**4
    return torch.where(spread > 1e-30, fourth / spread.square().clamp_min(1e-60) - 3, 0.0)


def within(scores: Sequence[Tensor], costs: Sequence[int], budget: float) -> list[Tensor]:
    """Which blocks stay, bool [count] of each group: the best of each, and then by score / cost as far as it goes.

    Args:
        scores: S of each group's blocks, [count]. costs: numbers of a block of the group.
    """
    pairs = list(zip([S.double().cpu() for S in scores], costs, strict=True))
    density = torch.cat([(S / n).index_fill(0, S.argmax(), math.inf) for S, n in pairs])
    order = density.sort(descending=True, stable=True).indices
    spent = torch.cat([torch.full((len(S),), n) for S, n in pairs])[order].cumsum(0)
    kept = torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[spent <= budget], True)
    return list(kept.split([len(S) for S, _ in pairs]))


def note(seen: dict[Any, Tensor], layer: nn.Module, x: Any, y: Tensor) -> None:
    """What a layer gives: the student's first call, which makes gradients, and the last one that makes none."""
    grows = torch.is_grad_enabled()
    if not (grows and (layer, grows) in seen):
        seen[layer, grows] = y


class Apt(Plugin):
    """See the module."""

    Config = AptConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_GRADIENTS, Claim.FOLDS_PREVIOUS, Claim.EDITS_INPUTS,
        Claim.TAKES_WEIGHTS, Claim.NARROWS, Claim.NEEDS_MASK,
    }  # fmt: skip
    architectures = ("mistral", "gemma2", "roberta")
    # A loop of one's own does not know its length, and these runs have few steps.
    example = {"density": 0.6, "rank": 1, "max_rank": 2, "tune": 0, "prune": 1, "fade": 1}
    refuses = {"gpt2": "queries, keys and values are one matrix", "t5": "an encoder and a decoder"}
    config: AptConfig
    masks: Sequence[tuple[Blocks, Mask]] = ()
    adapters: dict[str, Adapter] = {}

    def suits(self, model: ModelView) -> None:
        groups, g = heads_and_neurons(model), self.config.density
        least, total = sum(b.cost for b in groups), sum(b.cost * b.count for b in groups)
        if g * total < least:
            said = f"density {g:g} is less than one head and one neuron of each layer"
            enough = math.ceil(1000 * least / total) / 1000
            raise ArchitectureError(f"{model.owner}: {said}", hint=f"{enough:g} at least")
        pruning.check_into(model, groups, self.config.targets, "adapters stand on what does")
        pruning.check_shrinks(model, groups)

    @hookimpl
    def inject(self, model: ModelView) -> None:
        if "kept" in self.state:  # in the weights, but for a new head that trained along
            pruning.train_again(model, self.state["heads"])
            return
        c = self.config
        self.masks = [(b, b.out.attach(Mask(model.call, b, c.fade))) for b in heads_and_neurons(model)]
        self.adapters, self.layers = {}, [site.module for site in model.blocks("layer")]
        for site in model.linears(c.targets):
            site.check_rank(c.rank)
            self.adapters[site.path] = site.attach(Adapter(site, c))
        if c.distil:
            self.match = model.keep("match", Match(model.num_layers, c.rank, model.hidden_size))

    def check(self, stack: Stack) -> None:
        id = stack.id_of(self)
        done = stack.standing[id].compressed
        for other in () if done or not self.config.distil else stack.members:
            if OTHER_LOSS & other.plugin.claims:
                said = f"'{id}' weighs the task's loss against its teacher's, and '{other.id}' brings another"
                raise ConflictError(said, hint=f"distil: false in '{id}'")
        blocks = [] if done else heads_and_neurons(stack.view(id))
        pruning.check_heads(stack, id)
        pruning.check_layers(stack, id, {site.path for b in blocks for site in b.sites}, folds=True)

    def phases(self) -> Sequence[Phase]:
        if "kept" in self.state:
            return ()
        if self.state.get("pruned"):
            return (Phase("final"),)
        tune = (Phase("tune", self.config.tune),) if self.config.tune else ()
        return (*tune, Phase("prune", self.config.prune), Phase("final"))

    def one_process(self) -> str:
        return "each would choose blocks by its own rows" if len(self.phases()) > 1 else ""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        if not self.phases():
            return (yield)
        id, span, c = step.stack.id_of(self), step.phase(self), self.config
        memory, seen = step.memory.setdefault(id, {}), dict[Any, Tensor]()
        for _, mask in self.masks:
            mask.watching = span.name == "prune"
        step.after_update(lambda _: self.move(span, step.index + 1, memory))
        if span.name == "final":
            return (yield)
        last = spans(self.phases(), step.total, owner=id)[-1]
        left = math.inf if last.end is None else last.end - last.first
        if c.density < 1 and left + 1 < c.fade:
            said = f"masks take {c.fade} steps to fall, and {left} are left behind the pruning"
            raise TrainingError(f"{id}: {said}", hint="more steps, or a smaller `tune`, `prune` or `fade`")
        if span.name == "tune":
            return (yield)
        assert span.end is not None
        step.on_gradients(lambda _: self.sense(memory))
        with ExitStack() as hooks:
            if c.distil:
                for layer in self.layers:
                    hooks.callback(layer.register_forward_hook(partial(note, seen)).remove)
                hooks.callback(seen.clear)
                if step.begins(self):
                    memory |= {key: p.detach().clone() for key, p in self.trained().items()}
                mu = (step.index - span.first) / (span.end - span.first)
                step.add_loss(f"{id} task", lambda outputs: outputs.loss, -mu)
                step.add_loss(id, lambda _: self.lesson(step, seen, memory), mu, over="inputs")
            return (yield)

    def trained(self) -> dict[str, nn.Parameter]:
        """A and B of every adapter."""
        return {f"{path} {name}": p for path, a in self.adapters.items() for name, p in a.named_parameters()}

    def lesson(self, step: TrainStep, seen: dict[Any, Tensor], memory: Memory) -> Tensor:
        """sum_i MSE(T_i h_i, the teacher's h_i), 0-d; `seen` has the student's."""
        student = [seen.pop((layer, True)) for layer in self.layers]
        taught = [(p, memory[key].to(p)) for key, p in self.trained().items()]
        masks = [mask for _, mask in self.masks]
        off = lent(masks, "off", [True] * len(masks))
        with off, swapped(taught), eval_mode(step.model), torch.no_grad():
            step.model(**step.batch)
        real = masks[0].real  # of the teacher's call
        return self.match.loss(student, [seen[layer, False] for layer in self.layers], real)

    @torch.no_grad()
    def sense(self, memory: Memory) -> None:
        """S and I of this step, before any clipping, and means of the powers of H."""
        rows, now = {}, {}
        for path, a in self.adapters.items():  # no gradient: the layer was left out of this step
            rows[path] = torch.zeros_like(a.B[:, 0]) if a.B.grad is None else (a.B * a.B.grad).abs().sum(1)
            now[path] = rows[path].sum()
        for b, mask in self.masks:
            sums = mask.m().new_zeros(7, b.count * b.width) if mask.sums is None else mask.sums
            parts = [sums[0] * sums[1], *(rows[s.path] for s, _ in b.into if s.path in rows)]
            now[b.out.path] = sum(part.float().unflatten(0, (b.count, -1)).sum(1) for part in parts)
            memory[f"{b.out.path} H"], mask.sums = sums[2:6] / sums[6].clamp_min(1), None
        for key, value in now.items():
            memory[key] = memory.get(key, torch.zeros_like(value)).to(value).lerp(value, 1 - self.config.beta)

    @torch.no_grad()
    def move(self, span: Span, t: int, memory: Memory) -> None:
        """What follows update t: now and then other blocks and ranks, and always masks that fall or return."""
        c = self.config
        if span.name == "prune":
            assert span.end is not None
            T, t = span.end - span.first, t - span.first
            if t * c.times // T > (t - 1) * c.times // T:
                self.choose(c.density + (1 - c.density) * (1 - t / T) ** 3, memory)
                self.enlarge(1 + (c.grow - 1) * t / T, memory)
            if t == T:
                self.state["pruned"] = True
                memory.clear()
        for _, mask in self.masks:
            mask.level.add_(torch.where(mask.kept, 1, -1)).clamp_(0, mask.fade)

    def choose(self, share: float, memory: Memory) -> None:
        """Keep the blocks of the highest S / numbers, `share` of all numbers at most."""
        scores, costs = [], [b.cost for b, _ in self.masks]
        for b, _ in self.masks:
            S, H = memory[b.out.path].double(), memory[f"{b.out.path} H"]
            scores.append(S + excess_kurtosis(H, b.out.weight, b.width).clamp_min(0).sqrt())
        budget = share * sum(b.cost * b.count for b, _ in self.masks)
        for (_, mask), kept in zip(self.masks, within(scores, costs, budget), strict=True):
            mask.kept.copy_(kept)

    def enlarge(self, D: float, memory: Memory) -> None:
        """Larger ranks for the upper half of the adapters, within D times the numbers that there were at the start."""
        D_old, r_0 = self.state.get("grown", 1.0), self.config.rank
        rows = {site.path: int(mask.kept.sum()) * n for b, mask in self.masks for site, n in b.into}
        size = {path: a.A.shape[1] + rows[path] for path, a in self.adapters.items()}
        room = D * r_0 * sum(a.A.shape[1] + len(a.B) for a in self.adapters.values())
        room -= sum(int(a.live.sum()) * size[path] for path, a in self.adapters.items())
        order = sorted(self.adapters, key=lambda path: -float(memory[path]))
        for path in order[: math.ceil(len(order) / 2)]:
            live = self.adapters[path].live
            r = int(live.sum())
            new = min(int(r * D / D_old), len(live), r + max(int(room / size[path]), 0))
            live[r:new] = True
            room -= (new - r) * size[path]
        self.state["grown"] = D

    @hookimpl
    def compress(self, model: ModelView, stack: Stack) -> None:
        id = model.owner
        pruning.check_masked(stack, id)
        if steps := max(int((mask.level * ~mask.kept).max()) for _, mask in self.masks):
            said = "masks of blocks that are to go have not fallen to 0 yet"
            raise StackError(f"{id}: {said}", hint=f"train {steps} steps more")
        every = ((b, mask, {**self.adapters, b.out.path: mask}) for b, mask in self.masks)
        new = [pair for b, mask, deltas in every for pair in b.cut(mask.kept, deltas)]
        self.state["kept"] = {b.out.path: [int(mask.kept.sum()), b.count] for b, mask in self.masks}
        self.state["density"] = self.density()
        self.state["heads"] = pruning.put_in_place(stack, id, new)

    def density(self) -> float:
        """The blocks that stay, as a share of all by their numbers."""
        return pruning.share_left((b, mask.kept) for b, mask in self.masks)  # before `inject` all of them

    def planned(self, model: ModelView) -> Iterable[tuple[Site, int]]:
        return pruning.bytes_left((s for b in heads_and_neurons(model) for s in b.sites), self.config.density)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Which share of the numbers in heads and neurons is left, and numbers in the model."""
        evaluation.add("density", self.state["density"] if "density" in self.state else self.density())
        evaluation.add("parameters", evaluation.stack.base_parameters())
