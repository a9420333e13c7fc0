"""The scalar rules of a spec: YAML 1.2 core, and `${env:NAME}` from the environment.

| text                                   | value                     |
|----------------------------------------|---------------------------|
| `null` `Null` `NULL` `~` and nothing   | None                      |
| `true` `True` `TRUE` and `false` ...   | bool                      |
| `12` `-3` `+4` `007` `0o17` `0x1F`     | int (007 is seven)        |
| `1e-4` `1E5` `.5` `5.` `-.inf` `.nan`  | float                     |
| all else: `yes` `off` `1_000` `12:30`  | text; so is what is quoted |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

Scalar = str | int | float | bool | None

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = frozenset({".nan", ".NaN", ".NAN"})
_MOST_DIGITS = 1000  # far above any option, and below the interpreter's own limit for int()

_REFERENCE = re.compile(r"\$\$\{env:|\$\{env:([^}]*)(\}?)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ScalarError(ValueError):
    """A scalar that cannot be read; the caller knows the position and adds it."""


@dataclass(frozen=True)
class Interpolated:
    """A scalar after interpolation, and the names of the environment variables that it asked for."""

    value: Scalar
    variables: tuple[str, ...]


def parse_scalar(text: str) -> Scalar:
    """The value of a plain (unquoted) scalar. Raises `ScalarError` for a number that no number type holds."""
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if text in _NAN:
        return math.nan
    if found := _INFINITY.fullmatch(text):
        return -math.inf if found[1] == "-" else math.inf
    if _INT.fullmatch(text) or _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
        if len(text) > _MOST_DIGITS:
            raise ScalarError(f"a number of {len(text)} digits is too long (at most {_MOST_DIGITS})")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise ScalarError(f"{text} is too large for a float (the largest is 1.8e308)")
        return number
    return text


def interpolate(text: str, *, quoted: bool, environment: Mapping[str, str]) -> Interpolated:
    """Replace `${env:NAME}` and `${env:NAME:-default}` in a scalar's text and give its value.

    `$${env:` stands for a literal `${env:`. A scalar that is one reference and nothing else is read by the
    rules of `parse_scalar` after the replacement, quoted or not (inside `{}` and `[]` YAML forces the
    quotes); with text around it the result is text. An empty variable counts as missing, as `:-` does in a
    shell.

    Raises `ScalarError` for a missing variable or a malformed reference.
    """
    references = list(_REFERENCE.finditer(text))
    if not references:
        return Interpolated(text if quoted else parse_scalar(text), ())
    variables: list[str] = []

    def replace(match: re.Match[str]) -> str:
        if match[1] is None:
            return "${env:"
        name, has_default, default = match[1].partition(":-")
        if not match[2]:
            raise ScalarError(
                f"'{match[0]}' has no closing brace; write ${{env:NAME}} or ${{env:NAME:-default}}"
            )
        if not _NAME.fullmatch(name):
            raise ScalarError(
                f"'{match[0]}' names no variable; write ${{env:NAME}} or ${{env:NAME:-default}}"
            )
        variables.append(name)
        value = environment.get(name, "") or default
        if not value and not has_default:
            state = "is empty" if name in environment else "is not set"
            raise ScalarError(
                f"the environment variable {name} {state}; set it or write ${{env:{name}:-default}}"
            )
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ScalarError(f"the environment variable {name} is not valid UTF-8")
        return value

    result = _REFERENCE.sub(replace, text)
    whole = references[0][1] is not None and references[0].span() == (0, len(text))
    return Interpolated(parse_scalar(result) if whole else result, tuple(variables))


def escape(text: str) -> str:
    """The text that `interpolate` turns back into `text`."""
    return text.replace("${env:", "$${env:")
