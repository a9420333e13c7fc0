"""The step of a stack inside anybody's `transformers.Trainer`: TRL's SFT, DPO and GRPO, or one of your own.

    trainer = stack.trainer(SFTTrainer)(model=stack.model, args=SFTConfig(...), train_dataset=rows)

A trainer calls the model and its own loss, and knows nothing of the `train_step` hooks. This one runs them around that
loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

from peftx.engines.bundle import save
from peftx.engines.training.shares import shares
from peftx.engines.training.step import TrainStep, run_train_step
from peftx.errors import ConflictError, PeftxError
from peftx.kernel.plugin import Claim

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack


class StackStep(Trainer):
    """Between a trainer's class and `Trainer`, so that what the class does around a step stays around it."""

    stack: Stack
    _micro = 0
    _shares: list[dict[str, float]] = []

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.model is not self.stack.model:
            raise PeftxError(
                f"{type(self).__name__} trains another model than the stack's",
                hint="model=stack.model, without peft_config",
            )
        model.train()
        accumulation = self.current_gradient_accumulation_steps
        step = TrainStep(
            self.stack,
            self._prepare_inputs(inputs),
            model=model,
            index=self.state.global_step,
            micro=self._micro,
            accumulation=accumulation,
            total=self.state.max_steps,
            learning_rate=self._get_learning_rate(),
            share=self._shares[self._micro] if self._shares else None,
            backward=self.accelerator.backward,
        )
        self._micro = (self._micro + 1) % accumulation
        scaled = self._is_scaled(num_items_in_batch)

        def task() -> tuple[Tensor, Any]:
            # Outputs where a term asks for them: not every trainer gives them.
            arguments = {"return_outputs": True} if step.has_terms else {}
            with self.compute_loss_context_manager():
                found = self.compute_loss(
                    model, step.batch, num_items_in_batch=num_items_in_batch, **arguments
                )
            loss, outputs = found if step.has_terms else (found, None)
            return (loss * accumulation if scaled else loss), outputs

        step.replace_task_loss(task, over="step")  # it is weighed by the trainer
        return run_train_step(step) / accumulation

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Is a micro-batch's loss its part of the optimizer step's already; by the rule of `Trainer.training_step`."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        told = len(batches) > 1 and all("labels" in batch for batch in batches)
        self._micro, self._shares = 0, shares(self.stack.model, batches) if told else []
        return batches, count

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A bundle, and not a checkpoint of the model, which holds no plugin."""
        save(self.stack, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        raise PeftxError(
            f"{resume_from_checkpoint} is a bundle, which a trainer of another library does not go on from",
            hint="peftx.load(folder) and train on, or stack.train(..., resume=True)",
        )


def trainer_of(stack: Stack, kind: type[Trainer]) -> type[Trainer]:
    """A trainer's class whose step is the stack's.

    Raises:
        ConflictError: a plugin brings a loss of its own, and so does the class.
    """
    own = kind.compute_loss is not Trainer.compute_loss
    with_loss = [m.id for m in stack.members if m.claims(Claim.REPLACES_LOSS)]
    if own and with_loss:
        raise ConflictError(
            f"'{with_loss[0]}' has a loss of its own, and so has {kind.__name__}",
            hint="stack.train(rows), or stack.trainer(Trainer)",
        )
    bases = (StackStep,) if kind is Trainer else (kind, StackStep)
    return type(f"Stack{kind.__name__}", bases, {"stack": stack})
