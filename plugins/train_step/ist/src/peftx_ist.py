"""IST: train the adapters of a few important layers at each step, and learn which layers those are.

"Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of Large Language
Models" (arXiv:2410.11772). L layers carry adapters; s: [L] starts at 0, and a high s says that a layer can be spared
(the sign of the released code; the paper's importance is -s). p = sigmoid(s). Every `interval` steps:

    S_1..S_n                            distinct sets of L/2 layers, drawn without replacement by p
    l_k                                 the loss with the response of the adapters in S_k times 0.25
    r_k  = exp(-l_k) - mean_j exp(-l_j)
    s_i += rate * r_k * p_i (1 - p_i)   for each i in S_k: suppressing them hurt less, so they matter less

At every step L/4 layers are drawn by sigmoid(-s), and only their adapters train: the others get no gradient, keep
what the optimizer knows of them, and need no activations below the lowest layer that trains. The response of a delta D
is what it adds to y, D(x, y) - y; suppressed it gives y + 0.25 (D(x, y) - y), which for LoRA is 0.25 of its scale.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Plugin, PluginConfig, TrainStep, hookimpl
from peftx.errors import ConflictError, TrainingError
from peftx.kernel.modes import eval_mode
from peftx.kernel.parts import DeltaPart, Part
from peftx.kernel.slots.carrier import ReadCarrier, WeightCarrier
from peftx.kernel.stack import Stack

DRAWS = 100
"""Attempts at distinct sets: two layers have but two sets of one, and skewed scores repeat themselves."""


class IstConfig(PluginConfig):
    """Options of IST."""

    updated: float = Field(0.25, gt=0, le=1, description="share of the layers that train in a step")
    suppressed: float = Field(0.5, gt=0, lt=1, description="share of the layers in each set that is tried")
    factor: float = Field(0.25, ge=0, lt=1, description="what is left of a suppressed adapter's response")
    interval: int = Field(10, ge=1, description="steps from one measurement of importance to the next")
    candidates: int = Field(3, ge=2, description="n, sets that are tried in a measurement")
    rate: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="learning rate of s; 0: no measurements, layers at random (RST)",
    )


class Ist(Plugin):
    """See the module."""

    Config = IstConfig
    claims = {Claim.NEEDS_ADAPTERS, Claim.READS_LOSS}
    example = {"interval": 1}  # else a few steps hold no measurement
    exempt = {"every_parameter_gets_a_gradient": "one of the two layers trains; that is the method"}
    config: IstConfig

    def one_process(self) -> str:
        return "each would choose layers by losses of its own rows"

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        layers = adapters(step.stack)
        known = self.state.get("scores", [])
        scores = known if len(known) == len(layers) else [0.0] * len(layers)
        due = step.first_micro and step.index > 0 and step.index % self.config.interval == 0
        if due and self.config.rate > 0 and len(layers) > 1:
            scores = self.state["scores"] = self.measure(step, layers, scores)
        importance = [-s for s in scores]
        chosen = draw(importance, count(self.config.updated, len(layers)), random_of(step, "update"))
        active = {id(p) for i in chosen for p in parameters(layers[i])}
        rest = [p for layer in layers for p in parameters(layer) if id(p) not in active]
        for p in rest:
            p.grad = None  # a loop may have left zeros, with which an optimizer would move
        with frozen(rest):
            return (yield)

    def check(self, stack: Stack) -> None:
        if stack.ledger.parts:  # else nothing trains, which whoever trains it says
            adapters(stack)

    def measure(self, step: TrainStep, layers: list[list[Part]], scores: list[float]) -> list[float]:
        """s after trying the sets S_k on the step's own batch."""
        generator = random_of(step, "measure")
        # Of all layers there is but one set, and one loss says nothing about any of them.
        size = min(count(self.config.suppressed, len(layers)), len(layers) - 1)
        sets: list[list[int]] = []
        for found in (draw(scores, size, generator) for _ in range(DRAWS)):
            if found not in sets:
                sets.append(found)
            if len(sets) == self.config.candidates:
                break
        losses = []
        # Frozen, and not under no_grad: there a low-rank delta may be added without being called.
        with eval_mode(step.module), frozen(step.parameters()):
            for chosen in sets:
                with suppressed([part for i in chosen for part in layers[i]], self.config.factor):
                    losses.append(float(step.total_loss().detach()))
        if not all(map(math.isfinite, losses)):
            raise TrainingError(
                f"ist: the losses with suppressed layers are {losses} in step {step.index}",
                hint="a smaller learning rate",
            )
        return updated(scores, sets, losses, self.config.rate)


