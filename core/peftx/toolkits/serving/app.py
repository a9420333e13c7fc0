"""The HTTP routes: OpenAI's completions, chats, embeddings and models, vLLM's tokenize. Needs `peftx[serve]`."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as AnyHttpException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from peftx.errors import PeftxError, PluginError, nearest
from peftx.toolkits.serving.bodies import (
    AT_DEFAULT_ALONE,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    LoadBody,
    StreamOptions,
    TokenizeBody,
    UnloadBody,
)
from peftx.toolkits.serving.engine import Engine
from peftx.toolkits.serving.guards import Guard
from peftx.toolkits.serving.job import Completion, Job, Request, TokenScore
from peftx.toolkits.serving.metrics import Metrics
from peftx.toolkits.serving.models import Loader, Models, UnknownModel
from peftx.toolkits.serving.server import Server
from peftx.toolkits.serving.worker import QueueFull

ASK_AGAIN = 0.5  # seconds between two looks whether the client is still there
PAGE = Path(__file__).parent / "page.html"
POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def build_app(
    *servers: Server, allowed_hosts: Sequence[str] | None = None, loader: Loader | None = None
) -> FastAPI:
    """The application; the models' threads live as long as it does.

    Args:
        servers: of each model; the first one answers where a request names none, and its limits and its key hold.
            Routes of the plugins of all others begin with the model's name.
        loader: makes models of what clients load; they may load none if left out.
        allowed_hosts: values of the Host header that are answered; any if left out. Naming the loopback ones keeps web
            pages that point their own name at 127.0.0.1 away from the model.

    Raises:
        PeftxError: a model cannot be served, two have one name, or a plugin's `serve` hook failed.
    """
    server, models = servers[0], Models(servers, loader)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with models:
            yield

    app = FastAPI(title="peftx", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if allowed_hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_exception_handler(RequestValidationError, _bad_body)
    app.add_exception_handler(AnyHttpException, _http_error)
    app.add_exception_handler(PeftxError, _peftx_error)
    app.add_exception_handler(Exception, _crash)
    app.add_middleware(Guard, most=server.max_body, refusal=_error_body, key=server.api_key)
    routes(app, models)
    for each in servers:
        for route in each.routes:
            path = route.path if each is server else f"/{each.name}{route.path}"
            app.add_api_route(path, route.endpoint, methods=[route.method])
    return app


def routes(app: FastAPI, models: Models) -> None:
    """The server's own routes."""
    started, metrics = int(time.time()), Metrics(models)

    def about(engine: Engine) -> dict[str, Any]:
        return {"id": engine.server.name, "object": "model", "created": started, "owned_by": "peftx"}

    def headed(engine: Engine, prefix: str, kind: str) -> dict[str, Any]:
        id = f"{prefix}-{uuid.uuid4().hex}"
        return {"id": id, "object": kind, "created": int(time.time()), "model": engine.server.name}

    async def submitted(engine: Engine, requests: Sequence[Request]) -> list[Job]:
        jobs: list[Job] = []
        try:
            for request in requests:
                jobs.append(await run_in_threadpool(engine.submit, request))
                metrics.follow(engine.server.name, jobs[-1])
        except PeftxError:
            for job in jobs:
                job.cancel()
            raise
        return jobs

    async def finished(jobs: Sequence[Job], http: HttpRequest) -> list[Completion]:
        try:
            return [await _answered(job, http) for job in jobs]
        finally:
            for job in jobs:
                job.cancel()  # nothing is left to do, or the client is gone

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"content-security-policy": POLICY})

    @app.get("/health")
    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        each = {engine.server.name: engine.about() for engine in models}
        sums = {key: sum(one[key] for one in each.values()) for key in ("queued", "served", "batches")}
        return {"status": "ok", **sums, "models": each}

    @app.get("/metrics")
    def scraped() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def listed() -> dict[str, Any]:
        return {"object": "list", "data": [about(engine) for engine in models]}

    @app.get("/v1/models/{model:path}")
    def model(model: str) -> dict[str, Any]:
        engine = models.engine(model)
        stack = engine.server.stack
        return about(engine) | {
            "base": stack.base_id,
            "plugins": {id: repr(p) for id, p in stack.plugins.items()},
        }

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        engine = models.engine(body.model)
        asked = body.requests()
        if body.stream and (len(asked) > 1 or body.n > 1):
            raise HTTPException(400, "stream takes one prompt at a time, and gives one answer")
        head = headed(engine, "cmpl", "text_completion")
        jobs = await submitted(engine, [request for group in asked for request in group])
        if body.stream:
            events = _events(jobs[0], head, _choice, body.stream_options)
            return StreamingResponse(events, media_type="text/event-stream")
        done = iter(await finished(jobs, http))
        groups = [[next(done) for _ in group] for group in asked]
        if body.best_of is not None:
            groups = [sorted(group, key=lambda one: -one.mean) for group in groups]
        chosen = [one for group in groups for one in group[: body.n]]
        choices = [_choice(i, one.text, one.finish_reason, one) for i, one in enumerate(chosen)]
        usage = _usage([group[0] for group in groups], [one for group in groups for one in group])
        return JSONResponse(head | {"choices": choices, "usage": usage})

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        engine = models.engine(body.model)
        if body.stream and body.n > 1:
            raise HTTPException(400, "stream gives one answer")
        requests = await run_in_threadpool(body.requests, engine.server.stack.tokenizer)
        jobs = await submitted(engine, requests)
        if body.stream:
            head = headed(engine, "chatcmpl", "chat.completion.chunk")
            events = _events(jobs[0], head, _delta, body.stream_options)
            return StreamingResponse(events, media_type="text/event-stream")
        done = await finished(jobs, http)
        choices = [_turn(i, one, trim=requests[0].trim) for i, one in enumerate(done)]
        return JSONResponse(
            headed(engine, "chatcmpl", "chat.completion")
            | {"choices": choices, "usage": _usage(done[:1], done)}
        )

    @app.post("/v1/embeddings", response_model=None)
    def embeddings(body: EmbeddingsBody) -> Response:
        engine = models.engine(body.model)
        with engine.using() as own:
            vectors = own.embed(body.input).cpu()  # type: ignore[attr-defined]
            count = sum(len(own.tokenizer(text).input_ids) for text in body.input)
        data = [
            {"object": "embedding", "index": i, "embedding": vector.tolist() if body.encoding_format == "float"
             else base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()}
            for i, vector in enumerate(vectors)
        ]  # fmt: skip
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "model": engine.server.name, "data": data, "usage": usage})

    @app.post("/tokenize")
    def tokenize(body: TokenizeBody) -> dict[str, Any]:
        engine = models.engine(body.model)
        ids = engine.ids_of(Request(body.prompt)) if body.prompt else []
        return {"tokens": ids, "count": len(ids), "max_model_len": engine.context}

    @app.post("/detokenize")
    def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        engine = models.engine(body.model)
        return {"prompt": engine.text_of(body.tokens)}

    @app.post("/v1/load_lora_adapter")
    def load_adapter(body: LoadBody) -> PlainTextResponse:
        models.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload_adapter(body: UnloadBody) -> PlainTextResponse:
        models.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _usage(asked: Sequence[Completion], written: Sequence[Completion]) -> dict[str, int]:
    """Tokens of the prompts, each once, and of all answers."""
    prompt, new = sum(one.prompt_tokens for one in asked), sum(one.completion_tokens for one in written)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _choice(index: int, text: str, reason: str | None, done: Completion | None = None) -> dict[str, Any]:
    scores = done.scores if done is not None else ()
    told = None if not scores else {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_by_text(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }  # fmt: skip
    return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}


