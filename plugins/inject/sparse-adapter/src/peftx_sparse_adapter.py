"""SparseAdapter: prune the adapters of a stack before they train, and train what is left.

"SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters" (arXiv:2210.04284). Of the N
entries w of all matrices that the plugins before this one attached, floor((1 - s) N) are kept: those with the largest
scores z,

    random      z ~ U(0, 1)
    magnitude   z = |w|
    er          random, with d_l ~ (in_l + out_l) / (in_l out_l) of matrix l kept, at most all (Erdos-Renyi)
    snip        z = |w g|                        g = dL/dw, of the first micro-batch's rows
    grasp       z = w (H g)                      H = d2L/dw2, of the same rows
    synflow     z = |w| dR/d|w|                  R = sum over adapters of the sum of A(1); no rows are read

    m = 1[z among the largest],  w <- w m,  dL/dw <- m dL/dw

in all matrices together, or in each. Biases and gains are not pruned, and the base stays frozen. Matrices that start at
zero (LoRA's B) would give themselves and their partners scores of zero; they start from N(0, init**2) where the score
looks at weights. Vectors that start at zero (Aligner's gates) hide matrices too; the gradients of these are taken with
such numbers in the vectors, which are zero again before anything trains. A matrix that has none even so is not in the
loss of the first step: it is left whole, and not among the N. Large-Sparse is an adapter of k times the rank at
s = 1 - 1 / k: as many numbers, of more directions.

SynFlow (arXiv:2006.05467) looks at each adapter A alone, as the released code does: all its numbers are |.|, what goes
into and comes out of the layer is ones, and R sums what A gives for one position. z is then the sum over the paths
through w of the products of the weights on them. A LayerNorm inside an adapter would take ones to zero; it lets them
pass. What is no function of a layer's input and output, as soft tokens, has no such paths and is refused.
"""

from __future__ import annotations

import logging
import math
import warnings
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftx import Claim, Delta, ModelView, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.errors import ConflictError, OptionError, StackError, TrainingError
from peftx.kernel.heads import Head
from peftx.kernel.modes import eval_mode
from peftx.kernel.parts import (
    BasePart,
    ContextPart,
    DeltaPart,
    EditPart,
    FreePart,
    Part,
    ReplacedPart,
    VocabularyPart,
)
from peftx.kernel.slots.carrier import ReadCarrier, WeightCarrier
from peftx.kernel.stack import Stack

LOG = logging.getLogger("peftx")
BY_GRADIENTS = ("snip", "grasp")


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
    """m of the N entries of all matrices, bool; all False as long as nothing is chosen."""

    m: Tensor

    def __init__(self, N: int) -> None:
        super().__init__()
        self.register_buffer("m", torch.zeros(N, dtype=torch.bool))


