"""The JSON Schema of a spec, with the options of the installed plugins, for editors and for review."""

from __future__ import annotations

from typing import Any

from peftx_spec.catalogue import Catalogue
from peftx_spec.models import METRICS, Pipeline
from peftx_spec.overrides import RESERVED_IDS
from peftx_spec.trainer_names import TRAINER_NAMES

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

_STRING: Schema = {"type": "string", "minLength": 1}
_ID_LIST: Schema = {
    "items": {"pattern": "^[a-z0-9][a-z0-9-]*$", "type": "string"},
    "minItems": 1,
    "type": "array",
}


def json_schema(catalogue: Catalogue) -> Schema:
    """JSON Schema (2020-12) of `Pipeline`; a stack entry's `with` is what the plugin named in `use` takes.

    The same catalogue always gives the same schema, key for key. Values written as `${env:NAME}` are text to
    a schema, whatever they become. Raises `PeftxError` for a plugin that does not load.
    """
    schema = Pipeline.model_json_schema(ref_template="#/$defs/{model}")
    definitions: dict[str, Schema] = schema.pop("$defs")
    names = sorted(catalogue.names())
    entry = definitions["StackEntry"]
    entry["properties"]["use"] = {**entry["properties"]["use"], "enum": names}
    entry["properties"]["id"] = {**entry["properties"]["id"], "not": {"enum": sorted(RESERVED_IDS)}}
    entry["allOf"] = [_when(name) for name in names]
    bare: list[str] = []  # plugins that need no option, so that their name alone is an entry
    for name in names:
        options, inner = _options(catalogue, name, f"with.{name}.")
        definitions |= inner
        definitions[f"with.{name}"] = options
        if options.get("required"):
            entry["allOf"][names.index(name)]["then"]["required"] = ["with"]
        else:
            bare.append(name)
    _add_shorthands(definitions, bare)
    for definition in definitions.values():
        _untitled(definition)
    _untitled(schema)
    return {
        "$schema": DIALECT,
        "title": "peftx pipeline",
        **{key: value for key, value in schema.items() if key != "title"},
        "$defs": {key: definitions[key] for key in sorted(definitions)},
    }


def options_schema(catalogue: Catalogue, name: str) -> Schema:
    """JSON Schema (2020-12) of one plugin's options, what an entry of the stack has under `with`.

    Raises `PeftxError` for a plugin that is not there or does not load.
    """
    options, definitions = _options(catalogue, name, "")
    for schema in (options, *definitions.values()):
        _untitled(schema)
    schema = {"$schema": DIALECT, **options, "title": f"options of {name}"}
    return schema | ({"$defs": {key: definitions[key] for key in sorted(definitions)}} if definitions else {})


def _untitled(schema: Schema) -> None:
    """Take out the titles that say a field's name again."""
    for name, field in schema.get("properties", {}).items():
        if field.get("title", "").lower().replace(" ", "_") == name:
            del field["title"]


def _when(name: str) -> Schema:
    """The options of one plugin, where the entry uses it."""
    return {
        "if": {"properties": {"use": {"const": name}}, "required": ["use"]},
        "then": {"properties": {"with": {"$ref": f"#/$defs/with.{name}"}}},
    }


def _options(catalogue: Catalogue, name: str, prefix: str) -> tuple[Schema, dict[str, Schema]]:
    """The schema of a plugin's options, and the definitions that it refers to, whose names begin with `prefix`."""
    options = catalogue.config(name).model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
    inner = {f"{prefix}{key}": value for key, value in options.pop("$defs", {}).items()}
    options["additionalProperties"] = False
    return options, inner


def _add_shorthands(definitions: dict[str, Schema], bare: list[str]) -> None:
    """Allow the plain forms that the models accept before they validate."""
    stages = definitions["RunStage"]
    for kind, value in stages["properties"].items():
        full = next(option for option in value["anyOf"] if option != {"type": "null"})
        plain: list[Schema] = [{"type": "null"}] if kind != "save" else [_STRING, {"type": "null"}]
        if full.get("type") == "array":
            plain = [_ID_LIST["items"], {"type": "null"}]
        value["anyOf"] = [full, *plain]
        value.pop("default", None)
    stages |= {"minProperties": 1, "maxProperties": 1}
    plugins = definitions["TrainStage"]["properties"]["plugins"]
    definitions["TrainStage"]["properties"]["plugins"] = {
        "anyOf": [_ID_LIST, _ID_LIST["items"], {"type": "null"}],
        "description": plugins["description"],
    }
    for name in ("TrainSpec", "TrainStage"):
        own = definitions[name]["properties"]
        both: list[Schema] = [{"required": [ours, theirs]} for theirs, ours in TRAINER_NAMES.items()]
        definitions[name] |= {"not": {"anyOf": both}}
        own |= {
            theirs: {**own[ours], "description": f"the Trainer's name of {ours}"}
            for theirs, ours in TRAINER_NAMES.items()
        }
    metric = definitions["EvaluateSpec"]
    metric["properties"] = {name: {"$ref": "#/$defs/MetricOptions"} for name in METRICS}
    plain_forms: dict[str, list[Schema]] = {
        "EvaluateSpec": [_STRING],
        "HoldoutSpec": [{"exclusiveMinimum": 0, "exclusiveMaximum": 1, "type": "number"}],
        "MetricOptions": [_STRING, {"type": "null"}],
        "ModelSpec": [_STRING],
        "RunStage": [{"enum": sorted(stages["properties"])}],
        "SourceSpec": [_STRING],
        "StackEntry": [{"enum": bare}],
    }
    for name, forms in plain_forms.items():
        definitions[name] = {"anyOf": [definitions[name], *forms]}