def _by_text(score: TokenScore) -> dict[str, float] | None:
    """The likeliest tokens by what they say; of two that say the same (halves of characters) the likelier."""
    return None if score.logprob is None else dict(reversed(score.top))


def _delta(index: int, text: str, reason: str | None) -> dict[str, Any]:
    """A piece of a chat's stream; the first one, empty, says who speaks."""
    delta = {} if reason is not None else {"content": text} if text else {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _turn(index: int, done: Completion, *, trim: bool) -> dict[str, Any]:
    def scored(token: str, value: float | None) -> dict[str, Any]:
        return {"token": token, "logprob": value, "bytes": list(token.encode())}

    told = None if not done.scores else {"content": [
        scored(score.token, score.logprob) | {"top_logprobs": [scored(*pair) for pair in score.top]}
        for score in done.scores
    ], "refusal": None}  # fmt: skip
    text = done.text.removeprefix(" ") if trim else done.text
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": told, "finish_reason": done.finish_reason}


async def _answered(job: Job, http: HttpRequest) -> Completion:
    """The job's completion, waited for without a thread. Raises what the model raised, and if the client is gone."""
    waiting = asyncio.ensure_future(asyncio.shield(asyncio.wrap_future(job.future)))
    while not waiting.done():
        await asyncio.wait({waiting}, timeout=ASK_AGAIN)
        if not waiting.done() and await http.is_disconnected():
            waiting.cancel()
            raise HTTPException(499, "the client is gone")
    return waiting.result()


async def _events(
    job: Job,
    head: dict[str, Any],
    piece_of: Callable[[int, str, str | None], dict[str, Any]],
    options: StreamOptions | None,
) -> AsyncIterator[str]:
    """Server-sent events: pieces of text, an end with the reason, `[DONE]`. The usage comes with the end, or as OpenAI
    has it where it is asked for: in an event of its own, without choices."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()
    apart = options is not None and options.include_usage

    def send(piece: str | None) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed, and nobody waits for the text
            job.cancel()

    job.listen(send)

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        if piece_of is _delta:
            yield event(head | {"choices": [_delta(0, "", None)]})
        trim = job.request.trim
        while (piece := await pieces.get()) is not None:
            piece, trim = piece.removeprefix(" ") if trim else piece, False
            if piece:
                yield event(head | {"choices": [piece_of(0, piece, None)]})
        done = job.future.result()
        usage, last = _usage([done], [done]), {"choices": [piece_of(0, "", done.finish_reason)]}
        yield event(head | last | ({} if apart else {"usage": usage}))
        if apart:
            yield event(head | {"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    except PeftxError as error:
        yield event(_error_body(_status(error), str(error)))
    finally:
        job.cancel()  # nothing is left to do, or the client is gone


# -- errors, in OpenAI's shape ---------------------------------------------------------------------------------------


def _status(error: Exception) -> int:
    """A plugin that crashed is the server's fault, everything else that is said in words the request's."""
    if isinstance(error, PluginError):
        return 500
    if isinstance(error, UnknownModel):
        return 404
    return 429 if isinstance(error, QueueFull) else 400


_CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    404: "not_found",
    408: "timeout",
    413: "too_large",
    429: "queue_full",
    500: "internal_error",
}


def _error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "error": {"message": message, "type": kind, "param": param, "code": _CODES.get(status, str(status))}
    }


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(_error_body(status, message, param), status_code=status)


def _bad_body(_: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    name = place[0] if place else None
    if problem["type"] == "value_error":
        return _error(400, str(problem["msg"]).removeprefix("Value error, "), name)
    if problem["type"] == "extra_forbidden":
        known = {*CompletionBody.model_fields, *ChatBody.model_fields}
        near = nearest(str(name), known)
        return _error(400, f"'{name}' is not supported by this server {near}".rstrip(), name)
    if name in AT_DEFAULT_ALONE:
        return _error(400, f"'{name}' is not supported by this server, but as null or at its default", name)
    if problem["type"] == "json_invalid":
        return _error(400, f"the body is no JSON: {problem['ctx']['error']}")
    return _error(400, f"{name or 'body'}: {problem['msg']}", name)


def _http_error(_: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, AnyHttpException)
    return _error(error.status_code, str(error.detail))


def _peftx_error(_: HttpRequest, error: Exception) -> JSONResponse:
    return _error(_status(error), str(error))


def _crash(_: HttpRequest, error: Exception) -> JSONResponse:
    return _error(500, f"{type(error).__name__}: {error}")
