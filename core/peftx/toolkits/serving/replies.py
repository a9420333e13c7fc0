"""What clients get: OpenAI's answers, whole and in events."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import HTTPException
from fastapi.requests import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from peftx.errors import PeftxError
from peftx.toolkits.serving.bodies import Sampled
from peftx.toolkits.serving.errors import error_body, status_of
from peftx.toolkits.serving.job import Completion, Job, Piece, TokenScore


def usage_of(asked: Sequence[Completion], written: Sequence[Completion]) -> dict[str, int]:
    """Tokens of the prompts, each once, and of all answers."""
    prompt, new = sum(one.prompt_tokens for one in asked), sum(one.completion_tokens for one in written)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def choice(index: int, text: str, reason: str | None, scores: Sequence[TokenScore] = ()) -> dict[str, Any]:
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


def delta_of(index: int, text: str, reason: str | None, scores: Sequence[TokenScore] = ()) -> dict[str, Any]:
    """A piece of a chat's stream."""
    delta = {"content": text} if reason is None else {}
    return {"index": index, "delta": delta, "logprobs": _in_turn(scores), "finish_reason": reason}


def speaker(index: int) -> dict[str, Any]:
    """What a turn's stream begins with."""
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def turn(index: int, done: Completion, *, trim: bool) -> dict[str, Any]:
    text = done.text.removeprefix(" ") if trim else done.text
    message = {"role": "assistant", "content": text, "refusal": None}
    told = _in_turn(done.scores)
    return {"index": index, "message": message, "logprobs": told, "finish_reason": done.finish_reason}


def _in_turn(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    def scored(token: str, value: float | None) -> dict[str, Any]:
        return {"token": token, "logprob": value, "bytes": list(token.encode())}

    return None if not scores else {"content": [
        scored(score.token, score.logprob) | {"top_logprobs": [scored(*pair) for pair in score.top]}
        for score in scores
    ], "refusal": None}  # fmt: skip


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


PieceOf = Callable[[int, str, str | None, Sequence[TokenScore]], dict[str, Any]]
"""(index of the choice, text, why it ends, scores) -> a choice of an event."""


class Events(StreamingResponse):
    """Texts as server-sent events; jobs whose client is gone, be it before the first one, are cancelled.

    Args:
        jobs: of each choice, those of one prompt side by side. head: of every event. seconds: for all of it.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        head: dict[str, Any],
        piece_of: PieceOf,
        body: Sampled,
        seconds: float | None,
    ) -> None:
        super().__init__(_events(jobs, head, piece_of, body, seconds), media_type="text/event-stream")
        self.jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self.jobs:
                job.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _events(
    jobs: Sequence[Job], head: dict[str, Any], piece_of: PieceOf, body: Sampled, seconds: float | None
) -> AsyncIterator[str]:
    """Server-sent events: pieces of text, an end with the reason for each, `[DONE]`; an error where it takes longer.
    The usage comes with the last end, or as OpenAI has it where it is asked for: in an event without choices."""
    apart = body.stream_options is not None and body.stream_options.include_usage
    until = None if seconds is None else asyncio.get_running_loop().time() + seconds
    pieces = _pieces_of(jobs)
    trim, told, ended = [job.request.trim for job in jobs], [0] * len(jobs), 0

    def choosing(index: int, text: str, reason: str | None, scores: Sequence[TokenScore]) -> dict[str, Any]:
        told[index] += len(scores)
        return head | {"choices": [piece_of(index, text, reason, scores)]}

    try:
        if piece_of is delta_of:
            for index in range(len(jobs)):
                yield _event(head | {"choices": [speaker(index)]})
        while ended < len(jobs):
            try:
                async with asyncio.timeout_at(until):
                    index, piece = await pieces.get()
            except TimeoutError:
                yield _event(error_body(408, _late(seconds)))
                return
            if piece is not None:
                text, trim[index] = piece.text.removeprefix(" ") if trim[index] else piece.text, False
                if text or piece.scores:
                    yield _event(choosing(index, text, None, piece.scores))
                continue
            done, ended = jobs[index].future.result(), ended + 1
            if left := done.scores[told[index] :]:  # of tokens without a text, or all where batches run whole
                yield _event(choosing(index, "", None, left))
            last = choosing(index, "", done.finish_reason, ())
            yield _event(last if apart or ended < len(jobs) else last | {"usage": _usage(jobs, body.n)})
        if apart:
            yield _event(head | {"choices": [], "usage": _usage(jobs, body.n)})
        yield "data: [DONE]\n\n"
    except PeftxError as error:
        yield _event(error_body(status_of(error), str(error)))


def _usage(jobs: Sequence[Job], n: int) -> dict[str, int]:
    done = [job.future.result() for job in jobs]
    return usage_of(done[::n], done)


Pieces = asyncio.Queue[tuple[int, Piece | None]]


class _Post:
    """Puts pieces into queues of an event loop, from any thread. The loop is woken once for all that come until it
    looks: each time it would take the interpreter from who writes the text.
    """

    def __init__(self) -> None:  # without the loop, or what is kept for each would keep it alive
        self._woken = False
        self._sent = deque[tuple[Pieces, tuple[int, Piece | None]]]()

    def put(self, loop: asyncio.AbstractEventLoop, pieces: Pieces, piece: tuple[int, Piece | None]) -> None:
        """Raises RuntimeError where the loop, always the same one, is closed."""
        self._sent.append((pieces, piece))
        if not self._woken:  # twice is harmless
            self._woken = True
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._woken = False
                raise

    def _deliver(self) -> None:
        self._woken = False  # first, so that what comes now is looked for again
        while self._sent:
            pieces, piece = self._sent.popleft()
            pieces.put_nowait(piece)


_POSTS: WeakKeyDictionary[asyncio.AbstractEventLoop, _Post] = WeakKeyDictionary()


def _pieces_of(jobs: Sequence[Job]) -> Pieces:
    """What all of them say, as it comes, and whose it is; None at the end of each."""
    loop, pieces = asyncio.get_running_loop(), Pieces()
    post = _POSTS.setdefault(loop, _Post())

    def send(index: int, job: Job, piece: Piece | None) -> None:
        try:
            post.put(loop, pieces, (index, piece))
        except RuntimeError:  # the loop is closed, and nobody waits for the text
            job.cancel()

    for index, job in enumerate(jobs):
        job.listen(partial(send, index, job))
    return pieces
