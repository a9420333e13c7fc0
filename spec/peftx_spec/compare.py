"""The comparison: methods on one base, under one budget, over seeds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from peftx_spec.base import Label, Positive, Rate, Seed, SpecModel, Text
from peftx_spec.models import DataSpec, EvaluateSpec, ModelSpec, SourceSpec, StackEntry
from peftx_spec.training import TrainSpec

RATES = (3e-4, 1e-3, 3e-3)
"""What is tried where a file names no learning rates."""

Share = Annotated[float, Field(gt=0, lt=1)]
Rates = Annotated[tuple[Rate, ...], Field(min_length=1)]
Values = Annotated[tuple[JsonValue, ...], Field(min_length=1)]


class BaseSpec(SpecModel):
    """What all methods share: a pipeline without a stack."""

    model: ModelSpec = Field(description="the base model")
    data: DataSpec = Field(description="the data; eval (or holdout) is what every row is measured on")
    train: TrainSpec = Field(
        default_factory=TrainSpec, description="how stacks are trained, but for steps, learning rate and seed"
    )
    evaluate: tuple[EvaluateSpec, ...] = Field(min_length=1, description="the metrics")


class BaseFile(BaseSpec):
    """The same in a file of its own."""

    peftx: Literal[1] = Field(description="version of the spec's format")


class BudgetSpec(SpecModel):
    """How long every row trains: exactly one of the three."""

    steps: Positive | None = Field(None, description="optimizer steps")
    rows: Positive | None = Field(
        None, description="rows that are trained on, those seen again counted again"
    )
    seconds: Rate | None = Field(None, description="seconds of training; steps are measured, then fixed")

    @model_validator(mode="after")
    def _one(self) -> BudgetSpec:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"a budget is one of steps, rows and seconds, and this one has {' and '.join(given) or 'none'}"
            )
        return self

    def __str__(self) -> str:
        name, value = next((name, value) for name, value in self if value is not None)
        told = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        return f"{told} {name if value != 1 else name.removesuffix('s')}"


class MethodSpec(SpecModel):
    """One method: a stack, and what is varied in it."""

    stack: tuple[StackEntry, ...] = Field(
        description="the plugins, in order of effect; [] is the base as it is"
    )
    grid: dict[Text, Values] | None = Field(
        None,
        min_length=1,
        description="values of an option, 'lora.rank: [4, 16]'; a row for each combination",
    )
    learning_rate: Rates | None = Field(None, description="rates of this method; those of all unless given")


class CompareSpec(SpecModel):
    """A comparison."""

    base: Text | BaseSpec = Field(description="what all methods share, or the file that says it")
    metric: Text | None = Field(
        None,
        description="what rates are chosen by and rows are ordered by; the first of evaluate unless given",
    )
    budget: BudgetSpec = Field(description="how long every row trains")
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2), min_length=1, description="of training; a row is run with each"
    )
    learning_rate: Rates = Field(RATES, description="rates that are tried for each row")
    validation: Share | SourceSpec = Field(
        0.2, description="share of the training rows that rates are chosen on, or a file of such rows"
    )
    methods: dict[Label, MethodSpec] = Field(min_length=1, description="the methods by name")


class CompareFile(SpecModel):
    """The file of a comparison."""

    peftx: Literal[1] = Field(description="version of the spec's format")
    compare: CompareSpec = Field(description="the comparison")
