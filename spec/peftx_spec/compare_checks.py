"""What no field of a comparison can see by itself, read off the raw data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from peftx_spec.dumper import dump_plain
from peftx_spec.errors import nearest
from peftx_spec.models import HIGHER_IS_BETTER, LM_EVAL
from peftx_spec.overrides import entry_ids
from peftx_spec.problems import Path
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.trainer_names import our_name
from peftx_spec.translate import Finding

MOST_ROWS = 1000
"""Rows of a comparison; a grid of ten keys with ten values each would be more than any machine runs."""

_NOT_OF_A_BASE = {
    "stack": "it stands beside the base, under '{key}'",
    "run": "the stages follow from the stack",
    "output": "peftx {key} --output DIR says where the results go",
}
OF_TRAINING = {
    "steps": "'compare.budget' says how long every row trains",
    "learning_rate": "'compare.learning_rate' lists the rates that are tried",
    "seed": "'compare.seeds' lists them",
}


def check_compare(data: Data) -> Iterator[Finding]:
    """Everything in `compare:` but its base."""
    compare = mapping_of(data, "compare")
    yield from repeated(("compare", "seeds"), list_of(compare, "seeds"), "the seed")
    yield from repeated(("compare", "learning_rate"), list_of(compare, "learning_rate"), "the learning rate")
    methods = mapping_of(compare, "methods")
    rows = 0
    for name, method in methods.items():
        if isinstance(method, dict):
            path: Path = ("compare", "methods", name)
            yield from _method(path, method)
            rows += rows_of(method)
    if rows > MOST_ROWS:
        message = f"the grids make {rows:,} rows, and at most {MOST_ROWS:,} are compared"
        yield Finding(("compare", "methods"), message, at_key=True, suggestion="list fewer values")


def rows_of(method: Data) -> int:
    """How many rows a method's grid makes."""
    return math.prod(
        max(1, len(list_of(mapping_of(method, "grid"), key))) for key in mapping_of(method, "grid")
    )


def repeated(path: Path, values: list[object], noun: str) -> Iterator[Finding]:
    seen: dict[str, int] = {}
    for index, value in enumerate(values):
        text = value_text(value)
        if text in seen:
            yield Finding((*path, index), f"{noun} {text} stands twice", suggestion="leave one of them out")
        seen[text] = index


def value_text(value: object) -> str:
    """A value as a row's name has it: `4`, `0.001`, `[q, v]`."""
    return dump_plain({"v": value}).removeprefix("v:").strip().replace("\n", " ")


def _method(path: Path, method: Data) -> Iterator[Finding]:
    yield from repeated((*path, "learning_rate"), list_of(method, "learning_rate"), "the learning rate")
    if method.get("learning_rate") is not None and method.get("stack") == []:
        message = "'learning_rate' has no effect: the stack is empty, so nothing trains"
        yield Finding((*path, "learning_rate"), message, at_key=True, suggestion="leave it out")
    if "grid" in method and method["grid"] is None:
        yield Finding((*path, "grid"), "'grid' has no value", at_key=True, suggestion="leave the key out")
    ids = entry_ids(method)
    for key, values in mapping_of(method, "grid").items():
        place = (*path, "grid", key)
        if isinstance(values, list):
            yield from repeated(place, values, f"'{key}':")
        head, _, option = key.partition(".")
        known = [*ids, "train"]
        if head not in known:
            expected = f"<id>.<option>, with one of {', '.join(known)}"
            message = f"there is no '{head}' to vary in this stack"
            yield Finding(place, message, at_key=True, expected=expected, suggestion=nearest(head, known))
        elif not option:
            yield Finding(place, f"'{key}' names no option", at_key=True, expected=f"{head}.<option>")
        elif head == "train" and our_name(option) in OF_TRAINING:
            message = f"'{key}' is not a grid's to vary"
            yield Finding(place, message, at_key=True, suggestion=OF_TRAINING[our_name(option)])


def check_base(base: Data, metric: object, key: str, of_training: Mapping[str, str]) -> list[Finding]:
    """Everything in the base, with paths that start in it, and in the metric that is chosen by.

    Args:
        key: what the file is under. of_training: settings that its training may not have, with what to do instead.
    """
    return [
        *(Finding((name,), f"a base has no '{name}'", at_key=True, suggestion=remedy.replace("{key}", key))
          for name, remedy in _NOT_OF_A_BASE.items() if name in base),
        *(Finding(("train", name), f"'{name}' is not the base's to say", at_key=True, suggestion=remedy)
          for name, remedy in of_training.items() if name in mapping_of(base, "train")),
        *_base_data(base),
        *_metrics(base, metric),
    ]  # fmt: skip


def _base_data(base: Data) -> Iterator[Finding]:
    data = base.get("data")
    if not isinstance(data, dict):
        return
    if data.get("eval") is None and data.get("holdout") is None:
        message = "there are no rows to measure on: neither 'eval' nor 'holdout'"
        yield Finding(("data",), message, at_key=True, suggestion="write 'eval: file', or 'holdout: 0.1'")
    if data.get("eval") is not None and _path_of(data["eval"]) == _path_of(data.get("train")):
        message = "'eval' names the file of 'train': every row would be measured on what it was trained on"
        yield Finding(("data", "eval"), message, suggestion="write 'holdout: 0.1' in its place")


def _path_of(source: object) -> object:
    return source.get("path") if isinstance(source, dict) else source


def _metrics(base: Data, metric: object) -> Iterator[Finding]:
    """Metrics of a comparison are measured on data.eval, so that rates can be chosen by them on other rows."""
    listed: list[str] = []
    for index, item in enumerate(list_of(base, "evaluate")):
        for name, options in (
            {item: None} if isinstance(item, str) else item if isinstance(item, dict) else {}
        ).items():
            listed.append(str(name))
            if name == LM_EVAL:
                message = f"'{name}' has rows of its own, and a comparison measures on those of the base"
                remedy = "measure the best bundle: peftx evaluate BUNDLE --task NAME"
                yield Finding(("evaluate", index), message, suggestion=remedy)
                continue
            if isinstance(options, str) or (isinstance(options, dict) and "path" in options):
                message = f"'{name}' has rows of its own, and a rate would be chosen on them"
                yield Finding(
                    ("evaluate", index, name), message, suggestion="name them as 'data: {eval: file}'"
                )
    wanted = metric if isinstance(metric, str) else next(iter(listed), None)
    place: Path = ("metric",) if isinstance(metric, str) else ("evaluate", 0)
    if isinstance(metric, str) and listed and metric not in listed:
        message = f"'metric' is '{metric}', which 'evaluate' does not list"
        yield Finding(
            place, message, expected=f"one of {', '.join(listed)}", suggestion=nearest(metric, listed)
        )
    elif wanted is not None and wanted not in HIGHER_IS_BETTER:
        known = ", ".join(HIGHER_IS_BETTER)
        message = f"whether more of '{wanted}' is better, nobody knows"
        yield Finding(
            place, message, expected=f"one of {known}", suggestion=nearest(wanted, HIGHER_IS_BETTER)
        )
