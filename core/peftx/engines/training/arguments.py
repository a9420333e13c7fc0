"""The options of a training: as given, as the spec's `train:` section, and as the Trainer's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from transformers import TrainingArguments

from peftx.errors import OptionError, refused_options
from peftx_spec.trainer_names import with_our_names
from peftx_spec.training import TrainSpec

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack


def parse_options(options: dict[str, Any] | TrainSpec) -> TrainSpec:
    """Keyword options -> `TrainSpec`.

    Raises:
        PeftxError: an unknown option (with the nearest right one) or a bad value.
    """
    if isinstance(options, TrainSpec):
        return options
    options, twice = with_our_names(options)
    if twice:
        raise OptionError(f"train: {' and '.join(twice[0])} are names of one thing", hint="leave one out")
    try:
        return TrainSpec(**options)
    except ValidationError as error:
        said = refused_options(error, TrainSpec.model_fields)
        raise OptionError(f"train: {said}", hint=f"options: {', '.join(TrainSpec.model_fields)}") from error


def arguments_of(spec: TrainSpec, folder: Path, stack: Stack, keep: bool) -> TrainingArguments:
    saves = keep and spec.checkpoint_every is not None
    schedule = "constant_with_warmup" if spec.schedule == "constant" and spec.warmup else spec.schedule
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=spec.warmup,
        lr_scheduler_type=schedule,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        data_seed=spec.seed,
        activation_checkpointing=spec.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if spec.gradient_checkpointing else None,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps" if saves else "no",
        save_steps=spec.checkpoint_every or 500,
        save_total_limit=2,
        report_to=list(spec.trackers),
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=stack.model.device.type == "cpu",
        dataloader_pin_memory=False,
        include_num_input_tokens_seen=False,
        logging_nan_inf_filter=False,  # a loss that is not a number is reported as such, not as zero
    )
    arguments.optim = "sgd" if spec.optimizer == "sgd" else arguments.optim
    return arguments
