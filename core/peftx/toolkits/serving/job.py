"""One request on its way through the server, and what comes of it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One completion that is asked for, checked.

    `temperature` 0 is greedy. `seed` makes sampling repeatable.
    `max_tokens` None: what is left of the context, `MOST_LEFT` at most.
    """

    prompt: str
    max_tokens: int | None = 16
    ids: tuple[int, ...] = ()
    """The prompt as tokens, in the place of its text."""
    rendered: bool = False
    """Did a chat template write the prompt, which puts special tokens in by itself."""
    trim: bool = False
    """Is a blank in front of the answer what parts it from the speaker's name, and no part of it."""
    echo: bool = False
    """Give the prompt back in front of the answer."""
    logprobs: int | None = None
    """Log-probabilities of the tokens, and of so many likeliest others."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    schema: str = ""
    """JSON schema of the answer; empty where it may be anything."""

    @property
    def key(self) -> tuple[object, ...]:
        """Requests with the same key may run in one batch that runs whole."""
        shaped = self.presence_penalty, self.frequency_penalty, self.logit_bias
        return (self.temperature, self.top_p, self.stop, self.schema, *shaped)


MOST_LEFT = 1024
"""Tokens that are written where a request does not say how many."""


@dataclass(frozen=True)
class TokenScore:
    """A token of the text as the model saw it coming."""

    token: str
    logprob: float | None
    """None of the first token, before which nothing stands."""
    offset: int
    """Characters before it."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens in its place."""


@dataclass(frozen=True)
class Piece:
    """Of a text that is streamed: what came, and the scores of its tokens where they are known on the way."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What came of a request: `finish_reason` is `stop` (end token or stop string) or `length`."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    scores: tuple[TokenScore, ...] = ()
    """Of the tokens of the text, where they were asked for."""

    @property
    def mean(self) -> float:
        """Mean log-probability of a token of the answer."""
        known = [score.logprob for score in self.scores if score.logprob is not None]
        own = known[-self.completion_tokens :] if self.completion_tokens else known
        return sum(own) / max(1, len(own))


class Job:
    """One request on its way. `pieces` yields the text as it comes, `result` waits for all of it; who may not block
    listens (`listen`) and waits for `future`."""

    def __init__(self, request: Request, ids: list[int], max_tokens: int, model: str = "") -> None:
        self.request = request
        self.model = model
        self.ids = ids
        self.max_tokens = max_tokens
        self.arrived = time.monotonic()
        self.future: Future[Completion] = Future()
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._send: Callable[[Piece | None], None] = self._pieces.put
        self._sending = threading.Lock()
        self.cancelled = False
        # As a callback, so that a listener that raises is logged, and does not end who gave the answer.
        self.future.add_done_callback(lambda _: self._pass_on(None))

    @property
    def prompt_tokens(self) -> int:
        return len(self.ids)

    def cancel(self) -> None:
        """The client is gone: stop at the next token. What is finished stays so: its client leaves too."""
        if not self.future.done():
            self.cancelled = True

    def send(self, text: str, scores: tuple[TokenScore, ...] = ()) -> None:
        """A piece of the text."""
        self._pass_on(Piece(text, scores))

    def _pass_on(self, piece: Piece | None) -> None:
        with self._sending:
            self._send(piece)

    def listen(self, send: Callable[[Piece | None], None]) -> None:
        """Call `send` with each piece, those that came already first, and with None at the end; from any thread."""
        with self._sending:
            while not self._pieces.empty():
                send(self._pieces.get())
            self._send = send

    def finish(self, completion: Completion | None, error: Exception | None = None) -> None:
        """Give the answer; what comes after the first one is not asked for any more."""
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            assert completion is not None
            self.future.set_result(completion)

    def pieces(self) -> Iterator[str]:
        """The text in pieces, until it ends. Raises what the model raised."""
        while (piece := self._pieces.get()) is not None:
            yield piece.text
        self.future.result()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the whole text. Raises what the model raised, and TimeoutError."""
        try:
            return self.future.result(timeout)
        except TimeoutError:
            raise TimeoutError(f"no answer within {timeout} s") from None
