"""OpenAI's API, by its own client and by hand: chats, choices, scores, penalties, embeddings, keys, the page."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from peftx import Stack
from peftx.testing.models import EOS, tiny, tiny_tokenizer
from peftx.testing.shapes import FIRST_BYTE, VOCABULARY
from peftx.toolkits.serving import Request, Scheduler, Server
from peftx.toolkits.serving.app import build_app
from peftx.toolkits.serving.scoring import shaping
from peftx_lora import Lora

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]


def built(template: str | None = TEMPLATE) -> Stack:
    model = tiny("llama")
    printable = range(FIRST_BYTE + 32, FIRST_BYTE + 127)
    model.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in printable]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Stack(model, [Lora(rank=2)], tokenizer=tokenizer)


@pytest.fixture(scope="module")
def stack() -> Stack:
    return built()


@pytest.fixture
def http(stack: Stack) -> Iterator[TestClient]:
    with TestClient(build_app(Server(stack, name="small", scheduler=Scheduler(max_wait_ms=0)))) as found:
        yield found


def chat(http: TestClient, **body: Any) -> Any:
    found = http.post(
        "/v1/chat/completions", json={"model": "small", "messages": TALK, "max_tokens": 6} | body
    )
    assert found.status_code == 200, found.text
    return found.json()


def test_the_official_client(stack: Stack, listening: Any) -> None:
    import openai

    expected = stack.generate("<system>Short.<user>Hi<assistant>", max_new_tokens=6, do_sample=False)
    with listening(Server(stack, name="small", api_key="secret")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        asked: dict[str, Any] = {"model": "small", "messages": TALK, "max_tokens": 6, "temperature": 0}
        found = client.chat.completions.create(**asked)
        assert found.choices[0].message.content == expected
        assert found.choices[0].finish_reason == "length"
        assert found.usage.total_tokens == found.usage.prompt_tokens + 6
        pieces = list(
            client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        assert pieces[0].choices[0].delta.role == "assistant"
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == expected
        assert [p.usage.completion_tokens for p in pieces if p.usage] == [6]
        many = {"n": 2, "logprobs": True, "top_logprobs": 1, "seed": 3, "temperature": 1.5}
        whole = client.chat.completions.create(**asked | many)
        pieces = list(client.chat.completions.create(**asked | many, stream=True))
        for one in whole.choices:
            own = [c for p in pieces for c in p.choices if c.index == one.index]
            assert own[0].delta.role == "assistant"
            assert "".join(c.delta.content or "" for c in own) == one.message.content
            scores = [score for c in own if c.logprobs for score in c.logprobs.content]
            assert [(s.token, s.top_logprobs[0].token) for s in scores] == [
                (s.token, s.top_logprobs[0].token) for s in one.logprobs.content
            ]
            assert [s.logprob for s in scores] == pytest.approx(
                [s.logprob for s in one.logprobs.content], abs=1e-5
            )
        plain = client.completions.create(
            model="small", prompt="Once", max_tokens=4, n=3, seed=1, temperature=1.5
        )
        assert len({choice.text for choice in plain.choices}) > 1
        assert [m.id for m in client.models.list()] == ["small"]
        assert client.models.retrieve("small").id == "small"
        vectors = client.embeddings.create(model="small", input=["Once", "upon a time"])
        assert torch.allclose(
            torch.tensor([d.embedding for d in vectors.data]), stack.embed(["Once", "upon a time"]), atol=1e-6
        )
        for wrong, error in ((client.with_options(api_key="other"), openai.AuthenticationError),):
            with pytest.raises(error):
                wrong.models.list()
        with pytest.raises(openai.NotFoundError, match="no model 'large' here"):
            client.chat.completions.create(**asked | {"model": "large"})
        if (curl := shutil.which("curl")) is not None:
            body = json.dumps({"model": "small", "prompt": "Once", "max_tokens": 2})
            words = [curl, "-s", f"{url}/v1/completions", "-H", "Authorization: Bearer secret", "-d", body,
                     "-H", "Content-Type: application/json"]  # fmt: skip
            assert json.loads(subprocess.check_output(words))["usage"]["completion_tokens"] == 2


def test_a_chat_is_asked_as_it_was_trained(http: TestClient, stack: Stack) -> None:
    expected = stack.generate("<system>Short.<user>Hi<assistant>", max_new_tokens=6, do_sample=False)
    for more in (
        {},
        {"n": None, "response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": True},
    ):
        found = chat(http, temperature=0, **more)
        assert found["object"] == "chat.completion"
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    pieces = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    parts = [{"role": "developer", "content": "Short."}, {"role": "user", "content": pieces}]
    assert chat(http, temperature=0, messages=parts)["choices"] == found["choices"]


def test_tools_go_through_the_template(http: TestClient, stack: Stack) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    talk = [
        *TALK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sun", "tool_call_id": "1"},
    ]
    text = "<tools>" + json.dumps(tools) + "<system>Short.<user>Hi<assistant>Rome<tool>sun<assistant>"
    expected = stack.generate(text, max_new_tokens=6, do_sample=False)
    assert (
        chat(http, temperature=0, messages=talk, tools=tools)["choices"][0]["message"]["content"] == expected
    )


def test_without_a_template_a_turn_ends_where_the_next_begins() -> None:
    stack = built(None)
    text = stack.generate("System: Short.\nUser: Hi\nAssistant:", max_new_tokens=6, do_sample=False)
    with TestClient(build_app(Server(stack, name="small"))) as http:
        assert chat(http, temperature=0)["choices"][0]["message"]["content"] == text
        blank = stack.tokenizer(" ", add_special_tokens=False).input_ids[-1]
        asked = {"model": "small", "messages": TALK, "max_tokens": 1, "logit_bias": {str(blank): 100}}
        assert chat(http, **asked)["choices"][0]["message"]["content"] == "", (
            "which parts it from `Assistant:`"
        )
        refused = http.post(
            "/v1/chat/completions", json={"model": "small", "messages": TALK, "tools": [{"type": "function"}]}
        )
        assert refused.status_code == 400
        assert "this model has none" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "a message without content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format: Input should be 'text'"),
        ({"tool_choice": "required"}, "'tool_choice' is not supported"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"max_completion_tokens": 10_000}, "at most 128 fit this model"),
        ({"frequency_penaltie": 1}, "did you mean 'frequency_penalty'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "are no JSON"),
    ],
)  # fmt: skip
def test_malformed_chats_are_refused(http: TestClient, body: dict[str, Any], words: str) -> None:
    found = http.post("/v1/chat/completions", json={"model": "small", "messages": TALK} | body)
    assert found.status_code == 400, found.text
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert words in found.json()["error"]["message"]


def complete(http: TestClient, **body: Any) -> Any:
    found = http.post(
        "/v1/completions", json={"model": "small", "prompt": "Once", "temperature": 0, "max_tokens": 5} | body
    )
    assert found.status_code == 200, found.text
    return found.json()


def test_log_probabilities_are_the_models(http: TestClient, stack: Stack) -> None:
    (choice,) = complete(http, logprobs=2, echo=True)["choices"]
    told = choice["logprobs"]
    ids = http.post("/tokenize", json={"prompt": "Once"}).json()["tokens"]
    ids += stack.tokenizer(choice["text"].removeprefix("Once"), add_special_tokens=False).input_ids
    with torch.no_grad():
        expected = stack.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, value in enumerate(told["token_logprobs"]):
        if place == 0:
            assert value is None
            continue
        assert value == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-5)
        best = max(told["top_logprobs"][place].values())
        assert best == pytest.approx(float(expected[place - 1].max()), abs=1e-5)
    assert [choice["text"][o : o + 1] for o in told["text_offset"]][-3:] == told["tokens"][-3:]
    scored = complete(http, logprobs=0, echo=True, max_tokens=0)["choices"][0]
    assert scored["text"] == "Once"
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(
        told["token_logprobs"][1 : len(scored["logprobs"]["tokens"])], abs=1e-5
    )
    turn = chat(http, temperature=0, logprobs=True, top_logprobs=1)["choices"][0]
    assert "".join(one["token"] for one in turn["logprobs"]["content"]) == turn["message"]["content"]
    assert all(len(one["top_logprobs"]) == 1 for one in turn["logprobs"]["content"])


def test_the_best_of_several_is_the_likeliest(http: TestClient) -> None:
    many = complete(http, temperature=1.5, seed=7, n=4, logprobs=0)
    best = complete(http, temperature=1.5, seed=7, best_of=4)
    means = {
        c["text"]: sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"])
        for c in many["choices"]
    }
    assert best["choices"][0]["text"] == max(means, key=lambda text: means[text])
    assert best["usage"]["completion_tokens"] == 20
    assert best["choices"][0]["logprobs"] is None, "they were not asked for"
    assert (
        complete(http, temperature=1.5, seed=7, best_of=4, logprobs=0)["choices"][0]["logprobs"] is not None
    )
    assert many["usage"]["prompt_tokens"] == best["usage"]["prompt_tokens"], "a prompt counts once"


def test_penalties_and_biases_shape_what_is_written(http: TestClient, stack: Stack) -> None:
    plain = complete(http, max_tokens=8)["choices"][0]["text"]
    token = stack.tokenizer(plain[0], add_special_tokens=False).input_ids[-1]
    assert plain[0] not in complete(http, max_tokens=8, logit_bias={str(token): -100})["choices"][0]["text"]
    forced = complete(http, max_tokens=4, logit_bias={str(token): 100})["choices"][0]["text"]
    assert forced == plain[0] * 4
    body = {"max_tokens": 4, "logit_bias": {str(token): 20}}
    assert complete(http, **body)["choices"][0]["text"] == plain[0] * 4
    assert complete(http, **body, frequency_penalty=2)["choices"][0]["text"] == plain[0] * 4, (
        "20 - 3 * 2 is enough"
    )
    shaped = shaping(
        Request("", presence_penalty=0.5, frequency_penalty=2, logit_bias=((1, 3.0),)),
        start=2,
        grammars=lambda: pytest.fail("there is no schema"),
    )
    logits = torch.zeros(2, 4)
    ids = torch.tensor([[0, 0, 2, 2], [3, 3, 1, 0]])  # what stands before `start` is the prompt
    for each in shaped:
        logits = each(ids, logits)
    assert logits.tolist() == [[0.0, 3.0, -4.5, 0.0], [-2.5, 0.5, 0.0, 0.0]]


def test_prompts_as_tokens(http: TestClient, stack: Stack) -> None:
    ids = http.post("/tokenize", json={"prompt": "Once"}).json()
    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 128
    assert complete(http, prompt=ids["tokens"])["choices"] == complete(http)["choices"]
    assert len(complete(http, prompt=[ids["tokens"], ids["tokens"]])["choices"]) == 2
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"].endswith("Once")
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    echoed = complete(http, prompt=ids["tokens"], echo=True)["choices"][0]["text"]
    assert echoed.startswith("Once")


def test_embeddings_in_both_encodings(http: TestClient, stack: Stack) -> None:
    body = {"model": "small", "input": "Once upon a time"}
    vector = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    packed = http.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"][0][
        "embedding"
    ]
    assert struct.unpack(f"<{len(vector)}f", base64.b64decode(packed)) == pytest.approx(vector)
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
    for wrong in ({"input": []}, {"input": ""}, {"dimensions": 4}, {"encoding_format": "hex"}):
        assert http.post("/v1/embeddings", json=body | wrong).status_code == 400


def test_a_key_opens_everything_but_the_page_and_health(stack: Stack) -> None:
    with TestClient(build_app(Server(stack, name="small", api_key="secret"))) as http:
        for path in ("/", "/health", "/healthz"):
            assert http.get(path).status_code == 200
        for said in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            found = http.get("/v1/models", headers=said)
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_the_page_asks_nobody_else(http: TestClient) -> None:
    found = http.get("/")
    assert found.headers["content-type"].startswith("text/html")
    assert "http://" not in found.text
    assert "https://" not in found.text
    assert "default-src 'self'" in found.headers["content-security-policy"]
    told = http.get("/v1/models/small").json()
    assert told["plugins"]["lora"].startswith("Lora(")
    assert http.get("/v1/models/other").status_code == 404


def test_an_answer_ends_with_its_turn() -> None:
    """The end token is no part of the text, and the reason is `stop`."""
    stack = built()
    stack.model.generation_config.suppress_tokens = None
    with TestClient(build_app(Server(stack, name="small"))) as http:
        found = chat(http, temperature=0, logit_bias={str(EOS): 100})
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["choices"][0]["message"]["content"] == ""