class SparseAdapter(Plugin):
    """See the module.

    Attributes:
        state: `entries`, N; `chosen`, once there is a mask.
    """

    Config = SparseAdapterConfig
    claims = {
        Claim.IDENTITY_AT_START,
        Claim.BESIDE_WEIGHTS,
        Claim.NEEDS_GRADIENTS,
        Claim.READS_LOSS,
        Claim.WORKS_ON_PREVIOUS,
    }
    config: SparseAdapterConfig

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        self.sizes = [w.numel() for w in matrices(stack, model.owner)]
        # Adapters that were folded into the weights are no longer there when a bundle is loaded, and the mask is.
        if not model.restoring:
            self.state = {"entries": sum(self.sizes)}
        if N := self.state["entries"]:
            self.mask = model.keep("mask", Mask(N))

    def check(self, stack: Stack) -> None:
        owner = stack.id_of(self)
        if stack.ledger.parts and not self.state["entries"]:
            others = ", ".join(stack.plugins)
            raise ConflictError(
                f"{owner} prunes matrices of adapters that stand before it, and in the order {others} there are none",
                hint=f"put an adapter such as lora before '{owner}'",
            )
        if self.config.score == "synflow":
            of_matrices = [o for o in before(stack, owner) if any(w.ndim > 1 for w in tensors(stack, o))]
            edits = (
                p for o in of_matrices for p in stack.ledger.of(o) if isinstance(p, DeltaPart | EditPart)
            )
            if still := next((p for p in edits if not flows(p)), None):
                raise ConflictError(
                    f"{owner}: synflow follows what adapters make of a layer's input and output, and {still.key} "
                    f"({still.what}) of '{still.owner}' is not called on these alone",
                    hint="score: magnitude, er or random",
                )
        if self.config.score not in BY_GRADIENTS:
            return
        for other in before(stack, owner):
            why = stack.plugins[other].exempt.get("every_parameter_gets_a_gradient")
            if why and any(w.ndim > 1 for w in tensors(stack, other)):
                raise ConflictError(
                    f"{owner} scores all matrices of '{other}' by gradients of the first step, and some have none "
                    f"then: {why}",
                    hint="score: magnitude, er or random",
                )

    def left_when_pruned(self, stack: Stack) -> list[tuple[list[nn.Parameter], int]]:
        """Of one that the first step's loss does not reach all are left, and it is not among the N."""
        ws = matrices(stack, stack.id_of(self))
        groups = [ws] if self.config.scope == "global" else [[w] for w in ws]
        return [(some, kept(sum(w.numel() for w in some), self.config.sparsity)) for some in groups]

    def one_process(self) -> str:
        by_rows = self.config.score in ("snip", "grasp") and not self.state.get("chosen")
        return "each would score by its own rows; or score: magnitude" if by_rows else ""

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor, Tensor]:
        owner = step.stack.id_of(self)
        ws = matrices(step.stack, owner)
        if [w.numel() for w in ws] != self.sizes:
            raise StackError(f"{owner}: other adapters stand before it than did at first", hint="a new stack")
        if not self.state.get("chosen"):
            self.choose(owner, ws, self.scores(step, owner, ws))
        step.on_gradients(lambda _: self.hold(w.grad for w in ws))
        return (yield)

    def scores(self, step: TrainStep, owner: str, ws: list[nn.Parameter]) -> list[Tensor | None]:
        """z of each matrix; None of one that the step's loss does not reach."""
        if self.config.score == "random":
            return [torch.rand(w.shape, generator=random_of(step, i)) for i, w in enumerate(ws)]
        if (
            self.config.score == "er"
        ):  # -n / (in + out) of the n-th: of each matrix as many as fit its share come first
            sides = [sum(w.shape[-2:]) * math.prod(w.shape[:-2]) for w in ws]
            orders = [torch.randperm(w.numel(), generator=random_of(step, i)) for i, w in enumerate(ws)]
            return [-(order + 0.5) / side for order, side in zip(orders, sides, strict=True)]
        start(step, ws, self.config.init)
        if self.config.score == "magnitude":
            return [w.detach().abs() for w in ws]
        twice = self.config.score == "grasp"
        if not all(w.requires_grad for w in ws):
            raise TrainingError(
                f"{owner}: scores by gradients, and some adapters before it are frozen",
                hint=f"stack.unfreeze(); what freezes layers in its step, as ist, goes behind {owner}",
            )
        derive = flow if self.config.score == "synflow" else partial(derivatives, twice=twice)
        by = derive(step, owner, ws)
        z: list[Tensor | None] = [(w * each).detach() for w, each in zip(ws, by, strict=True)]
        blind = [i for i, each in enumerate(by) if not each.any()]
        if blind and self.config.init:
            gates = [
                p for other in before(step.stack, owner) for p in tensors(step.stack, other) if p.ndim < 2
            ]
            with started(step, [*ws, *gates], self.config.init):
                again = derive(step, owner, ws)
            for i in blind:
                z[i] = (ws[i] * again[i]).detach() if again[i].any() else None
        return z if twice else [None if each is None else each.abs() for each in z]

    def choose(self, owner: str, ws: list[nn.Parameter], z: list[Tensor | None]) -> None:
        """m, and w <- w m. All of a matrix without scores is kept."""
        device, s = self.mask.m.device, self.config.sparsity
        flat = {i: each.flatten().to(device, torch.float32) for i, each in enumerate(z) if each is not None}
        tied = next((i for i, each in flat.items() if not each.isfinite().all() or not each.any()), None)
        if not flat:
            said = f"{owner}: the first step's loss reaches none of the matrices that '{self.config.score}' is to score"
            raise TrainingError(said, hint="score: magnitude, er or random")
        if tied is not None and s:
            raise TrainingError(
                f"{owner}: matrix {tied} of the adapters, {tuple(ws[tied].shape)}, has {self.config.score} scores that "
                "are all 0, or no numbers: nothing tells its entries apart",
                hint="init above 0, rows that reach it, or score: random",
            )
        groups = [torch.cat([*flat.values()])] if self.config.scope == "global" else [*flat.values()]
        scored = torch.cat([largest(each, kept(len(each), s)) for each in groups])
        chosen = dict(zip(flat, scored.split([len(each) for each in flat.values()]), strict=True))
        gone = sum(not each.any() for each in chosen.values())
        if gone == len(flat):
            raise OptionError(f"{owner}: sparsity {s} leaves nothing", hint="a lower one")
        if 2 * gone >= len(flat):  # as all of LoRA's B
            told = f"{owner}: nothing is left of {gone} of {len(flat)} matrices; scope: local?"
            warnings.warn(told, stacklevel=2)
        if whole := [i for i in range(len(ws)) if i not in flat]:
            LOG.warning(
                "%s: left whole are %d of %d matrices, first %s: the first step's loss does not reach them",
                owner, len(whole), len(ws), tuple(ws[whole[0]].shape),
            )  # fmt: skip
        m = torch.cat(
            [chosen.get(i, w.new_ones(w.numel(), dtype=torch.bool)).to(device) for i, w in enumerate(ws)]
        )
        self.mask.m.copy_(m)
        self.state["chosen"] = True
        self.hold(ws)

    @torch.no_grad()
    def hold(self, tensors: Iterable[Tensor | None]) -> None:
        """Zero what is not left, in the matrices or in their gradients."""
        for x, m in zip(tensors, self.mask.m.split(self.sizes), strict=True):
            if x is not None:
                x.masked_fill_(~m.view(x.shape), 0)


