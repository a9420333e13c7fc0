"""The server: OpenAI's completions over HTTP, batches, streams, limits, and the `serve` hook."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peftx import Claim, Delta, Generation, ModelView, Plugin, Stack, hookimpl
from peftx.engines.models import load_model
from peftx.errors import PeftxError, ServerError, UnsupportedError
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.shapes import FIRST_BYTE, VOCABULARY
from peftx.toolkits.serving import Engine, Job, Request, Scheduler, Server
from peftx.toolkits.serving import engine as serving_engine
from peftx.toolkits.serving.app import build_app
from peftx.toolkits.serving.guards import Guard
from peftx.toolkits.serving.job import Completion
from peftx.toolkits.serving.metrics import Metrics
from peftx.toolkits.serving.stream import KEPT, Text, TextStream, cut_at_stop, settled
from peftx.toolkits.serving.worker import QueueFull
from peftx_nf4 import NF4Storage

PROMPTS = ["Once upon a time", "The river took the bridge, the camera and the car", "A"]


def built(*plugins: Plugin, arch: str = "llama") -> Stack:
    """A tiny random model that writes printable characters only, and never ends by itself."""
    model = tiny(arch)
    printable = range(FIRST_BYTE + 32, FIRST_BYTE + 127)
    model.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in printable]
    return Stack(model, plugins, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def stack() -> Stack:
    return built()


@pytest.fixture
def client(stack: Stack) -> Iterator[TestClient]:
    with TestClient(build_app(Server(stack, name="small", scheduler=Scheduler(max_wait_ms=0)))) as found:
        yield found


def ask(client: TestClient, prompt: Any = "Once upon a time", **body: Any) -> Any:
    found = client.post("/v1/completions", json={"model": "small", "prompt": prompt, "max_tokens": 8} | body)
    assert found.status_code == 200, found.text
    return found.json()


def events(client: TestClient, prompt: Any, **body: Any) -> list[Any]:
    """The JSON of each event but the last, which is [DONE]."""
    body = {"model": "small"} | body | {"prompt": prompt, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------------------------- completions
def test_the_shape_of_an_answer(client: TestClient, stack: Stack) -> None:
    found = ask(client, temperature=0)
    assert found["object"] == "text_completion"
    assert found["model"] == "small"
    assert found["id"].startswith("cmpl-")
    count = len(stack.tokenizer("Once upon a time")["input_ids"])
    assert found["usage"] == {"prompt_tokens": count, "completion_tokens": 8, "total_tokens": count + 8}
    (choice,) = found["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert choice["text"] == stack.generate("Once upon a time", max_new_tokens=8, do_sample=False)


def test_models_and_health(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "small"
    ask(client)
    counts = {"queued": 0, "served": 1, "batches": 1}
    assert client.get("/healthz").json() == {
        "status": "ok",
        **counts,
        "models": {
            "small": counts | {"batching": "continuous", "why_whole": None, "plugins": [], "why_apart": None}
        },
    }


class Averages(Delta):
    """Takes the mean of the batch from each row, so that no row is what it is alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y - 0.5 * y.mean(0, keepdim=True)


class Scaled(Plugin):
    """What rows may do side by side."""

    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.q"):
            site.attach(Halves())


class Halves(Delta):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * y


class Company(Plugin):
    @hookimpl
    def inject(self, model: ModelView) -> None:
        for site in model.linears("attention.v"):
            site.attach(Averages())


class Whole(Plugin):
    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Iterator[None]:
        return (yield)


class Also(Whole):
    """A second one."""


@pytest.mark.parametrize(
    ("plugins", "cause", "named"),
    [
        ((Scaled, Whole), "'whole' has a say in how a whole text is written, by its decode hook", ["whole"]),
        ((Scaled, Company), "tried, rows that come and go compute something else than each alone", ["company"]),
        ((Whole, Company, Also), "'whole' has a say", ["whole", "also"]),
    ],
)  # fmt: skip
def test_health_says_why_rows_do_not_come_and_go(
    plugins: Sequence[type[Plugin]], cause: str, named: list[str]
) -> None:
    with TestClient(build_app(Server(built(*(kind() for kind in plugins)), name="small"))) as client:
        told = client.get("/health").json()["models"]["small"]
    assert told["why_whole"].startswith(cause)
    assert told["batching"] == f"whole: {told['why_whole']}"
    assert told["plugins"] == named
    assert told["why_apart"] is None


def test_who_stops_rows_is_looked_for_once_and_before_anybody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    monkeypatch.setattr(
        serving_engine, "who_stops_rows", lambda answers: looked.append(answers) or ["company"]
    )
    engine = Engine(Server(built(Company()), name="small"))
    assert (bool(engine.whole), looked) == (True, [])
    assert engine.stopping == engine.stopping == ["company"]
    assert len(looked) == 1
    build_app(Server(built(Company()), name="small"))
    assert len(looked) == 2, "a server finds it before its first request"


