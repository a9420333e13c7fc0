"""What is wrong with the stages of `run`, and with sections that nothing reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from peftx_spec.errors import nearest
from peftx_spec.overrides import entry_ids
from peftx_spec.problems import Path
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.stages import ALL, HOOK_OF_STAGE, RunStage
from peftx_spec.translate import Finding


def _stages(data: Data, at: Path = ("run",)) -> Iterator[tuple[Path, object, RunStage]]:
    """Place, raw value and model of each stage of `run` that is well formed, those of `repeat` too."""
    for index, item in enumerate(list_of(data, "run")):
        path = (*at, index)
        try:
            stage = RunStage.model_validate(item, by_alias=True, by_name=False)
        except ValidationError:
            continue  # the pipeline's own validation names what is wrong with it
        if stage.repeat is not None and isinstance(item, dict):
            yield from _stages(item["repeat"], (*path, "repeat", "run"))
        else:
            yield path, item, stage


def _overs(data: Data, at: Path = ("run",)) -> Iterator[tuple[Path, list[object]]]:
    """Place and names of each `over`, those of a `repeat` in a `repeat` too."""
    for index, item in enumerate(list_of(data, "run")):
        repeat = item.get("repeat") if isinstance(item, dict) else None
        if isinstance(repeat, dict):
            path = (*at, index, "repeat")
            yield (*path, "over"), list_of(repeat, "over")
            yield from _overs(repeat, (*path, "run"))


def _is_whole(data: Data, stages: Sequence[tuple[Path, object, RunStage]]) -> bool:
    """Is every stage of `run` well formed; of one that is not nothing is known."""
    return len({at[1] for at, _, _ in stages}) == len(list_of(data, "run"))


def _id_path(path: Path, item: object, stage: RunStage, place: int) -> Path:
    """Where a stage's id number `place` stands: `compress: [a, b]`, `compress: a`, `train: {plugins: a}`."""
    value = item
    for key in (stage.kind, *(("plugins",) if stage.train is not None else ())):
        if isinstance(value, dict) and key in value:
            path, value = (*path, key), value[key]
    return (*path, place) if isinstance(value, list) else path


def run_findings(data: Data, hooks: dict[int, frozenset[str]]) -> Iterator[Finding]:
    if not isinstance(data.get("run"), list):
        return
    ids = entry_ids(data)
    used: set[str] = set()
    results: set[str] = set()
    trains = saves_to_output = False
    stages = list(_stages(data))
    sources = mapping_of(mapping_of(data, "data"), "sources")
    for at, names in _overs(data):
        for place, name in enumerate(names):
            if name not in sources:
                message = f"'over' names '{name}', which is not in data.sources"
                known = ", ".join(sources) or "none: data.sources is empty"
                yield Finding(
                    (*at, place),
                    message,
                    expected=f"a source ({known})",
                    suggestion=nearest(str(name), sources),
                )
    for at, item, stage in stages:
        hook = HOOK_OF_STAGE.get(stage.kind)
        if stage.ids == (ALL,):
            used |= {id for id, entry in ids.items() if hook in hooks.get(entry, ())}
        for place, id in enumerate(stage.ids if stage.ids != (ALL,) else ()):
            path = _id_path(at, item, stage, place)
            used.add(id)
            if id in stage.ids[:place]:
                yield Finding(path, f"'{stage.kind}' lists '{id}' twice")
            if id not in ids:
                known = ", ".join(ids) or "none: the stack is empty"
                message = f"'{stage.kind}' lists '{id}', which is not in the stack"
                yield Finding(
                    path, message, expected=f"an id of the stack ({known})", suggestion=nearest(id, ids)
                )
            elif hook is not None and hook not in hooks.get(ids[id], frozenset({hook})):
                able = [name for name, entry in ids.items() if hook in hooks.get(entry, ())]
                message = f"'{stage.kind}' lists '{id}', which has no {hook} hook"
                yield Finding(
                    path, message, expected=f"one of {', '.join(able)}" if able else "no such stage here"
                )
        trains = trains or stage.train is not None
        if stage.drop is not None and "repeat" in at:
            message = "'drop' in 'repeat' finds nothing to remove in the second round"
            yield Finding((*at, "drop"), message, at_key=True, suggestion="put it behind the 'repeat'")
        if stage.evaluate is not None and stage.evaluate.name is not None:
            if stage.evaluate.name in results:
                message = (
                    f"two evaluations are named '{stage.evaluate.name}'; the second would replace the first"
                )
                yield Finding((*at, "evaluate", "name"), message)
            results.add(stage.evaluate.name)
        if stage.save is not None and stage.save.path is None:
            if data.get("output") is None:
                message = "'save' has no path, and the spec has no 'output'"
                yield Finding((*at, "save"), message, at_key=True, suggestion="write 'save: folder'")
            elif saves_to_output:
                message = "a second 'save' to 'output' would replace the first"
                yield Finding((*at, "save"), message, at_key=True, suggestion="write 'save: folder'")
            saves_to_output = True
    if data.get("train") is not None and not trains and _is_whole(data, stages):
        yield Finding(("train",), "'train' has no effect: 'run' has no train stage", at_key=True)
    if used - set(ids):
        return  # a misspelt id is the likely reason that another one is not listed
    for id, entry in ids.items():
        able = [stage for stage, hook in HOOK_OF_STAGE.items() if hook in hooks.get(entry, ())]
        if able and id not in used:
            message = f"'{id}' is in the stack, but no stage of 'run' lists it"
            yield Finding(("stack", entry), message, suggestion=f"add '- {able[0]}: {id}' to 'run'")


