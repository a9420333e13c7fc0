"""One micro-batch, as the `train_step` hook sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftx.engines.training.shares import Over, Share
from peftx.errors import PeftxError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.kernel.stack import Stack

LossTerm = Callable[[Any], Tensor]
GradientTransform = Callable[[list[nn.Parameter]], None]


class TrainStep:
    """What a plugin may read and change while one micro-batch is trained on.

    Args:
        stack: the stack that trains. model: the model to call (it may be wrapped for DDP; `stack.model` is the inner
            one). batch: keyword arguments of the model, labels included.
        index: optimizer steps done so far. micro: which micro-batch of this optimizer step, from 0.
        accumulation: micro-batches in this optimizer step. total: optimizer steps planned, None if unknown.
        learning_rate: of the schedule, now. share: this micro-batch's part of the optimizer step, of `stack.shares`;
            equal parts if left out.
        memory: what plugins remember between steps; plain numbers, strings, lists and tensors, saved in checkpoints;
            the stack's own, of a loop of your own, if left out.
        backward: called with the scaled loss; `Tensor.backward` if left out.
    """

    def __init__(
        self,
        stack: Stack,
        batch: dict[str, Any],
        *,
        model: nn.Module | None = None,
        index: int = 0,
        micro: int = 0,
        accumulation: int = 1,
        total: int | None = None,
        learning_rate: float = 0.0,
        share: Share | None = None,
        memory: dict[str, Any] | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.stack = stack
        self.module = model if model is not None else stack.model
        self.batch = batch
        self.index = index
        self.micro = micro
        self.accumulation = accumulation
        self.total = total
        self.learning_rate = learning_rate
        self.share = share
        self.memory = memory if memory is not None else stack.memory
        self.losses: dict[str, float] = {}
        """Value of each term in the last `total_loss`, for the log."""
        self._backward = backward
        self._terms: dict[str, tuple[LossTerm, float, Over]] = {}
        self._task: Callable[[], tuple[Tensor, Any]] = self._task_loss
        self._task_over: Over = "labels"
        self._gradients: list[GradientTransform] = []

    @property
    def model(self) -> PreTrainedModel:
        """The `transformers` model itself."""
        return self.stack.model

    @property
    def first_micro(self) -> bool:
        return self.micro == 0

    @property
    def last_micro(self) -> bool:
        """Is this the micro-batch after which the optimizer steps."""
        return self.micro == self.accumulation - 1

    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains, in a fixed order, each once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    # -- losses --------------------------------------------------------------------------------------------------

    def forward(self, **changes: Any) -> Any:
        """Call the model on the batch, with some entries changed."""
        return self.module(**{**self.batch, **changes})

    def add_loss(self, name: str, term: LossTerm, weight: float = 1.0, *, over: Over = "labels") -> None:
        """Add `weight * term(outputs)` to the loss; `outputs` is what the model returned.

        Args:
            over: what the term is a mean over, so that accumulation weighs it rightly: labelled tokens, tokens of the
                `inputs` that are no pads, `rows`, or nothing of the batch (`step`), as a norm of weights.

        A function and not a number, so that a step that evaluates the loss several times (MeZO) sees it too. A name
        that is taken gets a number, since a plugin may stand twice in a stack.
        """
        same = sum(known == name or known.startswith(f"{name} #") for known in self._terms)
        self._terms[f"{name} #{same + 1}" if same else name] = (term, weight, over)

    def replace_task_loss(self, function: Callable[[], tuple[Tensor, Any]], *, over: Over = "labels") -> None:
        """Compute the task's loss otherwise: a function that returns (loss, outputs); preference losses do this.

        Args:
            over: what the loss is a mean over, as in `add_loss`.
        """
        self._task, self._task_over = function, over

    def _task_loss(self) -> tuple[Tensor, Any]:
        # The mean over this micro-batch, as every model gives it; not all of them know the tokens of a whole step.
        outputs = self.forward()
        if outputs.loss is None:
            raise PeftxError("the model returned no loss", hint="the batch needs 'labels'")
        return outputs.loss, outputs

    def total_loss(self) -> Tensor:
        """The task's loss plus all terms (0-d), so weighed that the mean over the micro-batches of an optimizer step is
        the loss of all of its rows at once."""
        loss, outputs = self._task()
        self.losses = {"task": float(loss.detach())}
        loss = self._weighed(loss, self._task_over)
        for name, (term, weight, over) in self._terms.items():
            value = term(outputs)
            self.losses[name] = float(value.detach())
            loss = loss + weight * self._weighed(value, over)
        return loss

    def _weighed(self, mean: Tensor, over: Over) -> Tensor:
        if self.share is None or over == "step":
            return mean
        weight = self.share[over] * self.accumulation
        if weight == 0 and not bool(mean.detach().isfinite()):  # a mean over nothing
            return sum((p.sum() * 0 for p in self.parameters()), start=torch.zeros((), device=mean.device))
        return mean if weight == 1 else mean * weight

    # -- gradients -----------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's share of the gradient."""
        loss = loss / self.accumulation
        if self._backward is not None:
            self._backward(loss)
        else:
            loss.backward()

    def on_gradients(self, transform: GradientTransform) -> None:
        """Run `transform(parameters)` on the accumulated gradients, once per optimizer step, before clipping.

        Register it in every micro-batch; it runs in the last one.
        """
        self._gradients.append(transform)

    def finish(self) -> None:
        """Run the gradient transforms if this is the last micro-batch; the core calls it after the hooks."""
        if self.last_micro:
            with torch.no_grad():
                for transform in self._gradients:
                    transform(self.parameters())


def run_train_step(step: TrainStep) -> Tensor:
    """Run the `train_step` hooks on one micro-batch; returns the loss (0-d, detached)."""
    loss: Tensor = step.stack.call_nested("train_step", step=step)
    step.finish()
    return loss.detach()


def default_step(step: TrainStep) -> Tensor:
    """What runs unless a plugin replaces it: one forward, one backward."""
    if not any(True for _ in _trainable(step)):
        raise PeftxError(
            "nothing trains: no plugin of the stack has trainable parameters", hint="add one, e.g. lora"
        )
    loss = step.total_loss()
    step.backward(loss)
    return loss.detach()


def _trainable(step: TrainStep) -> Iterator[nn.Parameter]:
    return (p for p in step.model.parameters() if p.requires_grad)
