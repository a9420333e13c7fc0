"""What `/openapi.json` says: every route with what it answers, errors too. Answers are told in full: a field that is
not here is not sent."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from peftx.toolkits.serving.guards import OPEN
from peftx.version import __version__

EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "An event: the JSON of a piece, at the end `[DONE]`",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
}
MEANINGS = {
    400: "What was asked for is malformed, does not fit the model, or is not supported",
    401: "The key is missing, or another one",
    404: "No such model is served",
    408: "The body, or the answer, did not come in time",
    413: "The body is too large, or does not tell its length",
    429: "Too many requests wait already",
    500: "The model, or a plugin on it, failed",
}


class Told(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Told):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorReply(Told):
    """What went wrong, as OpenAI says it."""

    error: ErrorDetail


class Usage(Told):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextScores(Told):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Told):
    index: int
    text: str
    logprobs: TextScores | None
    finish_reason: Literal["stop", "length"]


class TextReply(Told):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ScoredToken(Told):
    token: str
    logprob: float | None
    bytes: list[int]


class TurnToken(ScoredToken):
    top_logprobs: list[ScoredToken]


class TurnScores(Told):
    content: list[TurnToken]
    refusal: None


class Turn(Told):
    role: Literal["assistant"]
    content: str
    refusal: None


class TurnChoice(Told):
    index: int
    message: Turn
    logprobs: TurnScores | None
    finish_reason: Literal["stop", "length"]


class ChatReply(Told):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[TurnChoice]
    usage: Usage


class Embedding(Told):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or their base64 as little-endian float32."""


class ReadUsage(Told):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(Told):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: ReadUsage


class ModelReply(Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["peftx"]


class ModelDetail(ModelReply):
    base: str
    plugins: dict[str, str]


class ModelList(Told):
    object: Literal["list"]
    data: list[ModelReply]


class EngineHealth(Told):
    queued: int
    served: int
    batches: int
    batching: str
    why_whole: str | None
    plugins: list[str]
    why_apart: str | None


class Health(Told):
    status: Literal["ok"]
    queued: int
    served: int
    batches: int
    models: dict[str, EngineHealth]


class Tokens(Told):
    tokens: list[int]
    count: int
    max_model_len: int | None


class Prompt(Told):
    prompt: str


def answers(reply: type[Told] | None, *errors: int, events: bool = False) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: what it answers, as JSON or events too, and the errors."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": MEANINGS[status]} for status in errors
    }
    if reply is not None:
        found[200] = {"model": reply, "description": "The answer"} | ({"content": EVENTS} if events else {})
    return found


class App(FastAPI):
    """A FastAPI application whose description of itself is right about errors and keys.

    Args:
        keyed: do requests want a key.
    """

    def __init__(self, *, keyed: bool, **options: Any) -> None:
        super().__init__(title="peftx", version=__version__, docs_url=None, redoc_url=None, **options)
        self.keyed = keyed

    def openapi(self) -> dict[str, Any]:
        """The description; FastAPI's own 422 is never sent here."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        found = super().openapi()
        schemas = found.get("components", {}).get("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for path, methods in found["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                for status, each in operation["responses"].items():
                    if int(status) >= 400:  # FastAPI has them in the type of the answer
                        each["content"] = {"application/json": next(iter(each["content"].values()))}
                if self.keyed and path not in OPEN:
                    operation["security"] = [{"key": []}]
        if self.keyed:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return found
