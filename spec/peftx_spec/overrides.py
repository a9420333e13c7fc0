"""`--set lora.rank=16`: values in place of the file's, addressed by section or by a plugin's id."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftx_spec.errors import nearest
from peftx_spec.loader import MAX_DEPTH, parse_value
from peftx_spec.problems import Path, Problem, describe, path_text
from peftx_spec.scalars import ScalarError
from peftx_spec.trainer_names import our_name, with_our_names

SECTIONS = ("peftx", "model", "data", "stack", "train", "evaluate", "run", "output", "runtime")
SETTABLE = ("model", "data", "train", "evaluate", "output", "runtime")
RESERVED_IDS = frozenset({*SECTIONS, "all"})

VALUES = "a value as in YAML: 16, 1e-4, [1, 2], {a: 1}, 'text with [brackets'"

_SHORTHAND: dict[Path, str] = {
    ("model",): "id",
    ("data", "train"): "path",
    ("data", "eval"): "path",
    ("data", "calibration"): "path",
    ("runtime",): "engine",
}
"""Where a plain string stands for a mapping with one key."""

_INSTEAD: dict[Path, str] = {("data", "eval"): "holdout", ("data", "holdout"): "eval"}
"""Two ways to say one thing: what is set takes the place of the file's other one."""


class _OverrideError(Exception):
    """An override that cannot be carried out; `column` counts from 1 in its text."""

    def __init__(self, message: str, *, column: int = 1, expected: str = "", suggestion: str = "") -> None:
        super().__init__(message)
        self.column = column
        self.expected = expected
        self.suggestion = suggestion


