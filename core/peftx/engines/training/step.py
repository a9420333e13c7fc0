"""One micro-batch, as the `train_step` hook sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from peftx.engines.training.base import base_alone
from peftx.engines.training.feeders import OWN, Feeder, feeder_of
from peftx.engines.training.processes import ALONE, Processes, check_processes, world
from peftx.engines.training.segments import has_plain_loss, in_segments
from peftx.engines.training.shares import Over, Share
from peftx.engines.training.updates import Action, around_next_update
from peftx.errors import BatchError, TrainingError, UnsupportedError
from peftx.kernel.modes import eval_mode
from peftx.kernel.parts import BasePart
from peftx.kernel.phases import Span, at, spans
from peftx.kernel.plugin import Plugin

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
        sources: batches of further sources of rows, for `batch_of` and `batches_of`.
        groups: the optimizer's groups of parameters, for `rate`.
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
        sources: Mapping[str, Feeder] | None = None,
        processes: Processes = ALONE,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.stack = stack
        self._groups = groups
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
        self._segment: int | None = None
        self._gradients: list[GradientTransform] = []
        self._before: list[Action] = []
        self._after: list[Action] = []
        self._sources = sources or {}
        self.in_task = False
        """Is the task's own loss being computed: the model is called on this micro-batch, not on a plugin's other rows.
        Layers that run again in the backward pass, for gradient checkpointing, are not in it."""
        self._processes = processes

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

    def rate(self, plugin: Plugin) -> float:
        """The learning rate of a plugin now: its own where the optimizer has one for it, else `learning_rate`."""
        own = {id(p) for p in self.stack.ledger.parameters(self.stack.id_of(plugin))}
        groups = (group for group in self._groups if any(id(p) in own for p in group["params"]))
        return next((float(group["lr"]) for group in groups), self.learning_rate)

    def phase(self, plugin: Plugin) -> Span:
        """Which of its `phases` a plugin is in; `begins(plugin)` says whether this is its first micro-batch.

        Where they lie is settled when the run begins, and remembered in checkpoints: a run that is resumed, or
        lengthened, goes on in the right one.
        """
        id = self.stack.id_of(plugin)
        known = self.memory.setdefault("phases", {})
        if id not in known or (self.index == 0 and self.first_micro):
            known[id] = [[s.name, s.first, s.end] for s in spans(plugin.phases(), self.total, owner=id)]
        return at([Span(*found) for found in known[id]], self.index)

    def begins(self, plugin: Plugin) -> bool:
        """Is this the first micro-batch of a phase of the plugin's."""
        return self.first_micro and self.phase(plugin).first == self.index

    def require(self, *columns: str, by: str) -> None:
        """Raises BatchError, which names the plugin `by`, unless the batch has these columns."""
        if missing := ", ".join(sorted({*columns} - self.batch.keys())):
            raise BatchError(
                f"{by}: the batch has no {missing}, but {', '.join(sorted(self.batch)) or 'nothing'}",
                hint="stack.train does it by itself; in a loop of your own take the rows that stack.prepare returns",
            )

    def batch_of(self, name: str) -> dict[str, Tensor]:
        """The batch of another source of rows for this micro-batch, on the model's device.

        Raises:
            DataError: the run has no source of the name.
        """
        number = self.index * self.accumulation + self.micro
        number = number * self._processes.count + self._processes.index
        return self._moved(feeder_of(self._sources, name).batch(number))

    def batches_of(self, name: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """Batches of so many rows of a source (all, if it has fewer), each once, to look at before one trains. They are
        the same ones whenever they are asked for.

        Args:
            name: of a source; `train`: the rows that the run trains on.

        Raises:
            DataError: the run has no source of the name.
        """
        return map(self._moved, feeder_of(self._sources, name).first(rows))

    def sample(self, rows: int, *, by: str) -> Iterator[dict[str, Tensor]]:
        """Batches of so many of the rows that the run trains on, as `batches_of` gives them; the step's own batch in a
        loop that names no source `train`.

        Raises:
            UnsupportedError: names the plugin `by`, where each of several processes would look at a batch of its own.
        """
        if OWN in self._sources:
            return self.batches_of(OWN, rows)
        if world() > 1:
            hint = "stack.train, or a source 'train' for stack.train_step"
            raise UnsupportedError(f"{by}: every process would look at a batch of its own", hint=hint)
        return iter([self.batch])

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.model.device) for key, value in batch.items()}

    # -- other models --------------------------------------------------------------------------------------------

    @contextmanager
    def reference(
        self, of: Literal["start", "base"] | PreTrainedModel = "start"
    ) -> Iterator[PreTrainedModel]:
        """A model to compare with, in evaluation mode and without gradients; everything is as it was afterwards.

        Args:
            of: `start`, this model with all that trains as it was at the run's first step (copied there, and kept in
                checkpoints); `base`, this model without its plugins, in `base_alone`; or a model of its own, of
                `peftx.companion`.

        Raises:
            PeftxError: the start is not remembered.
        """
        if not isinstance(of, str):
            with eval_mode(of), torch.no_grad():
                yield of
            return
        instead = swapped(self._start()) if of == "start" else base_alone(self.stack)
        with instead, eval_mode(self.model), torch.no_grad():
            yield self.model

    def _start(self) -> list[tuple[nn.Parameter, Tensor]]:
        if self.total is not None and self.index > 0 and "start" not in self.memory:
            raise TrainingError(
                f"step {self.index} does not remember how the run started",
                hint="ask for the reference from the first step on; give all steps of a loop of your own one `memory`",
            )
        start = self.memory.setdefault("start", {})
        for name, p in self.model.named_parameters():
            if p.requires_grad and name not in start:  # or unfrozen later: till then it was as it is
                start[name] = p.detach().clone()
            elif name in start:  # from a checkpoint it is on the CPU; and the model may have been cast
                start[name] = start[name].to(p)
        return [(p, start[name]) for name, p in self.model.named_parameters() if name in start]

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Inside, all that trains may be changed, and gradients be made; afterwards both are as they were, to the bit,
        and so are the random numbers that follow."""
        kept = [(p, p.detach().clone(), p.grad) for p in self.parameters()]
        with torch.random.fork_rng(devices=[]):
            try:
                for p, _, _ in kept:
                    p.grad = None
                yield
            finally:
                with torch.no_grad():
                    for p, value, gradient in kept:
                        p.copy_(value)
                        p.grad = gradient

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

    @property
    def has_terms(self) -> bool:
        """Has a plugin added to the loss so far."""
        return bool(self._terms)

    def replace_task_loss(self, function: Callable[[], tuple[Tensor, Any]], *, over: Over = "labels") -> None:
        """Compute the task's loss otherwise: a function that returns (loss, outputs); preference losses do this.

        Args:
            over: what the loss is a mean over, as in `add_loss`.
        """
        self._task, self._task_over = function, over

    def segment_task_loss(self, size: int) -> None:
        """Compute the model's own loss so many tokens at a time: the same number and gradients, and the logits are
        never there whole. It stays whole where somebody reads them (a term, a task's loss of a plugin's own), where the
        loss is more than the head's cross entropy, beside soft tokens and in several processes."""
        self._segment = size

    def _task_loss(self) -> tuple[Tensor, Any]:
        labels, size = self.batch.get("labels"), self._segment
        if (
            size is not None
            and isinstance(labels, Tensor)
            and labels.numel() > size
            and not self._terms
            and self._processes.count == 1
            and has_plain_loss(self.model)
        ):
            return in_segments(self.model, self.forward, labels, size)
        # The mean over this micro-batch, as every model gives it; not all of them know the tokens of a whole step.
        outputs = self.forward()
        if outputs.loss is None:
            raise BatchError("the model returned no loss", hint="the batch needs 'labels'")
        return outputs.loss, outputs

    def total_loss(self) -> Tensor:
        """The task's loss plus all terms (0-d), so weighed that the mean over the micro-batches of an optimizer step is
        the loss of all of its rows at once."""
        self.in_task = True
        try:
            loss, outputs = self._task()
        finally:
            self.in_task = False
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
        weight = self.share[over] * self.accumulation * self._processes.count
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

    def before_update(self, action: Action) -> None:
        """Run `action(optimizer)` right before the optimizer steps, whoever calls it: register it in the last
        micro-batch, or in every one."""
        self._before.append(action)

    def after_update(self, action: Action) -> None:
        """Run `action(optimizer)` right after the optimizer has stepped."""
        self._after.append(action)

    def at_end(self, collapse: Callable[[torch.dtype], None], weight: nn.Parameter) -> None:
        """Run `collapse` behind the run's last update if `weight` trains, with the dtype that it has between updates:
        in one an optimizer may hold wider numbers. A loop of one's own that has no `total` has no end."""
        if self.total is not None and self.index + 1 >= self.total and weight.requires_grad:
            dtype = weight.dtype
            self.after_update(lambda _: collapse(dtype))

    def finish(self) -> None:
        """Run the gradient transforms if this is the last micro-batch; the core calls it after the hooks."""
        if not self.last_micro:
            return
        self._processes.average(self.parameters())
        masked = [part for part in self.stack.ledger.all(BasePart) if part.masks]
        with torch.no_grad():
            for part in masked:
                part.mask_gradients()
            for transform in self._gradients:
                transform(self.parameters())
        for handle in self.stack.around_update:
            handle.remove()  # of a step without an update
        after = [*((lambda _, part=part: part.hold()) for part in masked), *self._after]
        self.stack.around_update = around_next_update(self.parameters(), self._before, after)


@contextmanager
def swapped(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Other values in the parameters' place; nothing is copied."""
    own = [(p, p.data) for p, _ in values]
    try:
        for p, value in values:
            p.data = value
        yield
    finally:
        for p, value in own:
            p.data = value


def run_train_step(step: TrainStep) -> Tensor:
    """Run the `train_step` hooks on one micro-batch; returns the loss (0-d, detached)."""
    check_processes(step.stack.members, world())
    step.stack.update_is_due = True
    loss: Tensor = step.stack.call_nested("train_step", step=step)
    step.finish()
    step.stack.update_is_due = True  # also where a plugin steps an optimizer of its own
    return loss.detach()


def default_step(step: TrainStep) -> Tensor:
    """What runs unless a plugin replaces it: one forward, one backward."""
    if not any(True for _ in _trainable(step)):
        raise TrainingError(
            "nothing trains: no plugin of the stack has trainable parameters", hint="add one, e.g. lora"
        )
    loss = step.total_loss()
    step.backward(loss)
    return loss.detach()


def _trainable(step: TrainStep) -> Iterator[nn.Parameter]:
    return (p for p in step.model.parameters() if p.requires_grad)
