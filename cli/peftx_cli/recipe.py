"""From what was asked on the command line to a valid pipeline: a spec with overrides, or a list of plugins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx.errors import TrainingError, UsageError
from peftx_cli.columns import pairs_of
from peftx_spec.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftx.composition.registry import Registry
    from peftx_spec import Pipeline, PlannedConflict

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
HOLDOUT = {"share": 0.1, "most": 1000}
COMMAND_LINE = "<command line>"
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
    columns: str | None = None
    split: float | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A valid pipeline with absolute paths, and where each plugin stands in the spec."""

    pipeline: Pipeline
    where: dict[str, str] = field(default_factory=dict)
    text: str = ""
    """The pipeline as short YAML, overrides and options in it."""
    conflicts: Sequence[PlannedConflict] = ()
    """What a plan of it found in the way, where one was made."""


def read(asked: Asked, registry: Registry) -> Recipe:
    """The pipeline that was asked for.

    Raises:
        PeftxError: neither a spec nor a plugin, or both. SpecError: all that is wrong in it.
    """
    from peftx_cli import ahead
    from peftx_spec import load_spec, resolved
    from peftx_spec.dumper import dump_plain

    plugins = bool(asked.plugins) or asked.adapter is not None
    if bool(asked.spec) == plugins:
        problem = (
            f"a spec and {'--plugin' if asked.plugins else '--adapter'} exclude each other"
            if asked.spec
            else "nothing to do: neither a spec nor a plugin"
        )
        raise UsageError(
            problem, hint="peftx apply pipeline.yaml, or peftx apply --plugin lora --plugin prefixquant"
        )
    flags: dict[str, str] = {}
    conflicts: Sequence[PlannedConflict] = ()
    if asked.spec is None:
        text, conflicts = text_for(asked, registry)
    else:
        text, flags = asked.spec, _flags(asked)
    with _naming(asked, flags):
        overrides = [*asked.overrides, *flags]
        folder = Path.cwd() if asked.spec is None else Path(asked.spec).parent
        more = partial(ahead.further, registry=registry, folder=folder)
        loaded = load_spec(text, catalogue=registry, overrides=overrides, name=COMMAND_LINE, more=more)
        pipeline = resolved(loaded.pipeline, folder)
        ahead.check(loaded, pipeline, registry)
    places = {} if asked.spec is None else {entry.id: loaded.place_of(entry.id) for entry in pipeline.stack}
    data = loaded.overridden.data
    if asked.spec is not None and list(asked.metrics) == [NO_METRIC]:
        data = {**data, "evaluate": []}
        pipeline = pipeline.model_copy(update={"evaluate": ()})
    return Recipe(pipeline, places, dump_plain(data), conflicts)


@contextmanager
def _naming(asked: Asked, flags: dict[str, str]) -> Iterator[None]:
    """Options of the command line go into a spec as overrides; their problems are theirs, and not those of a --set."""
    from peftx_spec.problems import SpecError

    names = {f"--set #{len(asked.overrides) + n}": flag for n, flag in enumerate(flags.values(), start=1)}
    try:
        yield
    except SpecError as error:
        raise SpecError(
            [replace(problem, file=names.get(problem.file, problem.file)) for problem in error.problems]
        ) from error


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
        raise TrainingError(
            "nothing trains in this pipeline", hint="add a 'train:' section, or use peftx apply"
        )
    metrics = tuple(metric for metric in recipe.pipeline.evaluate if metric.metric not in idle)
    pipeline = recipe.pipeline.model_copy(update={"run": tuple(kept), "stack": stack, "evaluate": metrics})
    return replace(recipe, pipeline=pipeline, text=dump(pipeline))


