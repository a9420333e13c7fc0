"""The stages of a run, as `run:` spells them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from peftx_spec.base import (
    Amount,
    BestMetric,
    Label,
    NonNegative,
    Positive,
    Rate,
    Ratio,
    Reporter,
    Schedule,
    Seed,
    Slug,
    SpecModel,
    Text,
)
from peftx_spec.training import TrainSpec, check_warmup

ALL = "all"
StageKind = Literal[
    "prepare", "inject", "train", "freeze", "merge", "drop", "compress", "evaluate", "save", "repeat"
]  # fmt: skip
HOOK_OF_STAGE = {"prepare": "prepare_data", "inject": "inject", "compress": "compress"}
"""The stages that call one hook of the plugins that they list."""


def _one_or_many(value: object) -> object:
    """`prefixquant` is `[prefixquant]`; nothing at all is `[all]`."""
    if value is None:
        return (ALL,)
    return (value,) if isinstance(value, str) else value


Ids = Annotated[tuple[Slug, ...], BeforeValidator(_one_or_many), Field(min_length=1)]


class TrainStage(SpecModel):
    """One stretch of training; what is not given here is as in the pipeline's `train`."""

    plugins: Annotated[tuple[Slug, ...], BeforeValidator(_one_or_many)] = Field(
        (ALL,), min_length=1, description="ids of the plugins that train; all that are injected unless given"
    )
    steps: Positive | None = Field(None, description="instead of train.steps: optimizer steps")
    num_train_epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="instead of train.num_train_epochs: passes over the rows"
    )
    batch_size: Positive | None = Field(
        None, description="instead of train.batch_size: examples in a forward pass"
    )
    gradient_accumulation: Positive | None = Field(
        None, description="instead of train.gradient_accumulation: passes"
    )
    learning_rate: Rate | None = Field(
        None, description="instead of train.learning_rate: peak of the schedule"
    )
    learning_rates: dict[Slug, Rate] | None = Field(
        None, description="instead of train.learning_rates: id of a plugin -> its own peak"
    )
    weight_decay: Amount | None = Field(
        None, description="instead of train.weight_decay: decoupled weight decay"
    )
    warmup_steps: NonNegative | None = Field(
        None, description="instead of train.warmup_steps: steps of warmup"
    )
    warmup_ratio: Ratio | None = Field(None, description="instead of train.warmup_ratio: share of the steps")
    schedule: Schedule | None = Field(
        None, description="instead of train.schedule: the learning rate after warmup"
    )
    max_grad_norm: Amount | None = Field(
        None, description="instead of train.max_grad_norm: clipping; 0 is none"
    )
    seed: Seed | None = Field(None, description="instead of train.seed: order of the data, and dropout")
    optimizer: Literal["adamw", "sgd"] | None = Field(None, description="instead of train.optimizer")
    checkpoint_every: Positive | None = Field(None, description="instead of train.checkpoint_every: steps")
    gradient_checkpointing: bool | None = Field(None, description="instead of train.gradient_checkpointing")
    packing: bool | None = Field(None, description="instead of train.packing: texts behind each other")
    bf16: bool | None = Field(None, description="instead of train.bf16: autocast")
    max_length: Positive | None = Field(None, description="instead of train.max_length: tokens of an example")
    eval_steps: Positive | None = Field(
        None, description="instead of train.eval_steps: steps between measurements"
    )
    metric_for_best_model: BestMetric | None = Field(
        None, description="instead of train.metric_for_best_model"
    )
    load_best_model_at_end: bool | None = Field(None, description="instead of train.load_best_model_at_end")
    early_stopping_patience: Positive | None = Field(
        None, description="instead of train.early_stopping_patience: measurements"
    )
    report_to: Reporter | None = Field(None, description="instead of train.report_to")

    @model_validator(mode="after")
    def _fit(self) -> TrainStage:
        check_warmup(self.warmup_steps, self.warmup_ratio)
        return self

    def settings(self, base: TrainSpec) -> TrainSpec:
        """`base` with this stage's own values in place of the base's."""
        own = {name: value for name, value in self if name != "plugins" and value is not None}
        if self.steps is not None:
            own["num_train_epochs"] = None
        if self.warmup_steps is not None or self.warmup_ratio is not None:  # either says all of the warmup
            own |= {"warmup_steps": self.warmup_steps or 0, "warmup_ratio": self.warmup_ratio or 0.0}
        return base.model_copy(update=own)


class EvaluateStage(SpecModel):
    """Run everything under `evaluate`, and every plugin's evaluate hook, on the stack as it stands here."""

    name: Label | None = Field(
        None, description="name of the result; what it follows unless given, such as 'after train'"
    )


