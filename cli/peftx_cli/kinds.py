"""What an option takes, in words, from its JSON Schema."""

from __future__ import annotations

from typing import Any

KINDS = {
    "integer": "integer",
    "number": "number",
    "boolean": "boolean",
    "string": "text",
    "object": "mapping",
    "array": "list",
}
LIMITS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "length >= {}",
    "maxLength": "length <= {}",
    "minItems": "length >= {}",
    "maxItems": "length <= {}",
}


def kind(schema: dict[str, Any]) -> str:
    """A word or two: `integer`, `number or text`, the values of a choice. None is left out: a default says it."""
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(each) for each in _real(schema)))
    return KINDS.get(schema.get("type", ""), schema.get("type", "value"))


def kind_and_limits(schema: dict[str, Any]) -> str:
    """As `kind`, and what bounds it: `number, > 0`."""
    kinds = [_limited(each) for each in _real(schema)]
    return " or ".join(dict.fromkeys(kinds))


def _real(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]


def _limited(schema: dict[str, Any]) -> str:
    limits = [text.format(schema[name]) for name, text in LIMITS.items() if name in schema]
    return ", ".join([kind(schema), *limits])