def before(stack: Stack, owner: str) -> list[str]:
    """Ids of the plugins that stand before `owner`."""
    order = list(stack.plugins)
    return order[: order.index(owner)]


def tensors(stack: Stack, id: str) -> Iterator[nn.Parameter]:
    """Floating-point parameters of the adapters that a plugin attached."""
    for part in stack.ledger.of(id):
        base = isinstance(part, BasePart | ReplacedPart | VocabularyPart) or isinstance(part.module, Head)
        for _, module, leaf in () if base else part.places():
            w = module._parameters.get(leaf)
            if w is not None and w.is_floating_point():
                yield w


def matrices(stack: Stack, owner: str) -> list[nn.Parameter]:
    """Matrices that the plugins before `owner` attached, each once."""
    found = (w for other in before(stack, owner) for w in tensors(stack, other) if w.ndim > 1)
    return list({id(w): w for w in found}.values())


def start(step: TrainStep, ws: Iterable[nn.Parameter], init: float) -> list[nn.Parameter]:
    """N(0, init**2) for those that are zero; which these were."""
    zeros = {i: w for i, w in enumerate(ws) if not w.any()}
    for i, w in zeros.items():
        w.data.copy_(torch.randn(w.shape, generator=random_of(step, i)) * init)
    return list(zeros.values())


@contextmanager
def started(step: TrainStep, ws: Iterable[nn.Parameter], init: float) -> Iterator[None]:
    """The same for a while."""
    zeros = start(step, ws, init)
    try:
        yield
    finally:
        for w in zeros:
            w.data.zero_()


def kept(N: int, s: float) -> int:
    """floor((1 - s) N), of s as it is written: 0.8 of 10 leaves 2."""
    return math.floor((1 - Fraction(str(s))) * N)


def largest(z: Tensor, k: int) -> Tensor:
    """bool [N], True for the k largest."""
    return torch.zeros_like(z, dtype=torch.bool).index_fill(0, z.topk(k).indices, True)


def random_of(step: TrainStep, i: int) -> torch.Generator:
    """Of the stack's seed alone, so that all processes draw the same."""
    return torch.Generator().manual_seed(zlib.crc32(f"sparse-adapter:{step.stack.seed}:{i}".encode()))


def derivatives(step: TrainStep, owner: str, ws: list[nn.Parameter], *, twice: bool) -> tuple[Tensor, ...]:
    """g = dL/dw of the step's loss, without dropout; `twice`: H g, the derivatives of g^T g / 2."""
    with eval_mode(step.module), sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(step.total_loss(), ws, create_graph=twice, materialize_grads=True)
        if twice:
            half = torch.stack([each.square().sum() for each in g]).sum() / 2
            g = torch.autograd.grad(half, ws, materialize_grads=True)
    return g


def flows(part: Part) -> bool:
    """Is it a function of what goes into and comes out of a layer, called whenever that layer is; or no edit of it."""
    if isinstance(part, ContextPart):
        return True
    if not isinstance(part, DeltaPart) or isinstance(part.place, nn.Embedding | WeightCarrier | ReadCarrier):
        return False
    kind = type(part.module)
    assert issubclass(kind, Delta)
    return kind.has_forward() and not (kind.has_pre() or kind.has_around() or kind.has_base())


def flow(step: TrainStep, owner: str, ws: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """dR/d|w|. Adapters are called where the step's loss calls them, on ones; the model goes on as without them."""
    given: list[Tensor] = []  # outputs of the layers whose adapters are being called
    sums: dict[nn.Module, Tensor] = {}

    def ones(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        given.append(args[1])
        return tuple(map(torch.ones_like, args))

    def add(delta: nn.Module, _: object, out: Tensor) -> Tensor:
        sums[delta] = out.float().flatten(0, -2).mean(0).sum()
        return given.pop()

    def passes(norm: nn.LayerNorm, args: tuple[Tensor], _: Tensor) -> Tensor:
        x = args[0] if norm.weight is None else args[0] * norm.weight
        return x if norm.bias is None else x + norm.bias

    parts = [part for other in before(step.stack, owner) for part in step.stack.ledger.of(other)]
    with eval_mode(step.module), ExitStack() as exits:
        for part in (part for part in parts if isinstance(part, DeltaPart | FreePart)):
            for x in filter(Tensor.is_floating_point, part.tensors().values()):
                exits.callback(setattr, x, "data", x.data)
                x.data = x.data.abs()
            for norm in part.module.modules():
                if isinstance(norm, nn.LayerNorm):
                    exits.callback(norm.register_forward_hook(passes).remove)
        for part in (part for part in parts if isinstance(part, DeltaPart)):
            exits.callback(part.module.register_forward_pre_hook(ones).remove)
            exits.callback(part.module.register_forward_hook(add).remove)
        step.total_loss()
        if not sums:  # all are switched off
            return tuple(map(torch.zeros_like, ws))
        return torch.autograd.grad(torch.stack([*sums.values()]).sum(), ws, materialize_grads=True)
