"""The JSON Schema says what the loader says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from peftx_spec import Catalogue, PeftxError, SpecError, json_schema, load_pipeline, options_schema, parse

NOTES = frozenset({"$schema", "title", "description", "default", "$defs", "then"})


def conforms(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether `value` fits `schema`; knows the keywords that the schema uses, and fails on any other."""

    def fits(inner: dict[str, Any], item: Any = value) -> bool:
        return conforms(item, inner, root)

    def number(check: Callable[[Any], bool]) -> bool:
        return not isinstance(value, int | float) or isinstance(value, bool) or check(value)

    def sized(kind: type, check: Callable[[int], bool]) -> bool:
        return not isinstance(value, kind) or check(len(value))

    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}

    def typed(name: str) -> bool:
        if name in ("integer", "number"):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return is_number and (name == "number" or float(value).is_integer())
        return isinstance(value, types[name])

    def properties(fields: dict[str, Any]) -> bool:
        return (
            all(fits(fields[key], item) for key, item in value.items() if key in fields) if mapping else True
        )

    def additional(rule: bool | dict[str, Any]) -> bool:
        rest = (
            [item for key, item in value.items() if key not in schema.get("properties", {})]
            if mapping
            else []
        )
        return all(fits(rule, item) for item in rest) if isinstance(rule, dict) else rule or not rest

    mapping = isinstance(value, dict)
    keywords: dict[str, Callable[[Any], bool]] = {
        "$ref": lambda name: fits(root["$defs"][name.removeprefix("#/$defs/")]),
        "type": typed,
        "enum": lambda options: value in options,
        "const": lambda only: value == only and type(value) is type(only),
        "not": lambda inner: not fits(inner),
        "anyOf": lambda options: any(fits(option) for option in options),
        "oneOf": lambda options: sum(fits(option) for option in options) == 1,
        "allOf": lambda parts: all(fits(part) for part in parts),
        "if": lambda inner: not fits(inner) or fits(schema["then"]),
        "properties": properties,
        "additionalProperties": additional,
        "required": lambda names: not mapping or all(name in value for name in names),
        "items": lambda inner: not isinstance(value, list) or all(fits(inner, item) for item in value),
        "minItems": lambda n: sized(list, lambda size: size >= n),
        "minLength": lambda n: sized(str, lambda size: size >= n),
        "minProperties": lambda n: sized(dict, lambda size: size >= n),
        "maxProperties": lambda n: sized(dict, lambda size: size <= n),
        "minimum": lambda n: number(lambda x: x >= n),
        "maximum": lambda n: number(lambda x: x <= n),
        "exclusiveMinimum": lambda n: number(lambda x: x > n),
        "exclusiveMaximum": lambda n: number(lambda x: x < n),
        "pattern": lambda text: not isinstance(value, str) or re.search(text, value) is not None,
    }
    return all(keywords[key](rule) for key, rule in schema.items() if key not in NOTES)