def test_what_cannot_be_switched_off_is_not_blamed() -> None:
    stack = Stack(tiny("llama"), [NF4Storage(), Company()], tokenizer=tiny_tokenizer(), inject=False)
    stack.compress(ids=["nf4"])
    stack.inject()
    assert Engine(Server(stack, name="small")).stopping == ["company"]


def test_a_model_that_takes_no_rows_in_blames_no_plugin() -> None:
    with TestClient(build_app(Server(built(Scaled(), arch="t5"), name="small"))) as client:
        told = client.get("/health").json()["models"]["small"]
    assert told["why_whole"].startswith("an encoder reads a prompt at once")
    assert told["plugins"] == []


def test_several_prompts_come_back_in_order(client: TestClient, stack: Stack) -> None:
    found = ask(client, PROMPTS, temperature=0)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    expected = [stack.generate(prompt, max_new_tokens=8, do_sample=False) for prompt in PROMPTS]
    assert [choice["text"] for choice in found["choices"]] == expected


def test_sampling_repeats_under_a_seed(client: TestClient) -> None:
    texts = [ask(client, seed=seed, temperature=1.5)["choices"][0]["text"] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_temperature_one_is_the_default(client: TestClient) -> None:
    assert ask(client, seed=5)["choices"] == ask(client, seed=5, temperature=1.0, top_p=1.0)["choices"]


def test_a_stop_string_ends_the_text(client: TestClient) -> None:
    whole = ask(client, temperature=0, max_tokens=24)["choices"][0]["text"]
    stop = whole[5:7]
    found = ask(client, temperature=0, max_tokens=24, stop=stop)
    assert found["choices"][0]["text"] == whole[: whole.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] < 24


# -------------------------------------------------------------------------------------------------------------- streams
def test_a_stream_says_what_the_whole_answer_says(client: TestClient) -> None:
    for extra in ({"temperature": 0}, {"seed": 3, "temperature": 1.2}):
        whole = ask(client, max_tokens=20, **extra)
        pieces = events(client, "Once upon a time", max_tokens=20, **extra)
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
        assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert pieces[-1]["usage"] == whole["usage"]
        assert len(pieces) > 3, "it came in one piece"


def joined(pieces: Sequence[Any], index: int) -> dict[str, Any]:
    """A choice as its pieces make it."""
    own = [one for piece in pieces for one in piece["choices"] if one["index"] == index]
    told = [one["logprobs"] for one in own if one["logprobs"] is not None]
    scores = {key: [value for each in told for value in each[key]] for key in told[0]} if told else None
    reasons = [one["finish_reason"] for one in own]
    assert reasons[:-1] == [None] * (len(own) - 1), "nothing comes behind the end"
    text = "".join(one["text"] for one in own)
    return {"index": index, "text": text, "logprobs": scores, "finish_reason": reasons[-1]}


SAID = {"max_tokens": 12, "temperature": 1.3, "seed": 5, "logprobs": 2}


@pytest.mark.parametrize("plugins", [(), (Whole,)], ids=["rows", "whole"])
@pytest.mark.parametrize(
    "more", [{"n": 3}, {"n": 2, "prompt": ["Once", "A"]}, {"stop": ["a", "e", "t"]}, {"logprobs": None}]
)
def test_a_stream_of_several_choices_says_all_that_they_say(plugins: Any, more: dict[str, Any]) -> None:
    """Scores too: on the way where rows come and go, in the last piece where batches run whole."""
    with TestClient(build_app(Server(built(*(kind() for kind in plugins)), name="small"))) as client:
        whole = ask(client, **SAID | more)
        pieces = events(client, **{"prompt": "Once upon a time"} | SAID | more)
    assert pieces[-1]["usage"] == whole["usage"]
    assert all("usage" not in piece for piece in pieces[:-1])
    for expected in whole["choices"]:
        found = joined(pieces, expected["index"])
        scores, told = found.pop("logprobs"), expected.pop("logprobs")
        assert found == expected
        assert (scores is None) is (told is None)
        for key in told or ():
            assert scores[key] == (told[key] if key in ("tokens", "text_offset") else approx(told[key])), key
    if not plugins and "stop" not in more:
        first = next(one for piece in pieces for one in piece["choices"] if one["text"])
        assert (first["logprobs"] is None) is (more.get("logprobs", 2) is None), "they come with their tokens"


def approx(value: Any) -> Any:
    return [pytest.approx(one, abs=1e-5) for one in value]


def test_a_stream_whose_choices_the_queue_cannot_hold_is_refused(recorded: tuple[Stack, Recorder]) -> None:
    watched, recorder = recorded
    recorder.gate.set()
    with TestClient(build_app(Server(watched, name="small", scheduler=Scheduler(max_queue=1)))) as client:
        body = {"prompt": "A", "n": 16, "stream": True, "max_tokens": 40}
        assert client.post("/v1/completions", json=body).status_code == 429, "before anything is sent"
        while client.get("/health").json()["queued"]:
            threading.Event().wait(0.01)
        assert ask(client, max_tokens=1)["choices"]


def test_a_client_that_leaves_when_it_has_all_has_cancelled_nothing() -> None:
    """Its stream ends with the last piece, which is sent before those are called that count."""
    metrics, request = Metrics([]), Request("a")
    ended, gone = (Job(request, [1], 3) for _ in range(2))
    for job in (ended, gone):
        metrics.follow("m", job)
    ended.listen(lambda piece: ended.cancel() if piece is None else None)
    ended.finish(Completion("bc", "stop", 1, 2))
    gone.cancel()
    gone.finish(None, ServerError("the request was cancelled"))
    told = metrics.text().decode()
    assert 'peftx_requests_total{model="m",reason="stop"} 1.0' in told
    assert 'peftx_requests_total{model="m",reason="cancelled"} 1.0' in told
    assert 'peftx_generation_tokens_total{model="m"} 2.0' in told


def test_the_first_model_answers_where_none_is_named(client: TestClient) -> None:
    for body in ({"prompt": "a", "max_tokens": 1}, {"prompt": "a", "max_tokens": 1, "model": None}):
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == client.get("/v1/models").json()["data"][0]["id"]


def test_a_stream_shows_nothing_of_its_stop_string(client: TestClient) -> None:
    whole = ask(client, temperature=0, max_tokens=24)["choices"][0]["text"]
    stop = whole[4:8]
    pieces = events(client, "Once upon a time", max_tokens=24, temperature=0, stop=[stop])
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_pieces_are_whole_characters() -> None:
    """The tokenizer has one token for each byte: é is two."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("né à 中", add_special_tokens=False)["input_ids"]
    got: list[str] = []
    stream = TextStream(Text(tokenizer), stop=(), send=got.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(got) == "né à 中"
    assert all("�" not in piece for piece in got)


def marked(model: Any, decoder: Any) -> PreTrainedTokenizerFast:
    """Of characters, in words that `decoder` puts together."""
    found = Tokenizer(model)
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoder
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="?")


@cache
def tokenizers() -> list[Callable[[], Any]]:
    characters = [*"?▁abcdefgh.,'é", *("##" + c for c in "▁abcdefgh.,'é")]
    words = {character: i for i, character in enumerate(characters)}
    pieces = marked(models.WordPiece(words, unk_token="?"), decoders.WordPiece(cleanup=True))
    spaced = marked(models.BPE(words, [], unk_token="?"), decoders.Metaspace())
    bundled = load_model("peftx:tiny")[1]
    return [tiny_tokenizer, lambda: bundled, lambda: pieces, lambda: spaced]


@given(st.text("abcdefgh.,'é 中", min_size=60, max_size=200), st.integers(0, 3))
@settings(max_examples=60)
def test_a_text_is_what_all_its_tokens_say(text: str, kind: int) -> None:
    """Whatever is kept of it: bytes of characters that are cut, the bundled tokenizer, one that strips the first blank
    and marks words, one that says something else without what stands before."""
    tokenizer = tokenizers()[kind]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = Text(tokenizer)
    for i, token in enumerate(ids):
        assert found.put([token]) == tokenizer.decode(ids[: i + 1], skip_special_tokens=True)


def test_of_a_long_text_the_last_tokens_are_decoded() -> None:
    tokenizer, read = tiny_tokenizer(), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: read.append(len(ids)) or decode(ids, **options)
    found = Text(tokenizer)
    for token in [3 + 100] * 2000:
        found.put([token])
    assert len(found.said) == 2000
    assert sum(read) < 2000 * (2 * KEPT) + 2000 / KEPT * 2000


def test_what_is_settled() -> None:
    assert settled("abc", ["cd"]) == 2
    assert settled("abc", ["xy"]) == 3
    assert settled("ab\n", ["\n\n", "b\nc"]) == 1
    assert settled("ab�", []) == 2
    assert cut_at_stop("one two three", ["three", "two"]) == ("one ", True)
    assert cut_at_stop("one", ["two"]) == ("one", False)


def test_a_client_that_leaves_stops_the_work(stack: Stack) -> None:
    with Engine(Server(stack)) as engine:
        job = engine.submit(Request("Once upon a time", max_tokens=100, temperature=0, stream=True))
        next(job.pieces())
        job.cancel()
        assert job.result(timeout=60).completion_tokens < 100
        assert engine.submit(Request("A", max_tokens=2)).result(timeout=60).completion_tokens == 2


# -------------------------------------------------------------------------------------------------------------- batches
class Recorder(Plugin):
    """Notes the shape of every batch; can hold the first one back."""

    claims: set[Claim] = set()
    shapes: list[tuple[int, int]]
    gate: threading.Event

    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Any:
        self.shapes.append(tuple(request.input_ids.shape))
        self.gate.wait(60)
        return (yield)


@pytest.fixture
def recorded() -> tuple[Stack, Recorder]:
    plugin = Recorder()
    plugin.shapes, plugin.gate = [], threading.Event()
    return built(plugin), plugin


def submitted(engine: Engine, recorder: Recorder, requests: Sequence[Request]) -> list[Job]:
    """Hold the engine with a first request, queue the others, let go."""
    first = engine.submit(Request("A", max_tokens=1, temperature=0))
    while not recorder.shapes:
        threading.Event().wait(0.01)
    jobs = [engine.submit(request) for request in requests]
    recorder.gate.set()
    first.result(timeout=60)
    for job in jobs:
        job.result(timeout=60)
    return jobs


def test_requests_that_sample_alike_run_together(recorded: tuple[Stack, Recorder], stack: Stack) -> None:
    """Each row keeps its own length, and says what it says alone."""
    watched, recorder = recorded
    requests = [Request(text, max_tokens=3 + 4 * i, temperature=0) for i, text in enumerate(PROMPTS)]
    with Engine(Server(watched, scheduler=Scheduler(max_wait_ms=0))) as engine:
        jobs = submitted(engine, recorder, requests)
        assert [rows for rows, _ in recorder.shapes] == [1, 3]
        about = engine.about()
        assert (about["batches"], about["served"]) == (2, 4)
    for job in jobs:
        alone = stack.generate(job.request.prompt, max_new_tokens=job.request.max_tokens, do_sample=False)
        assert job.result().text == alone
        assert job.result().completion_tokens == job.request.max_tokens


def test_what_may_not_run_together(recorded: tuple[Stack, Recorder]) -> None:
    watched, recorder = recorded
    greedy, seeded = Request("A", max_tokens=2, temperature=0), Request("A", max_tokens=2, seed=1)
    requests = [greedy, seeded, greedy, Request("A", max_tokens=2, temperature=0.5), seeded]
    requests.append(Request("A", max_tokens=2, temperature=0, stop=("x",)))
    with Engine(Server(watched, scheduler=Scheduler(max_wait_ms=0))) as engine:
        submitted(engine, recorder, requests)
    assert [rows for rows, _ in recorder.shapes] == [1, 2, 1, 1, 1, 1]


def test_a_batch_stays_inside_the_context(recorded: tuple[Stack, Recorder]) -> None:
    """Two requests that fit alone, and together would need more positions than there are."""
    watched, recorder = recorded
    long = Request("x" * 100, max_tokens=5, temperature=0)
    many = Request("x", max_tokens=100, temperature=0)
    with Engine(Server(watched, scheduler=Scheduler(max_wait_ms=0))) as engine:
        assert engine.context == 128
        submitted(engine, recorder, [long, many])
    assert [rows for rows, _ in recorder.shapes] == [1, 1, 1]


def test_the_largest_batch(recorded: tuple[Stack, Recorder]) -> None:
    watched, recorder = recorded
    with Engine(Server(watched, scheduler=Scheduler(max_batch=2, max_wait_ms=0))) as engine:
        submitted(engine, recorder, [Request("A", max_tokens=2, temperature=0)] * 5)
    assert [rows for rows, _ in recorder.shapes] == [1, 2, 2, 1]


def test_an_order_of_ones_own(recorded: tuple[Stack, Recorder]) -> None:
    watched, recorder = recorded
    scheduler = Scheduler(
        max_batch=1, max_wait_ms=0, order=lambda jobs: sorted(jobs, key=lambda j: j.prompt_tokens)
    )
    with Engine(Server(watched, scheduler=scheduler)) as engine:
        submitted(engine, recorder, [Request("x" * n, max_tokens=1, temperature=0) for n in (30, 10, 20)])
    lengths = [length for _, length in recorder.shapes[1:]]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 3


def test_a_full_queue_turns_requests_away(recorded: tuple[Stack, Recorder]) -> None:
    watched, recorder = recorded
    with Engine(Server(watched, scheduler=Scheduler(max_wait_ms=0, max_queue=2))) as engine:
        first = engine.submit(Request("A", max_tokens=1))
        while not recorder.shapes:
            threading.Event().wait(0.01)
        waiting = [engine.submit(Request("A", max_tokens=1)) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait"):
            engine.submit(Request("A", max_tokens=1))
        recorder.gate.set()
        for job in (first, *waiting):
            assert job.result(timeout=60).completion_tokens == 1


def test_no_answer_is_longer_than_the_limit(stack: Stack) -> None:
    with TestClient(build_app(Server(stack, name="small", max_tokens=6))) as client:
        assert ask(client, max_tokens=6)["usage"]["completion_tokens"] == 6
        found = client.post("/v1/completions", json={"prompt": "A", "max_tokens": 7})
        assert found.status_code == 400
        assert "7 tokens are asked for, and this server writes 6 at most" in found.json()["error"]["message"]
        talk = {"messages": [{"role": "user", "content": "Hi"}]}
        told = client.post("/v1/chat/completions", json=talk).json()
        assert told["choices"][0]["finish_reason"] == "length", (
            "one that says nothing gets as many as there are"
        )
        assert told["usage"]["completion_tokens"] == 6
        assert client.post("/v1/chat/completions", json=talk | {"max_tokens": 7}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_no_request_runs_longer_than_the_limit(recorded: tuple[Stack, Recorder], stream: bool) -> None:
    watched, recorder = recorded
    server = Server(watched, name="small", scheduler=Scheduler(max_wait_ms=0), max_seconds=0.2)
    with TestClient(build_app(server)) as client:
        found = client.post("/v1/completions", json={"prompt": "A", "max_tokens": 2, "stream": stream})
        assert found.status_code == (200 if stream else 408), (
            "the head of a stream is sent before its end is known"
        )
        error = json.loads(found.text.removeprefix("data: "))["error"]
        assert error["code"] == "timeout"
        assert "no answer within 0.2 s" in error["message"]
        recorder.gate.set()
        server.max_seconds = 60
        assert ask(client, max_tokens=2, temperature=0)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("limit", [{"max_tokens": 0}, {"max_seconds": 0.0}, {"max_seconds": float("nan")}])
def test_a_limit_that_lets_nothing_through_is_refused(stack: Stack, limit: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match=f"{next(iter(limit))} is "):
        Engine(Server(stack, **limit))


def test_closing_turns_the_waiting_away(recorded: tuple[Stack, Recorder]) -> None:
    watched, recorder = recorded
    engine = Engine(Server(watched, scheduler=Scheduler(max_wait_ms=0))).start()
    first = engine.submit(Request("A", max_tokens=1))
    while not recorder.shapes:
        threading.Event().wait(0.01)
    waiting = engine.submit(Request("A", max_tokens=1))
    threading.Timer(0.2, recorder.gate.set).start()
    engine.close()
    assert first.result(timeout=1).completion_tokens == 1
    with pytest.raises(PeftxError, match="closing"):
        waiting.result(timeout=1)
    with pytest.raises(PeftxError, match="closing"):
        engine.submit(Request("A"))


def test_threads_that_submit_at_once(stack: Stack) -> None:
    """Tokenizers are not made for several threads: prompts of one batch and of the next have different lengths."""
    from concurrent.futures import ThreadPoolExecutor

    requests = [Request("x" * (1 + i % 37), max_tokens=1, temperature=0) for i in range(240)]
    scheduler = Scheduler(max_batch=8, max_wait_ms=1, max_queue=1000)
    with Engine(Server(stack, scheduler=scheduler)) as engine, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda r: engine.submit(r).result(timeout=120), requests))
    assert [done.prompt_tokens for done in found] == [len(r.prompt) for r in requests]


def test_tokens_after_a_stop_string_are_not_counted(stack: Stack) -> None:
    """Alone the loop ends there; beside a longer request it goes on."""
    text = stack.generate("A", max_new_tokens=12, do_sample=False)
    stop = Request("A", max_tokens=12, temperature=0, stop=(text[5:7],))
    other = next(
        p for p in "BCDEFGH" if text[5:7] not in stack.generate(p, max_new_tokens=12, do_sample=False)
    )
    more = Request(other, max_tokens=12, temperature=0, stop=(text[5:7],))
    engine = Engine(Server(stack, scheduler=Scheduler(max_wait_ms=0, max_batch=2)))
    jobs = [engine.submit(stop), engine.submit(more)]  # both are there when it starts
    with engine:
        both = [job.result(timeout=60) for job in jobs]
        assert engine.about()["batches"] == 1
        alone = engine.submit(stop).result(timeout=60)
    assert both[0] == alone
    assert alone.completion_tokens <= 7
    assert both[1].completion_tokens == 12


def test_waiting_requests_leave_the_server_responsive(recorded: tuple[Stack, Recorder]) -> None:
    """More requests than the thread pool has threads wait, and the health route answers."""
    from concurrent.futures import ThreadPoolExecutor

    watched, recorder = recorded
    server = Server(watched, name="small", scheduler=Scheduler(max_wait_ms=0, max_batch=1))
    with TestClient(build_app(server)) as client, ThreadPoolExecutor(60) as pool:
        answers = [pool.submit(ask, client, "A", max_tokens=1) for _ in range(60)]
        while client.get("/healthz").json()["queued"] < 59:
            threading.Event().wait(0.01)
        recorder.gate.set()
        assert all(answer.result(timeout=60)["choices"] for answer in answers)


@pytest.mark.parametrize("arch", ["gpt2", "bart"])
def test_more_tokens_than_positions_are_refused(arch: str) -> None:
    with TestClient(build_app(Server(built(arch=arch), name="small"))) as client:
        body = {"model": "small", "prompt": "A", "max_tokens": 500}
        found = client.post("/v1/completions", json=body)
        assert found.status_code == 400
        assert "128 fit this model" in found.json()["error"]["message"]


class Failing(Plugin):
    @hookimpl(wrapper=True)
    def decode(self, request: Generation) -> Any:
        if request.input_ids.shape[1] > 20:
            raise ZeroDivisionError("a bug in a plugin")
        return (yield)


def test_a_plugin_that_fails_ends_its_request_and_not_the_server() -> None:
    server = Server(built(Failing()), name="small")
    with TestClient(build_app(server), raise_server_exceptions=False) as client:
        body = {"model": "small", "prompt": "x" * 40, "max_tokens": 2}
        found = client.post("/v1/completions", json=body)
        assert found.status_code == 500
        assert found.json()["error"]["type"] == "server_error"
        assert "a bug in a plugin" in found.text
        assert ask(client, "x")["usage"]["completion_tokens"] > 0


# --------------------------------------------------------------------------------------------------------- prefix cache
def test_the_prefix_cache_reuses_what_was_served(stack: Stack) -> None:
    long = "The river took the bridge, the camera and the car. "
    with Engine(Server(stack, scheduler=Scheduler(prefix_cache=True, max_wait_ms=0))) as engine:
        assert engine.prefixes is not None
        for tail in ("One", "Two", "One", ""):
            found = engine.submit(Request(long + tail, max_tokens=8, temperature=0)).result(timeout=60)
            assert found.text == stack.generate(long + tail, max_new_tokens=8, do_sample=False)
        assert engine.prefixes.hits == 3
        count = len(stack.tokenizer(long)["input_ids"])
        assert engine.prefixes.reused_tokens >= 3 * (count - 1)


def test_the_prefix_cache_forgets_the_oldest(stack: Stack) -> None:
    with Engine(
        Server(stack, scheduler=Scheduler(prefix_cache=True, prefix_entries=1, max_wait_ms=0))
    ) as engine:
        assert engine.prefixes is not None
        for prompt in ("aaaaaaaa", "bbbbbbbb", "aaaaaaaa"):
            engine.submit(Request(prompt, max_tokens=2, temperature=0)).result(timeout=60)
        assert engine.prefixes.hits <= 1, "only the beginning-of-text token may be shared"


def test_no_prefix_cache_where_rows_are_no_tokens() -> None:
    class Pretending(Plugin):
        claims = {Claim.VIRTUAL_TOKENS}

        @hookimpl
        def inject(self, model: ModelView) -> None: ...

    with pytest.raises(PeftxError, match="'pretending' claims virtual-tokens"):
        Engine(Server(built(Pretending()), scheduler=Scheduler(prefix_cache=True)))


# ----------------------------------------------------------------------------------------------------------- serve hook
class Policy(Plugin):
    @hookimpl
    def serve(self, server: Server) -> None:
        server.scheduler.max_batch = 2
        server.add_route("GET", "/v1/policy", lambda: {"max_batch": server.scheduler.max_batch})


def test_no_prefix_cache_of_states_alone() -> None:
    with pytest.raises(PeftxError, match="prefix_cache: the model keeps states"):
        Engine(Server(built(arch="mamba"), scheduler=Scheduler(prefix_cache=True)))


def test_the_serve_hook_sets_the_policy_and_adds_routes() -> None:
    server = Server(built(Policy()), name="small")
    with TestClient(build_app(server)) as client:
        assert client.get("/v1/policy").json() == {"max_batch": 2}
    assert server.scheduler.max_batch == 2


def test_a_serve_hook_that_goes_wrong_names_its_plugin() -> None:
    class Wrong(Plugin):
        @hookimpl
        def serve(self, server: Server) -> None:
            server.add_route("GET", "/v1/models", dict)

    class Zero(Plugin):
        @hookimpl
        def serve(self, server: Server) -> None:
            server.scheduler.max_batch = 0

    with pytest.raises(PeftxError, match=r"wrong: serve.*GET /v1/models is taken"):
        Engine(Server(built(Wrong())))
    with pytest.raises(PeftxError, match="max_batch is 0"):
        Engine(Server(built(Zero())))


def test_a_loop_for_one_sequence_gets_batches_of_one() -> None:
    class Single(Plugin):
        claims = {Claim.REPLACES_DECODING}

        @hookimpl
        def decode(self, request: Generation) -> Tensor:
            assert len(request.input_ids) == 1
            return request.run_default()

    server = Server(built(Single()), name="small")
    with TestClient(build_app(server)) as client:
        assert len(ask(client, PROMPTS, temperature=0)["choices"]) == 3
    assert server.scheduler.max_batch == 1


def test_a_model_that_writes_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="generates no text"):
        Engine(Server(Stack(tiny("bert"), [], tokenizer=tiny_tokenizer())))


def test_an_encoder_decoder_model_is_served() -> None:
    served = built(arch="t5")
    with Engine(Server(served)) as engine:
        found = engine.submit(Request("Once", max_tokens=5, temperature=0)).result(timeout=60)
    assert found.text == served.generate("Once", max_new_tokens=5, do_sample=False)
    assert found.completion_tokens <= 5


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"model": "smal"}, 404, None, "did you mean 'small'?"),
        ({"prompt": ""}, 400, "prompt", "at least 1 character"),
        ({"prompt": []}, 400, "prompt", ""),
        ({"prompt": [1, 2.5]}, 400, "prompt", ""),
        ({"prompt": [1, 5000]}, 400, None, "has id 5000, and the model's embedding has"),
        ({"max_tokens": 0}, 400, None, "max_tokens 0 writes nothing"),
        ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 10_000}, 400, None, "at most 128 fit this model"),
        ({"temperature": "hot"}, 400, "temperature", "valid number"),
        ({"temperature": 3}, 400, "temperature", ""),
        ({"top_p": 0}, 400, "top_p", ""),
        ({"n": 17}, 400, "n", "less than or equal to 16"),
        ({"n": 3, "best_of": 2}, 400, None, "best_of is less than n"),
        ({"suffix": "x"}, 400, "suffix", "'suffix' is not supported"),
        ({"echo": True, "stream": True}, 400, None, "echo is not streamed"),
        ({"best_of": 2, "stream": True}, 400, None, "best_of cannot be streamed"),
        ({"logprobs": 21}, 400, "logprobs", ""),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias", ""),
        ({"logit_bias": {"5": 1, "5000": 100}}, 400, None, "logit_bias names token 5000, and this model has"),
        ({"presence_penalty": 3}, 400, "presence_penalty", ""),
        ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'?"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", ""),
        ({"stop": [""]}, 400, "stop", ""),
    ],
    ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) else "",
)
def test_errors_have_the_shape_of_openai(
    client: TestClient, body: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    found = client.post("/v1/completions", json={"model": "small", "prompt": "A", "max_tokens": 1} | body)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert client.get("/healthz").json()["served"] == 0


def test_bodies_that_are_no_json_or_too_large(stack: Stack) -> None:
    with TestClient(build_app(Server(stack, name="small", max_body=200))) as client:
        found = client.post("/v1/completions", content=b"{nope", headers={"content-type": "application/json"})
        assert found.status_code == 400
        assert "no JSON" in found.json()["error"]["message"]
        found = client.post("/v1/completions", json={"model": "small", "prompt": "x" * 300})
        assert found.status_code == 413
        assert "at most 200" in found.json()["error"]["message"]

        def parts() -> Iterator[bytes]:
            yield b'{"model": "small", '
            yield b'"prompt": "x"}'

        found = client.post("/v1/completions", content=parts(), headers={"content-type": "application/json"})
        assert found.status_code == 413
        assert "Content-Length" in found.text
        assert client.get("/nowhere").status_code == 404
        assert client.get("/nowhere").json()["error"]["code"] == "not_found"
        assert client.get("/v1/completions").status_code == 405


def test_only_named_hosts_are_answered(stack: Stack) -> None:
    """A web page that lets its own name point at 127.0.0.1 does not reach the model."""
    app = build_app(Server(stack, name="small"), allowed_hosts=["127.0.0.1", "localhost", "::1"])
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/healthz").status_code == 200
    with TestClient(app, base_url="http://evil.example") as client:
        for found in (client.get("/healthz"), client.post("/v1/completions", json={"prompt": "A"})):
            assert found.status_code == 400
            assert "'evil.example' is no name of this server" in found.json()["error"]["message"]
            assert found.json()["error"]["code"] == "bad_request"
    with TestClient(app) as client:
        told = [operation for each in app.openapi()["paths"].values() for operation in each.values()]
        assert all("400" in operation["responses"] for operation in told)
        for host, status in (
            ("LocalHost:80", 200),
            ("127.0.0.1:8000", 200),
            ("[::1]:8000", 200),
            ("[::1]", 200),
            ("", 400),
            ("[::1", 400),
            ("localhost.evil.example", 400),
            ("localhost@evil.example", 400),
        ):
            assert client.get("/healthz", headers={"host": host}).status_code == status, host


def test_many_clients_at_once(stack: Stack) -> None:
    """Every answer is the right one for its own prompt."""
    prompts = [f"{PROMPTS[n % 3]} {n}" for n in range(12)]
    expected = [stack.generate(prompt, max_new_tokens=4, do_sample=False) for prompt in prompts]
    server = Server(stack, name="small", scheduler=Scheduler(max_wait_ms=20))
    with TestClient(build_app(server)) as client:
        answers: dict[int, str] = {}

        def work(number: int) -> None:
            answers[number] = ask(client, prompts[number], temperature=0, max_tokens=4)["choices"][0]["text"]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [answers[n] for n in range(len(prompts))] == expected
        assert client.get("/healthz").json()["batches"] < len(prompts)


# ------------------------------------------------------------------------------------------------ clients as they are
def test_what_is_null_or_at_its_default_asks_for_nothing(client: TestClient) -> None:
    plain = ask(client)["choices"]
    for more in (
        {"temperature": None}, {"n": None}, {"stream": None}, {"logprobs": None}, {"echo": False}, {"best_of": 1},
        {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"logit_bias": None}, {"logit_bias": {}}, {"suffix": None},
        {"top_p": None}, {"seed": None}, {"stop": None}, {"user": None},
    ):  # fmt: skip
        assert ask(client, temperature=0, **{k: v for k, v in more.items() if k != "temperature"})
    assert ask(client, max_tokens=None)["usage"]["completion_tokens"] == 16
    assert plain
    for more, name in (({"suffix": "x"}, "suffix"),):
        found = client.post("/v1/completions", json={"model": "small", "prompt": "A", **more})
        assert found.status_code == 400
        assert f"'{name}' is not supported by this server, but as null or at its default" in found.text


def test_a_stop_string_counts_in_the_new_text_alone(client: TestClient, stack: Stack) -> None:
    """As OpenAI's: one that begins in the prompt is not in the answer."""
    first = ask(client, "The river", temperature=0)["choices"][0]["text"]
    stop = "river" + first[:2]
    answer = ask(client, "The river", temperature=0, stop=stop)
    assert answer["choices"][0] == {"index": 0, "text": first, "logprobs": None, "finish_reason": "length"}
    assert answer["usage"]["completion_tokens"] == 8
    assert stack.generate("The river", max_new_tokens=8, do_sample=False, stop_strings=[stop]) == first
    inside = first[2:4]
    assert (
        ask(client, "The river", temperature=0, stop=inside)["choices"][0]["text"]
        == first[: first.index(inside)]
    )


def test_the_coldest_temperatures_are_greedy(client: TestClient) -> None:
    greedy = ask(client, temperature=0)["choices"]
    for temperature in (1e-300, 1e-7):
        assert ask(client, temperature=temperature)["choices"] == greedy


@pytest.mark.parametrize(
    "body", [{"prompt": "\ud800"}, {"prompt": "A", "stop": "\udfff"}, {"prompt": ["A", "\ud8ff"]}]
)
def test_half_a_character_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    content = json.dumps({"model": "small", **body})
    found = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert "valid string" in found.json()["error"]["message"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_row_that_fails_after_its_answer_does_not_stop_the_server(
    stack: Stack, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two rows: the first one's answer was given already when the error came."""
    recorder = Recorder()
    recorder.shapes, recorder.gate = [], threading.Event()
    recorder.gate.set()
    scheduler = Scheduler(max_wait_ms=200, max_batch=2)
    with Engine(Server(built(recorder) if whole else stack, scheduler=scheduler)) as engine:
        assert bool(engine.whole) is whole
        batch, asked = engine._worker.batch, []
        answers = batch.answers if whole else batch.answers["peftx"]
        finish = answers.finish

        def breaks(job: Job, *rest: Any) -> None:
            asked.append(job)
            if len(asked) == 2:
                raise ValueError("the second one")
            finish(job, *rest)

        monkeypatch.setattr(answers, "finish", breaks)
        jobs = [engine.submit(Request(prompt, max_tokens=4, temperature=0)) for prompt in PROMPTS[:2]]
        assert jobs[0].result(30).completion_tokens == 4
        with pytest.raises(ValueError, match="the second one"):
            jobs[1].result(30)
        assert engine.submit(Request("A", max_tokens=3, temperature=0)).result(30).completion_tokens == 3


def test_a_client_that_leaves_a_plain_request_is_noticed(recorded: tuple[Stack, Recorder]) -> None:
    """The application sees it through what guards it from large bodies."""
    stack, recorder = recorded
    app = build_app(Server(stack, name="small", scheduler=Scheduler(max_wait_ms=0)))
    body = json.dumps({"model": "small", "prompt": "Once", "max_tokens": 100}).encode()
    sent: list[Any] = []

    async def run() -> None:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(messages, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "",
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "asgi": {"version": "3.0"},
        }  # fmt: skip
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
            recorder.gate.set()

    asyncio.run(run())
    assert sent[0]["status"] == 499


def test_a_body_that_never_ends_is_given_up() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    async def run() -> None:
        async def receive() -> dict[str, Any]:
            if not seen:
                seen.append("first")
                return {"type": "http.request", "body": b"{", "more_body": True}
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: Any) -> None:
            seen.append(message)

        guard = Guard(app, most=100, refusal=lambda status, message: {"error": message}, within=0.2)
        scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"5")]}
        await guard(scope, receive, send)

    asyncio.run(run())
    assert seen[1]["status"] == 408
    assert json.loads(seen[2]["body"]) == {"error": "the body did not come within 0.2 s"}
