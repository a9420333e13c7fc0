"""Pydantic's errors as findings: what is wrong at which path, what was expected and what was found.

Pydantic reads `"8"` as 8 and `yes` as true where a number or a boolean is wanted. A spec means what it says,
so a second, strict look takes that back; whole floats such as `1e4` stay good integers.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import ErrorDetails

from peftx_spec.errors import PeftxError, nearest
from peftx_spec.problems import Path, describe

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "frozen_set_type": "a list",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "mapping_type": "a mapping",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
    "set_type": "a list",
    "string_type": "text",
    "tuple_type": "a list",
}
_BOUNDED = {
    "greater_than": ("a number greater than", "gt"),
    "greater_than_equal": ("a number of at least", "ge"),
    "less_than": ("a number less than", "lt"),
    "less_than_equal": ("a number of at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
    "string_pattern_mismatch": ("text that matches", "pattern"),
}
_TYPES = frozenset({"int_type", "float_type", "bool_type"})
_SLUG = r"^[a-z0-9][a-z0-9-]*$"


@dataclass(frozen=True)
class Finding:
    """Something wrong at a path of the data, not yet at a position; `at_key`: the key is, not the value; `code`: see
    `Problem`."""

    path: Path
    message: str
    at_key: bool = False
    expected: str = ""
    got: str = ""
    suggestion: str = ""
    code: str = ""


def examine(model: type[BaseModel], data: object, *, noun: str = "key") -> list[Finding]:
    """Everything that keeps `data` from being a `model`; empty where nothing does.

    `noun` is what a name in the data is called: `key`, or `option of 'lora'`. Paths are relative to `data`.
    Raises `PeftxError` where a validator of the model does.
    """
    errors = _errors(model, data, strict=False)
    seen = {_path(data, error)[0] for error in errors}
    strict = _errors(model, data, strict=True)
    blamed: dict[Path, set[str]] = {}
    for error in strict:
        blamed.setdefault(_path(data, error)[0], set()).add(error["type"])
    for error in strict:
        path, value = _path(data, error)
        if path not in seen and _is_coerced(blamed[path], value):
            errors.append(error)
    findings = [_finding(model, data, error, noun) for error in errors if not _is_echo(data, error)]
    return _joined(findings)


def _errors(model: type[BaseModel], data: object, *, strict: bool) -> list[ErrorDetails]:
    try:
        if strict:  # JSON, so that lists still serve for tuples and sets, and text for paths and enums
            model.model_validate_json(json.dumps(data), strict=True, by_alias=True, by_name=False)
        else:
            model.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _is_coerced(blamed: set[str], value: object) -> bool:
    """Whether the strict errors `blamed` mean that the lax reading made another type out of `value`."""
    if "int_type" in blamed and isinstance(value, float) and value.is_integer():
        return False
    return bool(blamed & _TYPES) and blamed <= _TYPES | {"literal_error"}


def _is_echo(data: object, error: ErrorDetails) -> bool:
    """Whether the error only follows from another: a failed item is not counted, an id lacks its `use`."""
    if error["type"] == "default_factory_not_called":
        return True
    value = _path(data, error)[1]
    lengths = error.get("ctx", {})
    return (
        error["type"] == "too_short"
        and isinstance(value, list | dict)
        and len(value) >= lengths["min_length"]
    )


def _path(data: object, error: ErrorDetails) -> tuple[Path, object]:
    """The path of an error in the data, and the value there; pydantic's tags for unions are left out."""
    path: list[str | int] = []
    value = data
    for part in error["loc"]:
        is_key = isinstance(value, dict) and part in value
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_key or is_index:
            value = cast("Any", value)[part]
            path.append(part)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path), value


