"""A spec as YAML text that reads back as the same pipeline."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from peftx_spec.errors import UNSEEN
from peftx_spec.scalars import escape, parse_scalar

if TYPE_CHECKING:
    from pydantic import BaseModel

    from peftx_spec.models import Pipeline

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./@+-]*")
_ESCAPED = re.compile(f'["\\\\\ufffe\uffff]|{UNSEEN.pattern}')
_WIDEST_FLOW = 80  # characters of a list of scalars on one line


def dump(pipeline: Pipeline) -> str:
    """The pipeline in full: with every default, so that a later default cannot change what it means.

    `load_pipeline(dump(pipeline), catalogue=...) == pipeline`. Values that are absent (None by default) are
    left out, and what another key takes the place of.
    """
    return dump_plain(plain(pipeline))


def plain(model: BaseModel) -> dict[str, object]:
    """The model as dicts, lists and scalars, with the YAML's keys; options of plugins stay as they are."""
    from pydantic import RootModel

    from peftx_spec.base import SpecModel

    data: dict[str, object] = {}
    if isinstance(model, RootModel):
        return {str(key): _plain_value(value) for key, value in model.root.items()}
    unsaid = model.unsaid() if isinstance(model, SpecModel) else frozenset()
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if name not in unsaid and (value is not None or info.default is not None):
            data[info.alias or name] = _plain_value(value)
    return data


def _plain_value(value: object) -> object:
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain_value(item) for key, item in value.items()}
    return value


def dump_plain(data: dict[str, object]) -> str:
    """Dicts, lists and scalars as YAML in the dialect of the loader."""
    return "\n".join(_block(data, 0)) + "\n" if data else "{}\n"


def _block(value: object, indent: int) -> list[str]:
    """The lines of a mapping or list that is not empty, indented by `indent` spaces."""
    pad = " " * indent
    lines: list[str] = []
    if isinstance(value, dict):
        for key, item in value.items():
            head = f"{pad}{_text(key)}:"
            short = _inline(item)
            lines += [f"{head} {short}"] if short is not None else [head, *_block(item, indent + 2)]
    elif isinstance(value, list):
        for item in value:
            short = _inline(item)
            if short is not None:
                lines.append(f"{pad}- {short}")
            else:
                first, *rest = _block(item, indent + 2)
                lines += [f"{pad}- {first[indent + 2 :]}", *rest]
    return lines


def _inline(value: object) -> str | None:
    """The value on one line where that reads well, else None."""
    if isinstance(value, dict):
        return None if value else "{}"
    if isinstance(value, list):
        if any(isinstance(item, dict | list) for item in value):
            return None
        flow = f"[{', '.join(_scalar(item) for item in value)}]"
        return flow if len(flow) <= _WIDEST_FLOW else None
    return _scalar(value)


def _scalar(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return ".nan"
        return repr(value) if math.isfinite(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, str):
        escaped = escape(value)
        return (
            escaped
            if isinstance(parse_scalar(escaped), str) and _PLAIN.fullmatch(escaped)
            else _quoted(escaped)
        )
    raise TypeError(f"{type(value).__name__} cannot stand in a spec: {value!r}")


def _text(key: str) -> str:
    """A key; the loader reads every key as text, so only odd characters need quotes."""
    return key if _PLAIN.fullmatch(key) else _quoted(key)


def _quoted(text: str) -> str:
    return '"' + _ESCAPED.sub(lambda found: _escape(found[0]), text) + '"'


def _escape(char: str) -> str:
    return {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}.get(char, f"\\u{ord(char):04x}")
