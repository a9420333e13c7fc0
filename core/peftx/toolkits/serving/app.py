"""The HTTP routes: OpenAI's completions, models and health. Needs `peftx[serve]`."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as AnyHttpException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from peftx.errors import PeftxError, PluginError, nearest
from peftx.toolkits.serving.engine import Engine, QueueFull
from peftx.toolkits.serving.guards import Guard
from peftx.toolkits.serving.job import Completion, Job, Request
from peftx.toolkits.serving.server import Server

ASK_AGAIN = 0.5  # seconds between two looks whether the client is still there
MOST_STOPS = 4  # as OpenAI


Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class CompletionBody(BaseModel):
    """`POST /v1/completions`. What this server does not do is refused, not ignored; a field of OpenAI's that is null,
    or as it would be anyway, asks for nothing."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    n: int = Field(1, ge=1, le=1)
    user: str | None = None
    best_of: int = Field(1, ge=1, le=1)
    echo: Literal[False] = False
    logprobs: None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        """As OpenAI reads them: null is "not given"."""
        if not isinstance(data, dict):
            return data
        return {
            name: value for name, value in data.items() if value is not None or name not in cls.model_fields
        }

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def request(self, prompt: str) -> Request:
        stops = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Request(
            prompt=prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=stops,
            stream=self.stream,
        )


def build_app(server: Server, *, allowed_hosts: Sequence[str] | None = None) -> FastAPI:
    """The application; the model's thread lives as long as it does.

    Args:
        allowed_hosts: values of the Host header that are answered; any if left out. Naming the loopback ones keeps web
            pages that point their own name at 127.0.0.1 away from the model.

    Raises:
        PeftxError: the model cannot be served, or a plugin's `serve` hook failed.
    """
    engine = Engine(server)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = FastAPI(title="peftx", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if allowed_hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_exception_handler(RequestValidationError, _bad_body)
    app.add_exception_handler(AnyHttpException, _http_error)
    app.add_exception_handler(PeftxError, _peftx_error)
    app.add_exception_handler(Exception, _crash)
    app.add_middleware(Guard, most=server.max_body, refusal=_error_body)
    started = int(time.time())

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        return {"status": "ok", "queued": engine.queued, "served": engine.served, "batches": engine.batches}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        about = {"id": server.name, "object": "model", "created": started, "owned_by": "peftx"}
        return {"object": "list", "data": [about]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        if body.model != server.name:
            hint = nearest(body.model, [server.name]) or f"there is '{server.name}'"
            raise HTTPException(404, f"no model '{body.model}' here; {hint}")
        if body.stream and len(body.prompts) > 1:
            raise HTTPException(400, "stream takes one prompt at a time")
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = server.name
        jobs: list[Job] = []
        try:
            for prompt in body.prompts:
                jobs.append(await run_in_threadpool(engine.submit, body.request(prompt)))
        except PeftxError:
            for job in jobs:
                job.cancel()
            raise
        if body.stream:
            return StreamingResponse(_events(jobs[0], head), media_type="text/event-stream")
        try:
            return JSONResponse(head | _answer([await _answered(job, http) for job in jobs]))
        finally:
            for job in jobs:
                job.cancel()  # nothing is left to do, or the client is gone

    for route in server.routes:
        app.add_api_route(route.path, route.endpoint, methods=[route.method])
    return app


def _answer(done: list[Completion]) -> dict[str, Any]:
    prompt, written = sum(one.prompt_tokens for one in done), sum(one.completion_tokens for one in done)
    return {
        "choices": [_choice(index, one.text, one.finish_reason) for index, one in enumerate(done)],
        "usage": {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written},
    }


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


async def _answered(job: Job, http: HttpRequest) -> Completion:
    """The job's completion, waited for without a thread. Raises what the model raised, and if the client is gone."""
    waiting = asyncio.ensure_future(asyncio.shield(asyncio.wrap_future(job.future)))
    while not waiting.done():
        await asyncio.wait({waiting}, timeout=ASK_AGAIN)
        if not waiting.done() and await http.is_disconnected():
            waiting.cancel()
            raise HTTPException(499, "the client is gone")
    return waiting.result()


async def _events(job: Job, head: dict[str, Any]) -> AsyncIterator[str]:
    """Server-sent events: pieces of text, an end with the reason, `[DONE]`."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def send(piece: str | None) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed, and nobody waits for the text
            job.cancel()

    job.listen(send)

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        while (piece := await pieces.get()) is not None:
            yield event(head | {"choices": [_choice(0, piece, None)]})
        done = job.future.result()
        answer = _answer([done])
        yield event(head | {"choices": [_choice(0, "", done.finish_reason)], "usage": answer["usage"]})
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
    return 429 if isinstance(error, QueueFull) else 400


_CODES = {
    400: "bad_request",
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


_AT_DEFAULT_ALONE = (
    "best_of", "echo", "logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "suffix", "n",
)  # fmt: skip


def _bad_body(_: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    name = place[0] if place else None
    if problem["type"] == "extra_forbidden":
        near = nearest(str(name), CompletionBody.model_fields)
        return _error(400, f"'{name}' is not supported by this server {near}".rstrip(), name)
    if name in _AT_DEFAULT_ALONE:
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
