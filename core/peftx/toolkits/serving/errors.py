"""What went wrong, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHttpException

from peftx.errors import PeftxError, PluginError, nearest
from peftx.toolkits.serving.bodies import AT_DEFAULT_ALONE, ChatBody, CompletionBody
from peftx.toolkits.serving.models import UnknownModel
from peftx.toolkits.serving.worker import QueueFull


def answer_errors(app: FastAPI) -> None:
    """Have an application answer whatever is raised in it so."""
    app.add_exception_handler(RequestValidationError, _bad_body)
    app.add_exception_handler(AnyHttpException, _http_error)
    app.add_exception_handler(PeftxError, _peftx_error)
    app.add_exception_handler(Exception, _crash)


def status_of(error: Exception) -> int:
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


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "error": {"message": message, "type": kind, "param": param, "code": _CODES.get(status, str(status))}
    }


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message, param), status_code=status)


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
    found = _error(error.status_code, str(error.detail))
    found.headers.update(error.headers or {})  # the methods of a route, where another one was asked for
    return found


def _peftx_error(_: HttpRequest, error: Exception) -> JSONResponse:
    return _error(status_of(error), str(error))


def _crash(_: HttpRequest, error: Exception) -> JSONResponse:
    return _error(500, f"{type(error).__name__}: {error}")
