"""From what was asked on the command line to a valid pipeline: a spec with overrides, or a list of plugins."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx_spec.errors import PeftxError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftx.registry import Registry
    from peftx_spec import Pipeline

TINY = "peftx:tiny"
SAMPLE = {
    "train": "peftx:sample/train.jsonl",
    "eval": "peftx:sample/held_out.jsonl",
    "calibration": "peftx:sample/calibration.txt",
}
OUTPUT = "peftx-out"
STEPS = 60
RATE = 3e-3
NO_METRIC = "none"
CHECKPOINTS = 4  # of a run, so that an interrupted one has something to resume


@dataclass(frozen=True)
class Asked:
    """The command line's words; paths are seen from the working directory, a spec's own paths from its folder."""

    spec: str | None = None
    plugins: Sequence[str] = ()
    model: str | None = None
    data: str | None = None
    eval: str | None = None
    calibration: str | None = None
    steps: int | None = None
    output: str | None = None
    overrides: Sequence[str] = ()
    metrics: Sequence[str] = ()
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Recipe:
    """A valid pipeline with absolute paths, and where each plugin stands in the spec."""

    pipeline: Pipeline
    where: dict[str, str] = field(default_factory=dict)
    text: str = ""
    """The pipeline as short YAML, overrides and options in it."""


def read(asked: Asked, registry: Registry) -> Recipe:
    """The pipeline that was asked for.

    Raises:
        PeftxError: neither a spec nor a plugin, or both. SpecError: all that is wrong in it.
    """
    from peftx_spec import load_spec, resolved
    from peftx_spec.dumper import dump_plain
    from peftx_spec.models import EvaluateSpec

    if bool(asked.spec) == bool(asked.plugins):
        problem = (
            "a spec and --plugin exclude each other"
            if asked.spec
            else "nothing to do: neither a spec nor a plugin"
        )
        raise PeftxError(
            problem, hint="peftx apply pipeline.yaml, or peftx apply --plugin lora --plugin prefixquant"
        )
    if asked.spec is None:
        text = text_for(asked, registry)
        loaded = load_spec(text, catalogue=registry, overrides=list(asked.overrides))
        return Recipe(resolved(loaded.pipeline, Path.cwd()), {}, dump_plain(loaded.overridden.data))
    loaded = load_spec(asked.spec, catalogue=registry, overrides=[*asked.overrides, *_as_overrides(asked)])
    pipeline = resolved(loaded.pipeline, Path(asked.spec).parent)
    where = {entry.id: loaded.place_of(entry.id) for entry in pipeline.stack}
    data = loaded.overridden.data
    if asked.metrics:
        data = {**data, "evaluate": _metrics(asked)}  # type: ignore[dict-item]
        metrics = tuple(EvaluateSpec.model_validate({name: {}}) for name in _metrics(asked))
        pipeline = pipeline.model_copy(update={"evaluate": metrics})
    return Recipe(pipeline, where, dump_plain(data))


def without_compression(recipe: Recipe, registry: Registry) -> Recipe:
    """What `train` runs: no compress stage, and no plugin that does nothing but compress."""
    from peftx_spec import dump, stages_of

    stages = tuple(stage for stage in stages_of(recipe.pipeline, registry) if stage.kind != "compress")
    idle = {e.id for e in recipe.pipeline.stack if registry.hooks(e.use) <= {"compress", "evaluate"}}
    stack = tuple(entry for entry in recipe.pipeline.stack if entry.id not in idle)
    kept = []
    for stage in stages:
        if stage.kind in ("evaluate", "save"):
            kept.append(stage)
            continue
        ids = tuple(id for id in stage.ids if id not in idle)
        if not ids:
            continue
        value = stage.train.model_copy(update={"plugins": ids}) if stage.train is not None else ids
        kept.append(stage.model_copy(update={stage.kind: value}))
    if not any(stage.train is not None for stage in kept):
        raise PeftxError("nothing trains in this pipeline", hint="add a 'train:' section, or use peftx apply")
    metrics = tuple(metric for metric in recipe.pipeline.evaluate if metric.metric not in idle)
    pipeline = recipe.pipeline.model_copy(update={"run": tuple(kept), "stack": stack, "evaluate": metrics})
    return replace(recipe, pipeline=pipeline, text=dump(pipeline))


def text_for(asked: Asked, registry: Registry) -> str:
    """The YAML of a list of plugins, with every stage spelled out: evaluate, change, evaluate again, save."""
    from peftx_spec.dumper import dump_plain

    return dump_plain(_document(asked, registry))


def _document(asked: Asked, registry: Registry) -> dict[str, Any]:
    from peftx_spec import Pipeline, stages_of

    stack = _entries(asked.plugins, registry)
    hooks = [registry.hooks(entry["use"]) for entry in stack]
    data = {"train": asked.data or SAMPLE["train"], "eval": asked.eval or asked.data or SAMPLE["eval"]}
    data["calibration"] = asked.calibration or (asked.data if asked.data else SAMPLE["calibration"])
    document: dict[str, Any] = {
        "peftx": 1,
        "model": {"id": _model(asked.model) or TINY},
        "data": {name: _from_here(path) for name, path in data.items()},
        "stack": stack,
        "output": asked.output or OUTPUT,
    }
    if not any("compress" in own for own in hooks):
        del document["data"]["calibration"]
    document["evaluate"] = _metrics(asked) if asked.metrics else _metrics_for(data["eval"])
    if _trains(document, asked, hooks, registry):
        steps = asked.steps or STEPS
        document["train"] = {
            "steps": steps,
            "learning_rate": RATE,
            "checkpoint_every": max(1, steps // CHECKPOINTS),
        }
    elif asked.steps is not None:
        raise PeftxError(
            "--steps has no effect: no plugin of this stack trains", hint="peftx list --hook inject"
        )
    stages = stages_of(Pipeline.model_validate(document), registry)
    order = ("peftx", "model", "data", "stack", "train", "evaluate", "run", "output")
    document["run"] = _run(stages)
    if not document["evaluate"] and not any("evaluate" in own for own in hooks):
        document["run"] = [
            stage for stage in document["run"] if not isinstance(stage, dict) or "evaluate" not in stage
        ]
    return {key: document[key] for key in order if key in document}


def _metrics(asked: Asked) -> list[str]:
    return [] if list(asked.metrics) == [NO_METRIC] else list(asked.metrics)


def _metrics_for(file: str) -> list[str]:
    """The metric that says most of rows of this format."""
    if file.startswith("peftx:"):
        return ["perplexity"]
    from peftx.data import detect_format

    kind = detect_format(os.path.expanduser(file))
    return {"classification": ["accuracy"], "preference": []}.get(kind, ["perplexity"])


def _entries(names: Sequence[str], registry: Registry) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name in names:
        registry.point(name)  # an unknown name is an error of the command line, not of a line in a spec
        entry = {"use": name}
        count = sum(other["use"] == name for other in entries)
        entries.append(entry | {"id": f"{name}-{count + 1}"} if count else entry)
    return entries


def _trains(
    document: dict[str, Any], asked: Asked, hooks: Sequence[frozenset[str]], registry: Registry
) -> bool:
    """Whether a parameter of the stack trains: asked of the stack itself, on the meta device, overrides in it.

    Raises:
        SpecError: what is wrong with the overrides, before a model is looked at.
    """
    if any("train_step" in own for own in hooks):
        return True
    if not any("inject" in own for own in hooks):
        return False
    from peftx.planning import plan
    from peftx_spec import load_pipeline
    from peftx_spec.dumper import dump_plain

    draft = dump_plain({**document, "train": {}})
    pipeline = load_pipeline(draft, catalogue=registry, overrides=list(asked.overrides))
    planned = plan(pipeline, registry=registry, trust_remote_code=asked.trust_remote_code)
    return bool(planned.conflicts) or planned.totals.trainable_params > 0  # a conflict is reported by the run


def _run(stages: Sequence[Any]) -> list[Any]:
    """Stages as YAML, an evaluation around each that changes the model."""
    kinds = [stage.kind for stage in stages]
    changing = [index for index, kind in enumerate(kinds) if kind in ("inject", "train")]
    run: list[Any] = [{"evaluate": {"name": "base"}}]
    compressed = 0
    for index, stage in enumerate(stages):
        if stage.kind in ("evaluate", "save"):
            continue
        run.append("train" if stage.kind == "train" else {stage.kind: list(stage.ids)})
        if stage.kind == "compress":
            compressed += 1
            name = "compressed" if compressed == 1 else f"compressed-{compressed}"
            run.append({"evaluate": {"name": name}})
        elif changing and index == changing[-1]:
            run.append({"evaluate": {"name": "adapted"}})
    return [*run, "save"]


def _from_here(path: str) -> str:
    return path if path.startswith("peftx:") else os.path.abspath(os.path.expanduser(path))


def _model(id: str | None) -> str | None:
    """A folder becomes absolute; the id of a hub stays."""
    return _from_here(id) if id and id.startswith(("./", "../", "~/")) else id


def _as_overrides(asked: Asked) -> list[str]:
    """The options of the command line as overrides of a spec."""
    from peftx_spec.dumper import dump_plain

    texts = {
        "model.id": _model(asked.model),
        "data.train.path": asked.data and _from_here(asked.data),
        "data.eval.path": asked.eval and _from_here(asked.eval),
        "data.calibration.path": asked.calibration and _from_here(asked.calibration),
        "output": asked.output and _from_here(asked.output),
    }
    overrides = [
        f"{key}={dump_plain({'v': text}).removeprefix('v: ').strip()}" for key, text in texts.items() if text
    ]
    return [*overrides, f"train.steps={asked.steps}"] if asked.steps is not None else overrides
