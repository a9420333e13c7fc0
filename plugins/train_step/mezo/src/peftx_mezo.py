"""MeZO: fine-tuning with forward passes alone, in the memory of inference.

"Fine-Tuning Language Models with Just Forward Passes" (arXiv:2305.17333), algorithm 1. With z ~ N(0, 1) drawn from a
seed s, for every number that trains, and the loss L of a batch:

    g     = (L(theta + eps z) - L(theta - eps z)) / (2 eps)     two forward passes; g is one number
    theta = theta - eta (g z + lambda theta)                    z drawn from s again, tensor by tensor

z is never stored: theta moves by +eps z, -2 eps z and +eps z in place, each time drawn from s. Under 32 bits that does
not cancel, so what trains in bfloat16 or float16 is copied before and put back after. `samples` = n takes the mean of
g z over n seeds (n-SPSA). A step is known by its (s, g), so a run can be made again from a list of them (`replay`).
L may be anything that a forward pass gives: `objective: accuracy` minimises the share of wrong tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftx import Claim, Plugin, PluginConfig, Stack, TrainStep, hookimpl
from peftx.engines.data import IGNORE
from peftx.errors import BatchError, StackError, TrainingError, UnsupportedError
from peftx.toolkits.evaluation import eval_mode

MEMORY = "mezo"
"""What `step.memory` holds between the micro-batches of a step: seeds and the g so far."""


class MezoConfig(PluginConfig):
    """Options of MeZO. The learning rate is the training's (paper: 1e-7 to 1e-6 for all weights, 5e-5 to 1e-4 for LoRA,
    1e-3 to 1e-2 for prefixes; constant)."""

    eps: float = Field(1e-3, gt=0, description="eps, how far the weights move for the two forward passes")
    samples: int = Field(1, ge=1, description="n, seeds to a step; 2n forward passes")
    weight_decay: float = Field(
        0.0, ge=0, description="lambda, on matrices; gains, biases and norms are left alone"
    )
    objective: Literal["loss", "accuracy"] = Field(
        "loss", description="minimise the loss, or the share of wrong tokens, which has no gradient"
    )
    record: bool = Field(
        False, description="keep seed, g and rate of every step in the plugin's state, for `replay`"
    )


class Mezo(Plugin):
    """See the module."""

    Config = MezoConfig
    config: MezoConfig

    @hookimpl
    def train_step(self, step: TrainStep) -> Tensor:
        parameters = step.parameters()
        if not parameters:
            raise TrainingError("mezo: nothing trains", hint="add a plugin with parameters, such as lora")
        if self.config.objective == "accuracy":
            check_labels_of_tokens(step)
            step.replace_task_loss(lambda: wrong_share(step))
        if self.config.record:
            self.note_start(step)
        if step.first_micro:  # all micro-batches of a step look along the same directions
            seeds = torch.randint(2**53, (self.config.samples,)).tolist()
            step.memory[MEMORY] = {"seeds": seeds, "g": [0.0] * len(seeds)}
        seeds, g = step.memory[MEMORY]["seeds"], step.memory[MEMORY]["g"]
        total = 0.0
        with torch.no_grad(), eval_mode(step.module):
            for i, seed in enumerate(seeds):
                slope, loss = projected_gradient(
                    parameters, seed, self.config.eps, lambda: float(step.total_loss())
                )
                if not math.isfinite(slope):
                    if nothing_labelled(step):
                        raise BatchError(
                            f"mezo: no token of the batch has a label in step {step.index}, so there is no loss",
                            hint="every row needs a completion that max_length leaves room for",
                        )
                    raise TrainingError(
                        f"mezo: the loss is {loss} in step {step.index}",
                        hint="a smaller learning rate or eps",
                    )
                g[i] += slope / step.accumulation
                total += loss / len(seeds)
            if step.last_micro:
                update = {
                    "seeds": seeds,
                    "g": g,
                    "rate": step.rate(self),
                    "micro_batches": step.accumulation,
                }
                move(parameters, update, self.config.weight_decay)
                del step.memory[MEMORY]
                if self.config.record:
                    self.state.setdefault("updates", []).append(update)
        return torch.tensor(total)

    def note_start(self, step: TrainStep) -> None:
        """What the recorded steps start from: it stays the first one's, and all must train the same."""
        if "start" not in self.state:
            self.state["start"] = {"shapes": shapes(step.stack), "sha256": digest(step.parameters())}
        elif self.state["start"]["shapes"] != shapes(step.stack):
            raise TrainingError(
                f"mezo: other parameters train in step {step.index} than when the record began",
                hint="freeze and unfreeze before the first step, or take a new Mezo(record=True)",
            )


