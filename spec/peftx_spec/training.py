"""How a stack is trained: the section `train`."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from peftx_spec.base import (
    Amount,
    BestMetric,
    NonNegative,
    Positive,
    Rate,
    Ratio,
    Reporter,
    Schedule,
    Seed,
    Slug,
    SpecModel,
)


def check_warmup(steps: int | None, ratio: float | None) -> None:
    """Raises ValueError where both say how long the warmup is."""
    if steps and ratio:
        raise ValueError("warmup_steps and warmup_ratio both say how long the warmup is: leave one out")


class TrainSpec(SpecModel):
    """How the stack is trained."""

    steps: Positive = Field(200, description="optimizer steps")
    num_train_epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="passes over the rows, in place of steps"
    )
    batch_size: Positive = Field(8, description="examples in one forward pass")
    gradient_accumulation: Positive = Field(1, description="forward passes to one optimizer step")
    learning_rate: Rate = Field(1e-3, description="peak of the schedule")
    learning_rates: dict[Slug, Rate] = Field(
        default_factory=dict,
        description="id of a plugin -> its own peak of the schedule, where one rate does not serve all",
    )
    weight_decay: Amount = Field(0.0, description="decoupled weight decay")
    warmup_steps: NonNegative = Field(0, description="steps over which the learning rate rises from 0")
    warmup_ratio: Ratio = Field(0.0, description="in place of warmup_steps: their share of all steps")
    schedule: Schedule = Field(
        "linear",
        description="how the learning rate goes on after warmup: to 0 in a line or a half cosine, with the inverse "
        "square root of the step, or not",
    )
    max_grad_norm: Amount = Field(
        1.0, description="gradients are scaled down to this norm; 0 leaves them alone"
    )
    seed: Seed = Field(0, description="of the plugins' first values, the order of the data, and dropout")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="the optimizer, unless a plugin brings its own"
    )
    checkpoint_every: Positive | None = Field(
        None, description="steps between checkpoints; none unless given"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    packing: bool = Field(
        False, description="put the texts of a batch behind each other: fewer pads, the same loss"
    )
    bf16: bool = Field(
        False, description="compute in bfloat16 where that is safe (autocast); weights stay as they are"
    )
    max_length: Positive = Field(256, description="tokens of an example; longer ones are cut")
    eval_steps: Positive | None = Field(
        None, description="steps between measurements on data.eval while training; none unless given"
    )
    metric_for_best_model: BestMetric = Field(
        "perplexity", description="what is measured every eval_steps, and decides which state is the best"
    )
    load_best_model_at_end: bool = Field(
        False, description="end with the best state that was measured, not with the last"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="measurements without a better one, after which the run ends"
    )
    report_to: Reporter = Field(
        "none",
        description="where the Trainer logs losses and rates too, one or a list; the packages must be installed",
    )

    @property
    def warmup(self) -> int:
        """Steps of warmup; of a share as many as the Trainer makes of it."""
        return math.ceil(self.steps * self.warmup_ratio) if self.warmup_ratio else self.warmup_steps

    @property
    def trackers(self) -> tuple[str, ...]:
        """What is reported to."""
        given = (self.report_to,) if isinstance(self.report_to, str) else self.report_to
        return tuple(name for name in given if name != "none")

    def unsaid(self) -> frozenset[str]:
        return frozenset() if self.num_train_epochs is None else frozenset({"steps"})

    @model_validator(mode="after")
    def _fit(self) -> TrainSpec:
        given = self.model_fields_set
        if self.num_train_epochs is not None and "steps" in given:
            raise ValueError("steps and num_train_epochs both say how long: leave one out")
        check_warmup(self.warmup_steps, self.warmup_ratio)
        needs = [
            name for name in ("load_best_model_at_end", "early_stopping_patience") if getattr(self, name)
        ]
        if needs and self.eval_steps is None:
            raise ValueError(f"{needs[0]} needs measurements: set eval_steps")
        return self
