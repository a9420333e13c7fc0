"""The pipeline: a stack of plugins on one model, with its data, its training and its evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue, RootModel, model_validator

from peftx_spec.base import NonNegative, Positive, Seed, Slug, SpecModel, Text
from peftx_spec.stages import RunStage
from peftx_spec.training import TrainSpec

FORMATS = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "classification": ("text", "label"),
    "preference": ("prompt", "chosen", "rejected"),
}
"""What a row may be made of -> its columns."""

LM_EVAL = "lm-eval"

METRIC_FORMATS: dict[str, tuple[str, ...]] = {
    "perplexity": ("text", "prompt-completion", "messages", "classification"),
    "accuracy": ("classification",),
    "exact-match": ("prompt-completion",),
    "task-accuracy": ("classification",),
    LM_EVAL: (),
}
"""Metric that needs no plugin -> the formats of rows that it reads; none of one that has rows of its own."""

METRICS = tuple(METRIC_FORMATS)
"""The metrics that need no plugin."""

DEVICE = r"^(auto|cpu|mps|cuda(:[0-9]{1,4})?)$"
"""How a device is written."""

Format = Literal["auto", "text", "prompt-completion", "messages", "classification", "preference"]
Phase = Literal["before-training", "after-training"]
HIGHER_IS_BETTER = {"perplexity": False, "accuracy": True, "exact-match": True}
"""Metric that one can choose by -> is more of it better."""


class ModelSpec(SpecModel):
    """The base model; a plain string in its place is its id."""

    id: Text = Field(description="name on the hub, folder, or peftx:tiny for the bundled model")
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = Field(
        "auto", description="dtype of the weights; auto is the checkpoint's own"
    )
    device: Annotated[str, Field(pattern=DEVICE)] = Field(
        "auto", description="auto (an accelerator if there is one), cpu, cuda, cuda:0, mps"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        return {"id": data} if isinstance(data, str) else data


class SourceSpec(SpecModel):
    """Where examples come from; a plain string in its place is its path."""

    path: Text = Field(description="file, from the spec's folder")
    format: Format = Field("auto", description="what an example is made of; auto reads it off the columns")
    limit: Positive | None = Field(
        None, description="number of examples to use, from the start; all unless given"
    )
    max_length: Positive | None = Field(
        None, description="tokens of an example; train.max_length unless given"
    )
    columns: dict[str, Text] = Field(
        default_factory=dict,
        description="name of the file's column for a name of the format: {prompt: question}",
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        return {"path": data} if isinstance(data, str) else data


class HoldoutSpec(SpecModel):
    """Rows of the training data that are kept for evaluation; a plain number in its place is their share.

    Rows that are equal in the columns of their format stand on one side, so that no row is trained on and measured.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="of the rows; one at least is held out, and one at least is left to train on"
    )
    most: Positive | None = Field(None, description="number of rows at most; no limit unless given")
    seed: Seed = Field(0, description="which rows they are, whatever their order in the file")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        is_number = isinstance(data, int | float) and not isinstance(data, bool)
        return {"share": data} if is_number else data


class DataSpec(SpecModel):
    """The data of a pipeline."""

    train: SourceSpec | None = Field(None, description="what the plugins train on")
    eval: SourceSpec | None = Field(
        None, description="held-out data, for loss while training and for metrics"
    )
    holdout: HoldoutSpec | None = Field(
        None, description="rows of train that are evaluated on and not trained on, in place of eval"
    )
    calibration: SourceSpec | None = Field(
        None, description="what compression calibrates on; the rows that are trained on unless given"
    )
    sources: dict[Slug, SourceSpec] = Field(
        default_factory=dict,
        description="further rows by name: for plugins that train on several, or to be gone over one by one in 'run'",
    )

    def trained_in(self, stage: RunStage) -> SourceSpec | None:
        """The rows that a stage works on: those of its round, or `train`."""
        return self.sources[stage.source] if stage.source else self.train


