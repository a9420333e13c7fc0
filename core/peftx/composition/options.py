"""Options in words, from their JSON Schema: what each takes, and the table of a README."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftx.kernel.plugin import PluginConfig

COLUMNS = "| option | type | default | meaning |"
"""The head of a README's option table, by which it is known for one."""
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


def options_table(config: type[PluginConfig]) -> str:
    """The option table of a README, in Markdown."""
    properties = config.model_json_schema().get("properties", {})
    if not properties:
        return "None."
    required = {name: None for name, f in config.model_fields.items() if f.is_required()}
    values = config.model_construct(**required).model_dump(mode="json", exclude=set(required), warnings=False)
    lines = [COLUMNS, "| --- | --- | --- | --- |"]
    for name, schema in properties.items():
        default = _default(values[name]) if name in values else "required"
        meaning = schema.get("description", "").replace("|", "\\|")
        lines.append(f"| {name} | {kind(schema)} | {default} | {meaning} |")
    return "\n".join(lines)


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list | tuple):
        return json.dumps(value)
    return str(value).replace("\n", "\\n")