FITS = [
    "{peftx: 1, model: m}",
    "{peftx: 1, model: {id: m, dtype: auto, device: 'cuda:1'}}",
    "{peftx: 1, model: m, data: {train: t, eval: {path: e, limit: 3, columns: {a: b}}}, stack: [lora], train: {}}",
    "{peftx: 1, model: m, data: {train: t, holdout: .2}, stack: [lora], train: {steps: 3}}",
    "{peftx: 1, model: m, data: {train: t, holdout: {most: 3, seed: 1}}, stack: [lora], train: {}}",
    "{peftx: 1, model: m, stack: [lora, {use: lora, id: b, with: {rank: 3}}]}",
    "{peftx: 1, model: m, stack: [{use: prefixquant, with: {bits: 3}}]}",
    "{peftx: 1, model: m, stack: [{use: lora, with: {schedule: {start: 1.5}, layers: [1], window: 3}}]}",
    "{peftx: 1, model: m, stack: [{use: mosaic-it, with: {keep: .5}}]}",
    "{peftx: 1, model: m, stack: [{use: prefixquant, phase: after-training}]}",
    "{peftx: 1, model: m, data: {eval: e}, evaluate: [accuracy, {exact-match: {limit: 2}}, {accuracy: }]}",
    "{peftx: 1, model: m, evaluate: [{perplexity: p}]}",
    "{peftx: 1, model: m, data: {train: t}, stack: [lora], run: [inject, {train: }, {train: {plugins: all}}]}",
    "{peftx: 1, model: m, stack: [lora], run: [{inject: [lora]}, {freeze: lora}, {drop: all}, {save: x}]}",
    "{peftx: 1, model: m, data: {train: t}, stack: [lora], train: {max_steps: 3, report_to: [wandb]}}",
    "{peftx: 1, model: m, data: {train: t}, stack: [lora], run: [inject, {train: {save_steps: 3}}]}",
    "{peftx: 1, model: m, output: o, run: [{save: }]}",
    "{peftx: 1, model: m, output: o, run: [save, {prepare: }]}",
]
DOES_NOT = [
    "{model: m}",
    "{peftx: 2, model: m}",
    "{peftx: 1, model: m, stak: []}",
    "{peftx: 1, model: ''}",
    "{peftx: 1, model: {id: m, dtype: x}}",
    "{peftx: 1, model: {id: m, x: 1}}",
    "{peftx: 1, model: m, data: {train: t, holdout: 1}}",
    "{peftx: 1, model: m, data: {train: t, holdout: {share: 0}}}",
    "{peftx: 1, model: m, data: {train: t, holdout: x}}",
    "{peftx: 1, model: {id: m, trust_remote_code: false}}",
    "{peftx: 1, model: m, stack: [none]}",
    "{peftx: 1, model: m, stack: [{use: none}]}",
    "{peftx: 1, model: m, stack: [mosaic-it]}",
    "{peftx: 1, model: m, stack: [{use: mosaic-it}]}",
    "{peftx: 1, model: m, stack: [{use: mosaic-it, with: {}}]}",
    "{peftx: 1, model: m, stack: [{use: lora, with: {bits: 3}}]}",
    "{peftx: 1, model: m, stack: [{use: prefixquant, with: {bits: 5}}]}",
    "{peftx: 1, model: m, stack: [{use: lora, with: {rank: '8'}}]}",
    "{peftx: 1, model: m, stack: [{use: lora, with: {schedule: {shap: 1}}}]}",
    "{peftx: 1, model: m, stack: [{use: lora, options: {}}]}",
    "{peftx: 1, model: m, stack: [{use: lora, id: model}]}",
    "{peftx: 1, model: m, evaluate: [{accuracy: p, perplexity: p}]}",
    "{peftx: 1, model: m, evaluate: [{accuracy: {pth: p}}]}",
    "{peftx: 1, model: m, data: {train: t}, train: {steps: 0}}",
    "{peftx: 1, model: m, data: {train: t}, stack: [lora], train: {max_steps: 0}}",
    "{peftx: 1, model: m, data: {train: t}, stack: [lora], train: {max_steps: 3, steps: 3}}",
    "{peftx: 1, model: m, output: o, run: [none]}",
    "{peftx: 1, model: m, output: o, run: [{save: a, prepare: all}]}",
    "{peftx: 1, model: m, output: o, run: [{}]}",
    "{peftx: 1, model: m, output: o, run: []}",
]


@pytest.mark.parametrize("text", FITS)
def test_what_the_loader_takes_fits(working: Catalogue, text: str) -> None:
    load_pipeline(text, catalogue=working)
    schema = json_schema(working)
    assert conforms(parse(text).data, schema, schema)


@pytest.mark.parametrize("text", DOES_NOT)
def test_what_the_loader_refuses_does_not(working: Catalogue, text: str) -> None:
    with pytest.raises(SpecError):
        load_pipeline(text, catalogue=working)
    schema = json_schema(working)
    assert not conforms(parse(text).data, schema, schema)


def test_the_same_every_time_whatever_the_order_of_the_names(working: Catalogue) -> None:
    class Turned(type(working)):  # type: ignore[misc]
        def names(self) -> list[str]:
            return super().names()[::-1]

    assert json.dumps(json_schema(working)) == json.dumps(json_schema(Turned(without=["broken"])))


def test_every_mapping_is_closed(working: Catalogue) -> None:
    def walk(schema: Any, path: str) -> None:
        if isinstance(schema, dict):
            if "properties" in schema and schema.get("type") == "object":
                assert "additionalProperties" in schema, path
            for key, value in schema.items():
                walk(value, f"{path}/{key}")
        elif isinstance(schema, list):
            for index, value in enumerate(schema):
                walk(value, f"{path}/{index}")

    walk(json_schema(working), "")


def test_every_reference_leads_somewhere(working: Catalogue) -> None:
    schema = json_schema(working)
    references = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema)))
    assert references
    assert references <= set(schema["$defs"])


def test_dialect_and_descriptions(working: Catalogue) -> None:
    schema = json_schema(working)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$defs"]["with.lora"]["properties"]["rank"]["description"] == "rank"
    assert all("description" in field for field in schema["properties"].values())


def test_a_plugin_that_does_not_load_is_named(catalogue: Catalogue) -> None:
    with pytest.raises(PeftxError, match="the plugin 'broken' does not import"):
        json_schema(catalogue)


@pytest.mark.parametrize(
    ("options", "fits"),
    [("{}", True), ("{rank: 3, schedule: {start: 1.5}}", True), ("{rank: 0}", False), ("{schedule: {shap: 1}}", False),
     ("{bits: 3}", False)],
)  # fmt: skip
def test_options_of_one_plugin(working: Catalogue, options: str, fits: bool) -> None:
    schema = options_schema(working, "lora")
    assert schema["title"] == "options of lora"
    assert set(schema["$defs"]) == {"Init", "Schedule"}
    assert conforms(parse(options).data, schema, schema) == fits