def text_for(asked: Asked, registry: Registry) -> tuple[str, Sequence[PlannedConflict]]:
    """The YAML of a list of plugins, with every stage spelled out: evaluate, change, evaluate again, save; and what a
    plan of it found in the way."""
    from peftx_spec import Pipeline, stages_of
    from peftx_spec.dumper import dump_plain

    stack = _entries(asked.plugins, registry, adapter=asked.adapter)
    hooks = frozenset[str]().union(*(registry.hooks(entry["use"]) for entry in stack))
    formats = _formats(asked)
    document: dict[str, Any] = {
        "peftx": 1,
        "model": {"id": _model(asked.model) or _base_of(asked.adapter) or TINY},
        "data": {},
        "stack": stack,
        "output": asked.output or OUTPUT,
        "evaluate": _metrics(asked) if asked.metrics else _metrics_for(formats),
    }
    measures = bool(document["evaluate"]) or "evaluate" in hooks
    document["data"] = _data(asked, hooks, trains=True, measures=measures)
    trains, conflicts = _trains(document, asked, hooks, registry)
    if not trains:
        document["data"] = _data(asked, hooks, trains=False, measures=measures)
        if asked.steps is not None:
            raise UsageError(
                "--steps has no effect: no plugin of this stack trains", hint="peftx list --hook inject"
            )
    else:
        steps = asked.steps or STEPS
        document["train"] = {
            "steps": steps,
            "learning_rate": RATE,
            "checkpoint_every": max(1, steps // CHECKPOINTS),
        }
    document["run"] = _run(stages_of(Pipeline.model_validate(document), registry), measures=measures)
    order = ("peftx", "model", "data", "stack", "train", "evaluate", "run", "output")
    return dump_plain({key: document[key] for key in order if key in document}), conflicts


def _formats(asked: Asked) -> dict[str, str | None]:
    """The formats of the files that the command line names.

    Raises:
        PeftxError: one that is not there, or that holds no rows.
    """
    named = {"--data": asked.data, "--eval": asked.eval, "--calibration": asked.calibration}
    columns = _columns(asked)
    return {
        option: format_of(option, file, columns if option != "--calibration" else {})
        for option, file in named.items()
        if file is not None
    }


def _columns(asked: Asked) -> dict[str, str]:
    """The names of columns in the files of the command line."""
    found = pairs_of(asked.columns)
    if found and asked.data is None and asked.eval is None:
        raise UsageError(
            "--columns names columns of --data and --eval, and there is neither", hint="--data FILE"
        )
    return found


def format_of(option: str, file: str, columns: dict[str, str] | None = None) -> str | None:
    """The format of a file's rows, if the first one tells. Raises `PeftxError`, as `_formats`."""
    from peftx_cli.peek import MAP, Unfit, look

    try:
        return look(_from_here(file), columns=columns or {})
    except Unfit as error:
        hint = "--columns OURS=THEIRS, as in prompt=ask,completion=reply" if error.hint == MAP else error.hint
        raise DataError(f"{option}: {error.message}", hint=hint or None) from error


def _data(asked: Asked, hooks: frozenset[str], *, trains: bool, measures: bool) -> dict[str, Any]:
    """The data that this stack reads: the files of the command line, else the samples.

    What is trained on is not measured on: without --eval a part of the rows of --data is held out.

    Raises:
        PeftxError: a file that nothing would read.
    """
    compresses = "compress" in hooks
    reads = trains or "prepare_data" in hooks or (compresses and asked.calibration is None)
    data: dict[str, Any] = {}
    if asked.data is None:
        data = {name: SAMPLE[name] for name in ("train", "eval", "calibration")}
        if not trains and "prepare_data" not in hooks:
            del data["train"]
    elif reads:
        share = asked.split if asked.split is not None else HOLDOUT
        data = {"train": _source(asked, asked.data)} | ({"holdout": share} if measures else {})
    elif asked.eval is None:
        data = {"eval": _source(asked, asked.data)}  # nothing learns from it
    else:
        raise UsageError("--data has no effect: nothing in this stack reads it", hint="leave it out")
    if asked.split is not None and "holdout" not in data:
        raise UsageError(
            "--split has no effect: no rows of --data are both trained on and measured", hint="leave it out"
        )
    if asked.eval is not None:
        if asked.split is not None:
            raise UsageError("--split and --eval exclude each other: both say what is measured on")
        data = {name: source for name, source in data.items() if name != "holdout"}
        data["eval"] = _source(asked, asked.eval)
    if asked.calibration is not None:
        data["calibration"] = _from_here(asked.calibration)
    if not compresses:
        if asked.calibration is not None:
            raise UsageError(
                "--calibration has no effect: no plugin of this stack compresses",
                hint="peftx list --hook compress",
            )
        data.pop("calibration", None)
    return {name: data[name] for name in ("train", "holdout", "eval", "calibration") if name in data}


def _source(asked: Asked, file: str) -> str | dict[str, Any]:
    """A file of the command line, with the names that --columns gives its columns."""
    columns = _columns(asked)
    return {"path": _from_here(file), "columns": columns} if columns else _from_here(file)


def _metrics(asked: Asked) -> list[str]:
    return [] if list(asked.metrics) == [NO_METRIC] else list(asked.metrics)


def _metrics_for(formats: dict[str, str | None]) -> list[str]:
    """The metric that says most of rows of this format."""
    kind = formats.get("--eval", formats.get("--data"))
    return {"classification": ["accuracy"], "preference": []}.get(kind or "", ["perplexity"])


def _base_of(adapter: str | None) -> str | None:
    """The model that an adapter of HF PEFT names."""
    from peftx.composition.adapters import read_adapter

    return None if adapter is None else read_adapter(_from_here(adapter)).base


def _entries(names: Sequence[str], registry: Registry, *, adapter: str | None = None) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    if adapter is not None:
        path = _from_here(adapter)
        for each in registry.adapter(path):
            entry = {"use": each["use"], "id": _free(each["use"], entries), "with": each["with"]}
            entries.append({**entry, "path": path})
    for name in names:
        registry.point(name)  # an unknown name is an error of the command line, not of a line in a spec
        id = _free(name, entries)
        entries.append({"use": name} | ({"id": id} if id != name else {}))
    return entries


def _free(name: str, entries: Sequence[dict[str, Any]]) -> str:
    """The name itself, or with the first number behind it that makes it another one's than those of the entries."""
    taken = {entry.get("id", entry["use"]) for entry in entries}
    numbered = (f"{name}-{number}" for number in range(2, len(entries) + 2))
    return name if name not in taken else next(id for id in numbered if id not in taken)


def _trains(
    document: dict[str, Any], asked: Asked, hooks: frozenset[str], registry: Registry
) -> tuple[bool, Sequence[PlannedConflict]]:
    """Whether a parameter of the stack trains: asked of the stack itself, on the meta device, overrides in it; and what
    is in the way.

    Raises:
        SpecError: what is wrong with the overrides, before a model is looked at.
    """
    if "train_step" in hooks:
        return True, ()
    if "inject" not in hooks:
        return False, ()
    from peftx.planning import plan
    from peftx_spec import load_spec
    from peftx_spec.dumper import dump_plain

    draft = dump_plain({**document, "train": {"steps": asked.steps or STEPS, "learning_rate": RATE}})
    loaded = load_spec(draft, catalogue=registry, overrides=list(asked.overrides), name=COMMAND_LINE)
    planned = plan(loaded.pipeline, registry=registry, trust_remote_code=asked.trust_remote_code)
    return bool(planned.conflicts) or planned.totals.trainable_params > 0, planned.conflicts


def _run(stages: Sequence[Any], *, measures: bool) -> list[Any]:
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
    if not measures:
        run = [stage for stage in run if not isinstance(stage, dict) or "evaluate" not in stage]
    return [*run, "save"]


def _from_here(path: str) -> str:
    return path if path.startswith(("peftx:", "hub:")) else os.path.abspath(os.path.expanduser(path))


def _model(id: str | None) -> str | None:
    """A folder becomes absolute; the id of a hub stays."""
    return _from_here(id) if id and id.startswith(("./", "../", "~/")) else id


def _flags(asked: Asked) -> dict[str, str]:
    """The options of the command line as overrides of a spec, and what each is called."""
    import json

    from peftx_spec.scalars import escape

    _columns(asked)  # without a file that they are of, they are refused
    values: list[tuple[str, str, object]] = [
        ("--model", "model.id", asked.model),
        ("--data", "data.train.path", asked.data),
        ("--eval", "data.eval.path", asked.eval),
        ("--calibration", "data.calibration.path", asked.calibration),
        ("--output", "output", asked.output),
        ("--metric", "evaluate", _metrics(asked)),
        ("--steps", "train.steps", asked.steps),
        ("--columns", "data.train.columns", _columns(asked) if asked.data is not None else None),
        ("--columns", "data.eval.columns", _columns(asked) if asked.eval is not None else None),
        ("--split", "data.holdout", asked.split),
    ]
    return {
        f"{target}={escape(json.dumps(value, ensure_ascii=False))}": flag
        for flag, target, value in values
        if value or value == 0  # which the spec refuses
    }
