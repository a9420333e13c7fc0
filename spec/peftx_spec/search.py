"""The search: which stack, with which options, is the best for what it costs."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, model_validator

from peftx_spec.base import NonNegative, Positive, Seed, Slug, SpecModel, Text
from peftx_spec.compare import BaseSpec, Share, Values
from peftx_spec.models import SourceSpec, StackEntry

QUALITY = "quality"
CHECKS = 3
"""How often a trial is looked at while it trains, unless the file says otherwise."""

Cost = Literal["trained", "bundle_bytes", "shipped_bytes", "memory_bytes", "train_seconds", "token_seconds"]
Objective = Literal["quality", Cost]

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMG])")
_TIMES = {"k": 1e3, "M": 1e6, "G": 1e9}


def _amount(value: object) -> object:
    """`200k` is 200,000."""
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    return float(found[1]) * _TIMES[found[2]] if found else value


Amount = Annotated[float, BeforeValidator(_amount), Field(gt=0)]
Bounds = Annotated[tuple[int | float, ...], Field(min_length=2, max_length=2)]


class SpanSpec(SpecModel):
    """Numbers between two ends, both of them included; whole ones where both ends are written as whole numbers."""

    log: Bounds | None = Field(None, description="ends; each factor is as likely as any other")
    range: Bounds | None = Field(None, description="ends; each number is as likely as any other")

    @model_validator(mode="after")
    def _ordered(self) -> SpanSpec:
        if (self.log is None) == (self.range is None):
            raise ValueError("a span is either log: [low, high] or range: [low, high]")
        low, high = self.ends
        if low >= high:
            raise ValueError(f"the first end of a span is the smaller one, and {low:g} is not below {high:g}")
        if self.log is not None and low <= 0:
            raise ValueError(f"a span of log starts above 0, and this one at {low:g}")
        return self

    @property
    def ends(self) -> tuple[int | float, int | float]:
        found = self.log or self.range
        assert found is not None
        return (found[0], found[1])

    @property
    def whole(self) -> bool:
        return all(isinstance(end, int) for end in self.ends)


def _kind_of_space(value: Any) -> str:
    return "values" if isinstance(value, list | tuple) else "span"


def _kind_of_slot(value: Any) -> str:
    return "choices" if isinstance(value, list | tuple) else "entry"


Space = Annotated[
    Annotated[SpanSpec, Tag("span")] | Annotated[Values, Tag("values")], Discriminator(_kind_of_space)
]
Choices = Annotated[tuple[StackEntry | None, ...], Field(min_length=1)]
Slot = Annotated[
    Annotated[StackEntry, Tag("entry")] | Annotated[Choices, Tag("choices")], Discriminator(_kind_of_slot)
]


class SamplerSpec(SpecModel):
    """Who proposes the points; a plain string in its place is `use`."""

    use: Slug = Field(description="tpe, nsga2, random, or one that a package brings")
    options: dict[str, JsonValue] = Field(default_factory=dict, alias="with", description="its own options")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        return {"use": data} if isinstance(data, str) else data


class SearchSpec(SpecModel):
    """A search."""

    base: Text | BaseSpec = Field(description="what all trials share, or the file that says it")
    metric: Text | None = Field(None, description="what quality is; the first of evaluate unless given")
    stack: tuple[Slot, ...] = Field(
        min_length=1,
        description="the plugins, in order of effect; a list in a place is a choice, ~ in it none",
    )
    space: dict[Text, Space] = Field(
        default_factory=dict,
        description="what is varied: 'lora.rank: {log: [2, 64]}', or a list of values; train.* too",
    )
    objectives: tuple[Objective, ...] = Field(
        ("quality", "bundle_bytes", "token_seconds", "train_seconds"),
        min_length=1,
        description="what is to be good at once: quality, and costs",
    )
    limits: dict[Cost, Amount] = Field(
        default_factory=dict, description="what a cost may be at most: 'bundle_bytes: 200k'"
    )
    trials: Positive = Field(30, description="points that are tried")
    jobs: NonNegative = Field(0, description="trials side by side; 0: one a core, or one on an accelerator")
    sampler: SamplerSpec = Field(
        default_factory=lambda: SamplerSpec(use="tpe"), description="who proposes the points"
    )
    seed: Seed = Field(0, description="of the sampler, and of each trial's training")
    seeds: tuple[Seed, ...] = Field(
        (0, 1, 2), min_length=1, description="of training; the front's points are measured with each"
    )
    checks: NonNegative | None = Field(
        None,
        description="how often a trial is looked at while it trains, so that a beaten one ends early; 0: never",
    )
    validation: Share | SourceSpec = Field(
        0.2, description="share of the training rows that trials are scored on, or a file of such rows"
    )


class SearchFile(SpecModel):
    """The file of a search."""

    peftx: Literal[1] = Field(description="version of the spec's format")
    search: SearchSpec = Field(description="the search")