def rate_findings(data: Data, hooks: dict[int, frozenset[str]]) -> Iterator[Finding]:
    """Learning rates of plugins that are not there, or inject nothing."""
    ids = entry_ids(data)
    trains: list[tuple[Path, Data]] = [(("train",), mapping_of(data, "train"))]
    trains += [
        ((*at, "train"), mapping_of(item, "train")) for at, item, _ in _stages(data) if isinstance(item, dict)
    ]
    for at, train in trains:
        for id in mapping_of(train, "learning_rates"):
            path = (*at, "learning_rates", id)
            if id not in ids:
                known = ", ".join(ids) or "none: the stack is empty"
                message = f"'learning_rates' names '{id}', which is not in the stack"
                expected, near = f"an id of the stack ({known})", nearest(id, ids)
                yield Finding(path, message, at_key=True, expected=expected, suggestion=near)
            elif "inject" not in hooks.get(ids[id], frozenset({"inject"})):
                yield Finding(
                    path, f"'{id}' injects nothing that could train", at_key=True, suggestion="leave it out"
                )


def need_findings(data: Data, hooks: dict[int, frozenset[str]]) -> Iterator[Finding]:
    """Training needs data and something that trains, evaluation something to compute; and what is given has a use."""
    stages = list(_stages(data))
    if data.get("run") is None:
        trains: list[Path] = [("train",)] if isinstance(data.get("train"), dict) else []
        will_train, evaluates = "train" in data, True
    else:
        trains = [(*at, "train") for at, _, stage in stages if stage.train is not None]
        is_whole = _is_whole(data, stages)
        will_train = bool(trains) or not is_whole or "train" in data  # that it has no effect is said already
        evaluates = not is_whole or any(stage.evaluate is not None for _, _, stage in stages)
    able = frozenset().union(*hooks.values())
    is_known = len(hooks) == len(list_of(data, "stack")) and isinstance(data.get("stack", []), list)
    sources = mapping_of(data, "data")
    streams = [at[:-1] for at, names in _overs(data) if names]
    without = [at for at in trains if not any(at[: len(stream)] == stream for stream in streams)]
    if without and "prepare_data" not in able and sources.get("train") is None:  # a plugin may make the data
        message = "there is nothing to train on: data.train is missing"
        yield Finding(without[0], message, at_key=True, suggestion="write 'data: {train: file}'")
    elif trains and is_known and not able & {"inject", "train_step"}:
        message = (
            "there is nothing to train: no plugin of the stack injects parameters or brings a training step"
        )
        remedy = "add one to 'stack' (peftx list --hook inject), or leave 'train' out"
        yield Finding(trains[0], message, at_key=True, suggestion=remedy)
    if is_known:
        yield from _idle_data(data, able, will_train=will_train)
    if mapping_of(data, "train").get("eval_steps") is not None and not {"eval", "holdout"} & sources.keys():
        message = "there is nothing to measure on while it trains: data.eval is missing"
        remedy = "write 'data: {eval: file}', or hold rows out: 'data: {holdout: 0.1}'"
        yield Finding(("train", "eval_steps"), message, at_key=True, suggestion=remedy)
    metrics = bool(list_of(data, "evaluate"))
    if metrics and not evaluates:
        message = "'evaluate' has no effect: 'run' has no evaluate stage"
        yield Finding(("evaluate",), message, at_key=True, suggestion="add '- evaluate' to 'run'")
    for at, _, stage in stages:
        if stage.evaluate is not None and not metrics and "evaluate" not in able:
            message = "there is nothing to evaluate: the spec lists no metric"
            yield Finding((*at, "evaluate"), message, at_key=True, suggestion="add 'evaluate: [...]'")


def _idle_data(data: Data, able: frozenset[str], *, will_train: bool) -> Iterator[Finding]:
    """Data that nothing reads: most often a 'train' section that was forgotten, and an adapter that stays untrained."""
    sources = mapping_of(data, "data")
    calibrates = "compress" in able and sources.get("calibration") is None
    read = will_train or "prepare_data" in able or calibrates or sources.get("holdout") is not None
    if sources.get("train") is not None and not read:
        message = "'data.train' has no effect: nothing is trained"
        remedy = (
            "add 'train: {}' for training with the defaults"
            if data.get("run") is None
            else "add '- train' to 'run'"
        )
        yield Finding(
            ("data", "train"), message, at_key=True, suggestion=f"{remedy}, or leave data.train out"
        )
    if sources.get("calibration") is not None and "compress" not in able:
        message = "'data.calibration' has no effect: no plugin of the stack compresses"
        yield Finding(("data", "calibration"), message, at_key=True, suggestion="leave it out")
