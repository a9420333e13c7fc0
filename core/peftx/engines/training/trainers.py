"""The step of a stack inside other trainers: TRL's SFT, DPO and GRPO, or a `transformers.Trainer` of your own.

    trainer = stack.trainer(SFTTrainer)(model=stack.model, args=SFTConfig(...), train_dataset=rows)

A trainer calls the model and its own loss, and knows nothing of the `train_step` hooks. This one runs them around that
loss.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

from peftx.copies import frozen
from peftx.engines.bundle import save
from peftx.engines.training.outside import UnderLoss, refuse_fused_head
from peftx.engines.training.packing import check_member
from peftx.engines.training.step import run_train_step
from peftx.engines.training.stepping import Stepping
from peftx.errors import CheckpointError, ConflictError, TrainingError
from peftx.kernel.plugin import Claim

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack

BUNDLE = "bundle"
"""In a checkpoint's folder, beside what the trainer keeps there."""
REFERENCE = "ref_model"
"""How TRL names it."""


class StackStep(Stepping):
    """Between a trainer's class and `Trainer`, so that what the class does around a step stays around it.

    Raises:
        PeftxError: it is to train another model than the stack's, or to go back to its best checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model is not self.stack.model:
            raise TrainingError(
                f"{type(self).__name__} trains another model than the stack's",
                hint="model=stack.model, without peft_config",
            )
        if self.args.load_best_model_at_end:
            raise TrainingError(
                f"{type(self).__name__} cannot go back to its best checkpoint, which is a bundle",
                hint="load_best_model_at_end=False, or stack.train(..., load_best_model_at_end=True)",
            )
        if getattr(self.args, "packing", False) or getattr(self.args, "padding_free", False):
            for member in self.stack.members:
                check_member(member)
        if "forward" in vars(self.model):  # TRL's, for its losses; SFT's, DPO's and others
            refuse_fused_head(self.model)
        self.memory: dict[str, Any] = {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        step = self.step_of(model, inputs, self.memory)
        scaled = self._is_scaled(num_items_in_batch)

        def task() -> tuple[Tensor, Any]:
            with self.compute_loss_context_manager():
                if step.has_terms:
                    loss, outputs = self._loss_and_outputs(model, step.batch, num_items_in_batch)
                else:  # not every trainer gives outputs
                    loss = self.compute_loss(model, step.batch, num_items_in_batch=num_items_in_batch)
                    outputs = None
            return (loss * step.accumulation if scaled else loss), outputs

        step.replace_task_loss(task, over="step")  # it is weighed by the trainer
        return run_train_step(step) / step.accumulation

    def _loss_and_outputs(self, model: nn.Module, batch: dict[str, Any], count: Any) -> tuple[Tensor, Any]:
        try:
            return self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=count)
        except ValueError as error:  # GRPO's refuses so
            raise TrainingError(
                f"{type(self).__name__}, asked for what the model returned: {error}",
                hint="a plugin's loss term reads it: leave that plugin out, or take a trainer that gives it, as SFT's",
            ) from error

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Is a micro-batch's loss its part of the optimizer step's already; by the rule of `Trainer.training_step`."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.begin(batches if all("labels" in batch for batch in batches) else [])
        return batches, count

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a bundle; of a checkpoint in a folder of its own: a bundle holds no file that it does not list."""
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            return  # the first process does
        save(self.stack, folder / BUNDLE if _internal_call else folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        raise CheckpointError(
            f"{resume_from_checkpoint}: a trainer of another library does not go on from a bundle",
            hint=f"peftx.load('{resume_from_checkpoint}/{BUNDLE}') and train on; stack.train(..., resume=True) resumes",
        )


class Referring:
    """In front of a trainer that compares with a reference model, as DPO's: unless another one is given, that is the
    stack as it is when the trainer is made. The trainer would read a base from the disk, without plugins, and without
    whatever was changed in memory."""

    stack: Stack

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        # Log-probabilities that are computed before the first step are those of the stack as it is, too.
        ahead = getattr(given.arguments.get("args"), "precompute_ref_log_probs", False)
        if given.arguments.get(REFERENCE) is None and not ahead:
            given.arguments[REFERENCE] = frozen(self.stack)
        super().__init__(*given.args, **given.kwargs)


def trainer_of(stack: Stack, kind: type[Trainer]) -> type[Trainer]:
    """A trainer's class whose step is the stack's.

    Raises:
        ConflictError: a plugin brings a loss of its own, and so does the class, which it does not serve.
    """
    bases: tuple[type, ...] = (StackStep,) if kind is Trainer else (kind, StackStep)
    own = kind.compute_loss is not Trainer.compute_loss
    for member in (m for m in stack.members if own and m.claims(Claim.REPLACES_LOSS)):
        front = member.plugin.front(kind) if isinstance(member.plugin, UnderLoss) else None
        if front is None:
            raise ConflictError(
                f"'{member.id}' has a loss of its own, and so has {kind.__name__}",
                hint="stack.train(rows), or stack.trainer(Trainer)",
            )
        bases = (front, *bases)
    if REFERENCE in inspect.signature(kind).parameters:
        bases = (Referring, *bases)
    return type(f"Stack{kind.__name__}", bases, {"stack": stack})