class StackEntry(SpecModel):
    """One configured plugin; a plain string in its place is `use`."""

    use: Slug = Field(description="name of the plugin")
    id: Slug = Field(
        default_factory=lambda data: data["use"],
        description="name of this entry; needed only where a plugin stands twice",
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict, alias="with", description="the plugin's own options"
    )
    path: Text | None = Field(
        None,
        description="folder of an adapter of HF PEFT that the plugin begins with; with 'use: peft', plugin and options "
        "are read from it too",
    )
    phase: Phase | None = Field(
        None, description="when a compressing plugin acts; from its place in the stack unless given"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        if isinstance(data, str):
            return {"use": data}
        if isinstance(data, dict) and "with" in data and data["with"] is None:
            return {**data, "with": {}}
        return data


class MetricOptions(SpecModel):
    """What a metric is computed on; a plain string in its place is its path."""

    path: Text | None = Field(None, description="file, from the spec's folder; data.eval unless given")
    format: Format = Field("auto", description="what an example is made of; auto reads it off the columns")
    limit: Positive | None = Field(
        None, description="number of examples to use, from the start; all unless given"
    )
    max_length: Positive | None = Field(
        None, description="tokens of an example; train.max_length unless given"
    )

    tasks: tuple[Text, ...] = Field(
        (), description="of lm-eval: names of its tasks, packaged ones, or one's own"
    )
    include: Text | None = Field(
        None, description="of lm-eval: folder of tasks of one's own, from the spec's folder"
    )
    num_fewshot: NonNegative | None = Field(
        None, description="of lm-eval: examples before each question; the task's own number unless given"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        return {"path": data} if isinstance(data, str) else data

    @property
    def of_tasks(self) -> dict[str, object]:
        """What lm-eval alone is told."""
        return {name: getattr(self, name) for name in ("tasks", "include", "num_fewshot")}


class EvaluateSpec(RootModel[dict[str, MetricOptions]]):
    """One metric: a mapping with exactly one key, a built-in metric or the id of a plugin that evaluates."""

    model_config = ConfigDict(frozen=True)
    root: dict[str, MetricOptions] = Field(
        min_length=1, max_length=1, description="name of the metric, and what it is computed on"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        if isinstance(data, str):
            return {data: {}}
        if isinstance(data, dict):
            return {key: {} if value is None else value for key, value in data.items()}
        return data

    @property
    def metric(self) -> str:
        """Name of the metric, or id of the plugin."""
        return next(iter(self.root))

    @property
    def options(self) -> MetricOptions:
        """What it is computed on."""
        return self.root[self.metric]


class RuntimeSpec(SpecModel):
    """Where a pipeline runs; a plain string in its place is its engine."""

    engine: Literal["local", "ray"] = Field(
        "local", description="local: in this process; ray: in processes that Ray Train starts"
    )
    workers: Positive = Field(
        1, description="of ray: processes that train together, each on batches of its own"
    )
    restarts: NonNegative = Field(
        3, description="of ray: how often all begin again, from the last checkpoint, when one has died"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: object) -> object:
        return {"engine": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _fit(self) -> RuntimeSpec:
        own = [n for n in ("workers", "restarts") if getattr(self, n) != type(self).model_fields[n].default]
        if self.engine == "local" and own:
            raise ValueError(f"{own[0]} is of engine ray, and a local run has one process: set engine: ray")
        return self


class Pipeline(SpecModel):
    """The declaration of a stack with its data, its training and its evaluation."""

    peftx: Literal[1] = Field(description="version of the spec's format")
    model: ModelSpec = Field(description="the base model")
    data: DataSpec = Field(default_factory=DataSpec, description="the data")
    stack: tuple[StackEntry, ...] = Field((), description="the plugins, in order of effect")
    train: TrainSpec | None = Field(None, description="how the stack is trained; absent: not at all")
    evaluate: tuple[EvaluateSpec, ...] = Field((), description="the metrics")
    run: tuple[RunStage, ...] | None = Field(
        None,
        min_length=1,
        description="the stages in order, for recipes with several; derived from the rest if absent",
    )
    output: Text | None = Field(
        None, description="folder of the bundle, from the spec's folder; not saved if absent"
    )
    runtime: RuntimeSpec = Field(default_factory=RuntimeSpec, description="where it runs")

    def entry(self, id: str) -> StackEntry:
        """The entry of the stack with this id. Raises `KeyError`."""
        for entry in self.stack:
            if entry.id == id:
                return entry
        raise KeyError(id)

    def train_settings(self, stage: RunStage) -> TrainSpec:
        """The full settings of a `train` stage. Raises `ValueError` for another stage."""
        if stage.train is None:
            raise ValueError(f"'{stage.kind}' is no stage of training")
        return stage.train.settings(self.train or TrainSpec())
