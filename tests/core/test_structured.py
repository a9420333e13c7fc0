"""Answers in JSON: whatever a random model writes under a schema parses, and is what the schema says."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import torch
from fastapi.testclient import TestClient

from peftx import Plugin, Stack, hookimpl
from peftx.errors import PeftxError
from peftx.testing import tiny, tiny_tokenizer
from peftx.toolkits.serving import Engine, Request, Scheduler, Server
from peftx.toolkits.serving.app import build_app
from peftx.toolkits.serving.structured import Structure

pytest.importorskip("xgrammar", reason="the extra `structured` is not installed")

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": -3, "exclusiveMaximum": 40},
                                      "b": {"type": "boolean"}}, "required": ["a", "b"]},
    {"type": "array", "items": {"enum": ["x", "yy", 3, None]}, "minItems": 2, "maxItems": 3},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[a-c]+-[0-9]{2}$", "title": "of no weight"},
    {"type": ["number", "null"], "minimum": 0.5, "maximum": 2.25},
    {"anyOf": [{"const": {"k": [1]}}, {"$ref": "#/$defs/leaf"}], "$defs": {"leaf": {"type": "boolean"}}},
    {"type": "array", "prefixItems": [{"type": "null"}, {"type": "string", "maxLength": 3}], "items": False,
     "minItems": 2},
    {"type": "object", "properties": {"n": {"type": "string", "enum": ["é", "中"]}}, "required": ["n"],
     "additionalProperties": False},
]  # fmt: skip
LONG = 60
DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}


@pytest.fixture(scope="module")
def stack() -> Stack:
    """A tiny random model, whose embedding has more rows than its tokenizer has tokens."""
    found = Stack(tiny("llama"), [], tokenizer=tiny_tokenizer())
    assert found.model.get_input_embeddings().weight.shape[0] > len(found.tokenizer)
    return found


@pytest.fixture
def http(stack: Stack) -> Iterator[TestClient]:
    with TestClient(build_app(Server(stack, name="small", scheduler=Scheduler(max_batch=16)))) as found:
        yield found


def valid(schema: dict[str, Any], text: str) -> bool:
    return bool(jsonschema_rs.is_valid(schema, json.loads(text)))


def under(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


class Whole(Plugin):
    """Has batches run whole."""

    @hookimpl(wrapper=True)
    def decode(self, request: Any) -> Any:
        return (yield)


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_written_under_a_schema_is_valid(stack: Stack, whole: bool) -> None:
    """All of them in one batch, free rows beside them; greedy and sampled, by narrow nuclei too."""
    served = Stack(tiny("llama"), [Whole()], tokenizer=tiny_tokenizer()) if whole else stack
    free = Request("Once", max_tokens=9, temperature=0)
    alone = served.generate("Once", max_new_tokens=9, do_sample=False)
    done = 0
    with Engine(Server(served, scheduler=Scheduler(max_batch=16, max_queue=500))) as engine:
        assert bool(engine.whole) is whole
        jobs = []
        for seed in range(2 if whole else 5):
            for schema in SCHEMAS:
                how = {"temperature": (0.0, 1.0, 1.5)[seed % 3], "top_p": (1.0, 0.3)[seed % 2], "seed": seed}
                asked = Request("Once", max_tokens=LONG, schema=json.dumps(schema), **how)
                jobs.append((schema, engine.submit(asked)))
            others = [engine.submit(free) for _ in range(2)]
            assert [job.result(120).text for job in others] == [alone] * 2
        for schema, job in jobs:
            found = job.result(120)
            if found.finish_reason == "stop":
                assert valid(schema, found.text), (schema, found.text)
                done += 1
            else:
                assert found.completion_tokens == LONG
    assert done > 0.7 * len(jobs)


def test_any_object_is_an_object(http: TestClient) -> None:
    ended = 0
    for seed in range(6):
        body = {"model": "small", "prompt": "A", "max_tokens": 100, "seed": seed, "temperature": 1.3}
        found = http.post("/v1/completions", json=body | {"response_format": {"type": "json_object"}}).json()
        (choice,) = found["choices"]
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
            ended += 1
    assert ended


def test_streams_say_the_same_and_a_cut_text_says_length(http: TestClient) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "seed": 1, **under(SCHEMAS[0])}
    whole = http.post("/v1/chat/completions", json=body | {"max_tokens": LONG}).json()["choices"][0]
    assert whole["finish_reason"] == "stop"
    assert valid(SCHEMAS[0], whole["message"]["content"])
    with http.stream(
        "POST", "/v1/chat/completions", json=body | {"max_tokens": LONG, "stream": True}
    ) as answer:
        lines = [json.loads(line[6:]) for line in answer.iter_lines() if line and "[DONE]" not in line]
    deltas = [line["choices"][0]["delta"].get("content", "") for line in lines]
    assert "".join(deltas) == whole["message"]["content"]
    assert lines[-1]["choices"][0]["finish_reason"] == "stop"
    cut = http.post("/v1/chat/completions", json=body | {"max_tokens": 4}).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert whole["message"]["content"].startswith(cut["message"]["content"])


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nope"}, "no type 'nope'"),
        ({"type": "object", "properties": 3}, "'properties' is no object"),
        ({"type": "object", "properties": {"a": 3}}, "schema.a is no JSON schema"),
        ({"$ref": "#/x"}, "Cannot find field 'x'"),
        ({"type": "string", "pattern": "("}, "parenthesis is not closed"),
        ({"not": {"type": "string"}}, "'not' is not held to"),
        ({"type": "array", "items": {"type": "integer", "multipleOf": 3}}, "schema.items: 'multipleOf' is not held to"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "'maxLength' is not held to"),
        ({"anyOf": [{}], "type": "string"}, "'type' is not held to beside 'anyOf'"),
        ({"type": "string", "enum": [1]}, "'type' is not held to beside 'enum'"),
        ({"minimum": 3}, "'minimum' is not held to without a type"),
        ({"type": "object", "required": ["z"]}, "'z' is required, and not among its properties"),
        ({"type": "object", "required": [[1]]}, "[1] is required"),
        ({"type": [{}]}, "no type {}"),
        ({"type": "object", "properties": {"a": True}, "additionalProperties": {"type": "null"}}, "is false beside"),
        (DEEP, "32 deep at most"),
        ({"enum": 3}, "'enum' is no list"),
        ({"const": float("nan")}, "JSON compliant"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_to_is_refused(http: TestClient, schema: dict[str, Any], words: str) -> None:
    body = {"model": "small", "prompt": "A", "stream": True, **under(schema)}
    headers = {"content-type": "application/json"}
    found = http.post("/v1/completions", content=json.dumps(body), headers=headers)
    assert found.status_code == 400, found.text
    assert words in found.json()["error"]["message"]
    assert "/project/" not in found.text


def test_a_schema_goes_with_its_type(http: TestClient) -> None:
    for wrong in ({"type": "json_schema"}, {**under({})["response_format"], "type": "text"}):
        found = http.post("/v1/completions", json={"model": "small", "prompt": "A", "response_format": wrong})
        assert found.status_code == 400
        assert "json_schema is given where" in found.json()["error"]["message"]


def test_a_grammar_is_compiled_once(stack: Stack) -> None:
    grammars = Engine(Server(stack))._answers.grammars()
    sizes = []
    for length in (17, 17, 18):
        grammars.compiled(json.dumps({"type": "string", "maxLength": length}))
        sizes.append(grammars._compiler.get_cache_size_bytes())
    assert 0 < sizes[0] == sizes[1] < sizes[2]


def test_nothing_that_may_follow_is_said(stack: Stack) -> None:
    """The model may not write what the schema asks for."""
    served = Stack(tiny("llama"), [], tokenizer=tiny_tokenizer())
    (brace,) = served.tokenizer("{", add_special_tokens=False).input_ids
    served.model.generation_config.suppress_tokens = [brace]
    with Engine(Server(served)) as engine:
        job = engine.submit(Request("A", max_tokens=5, schema='{"type": "object"}'))
        with pytest.raises(PeftxError, match="may write nothing that fits"):
            job.result(60)


def test_the_extra_is_named(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "xgrammar":
            raise ModuleNotFoundError("no", name="xgrammar")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PeftxError, match="needs xgrammar, which is not installed") as caught:
        Engine(Server(stack)).submit(Request("A", schema="{}"))
    assert "pip install 'peftx[structured]'" in str(caught.value)


def test_tokens_that_are_taken_back_leave_no_trace(stack: Stack) -> None:
    """As drafting loops do: another text of the same row, shorter or longer."""
    grammars = Engine(Server(stack))._answers.grammars()

    def allowed(structure: Structure, text: str) -> torch.Tensor:
        ids = torch.tensor([[5, *stack.tokenizer(text, add_special_tokens=False).input_ids]])
        return structure(ids, torch.zeros(1, grammars.size)) == 0

    schema = json.dumps(SCHEMAS[0])
    one = Structure(grammars, schema, start=1)
    for text in ('{"a": 3', '{"a": 12, "b"', '{"a', "", '{"a": 12, "b": tr'):
        assert torch.equal(allowed(one, text), allowed(Structure(grammars, schema, start=1), text)), text
