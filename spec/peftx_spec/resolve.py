"""Paths of a spec are relative to the spec's own folder, those of overrides to the working directory; here they become
absolute."""

from __future__ import annotations

import os
import re
from pathlib import Path as FilePath
from typing import Any

from peftx_spec.models import DataSpec, EvaluateSpec, ModelSpec, Pipeline, SourceSpec, StackEntry
from peftx_spec.overrides import Overridden
from peftx_spec.problems import Path
from peftx_spec.stages import RunStage

_SCHEME = re.compile(r"[a-z][a-z0-9+-]+:")  # peftx:sample; two letters at least, a drive has one
FOLDER = ("./", "../", "~/")
"""How a model's id begins that is a path; all others are names."""


def resolved(pipeline: Pipeline, base_dir: str | os.PathLike[str]) -> Pipeline:
    """The pipeline with absolute paths in data, metrics, saves and output.

    A model id is a path only where it starts with `./`, `../` or `~/` (`FOLDER`). A name with a scheme (`peftx:tiny`)
    and an absolute path stay as they are. Nothing has to exist.
    """
    base = FilePath(base_dir).absolute()
    return pipeline.model_copy(
        update={
            "model": _model(pipeline.model, base),
            "data": _data(pipeline.data, base),
            "stack": tuple(_entry(entry, base) for entry in pipeline.stack),
            "evaluate": tuple(_metric(metric, base) for metric in pipeline.evaluate),
            "run": None if pipeline.run is None else tuple(_stage(stage, base) for stage in pipeline.run),
            "output": None if pipeline.output is None else absolute(pipeline.output, base),
        }
    )


def from_here(overridden: Overridden) -> None:
    """What overrides say of places is seen from the working directory, as a shell's words are, and not from the spec's
    folder: it becomes absolute."""
    here = FilePath.cwd()
    for path in overridden.origin:
        parent: Any = overridden.data
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = _seen(path, parent[path[-1]], here)


def _seen(path: Path, value: object, here: FilePath) -> object:
    if isinstance(value, dict):
        return {key: _seen((*path, key), item, here) for key, item in value.items()}
    if isinstance(value, list):
        return [_seen((*path, index), item, here) for index, item in enumerate(value)]
    if not isinstance(value, str) or not value:
        return value
    match path:
        case ("model",) | ("model", "id"):
            return absolute(value, here) if value.startswith(FOLDER) else value
        case (
            ("output",)
            | ("data", "train" | "eval" | "calibration")
            | ("data", "train" | "eval" | "calibration", "path")
            | ("data", "sources", _)
            | ("data", "sources", _, "path")
            | ("evaluate", int(), _)
            | ("evaluate", int(), _, "path" | "include")
        ):
            return absolute(value, here)
    return value


def absolute(path: str, base: FilePath) -> str:
    """`path` seen from `base`, without `.` and `..`; a name with a scheme stays as it is."""
    if _SCHEME.match(path):
        return path
    return os.path.normpath(base / os.path.expanduser(path))  # pathlib's own raises for an unknown user


def _model(model: ModelSpec, base: FilePath) -> ModelSpec:
    if model.id.startswith(FOLDER):
        return model.model_copy(update={"id": absolute(model.id, base)})
    return model


def _entry(entry: StackEntry, base: FilePath) -> StackEntry:
    return entry if entry.path is None else entry.model_copy(update={"path": absolute(entry.path, base)})


def _data(data: DataSpec, base: FilePath) -> DataSpec:
    def moved(source: SourceSpec | None) -> SourceSpec | None:
        return None if source is None else source.model_copy(update={"path": absolute(source.path, base)})

    update: dict[str, object] = {
        "train": moved(data.train), "eval": moved(data.eval), "calibration": moved(data.calibration),
        "sources": {name: moved(source) for name, source in data.sources.items()},
    }  # fmt: skip
    return data.model_copy(update=update)


def _metric(metric: EvaluateSpec, base: FilePath) -> EvaluateSpec:
    options = metric.options
    places = {"path": options.path, "include": options.include}
    options = options.model_copy(
        update={name: absolute(place, base) for name, place in places.items() if place is not None}
    )
    return EvaluateSpec({metric.metric: options})


def _stage(stage: RunStage, base: FilePath) -> RunStage:
    if stage.repeat is not None:
        inner = tuple(_stage(each, base) for each in stage.repeat.run)
        return stage.model_copy(update={"repeat": stage.repeat.model_copy(update={"run": inner})})
    if stage.save is None or stage.save.path is None:
        return stage
    save = stage.save.model_copy(update={"path": absolute(stage.save.path, base)})
    return stage.model_copy(update={"save": save})
