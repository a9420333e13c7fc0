"""The server's description of itself, and whatever requests schemathesis makes of it: each is answered as it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from peftx import Plugin, Stack, hookimpl, load
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.shapes import FIRST_BYTE, VOCABULARY
from peftx.toolkits.serving import Server
from peftx.toolkits.serving.app import build_app
from peftx.toolkits.serving.folder import AdapterFolder

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
ROUTES = [
    ("GET", "/health"), ("GET", "/healthz"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/embeddings"), ("POST", "/tokenize"),
    ("POST", "/detokenize"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
]  # fmt: skip


class Routed(Plugin):
    """Brings a route of its own."""

    @hookimpl
    def serve(self, server: Server) -> None:
        server.add_route("GET", "/v1/policy", lambda: {"most": server.scheduler.max_batch})


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = tiny("llama")
    printable = range(FIRST_BYTE + 32, FIRST_BYTE + 127)
    model.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in printable]
    stack = Stack(model, [Routed()], tokenizer=tiny_tokenizer())

    def served(name: str, folder: str) -> Server:
        return Server(load(folder), name=name)

    adapters = AdapterFolder(tmp_path_factory.mktemp("adapters"), served)
    found = build_app(Server(stack, name="small", max_body=10**7), loader=adapters)
    found.state.stack = stack
    with TestClient(found):
        yield found


def test_every_route_is_told(app: Any) -> None:
    told = app.openapi()
    found = {(method.upper(), path) for path, each in told["paths"].items() for method in each}
    assert found == {*ROUTES, ("GET", "/v1/policy")}
    for each in told["paths"].values():
        for operation in each.values():
            assert "422" not in operation["responses"]
    assert "HTTPValidationError" not in told["components"]["schemas"]


def test_a_key_is_told_where_it_is_wanted() -> None:
    app = build_app(Server(Stack(tiny("llama"), [], tokenizer=tiny_tokenizer()), api_key="secret"))
    with TestClient(app) as http:
        assert http.get("/openapi.json").status_code == 401
        told = http.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()
        for path, each in told["paths"].items():
            for method, operation in each.items():
                wanted = http.request(method, path, json={} if method == "post" else None).status_code == 401
                assert ("security" in operation) is ("401" in operation["responses"]) is wanted, path
        error = told["paths"]["/metrics"]["get"]["responses"]["401"]["content"]
        assert list(error) == ["application/json"]
    assert told["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_there_is_no_page_that_loads_from_elsewhere(app: Any) -> None:
    with TestClient(app) as http:
        assert {http.get(path).status_code for path in ("/docs", "/redoc")} == {404}


def conforms(app: Any, method: str, path: str, mode: GenerationMode, count: int) -> None:
    """As many requests of an operation, each checked against the description; of completions, one in two by name."""
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]

    @seed(0)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def answered(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "small"
        case.call_and_validate(checks=CHECKS)

    answered()


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_what_is_well_formed_is_answered_as_told(app: Any, method: str, path: str) -> None:
    conforms(app, method, path, GenerationMode.POSITIVE, 8 if method == "POST" else 2)


@pytest.mark.parametrize(("method", "path"), [each for each in ROUTES if each[0] == "POST"])
def test_what_is_malformed_is_refused(app: Any, method: str, path: str) -> None:
    conforms(app, method, path, GenerationMode.NEGATIVE, 8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), [each for each in ROUTES if each[0] == "POST"])
def test_many_requests_are_answered_as_told(app: Any, method: str, path: str, mode: GenerationMode) -> None:
    conforms(app, method, path, mode, 200)


HALF = "\ud800"
TALK = {"messages": [{"role": "user", "content": "Hi"}]}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": HALF, "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "small", "prompt": "A", HALF: 1}),
        ("/v1/completions", {"model": HALF, "prompt": "A"}),
        ("/v1/completions", {"model": "small", "prompt": "A", "logit_bias": {HALF: 1}}),
        ("/v1/chat/completions", {"model": "small", **TALK, "tools": [{HALF: HALF}]}),
        ("/v1/chat/completions", {"model": "small", "messages": [CALL]}),
    ],
)
def test_half_a_character_anywhere_is_refused(app: Any, path: str, body: dict[str, Any]) -> None:
    """An answer that repeats it must be UTF-8 all the same."""
    template = "{{ tools }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    tokenizer = app.state.stack.tokenizer
    tokenizer.chat_template = template
    try:
        with TestClient(app) as http:
            found = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    finally:
        tokenizer.chat_template = None
    assert found.status_code == (404 if body["model"] == HALF else 400), found.text
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "path", ["b\0", "b" * 900, "b\n", "~", "hub:me/x", "C:\\x", "\u202eb"], ids=lambda path: ascii(path)[:9]
)
def test_a_path_that_leads_nowhere_is_refused(app: Any, path: str) -> None:
    """Some of them no file system takes, and strategies draw none of those."""
    with TestClient(app) as http:
        found = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
    assert found.status_code == 400, found.text
    assert "there is no bundle" in found.json()["error"]["message"]


def test_another_method_is_told_the_right_ones(app: Any) -> None:
    with TestClient(app) as http:
        found = http.get("/v1/completions")
    assert (found.status_code, found.headers["allow"]) == (405, "POST")
    assert found.json()["error"]["code"] == "405"


@pytest.mark.parametrize("wrong", [{"temperature": "0.5"}, {"max_tokens": "3"}, {"echo": "yes"}, {"n": True}])
def test_a_number_in_quotes_is_no_number(app: Any, wrong: dict[str, Any]) -> None:
    with TestClient(app) as http:
        found = http.post("/v1/completions", json={"model": "small", "prompt": "A", **wrong})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == next(iter(wrong))


@pytest.mark.parametrize("name", ["CompletionBody", "ChatBody", "EmbeddingsBody"])
def test_what_need_not_be_given_may_be_null(app: Any, name: str) -> None:
    told = app.openapi()["components"]["schemas"][name]
    for field, schema in told["properties"].items():
        null = {"type": "null"}
        may = any(each.items() >= null.items() for each in (schema, *schema.get("anyOf", ())))
        assert may is (field not in told["required"]), field
