"""What clients get: OpenAI's answers, whole and in events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.requests import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from peftx.errors import PeftxError
from peftx.toolkits.serving.bodies import StreamOptions
from peftx.toolkits.serving.errors import error_body, status_of
from peftx.toolkits.serving.job import Completion, Job, TokenScore


def usage_of(asked: Sequence[Completion], written: Sequence[Completion]) -> dict[str, int]:
    """Tokens of the prompts, each once, and of all answers."""
    prompt, new = sum(one.prompt_tokens for one in asked), sum(one.completion_tokens for one in written)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def choice(index: int, text: str, reason: str | None, done: Completion | None = None) -> dict[str, Any]:
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


def delta_of(index: int, text: str, reason: str | None) -> dict[str, Any]:
    """A piece of a chat's stream; the first one, empty, says who speaks."""
    delta = {} if reason is not None else {"content": text} if text else {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def turn(index: int, done: Completion, *, trim: bool) -> dict[str, Any]:
    def scored(token: str, value: float | None) -> dict[str, Any]:
        return {"token": token, "logprob": value, "bytes": list(token.encode())}

    told = None if not done.scores else {"content": [
        scored(score.token, score.logprob) | {"top_logprobs": [scored(*pair) for pair in score.top]}
        for score in done.scores
    ], "refusal": None}  # fmt: skip
    text = done.text.removeprefix(" ") if trim else done.text
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": told, "finish_reason": done.finish_reason}


def _late(seconds: float | None) -> str:
    return f"no answer within {seconds} s, which is this server's limit\n  hint: fewer tokens, or try again later"


async def finished(jobs: Sequence[Job], http: HttpRequest, seconds: float | None) -> list[Completion]:
    """The jobs' completions, waited for so long and without a thread.

    Raises what the model raised, and HTTPException where the time is up or the client is gone.
    """
    waiting = asyncio.gather(*(asyncio.shield(asyncio.wrap_future(job.future)) for job in jobs))
    gone = asyncio.ensure_future(_gone(http))
    try:
        both: set[asyncio.Future[Any]] = {waiting, gone}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not waiting.done():
            raise HTTPException(499, "the client is gone")
        if not waiting.done():
            raise HTTPException(408, _late(seconds))
        return waiting.result()
    finally:
        gone.cancel()
        waiting.cancel()
        for job in jobs:
            job.cancel()  # nothing is left to do, or the client is gone


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """A job's text as server-sent events; a job whose client is gone, be it before the first one, is cancelled."""

    def __init__(
        self,
        job: Job,
        head: dict[str, Any],
        piece_of: Callable[[int, str, str | None], dict[str, Any]],
        options: StreamOptions | None,
        seconds: float | None,
    ) -> None:
        super().__init__(_events(job, head, piece_of, options, seconds), media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def _events(
    job: Job,
    head: dict[str, Any],
    piece_of: Callable[[int, str, str | None], dict[str, Any]],
    options: StreamOptions | None,
    seconds: float | None,
) -> AsyncIterator[str]:
    """Server-sent events: pieces of text, an end with the reason, `[DONE]`; an error where it takes longer. The usage
    comes with the end, or as OpenAI has it where it is asked for: in an event of its own, without choices."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()
    apart = options is not None and options.include_usage
    until = None if seconds is None else loop.time() + seconds

    def send(piece: str | None) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed, and nobody waits for the text
            job.cancel()

    job.listen(send)

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        if piece_of is delta_of:
            yield event(head | {"choices": [delta_of(0, "", None)]})
        trim = job.request.trim
        while True:
            async with asyncio.timeout_at(until):
                piece = await pieces.get()
            if piece is None:
                break
            piece, trim = piece.removeprefix(" ") if trim else piece, False
            if piece:
                yield event(head | {"choices": [piece_of(0, piece, None)]})
        done = job.future.result()
        usage, last = usage_of([done], [done]), {"choices": [piece_of(0, "", done.finish_reason)]}
        yield event(head | last | ({} if apart else {"usage": usage}))
        if apart:
            yield event(head | {"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    except TimeoutError:
        yield event(error_body(408, _late(seconds)))
    except PeftxError as error:
        yield event(error_body(status_of(error), str(error)))
