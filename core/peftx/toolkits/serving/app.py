"""The HTTP routes: OpenAI's completions, chats, embeddings and models, vLLM's tokenize. Needs `peftx[serve]`."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.requests import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from peftx.errors import PeftxError
from peftx.toolkits.serving.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    LoadBody,
    TokenizeBody,
    UnloadBody,
)
from peftx.toolkits.serving.engine import Engine
from peftx.toolkits.serving.errors import answer_errors, error_body
from peftx.toolkits.serving.guards import Guard
from peftx.toolkits.serving.job import Job, Request
from peftx.toolkits.serving.metrics import Metrics
from peftx.toolkits.serving.models import Loader, Models
from peftx.toolkits.serving.openapi import (
    App,
    ChatReply,
    EmbeddingsReply,
    Health,
    ModelDetail,
    ModelList,
    Prompt,
    TextReply,
    Tokens,
    answers,
)
from peftx.toolkits.serving.replies import Events, choice, delta_of, finished, turn, usage_of
from peftx.toolkits.serving.server import Server

SENDING = (408, 413)
"""Errors of all routes that are sent something."""
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

    app = App(keyed=server.api_key is not None, lifespan=lifespan)
    answer_errors(app)
    app.add_middleware(
        Guard, most=server.max_body, refusal=error_body, key=server.api_key, hosts=allowed_hosts
    )
    hosted = () if allowed_hosts is None else (400,)
    keyed = (401, *hosted) if app.keyed else hosted
    routes(app, models, hosted=hosted, keyed=keyed)
    for each in servers:
        for route in each.routes:
            path = route.path if each is server else f"/{each.name}{route.path}"
            failing = answers(None, 400, 500, *keyed, *(SENDING if route.method == "POST" else ()))
            app.add_api_route(path, route.endpoint, methods=[route.method], responses=failing)
    return app


def routes(app: FastAPI, models: Models, *, hosted: tuple[int, ...], keyed: tuple[int, ...]) -> None:
    """The server's own routes; `hosted`: errors of all, `keyed`: of all that want a key."""
    started, metrics = int(time.time()), Metrics(models)
    reading = (400, 404, 500, *SENDING, *keyed)
    writing = (429, *reading)

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

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"content-security-policy": POLICY})

    @app.get("/health", responses=answers(Health, *hosted))
    @app.get("/healthz", responses=answers(Health, *hosted))
    def healthz() -> dict[str, Any]:
        each = {engine.server.name: engine.about() for engine in models}
        sums = {key: sum(one[key] for one in each.values()) for key in ("queued", "served", "batches")}
        return {"status": "ok", **sums, "models": each}

    @app.get("/metrics", response_class=PlainTextResponse, responses=answers(None, *keyed))
    def scraped() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=answers(ModelList, *keyed))
    def listed() -> dict[str, Any]:
        return {"object": "list", "data": [about(engine) for engine in models]}

    @app.get("/v1/models/{model:path}", responses=answers(ModelDetail, 404, *keyed))
    def model(model: str) -> dict[str, Any]:
        engine = models.engine(model)
        stack = engine.server.stack
        return about(engine) | {
            "base": stack.base_id,
            "plugins": {id: repr(p) for id, p in stack.plugins.items()},
        }

    @app.post("/v1/completions", response_model=None, responses=answers(TextReply, *writing, events=True))
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        engine = models.engine(body.model)
        asked = body.requests()
        head = headed(engine, "cmpl", "text_completion")
        jobs = await submitted(engine, [request for group in asked for request in group])
        if body.stream:
            return Events(jobs, head, choice, body, engine.server.max_seconds)
        done = iter(await finished(jobs, http, engine.server.max_seconds))
        groups = [[next(done) for _ in group] for group in asked]
        if body.best_of is not None:
            groups = [sorted(group, key=lambda one: -one.mean) for group in groups]
        chosen = [one for group in groups for one in group[: body.n]]
        told = body.logprobs is not None  # best_of looks at them too
        choices = [
            choice(i, one.text, one.finish_reason, one.scores if told else ()) for i, one in enumerate(chosen)
        ]
        usage = usage_of([group[0] for group in groups], [one for group in groups for one in group])
        return JSONResponse(head | {"choices": choices, "usage": usage})

    @app.post(
        "/v1/chat/completions", response_model=None, responses=answers(ChatReply, *writing, events=True)
    )
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        engine = models.engine(body.model)
        requests = await run_in_threadpool(body.requests, engine.server.stack.tokenizer)
        jobs = await submitted(engine, requests)
        if body.stream:
            head = headed(engine, "chatcmpl", "chat.completion.chunk")
            return Events(jobs, head, delta_of, body, engine.server.max_seconds)
        done = await finished(jobs, http, engine.server.max_seconds)
        choices = [turn(i, one, trim=requests[0].trim) for i, one in enumerate(done)]
        return JSONResponse(
            headed(engine, "chatcmpl", "chat.completion")
            | {"choices": choices, "usage": usage_of(done[:1], done)}
        )

    @app.post("/v1/embeddings", response_model=None, responses=answers(EmbeddingsReply, *reading))
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

    @app.post("/tokenize", responses=answers(Tokens, *reading))
    def tokenize(body: TokenizeBody) -> dict[str, Any]:
        engine = models.engine(body.model)
        ids = engine.ids_of(Request(body.prompt)) if body.prompt else []
        return {"tokens": ids, "count": len(ids), "max_model_len": engine.context}

    @app.post("/detokenize", responses=answers(Prompt, *reading))
    def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        engine = models.engine(body.model)
        return {"prompt": engine.text_of(body.tokens)}

    @app.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=answers(None, *reading))
    def load_adapter(body: LoadBody) -> PlainTextResponse:
        models.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=answers(None, *reading))
    def unload_adapter(body: UnloadBody) -> PlainTextResponse:
        models.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
