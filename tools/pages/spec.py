"""The keys of a spec, a comparison and a search, from the models that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from peftx.composition.options import kind_and_limits
from peftx_spec.compare import BudgetSpec, CompareSpec, MethodSpec
from peftx_spec.models import (
    DataSpec,
    HoldoutSpec,
    MetricOptions,
    ModelSpec,
    Pipeline,
    RuntimeSpec,
    SourceSpec,
    StackEntry,
)
from peftx_spec.search import SamplerSpec, SearchSpec, SpanSpec
from peftx_spec.stages import EvaluateStage, RepeatStage, RunStage, SaveStage, TrainStage
from peftx_spec.trainer_names import TRAINER_NAMES
from peftx_spec.training import TrainSpec

SECTIONS: dict[str, type[BaseModel]] = {
    "pipeline": Pipeline,
    "model": ModelSpec,
    "data": DataSpec,
    "source": SourceSpec,
    "holdout": HoldoutSpec,
    "entry": StackEntry,
    "train": TrainSpec,
    "metric": MetricOptions,
    "run": RunStage,
    "run-train": TrainStage,
    "run-evaluate": EvaluateStage,
    "run-save": SaveStage,
    "run-repeat": RepeatStage,
    "runtime": RuntimeSpec,
    "compare": CompareSpec,
    "compare-method": MethodSpec,
    "compare-budget": BudgetSpec,
    "search": SearchSpec,
    "search-span": SpanSpec,
    "search-sampler": SamplerSpec,
}
"""`<!-- made: spec-train -->` -> the model whose keys stand there."""

ANCHORS = {
    "ModelSpec": "model",
    "DataSpec": "data",
    "SourceSpec": "a-source-of-rows",
    "HoldoutSpec": "holdout",
    "StackEntry": "stack",
    "TrainSpec": "train",
    "MetricOptions": "evaluate",
    "EvaluateSpec": "evaluate",
    "RunStage": "run",
    "RuntimeSpec": "runtime",
    "TrainStage": "run-train",
    "EvaluateStage": "run-evaluate",
    "SaveStage": "run-save",
    "RepeatStage": "run-repeat",
    "BaseSpec": "a-comparison",
    "MethodSpec": "a-method",
    "BudgetSpec": "a-budget",
    "SpanSpec": "a-span",
    "SamplerSpec": "a-sampler",
}
"""Where docs/reference/spec.md has a heading for a model."""


def keys(model: type[BaseModel]) -> str:
    """A table: key, what it takes, its value where it is left out, what it means. Keys of training by both names."""
    others = (
        {ours: theirs for theirs, ours in TRAINER_NAMES.items()} if model in (TrainSpec, TrainStage) else {}
    )
    schema = model.model_json_schema(ref_template="{model}", by_alias=True)
    definitions = schema.get("$defs", {})
    schema = definitions[schema["$ref"]] if "$ref" in schema else schema  # of a model that holds itself
    required = set(schema.get("required", ()))
    lines = ["| key | takes | unless given | meaning |", "| --- | --- | --- | --- |"]
    for name, field in schema.get("properties", {}).items():
        names = f"`{name}` or `{others[name]}`" if name in others else f"`{name}`"
        lines.append(
            f"| {names} | {_takes(field, definitions)} | {_default(name, field, required)} | "
            f"{_cell(field.get('description', ''))} |"
        )
    return "\n".join(lines)


def _takes(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """As in `integer, >= 1`, `list of [source](#...)`."""
    if "$ref" in schema:
        name = schema["$ref"]
        if name in ANCHORS:
            return f"[{ANCHORS[name].replace('-', ' ')}](#{ANCHORS[name]})"
        return _takes(definitions[name], definitions)
    if "anyOf" in schema or "oneOf" in schema:
        parts = [each for each in schema.get("anyOf", schema.get("oneOf", ())) if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(_takes(each, definitions) for each in parts))
    if schema.get("type") == "array" and schema.get("items"):
        inner = _takes(schema["items"], definitions)
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    values = schema.get("additionalProperties")
    if schema.get("type") == "object" and isinstance(values, dict) and values:
        return f"mapping to {_takes(values, definitions)}"
    return _cell(kind_and_limits({key: value for key, value in schema.items() if key != "minLength"}))


def _default(name: str, field: dict[str, Any], required: set[str]) -> str:
    if name in required:
        return "required"
    value = field.get("default")
    if value in (None, [], {}):
        return ""
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


MADE: dict[str, Callable[[], str]] = {
    f"spec-{name}": lambda model=model: keys(model)  # type: ignore[misc]
    for name, model in SECTIONS.items()
}