def _finding(model: type[BaseModel], data: object, error: ErrorDetails, noun: str) -> Finding:
    path, value = _path(data, error)
    kind, context = error["type"], error.get("ctx", {})
    name = str(path[-1]) if path else ""
    if kind == "missing":
        known = _field(model, path)
        return Finding(path, f"missing {noun}: '{name}'", expected=known)
    if kind == "extra_forbidden":
        names = known_keys(model, path[:-1])
        return Finding(
            path,
            f"unknown {noun}: '{name}'",
            at_key=True,
            expected=f"one of {', '.join(names)}" if names else f"no {noun} at all",
            suggestion=nearest(name, names),
        )
    owner = next((part for part in reversed(path) if isinstance(part, str)), "")
    what = f"'{owner}'" if owner == name else f"an item of '{owner}'" if owner else "this"
    expected = _expected(kind, context)
    if error["loc"][-1:] == ("[key]",):
        return Finding(path, f"'{name}' cannot be a name here", at_key=True, expected=expected)
    suggestion = ""
    if kind in ("literal_error", "enum") and isinstance(value, str):
        suggestion = nearest(
            value, [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        )
    if kind.startswith("bool") and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        suggestion = f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if expected:
        return Finding(
            path, f"{what} has a wrong value", expected=expected, got=describe(value), suggestion=suggestion
        )
    if kind not in ("value_error", "assertion_error"):
        return Finding(path, error["msg"], got=describe(value))
    cause = context["error"].__cause__
    if isinstance(cause, PeftxError):
        return Finding(path, cause.message, got=describe(value), suggestion=cause.hint or "", code=cause.code)
    return Finding(path, str(context["error"]), got=describe(value))


def _expected(kind: str, context: dict[str, Any]) -> str:
    if kind in _BOUNDED:
        words, key = _BOUNDED[kind]
        if context[key] == _SLUG:
            return "a name of small letters, digits and hyphens"
        return f"{words} {context[key]}"
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind == "string_too_short":
        return (
            f"text of at least {context['min_length']} characters"
            if context["min_length"] > 1
            else "text, not empty"
        )
    if kind in ("too_short", "too_long"):
        least = kind == "too_short"
        limit = context["min_length" if least else "max_length"]
        return f"at {'least' if least else 'most'} {limit} entr{'y' if limit == 1 else 'ies'}"
    return _EXPECTED.get(kind, "")


def _joined(findings: list[Finding]) -> list[Finding]:
    """One finding for each path: the members of a union each complain, and mean `one or the other`."""
    by_path: dict[Path, Finding] = {}
    for finding in findings:
        first = by_path.setdefault(finding.path, finding)
        if finding.expected and finding.expected not in first.expected:
            expected = f"{first.expected} or {finding.expected}" if first.expected else finding.expected
            by_path[finding.path] = replace(
                first, expected=expected, suggestion=first.suggestion or finding.suggestion
            )
    return list(by_path.values())


def known_keys(annotation: object, path: Path = ()) -> list[str]:
    """The keys that the model at `path` inside `annotation` takes, in order; empty if it is no model."""
    return [key for inner in _inside(annotation, path) for key in _fields(inner)]


def _field(annotation: object, path: Path) -> str:
    """The description of the field at `path`."""
    for inner in _inside(annotation, path[:-1]):
        for name, info in inner.model_fields.items():
            if path[-1] == (info.alias or name):
                return info.description or ""
    return ""


def _fields(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _inside(annotation: object, path: Path) -> Iterator[type[BaseModel]]:
    """The models that `path` leads to, through fields, lists, mappings and unions."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        yield from _inside(annotation.model_fields["root"].annotation, path)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not path:
            yield annotation
        for name, info in annotation.model_fields.items():
            if path and path[0] == (info.alias or name):
                yield from _inside(info.annotation, path[1:])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _inside(argument, path)
    elif origin is typing.Annotated:
        yield from _inside(arguments[0], path)
    elif path and arguments and origin in (list, tuple, dict, set, frozenset):
        yield from _inside(arguments[-1] if origin is dict else arguments[0], path[1:])


def examine_options(model: type[BaseModel], options: dict[str, object], *, plugin: str) -> list[Finding]:
    """As `examine`, for a plugin's options; an error that its own types raise is put on the option."""
    noun = f"option of '{plugin}'"
    try:
        return examine(model, options, noun=noun)
    except PeftxError as error:
        whole = error
    findings: list[Finding] = []
    for name, value in options.items():
        # one option at a time: which of them raises is not said otherwise
        try:
            findings += [
                found for found in examine(model, {name: value}, noun=noun) if found.path[:1] == (name,)
            ]
        except PeftxError as error:
            findings.append(Finding((name,), error.message, got=describe(value), suggestion=error.hint or ""))
    if not findings:  # it is their combination that is wrong
        findings.append(Finding((), whole.message, suggestion=whole.hint or ""))
    missing = [
        Finding((name,), f"missing {noun}: '{name}'", expected=_field(model, (name,)))
        for name, info in ((info.alias or key, info) for key, info in model.model_fields.items())
        if info.is_required() and name not in options
    ]
    return findings + missing