@dataclass
class Overridden:
    """The data with all overrides in it, and which override each changed path came from."""

    data: dict[str, object]
    texts: Sequence[str]
    origin: dict[Path, tuple[int, int]] = field(
        default_factory=dict
    )  # path -> override (from 0), column (from 1)
    problems: list[Problem] = field(default_factory=list)

    def source(self, path: Path) -> tuple[int, int] | None:
        """The override that `path`, or the mapping around it, comes from; None where that is the file."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origin:
                return self.origin[path[:end]]
        return None

    def problem(self, message: str, source: tuple[int, int], path: Path = (), **words: str) -> Problem:
        """A problem that stands in an override."""
        index, column = source
        return Problem(message, f"--set #{index + 1}", 1, column, self.texts[index], path_text(path), **words)


def override(data: dict[str, object], texts: Sequence[str]) -> Overridden:
    """`data`, copied, with the overrides `target=value` in it in order; faulty ones are noted and skipped."""
    result = Overridden(copy.deepcopy(data), texts)
    for index, text in enumerate(texts):
        try:
            _carry_out(result, index, text)
        except _OverrideError as error:
            source = (index, error.column)
            words = {"expected": error.expected, "suggestion": error.suggestion}
            result.problems.append(result.problem(str(error), source, (), **words))
    return result


def _carry_out(result: Overridden, index: int, text: str) -> None:
    target, equals, raw = text.partition("=")
    names = [name.strip() for name in target.split(".")]
    if not equals or not all(names):
        raise _OverrideError(
            "an override is 'target=value'", expected="lora.rank=16, train.steps=50, model.id=..."
        )
    if len(names) > MAX_DEPTH:
        raise _OverrideError(f"a target of {len(names)} names; a spec is at most {MAX_DEPTH} levels deep")
    try:
        value = parse_value(raw)
    except ScalarError as error:
        raise _OverrideError(str(error), column=len(target) + 2, expected=VALUES) from error
    if names == ["train"] and isinstance(value, dict):
        value, twice = with_our_names(value)
        if twice:
            ours, theirs = twice[0]
            raise _OverrideError(f"'{ours}' and '{theirs}' are names of one thing", column=len(target) + 2,
                                 suggestion="leave one of them out")  # fmt: skip
    path, rest = _target(result.data, names)
    _put(result, index, path, rest, value, column=len(target) + 2)


def _target(data: dict[str, object], names: list[str]) -> tuple[Path, list[str]]:
    """The path of the mapping that the override goes into, and the keys below it."""
    head = names[0]
    if head in SETTABLE:
        if head == "evaluate" and len(names) > 1:
            return _metric(data, names)
        if head == "train" and len(names) > 1:
            return (), [head, our_name(names[1]), *names[2:]]
        return (), names
    if head in SECTIONS:
        reason = (
            f"name a plugin by its id instead: {_ids_text(data)}"
            if head == "stack"
            else "change it in the file"
        )
        raise _OverrideError(f"'{head}' cannot be set from the command line; {reason}")
    index = entry_ids(data).get(head)
    known = [*SETTABLE, *entry_ids(data)]
    if index is None:
        message = f"there is no '{head}' to set"
        raise _OverrideError(message, expected=f"one of {', '.join(known)}", suggestion=nearest(head, known))
    if len(names) < 2:
        raise _OverrideError(f"'{head}' is a plugin; name the option too: {head}.<option>=value")
    return ("stack", index), ["with", *names[1:]]


def _metric(data: dict[str, object], names: list[str]) -> tuple[Path, list[str]]:
    items = data.get("evaluate")
    metrics: dict[str, int] = {}
    for index, item in enumerate(items if isinstance(items, list) else []):
        name = item if isinstance(item, str) else next(iter(item), None) if isinstance(item, dict) else None
        if name is not None:
            metrics.setdefault(str(name), index)
    if len(names) < 3 or names[1] not in metrics:
        listed = ", ".join(metrics) or "(none listed)"
        raise _OverrideError(
            f"there is no '{'.'.join(names)}' to set",
            expected=f"evaluate.<metric>.<option>, with one of the metrics {listed}",
            suggestion=nearest(names[1], metrics) if len(names) > 1 else "",
        )
    return ("evaluate", metrics[names[1]]), names[1:]


def _put(result: Overridden, index: int, path: Path, rest: list[str], value: object, *, column: int) -> None:
    """Set `value` below `path`; mappings that are missing are made, shorthands are written out."""
    container = _mapping_at(result, (), path, index, column)
    for name in rest[:-1]:
        path = (*path, name)
        container = _mapping_at(result, path[:-1], (name,), index, column)
    path = (*path, rest[-1])
    container[rest[-1]] = value
    other = _INSTEAD.get(path[:2])
    if other is not None and result.source((path[0], other)) is None:
        _mapping_at(result, (), path[:1], index, column).pop(other, None)
    for old in [place for place in result.origin if place[: len(path)] == path]:
        del result.origin[old]
    result.origin[path] = (index, column)


def _mapping_at(result: Overridden, start: Path, names: Path, index: int, column: int) -> dict[str, object]:
    """The mapping at `start + names`, made from nothing or from its shorthand where it is not one yet."""
    parent: object = None
    value: object = result.data
    for name in (*start, *names):
        parent, value = value, _child(value, name)
    path = (*start, *names)
    if isinstance(value, dict):
        return value
    made = _written_out(path, value)
    if made is None or not isinstance(parent, dict | list):
        message = f"'{path_text(path)}' is {describe(value)}; nothing below it can be set"
        raise _OverrideError(message)
    if isinstance(parent, list):
        parent[int(path[-1])] = made
    else:
        parent[str(path[-1])] = made
    if value is None:
        result.origin.setdefault(path, (index, column))
    return made


def _child(value: object, name: str | int) -> object:
    if isinstance(value, dict):
        return value.get(name)
    return value[name] if isinstance(value, list) and isinstance(name, int) else None


def _written_out(path: Path, value: object) -> dict[str, object] | None:
    """The mapping that a shorthand stands for; None where the value is no shorthand."""
    if value is None:
        return {}
    if path == ("data", "holdout") and isinstance(value, int | float) and not isinstance(value, bool):
        return {"share": value}
    if not isinstance(value, str):
        return None
    if path in _SHORTHAND:
        return {_SHORTHAND[path]: value}
    if path[0] == "stack" and len(path) == 2:
        return {"use": value}
    if path[0] == "evaluate":
        return {value: {}} if len(path) == 2 else {"path": value} if len(path) == 3 else None
    return None


def entry_ids(data: dict[str, object]) -> dict[str, int]:
    """Ids of the stack in the raw data, with the place of the first entry of each."""
    stack = data.get("stack")
    ids: dict[str, int] = {}
    for index, item in enumerate(stack if isinstance(stack, list) else []):
        name = item.get("id", item.get("use")) if isinstance(item, dict) else item
        if isinstance(name, str):
            ids.setdefault(name, index)
    return ids


def _ids_text(data: dict[str, object]) -> str:
    return ", ".join(entry_ids(data)) or "(the stack is empty)"