def projected_gradient(
    parameters: list[nn.Parameter], seed: int, eps: float, loss: Callable[[], float]
) -> tuple[float, float]:
    """g along the seed's z, and the mean of the two losses; `parameters` end where they were: of 32 bits and more to
    rounding, narrower ones to the bit.

    Both losses are computed with torch's global generators at the same state.
    """
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    values = []
    with restored(parameters):
        try:
            for distance in (eps, -2 * eps):
                perturb(parameters, seed, distance)
                with torch.random.fork_rng(devices=list(devices)):
                    torch.manual_seed(seed)
                    values.append(loss())
        finally:
            perturb(parameters, seed, eps if values else -eps)  # also when `loss` fails
    plus, minus = values
    return (plus - minus) / (2 * eps), (plus + minus) / 2


@contextmanager
def restored(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters of less than 32 bits come back to the bit; holds a copy of those meanwhile.

    In bfloat16 a perturbation rounds by up to a 256th of a weight, so the weights would walk at random, at rate 0 too.
    """
    starts = [(p, p.clone()) for p in parameters if p.element_size() < 4]
    try:
        yield
    finally:
        for p, start in starts:
            p.copy_(start)


def perturb(parameters: list[nn.Parameter], seed: int, distance: float) -> None:
    """theta += distance * z, with z ~ N(0, 1) of this seed; holds z of one tensor at a time."""
    generators: dict[torch.device, torch.Generator] = {}
    for p in parameters:
        if p.device not in generators:
            generators[p.device] = torch.Generator(p.device).manual_seed(seed)
        z = torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=p.dtype)
        p.add_(z, alpha=distance)


def move(parameters: list[nn.Parameter], update: dict[str, Any], weight_decay: float) -> None:
    """theta -= eta (mean of g z + lambda theta)."""
    rate = update["rate"]
    for p in parameters:
        if weight_decay and p.ndim > 1:
            p.mul_(1 - rate * weight_decay)
    for seed, g in zip(update["seeds"], update["g"], strict=True):
        perturb(parameters, seed, -rate * g / len(update["seeds"]))


@torch.no_grad()
def replay(stack: Stack, mezo: Mezo) -> None:
    """Make the steps that `mezo` has recorded again, on a stack as it was before the first: same weights, to the bit,
    and no data. The perturbations are repeated too, since they round.

    Raises:
        PeftxError: nothing was recorded, or the stack trains other parameters, or starts from other values.
    """
    if "updates" not in mezo.state:
        raise StackError("mezo: no steps were recorded", hint="train with record: true")
    start, parameters = mezo.state["start"], [p for p in stack.model.parameters() if p.requires_grad]
    here = shapes(stack)
    if start["shapes"] != here:
        differ = sorted(n for n in start["shapes"].keys() | here if start["shapes"].get(n) != here.get(n))
        raise StackError(
            f"mezo: the steps were recorded on other parameters: {len(differ)} differ, first {differ[0]}",
            hint="replay on the same model, with the same plugins, options and ids",
        )
    if start["sha256"] != digest(parameters):
        raise StackError(
            "mezo: the parameters start from other values than those of the record",
            hint="a stack that has not been trained, with the same seed and dtype",
        )
    for update in mezo.state["updates"]:
        for seed in [*update["seeds"]] * update["micro_batches"]:
            with restored(parameters):
                for distance in (1, -2, 1):
                    perturb(parameters, seed, distance * mezo.config.eps)
        move(parameters, update, mezo.config.weight_decay)


def shapes(stack: Stack) -> dict[str, list[int]]:
    """Name -> shape of all that trains."""
    return {name: list(p.shape) for name, p in stack.model.named_parameters() if p.requires_grad}


def digest(parameters: list[nn.Parameter]) -> str:
    """SHA-256 of dtypes and values, parameter by parameter."""
    found = hashlib.sha256()
    for p in parameters:
        found.update(str(p.dtype).encode())
        found.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def nothing_labelled(step: TrainStep) -> bool:
    """Has the batch labels of tokens, and none that counts. A head's rows never have one."""
    head = any(member.claims(Claim.CLASSIFIES) for member in step.stack.members)
    return not head and "labels" in step.batch and bool((step.batch["labels"] == IGNORE).all())


def check_labels_of_tokens(step: TrainStep) -> None:
    """Raise where `objective: accuracy` has no labels to compare the likeliest tokens with."""
    for member in step.stack.members:
        if member.claims(Claim.CLASSIFIES) or member.claims(Claim.OWN_LAYOUT):
            raise UnsupportedError(
                f"mezo: objective 'accuracy' counts label tokens, and '{member.id}' has a loss of its own instead",
                hint="objective: loss",
            )
    if "labels" not in step.batch:
        raise BatchError(
            f"mezo: objective 'accuracy' needs labels; the batch has {', '.join(step.batch)}",
            hint="give labels, or take objective: loss",
        )


def wrong_share(step: TrainStep) -> tuple[Tensor, Any]:
    """Share of labelled tokens (of rows, under a classification head) whose label is not the likeliest, 0-d."""
    outputs = step.forward()
    logits, labels = outputs.logits, step.batch["labels"]
    if step.stack.anatomy.is_decoder and not step.stack.anatomy.is_encoder_decoder and labels.ndim > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]  # token i is predicted at i - 1
    known = labels != IGNORE
    return (logits.argmax(-1)[known] != labels[known]).float().mean(), outputs