class SaveStage(SpecModel):
    """Write a bundle of the stack as it stands here."""

    path: Text | None = Field(
        None, description="folder of the bundle, from the spec's folder; `output` unless given"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        return {"path": data} if isinstance(data, str) else data


class RepeatStage(SpecModel):
    """Stages that are carried out several times, one round after the other."""

    times: Positive | None = Field(None, description="number of rounds")
    over: tuple[Slug, ...] | None = Field(
        None,
        min_length=1,
        description="names of data.sources, in place of times: a round for each, on its rows instead of data.train",
    )
    run: tuple[RunStage, ...] = Field(min_length=1, description="the stages of a round, in order")

    @model_validator(mode="after")
    def _says_how_often(self) -> RepeatStage:
        if (self.times is None) == (self.over is None):
            raise ValueError("either times or over says how many rounds there are")
        if self.over is not None and len(set(self.over)) < len(self.over):
            raise ValueError("over names a source twice")
        return self


class RunStage(SpecModel):
    """One step of `run`: a mapping with exactly one key; a lone word is that stage for all plugins."""

    prepare: Ids | None = Field(None, description="ids of the plugins that rewrite the data")
    inject: Ids | None = Field(None, description="ids of the plugins that attach to the model")
    train: TrainStage | None = Field(None, description="plugins that train, and own values of `train`")
    freeze: Ids | None = Field(None, description="ids of the plugins whose parameters stop training")
    merge: Ids | None = Field(None, description="ids of the plugins that are folded into the weights")
    drop: Ids | None = Field(None, description="ids of the plugins that are removed from the model")
    compress: Ids | None = Field(None, description="ids of the plugins that compress the model")
    evaluate: EvaluateStage | None = Field(None, description="run the evaluation; `name` labels the result")
    save: SaveStage | None = Field(None, description="write a bundle, to `output` unless a path is given")
    repeat: RepeatStage | None = Field(
        None,
        description="carry out stages several times: {times: 3, run: [...]}, or {over: [a, b], run: [...]}",
    )
    _round: str = PrivateAttr("")
    _source: str = PrivateAttr("")
    _place: int = PrivateAttr(0)

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        if isinstance(data, str):
            data = {data: None}
        if not isinstance(data, dict):
            return data
        # a stage that says nothing more means all plugins, or its defaults
        empty: dict[str, object] = {"train": {}, "evaluate": {}, "save": {}}
        return {key: empty.get(key, (ALL,)) if value is None else value for key, value in data.items()}

    @model_validator(mode="after")
    def _exactly_one(self) -> RunStage:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"a stage has exactly one key, this one has {' and '.join(given) or 'none'}")
        return self

    @property
    def round(self) -> str:
        """Of a stage that is repeated: `round 2 of 3`."""
        return self._round

    @property
    def told(self) -> str:
        """What it is called where a run is told: its kind, and its round."""
        return f"{self.kind} ({self._round})" if self._round else self.kind

    @property
    def source(self) -> str:
        """Of data.sources the one whose rows this stage works on; empty: those of data.train."""
        return self._source

    @property
    def place(self) -> int:
        """Of that source among those that are gone over, from 0."""
        return self._place

    def rounds(self) -> tuple[RunStage, ...]:
        """The stages that this one stands for: itself, or those of all rounds; results of evaluations are named by
        round, or by its source."""
        if self.repeat is None:
            return (self,)
        names = self.repeat.over or ("",) * (self.repeat.times or 0)
        found: list[RunStage] = []
        for number, source in enumerate(names, start=1):
            for inner in (inner for outer in self.repeat.run for inner in outer.rounds()):
                stage = inner.model_copy()
                if stage.evaluate is not None:
                    own = stage.evaluate.name
                    name = (
                        f"{own or 'round'}-{number}" if not source else f"{own}-{source}" if own else source
                    )
                    stage = stage.model_copy(update={"evaluate": EvaluateStage(name=name)})
                if source and not stage._source:
                    stage._source, stage._place = source, number - 1
                told = f"{f'{source},' if source else 'round'} {number} of {len(names)}"
                stage._round = told if not stage._round else f"{told}, {stage._round}"
                found.append(stage)
        return tuple(found)

    @property
    def kind(self) -> StageKind:
        """Which stage this is."""
        return cast("StageKind", next(name for name, value in self if value is not None))

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids that the stage lists; `("all",)` for all; empty for `evaluate` and `save`."""
        listed = (self.prepare, self.inject, self.freeze, self.merge, self.drop, self.compress)
        if self.train is not None:
            return self.train.plugins
        return next((ids for ids in listed if ids is not None), ())


def stream_of(stages: Iterable[RunStage]) -> list[str]:
    """The sources that rounds go over, in order."""
    return list(dict.fromkeys(stage.source for stage in stages if stage.source))