def adapters(stack: Stack) -> list[list[Part]]:
    """What the plugins of the stack attached and train, by layer (of an encoder, then of a decoder); layers without are
    left out. What is frozen stays in effect, and is not chosen.

    Raises:
        ConflictError: nothing in a layer trains, or something whose response cannot be scaled.
    """
    trained = [part for part in stack.ledger.parts if any(p.requires_grad for p in parameters([part]))]
    paths = [f"{site.path}." for site in stack.anatomy.sites if site.role == "block.layer"]
    layers = [[part for part in trained if part.key.replace("@", ".").startswith(path)] for path in paths]
    if odd := [part for part in chain(*layers) if not scalable(part)]:
        owner, keys = odd[0].owner, {part.key for part in odd if part.owner == odd[0].owner}
        roles = " ".join(dict.fromkeys(f"!{site.role}" for site in stack.anatomy.sites if site.key in keys))
        said = f"ist scales what adapters add to an output, and {owner} does something else at {odd[0].key}"
        way = f"leave it out of {owner}'s targets: '{roles}'; or an adapter such as lora in its place"
        raise ConflictError(said, hint=way)
    if not any(layers):
        others = ", ".join(dict.fromkeys(part.owner for part in stack.ledger.parts)) or "the stack"
        said = f"ist chooses among layers with adapters that train, and {others} has none"
        raise ConflictError(said, hint="add one, such as lora, or stack.unfreeze() it")
    return [layer for layer in layers if layer]


def scalable(part: Part) -> bool:
    """Is this what an adapter adds to an output: nothing in a layer's weight, before it, or of what a layer reads."""
    elsewhere = not isinstance(part, DeltaPart) or isinstance(part.place, ReadCarrier | WeightCarrier)
    return not elsewhere and not part.module.has_pre()


def parameters(layer: Iterable[Part]) -> list[nn.Parameter]:
    return [p for part in layer for p in part.tensors().values() if isinstance(p, nn.Parameter)]


def count(share: float, layers: int) -> int:
    """round(share * L), at least one."""
    return max(1, round(share * layers))


def draw(scores: list[float], number: int, generator: torch.Generator) -> list[int]:
    """`number` layers without replacement, with probability proportional to sigmoid(scores); sorted."""
    weights = torch.tensor(scores, dtype=torch.float64).sigmoid()
    return sorted(torch.multinomial(weights, number, generator=generator).tolist())


def updated(scores: list[float], sets: list[list[int]], losses: list[float], rate: float) -> list[float]:
    """s_i + rate * r_k * p_i (1 - p_i) for i in S_k, over all k; p is that of the old s."""
    # Counted from the first, so that equal losses leave s as it is, to the bit.
    gains = [math.exp(-loss) - math.exp(-losses[0]) for loss in losses]
    mean = sum(gains) / len(gains)
    slopes = [p * (1 - p) for p in torch.tensor(scores, dtype=torch.float64).sigmoid().tolist()]
    new = list(scores)
    for chosen, gain in zip(sets, gains, strict=True):
        for i in chosen:
            new[i] += rate * (gain - mean) * slopes[i]
    return new


def random_of(step: TrainStep, purpose: str) -> torch.Generator:
    """A stream of its own for each step, so that all micro-batches, and a resumed run, draw the same."""
    return torch.Generator().manual_seed(zlib.crc32(f"ist:{step.stack.seed}:{step.index}:{purpose}".encode()))


@contextmanager
def suppressed(parts: list[Part], factor: float) -> Iterator[None]:
    """y + factor * (D(x, y) - y) for these deltas; each is as it was afterwards."""

    def scale(delta: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        return torch.lerp(inputs[1], output, factor)

    with ExitStack() as exits:
        for part in parts:
            exits.callback(part.module.register_forward_hook(scale).remove)
        yield


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No gradient for these; what trained before trains again afterwards."""
    with ExitStack() as exits:
        for p in parameters:
            exits.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        yield
