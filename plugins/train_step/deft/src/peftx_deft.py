"""DEFT: adapters whose loss also counts the MLP activations that are not zero.

"From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers" (arXiv:2402.01911).
Let o [B, T, d_ff] be what the second matrix of an MLP reads, in the blocks l = 1..L:

    D    = mean of o**2 / (o**2 + eps)       over rows, their tokens, features and blocks; about the share of o != 0
    loss = task + alpha D                    encoder and decoder: alpha (D_encoder + D_decoder)

The count of non-zeros has no gradient; D has 2 o eps / (o**2 + eps)**2, which is 0 at o = 0 and far from it. The plugin
has no parameters: the adapters beside it in the stack learn to keep units at zero. `evaluate` counts: the share of
entries with |o| > threshold, in a merged or quantized model too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from peftx import (
    Claim,
    Delta,
    Evaluation,
    ModelView,
    Plugin,
    PluginConfig,
    Site,
    Targets,
    TrainStep,
    hookimpl,
)
from peftx.errors import BatchError, TrainingError
from peftx.kernel import calls
from peftx.kernel.call import Call
from peftx.kernel.parts import DeltaPart
from peftx.kernel.reading import check_output
from peftx.toolkits.injecting import Side, side_of

Measure = Callable[[Tensor], Tensor]
"""Activations [B, T, d_ff] -> one number a token, [B, T]."""


class DeftConfig(PluginConfig):
    """Options of DEFT."""

    alpha: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="alpha, weight of the density in the loss"
    )
    eps: float = Field(
        1e-7,
        gt=0,
        allow_inf_nan=False,
        description="eps; the smaller, the nearer the density is to the count",
    )
    threshold: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="`evaluate` counts |o| above it; 0 counts what is not exactly zero",
    )
    targets: Targets = Field(Targets("mlp.down"), description="linear layers whose input is o")


def density(o: Tensor, eps: float) -> Tensor:
    """Mean over features of o**2 / (o**2 + eps): [..., d_ff] -> [...], float32."""
    squares = o.float().square()
    # Not a quotient, whose slope is 1 / 0 where a plugin stored nothing of a feature (LeMo); of a product it is 0.
    return (squares * (squares + eps).reciprocal()).mean(-1)


def count(o: Tensor, threshold: float) -> Tensor:
    """Share of features with |o| > threshold: [..., d_ff] -> [...], float32."""
    return (o.abs() > threshold).float().mean(-1)


class Observer(Delta):
    """Measures its layer's input while somebody watches, and changes nothing.

    Args:
        site: where it stands. call, side: what the model is called on, and which of its tokens the site sees. measure:
            what is watched, if anything is.
    """

    def __init__(self, site: Site, call: Call, side: Side, measure: Measure | None = None) -> None:
        super().__init__()
        self.tower, self.layer, self.measure = site.tower, site.layer, measure
        self.call, self.side, self.step = call, side, None
        self.seen: list[tuple[bool, Tensor, Tensor]] = []
        """Of each call: was a gradient recorded; one number a token, [B, T] or [B * T]; which tokens count."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.measure is not None:
            tokens = self.measure(x)  # of every call: a checkpointed block does the same when it runs again
            if self.step is None or self.step.in_task:
                self.seen.append((torch.is_grad_enabled(), tokens, self.weights(tokens)))
        return y

    def weights(self, tokens: Tensor) -> Tensor:
        """1 for tokens of what the tower reads, soft ones too, and 0 for pads, [B, T]. A mask of other tokens as it is:
        `row_means` refuses it, and what a recomputed layer is told of another call is dropped before."""
        real = {"source": self.call.real, "target": self.call.decoder_real, None: None}[self.side]
        if real is None:
            return torch.ones_like(torch.atleast_2d(tokens).flatten(1))
        mask = self.call.arguments.get("attention_mask")
        mask = real if mask is None or self.side == "target" else mask
        soft, rest = divmod(tokens.numel() - real.numel(), len(real))
        if mask.ndim != 2 or soft < 0 or rest:
            return mask
        return self.call.rows(real.to(tokens.dtype), tokens.reshape(len(real), -1), fill=1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.clone(), None if bias is None else bias.clone()

    def take(self) -> Tensor:
        """The means of rows seen since the last call under the present gradient mode (a reference pass without
        gradients is none of the loss's business), [rows].

        Raises:
            PeftxError: nothing was.
        """
        found = [row_means(*seen) for grad, *seen in self.seen if grad == torch.is_grad_enabled()]
        self.seen.clear()
        if not found:
            how = "it did not run, or its observer is merged or off, or reentrant checkpointing hides it"
            said = f"deft: the MLP of layer {self.layer} was not observed: {how}"
            raise TrainingError(said, hint="stack.unmerge(), or use_reentrant=False")
        return torch.cat(found)


@contextmanager
def watching(observers: Sequence[Observer], measure: Measure, step: TrainStep | None) -> Iterator[None]:
    """Observe: all calls, or those of a step's task. On until after the backward pass, since checkpointing runs the
    blocks a second time there."""
    try:
        for observer in observers:
            observer.measure, observer.step = measure, step
        yield
    finally:
        for observer in observers:
            observer.measure = observer.step = None
            observer.seen.clear()


@contextmanager
def listening(view: ModelView, sites: Sequence[Site], measure: Measure) -> Iterator[list[Observer]]:
    """Observers outside the layers: those in the slots may be folded away, merged or switched off."""
    with calls.listening(view.module) as call, ExitStack() as hooks:
        observers = [Observer(site, call, side_of(view, site), measure) for site in sites]
        for site, observer in zip(sites, observers, strict=True):
            hook = site.module.register_forward_hook(lambda _, x, y, observer=observer: observer(x[0], y))
            hooks.enter_context(hook)
        yield observers


def row_means(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean over each row's own tokens: [B, T] (or [B * T], as OPT computes its MLP) -> [B]."""
    if weights.ndim != 2 or weights.numel() != tokens.numel():
        said = f"deft: activations of shape {tuple(tokens.shape)} do not go with a mask of {tuple(weights.shape)}"
        raise BatchError(said, hint="a batch needs a 2-D attention_mask of the rows that the model reads")
    return (tokens.reshape(weights.shape) * weights).sum(1) / weights.sum(1).clamp(min=1)


def total(observers: Sequence[Observer]) -> Tensor:
    """The sum over towers of D, 0-d."""
    towers = dict.fromkeys(observer.tower for observer in observers)
    rows = [torch.cat([each.take() for each in observers if each.tower == tower]) for tower in towers]
    return torch.stack([of_tower.mean() for of_tower in rows]).sum()


class Deft(Plugin):
    """See the module."""

    Config = DeftConfig
    claims = {Claim.IDENTITY_AT_START, Claim.MERGEABLE, Claim.NEEDS_MASK}
    architectures = ("opt", "gemma2")
    example = {"eps": 1e-3}  # at 1e-7 a slope of 1 / eps makes another gradient of a random model's rounding
    config: DeftConfig

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears(self.config.targets):
            check_output(site, owner=model.owner)
            site.attach(Observer(site, model.call, side_of(model, site)))

    @hookimpl(wrapper=True)
    def train_step(self, step: TrainStep) -> Generator[None, Tensor | None, Tensor | None]:
        observers: list[Any] = [p.module for p in step.stack.ledger.of(step.stack.id_of(self), DeltaPart)]
        with watching(observers, partial(density, eps=self.config.eps), step):
            step.add_loss("density", lambda _: total(observers), weight=self.config.alpha, over="rows")
            return (yield)

    @hookimpl
    def evaluate(self, evaluation: Evaluation) -> None:
        """Add `density`, and `density/layer-<l>` for each block; with two towers `density/<tower>` and so on."""
        view = evaluation.stack.view(evaluation.stack.id_of(self))
        sites = view.linears(self.config.targets)
        found: dict[str, list[Tensor]] = {}  # score -> densities of rows
        with listening(view, sites, partial(count, threshold=self.config.threshold)) as observers:
            for batch in evaluation.batches(8):
                view.module(**batch)
                for observer in observers:
                    name = f"density/{observer.tower}" if view.config.is_encoder_decoder else "density"
                    found.setdefault(f"{name}/layer-{observer.layer}", []).append(observer.take().cpu())
        layers = {name: torch.cat(parts) for name, parts in found.items()}  # [N] each
        for name in dict.fromkeys(name.rpartition("/")[0] for name in layers):
            rows = torch.stack([v for k, v in layers.items() if k.rpartition("/")[0] == name]).mean(0)
            evaluation.add_ratio(name, rows.tolist(), unit="share")
        for name, rows in layers.items():
            evaluation.add(name, rows.mean().item(), count=len(rows), unit="share")
