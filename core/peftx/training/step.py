"""One micro-batch, as the `train_step` hook sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftx.errors import PeftxError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.stack import Stack

LossTerm = Callable[[Any], Tensor]
GradientTransform = Callable[[list[nn.Parameter]], None]


class TrainStep:
    """What a plugin may read and change while one micro-batch is trained on.

    Args:
        stack: the stack that trains. model: the model to call (it may be wrapped for DDP; `stack.model` is the inner
            one). batch: keyword arguments of the model, labels included.
        index: optimizer steps done so far. micro: which micro-batch of this optimizer step, from 0.
        accumulation: micro-batches in this optimizer step. total: optimizer steps planned, None if unknown.
        learning_rate: of the schedule, now. items: labelled tokens in all micro-batches of this step, if known.
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
        items: Tensor | int | None = None,
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
        self.items = items
        self.memory = memory if memory is not None else stack.memory
        self.losses: dict[str, float] = {}
        """Value of each term in the last `total_loss`, for the log."""
        self._backward = backward
        self._terms: dict[str, tuple[LossTerm, float]] = {}
        self._task: Callable[[], tuple[Tensor, Any]] = self._task_loss
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

    def add_loss(self, name: str, term: LossTerm, weight: float = 1.0) -> None:
        """Add `weight * term(outputs)` to the loss; `outputs` is what the model returned.

        A function and not a number, so that a step that evaluates the loss several times (MeZO) sees it too. A name
        that is taken gets a number, since a plugin may stand twice in a stack.
        """
        same = sum(known == name or known.startswith(f"{name} #") for known in self._terms)
        self._terms[f"{name} #{same + 1}" if same else name] = (term, weight)

    def replace_task_loss(self, function: Callable[[], tuple[Tensor, Any]]) -> None:
        """Compute the task's loss otherwise: a function that returns (loss, outputs); preference losses do this."""
        self._task = function

    def _task_loss(self) -> tuple[Tensor, Any]:
        extra = {"num_items_in_batch": self.items} if self.items is not None else {}
        outputs = self.forward(**extra)
        if outputs.loss is None:
            raise PeftxError("the model returned no loss", hint="the batch needs 'labels'")
        # Normalised by the tokens of all micro-batches already; undone here, since `backward` divides again.
        scale = self.accumulation if self.items is not None else 1
        return outputs.loss * scale, outputs

    def total_loss(self) -> Tensor:
        """The task's loss plus all terms (0-d), mean over the micro-batch's labelled tokens."""
        loss, outputs = self._task()
        self.losses = {"task": float(loss.detach())}
        for name, (term, weight) in self._terms.items():
            value = term(outputs)
            self.losses[name] = float(value.detach())
            loss = loss + weight * value
        return loss

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
