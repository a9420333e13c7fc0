"""The queue, and the one thread that runs the model.

Rows come and go at every step (`rows.py`) where the model and what stands on it compute the same that way, which is
tried when an engine is made; batches run whole (`batches.py`) elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peftx.engines.data.gate import require_text
from peftx.errors import PeftxError, UnsupportedError
from peftx.kernel.positions import free_positions
from peftx.toolkits.decoding.text import check_ids, check_length, ids_for
from peftx.toolkits.serving.answers import Answers
from peftx.toolkits.serving.batches import Batches
from peftx.toolkits.serving.job import MOST_LEFT, Job, Request
from peftx.toolkits.serving.packed import pack
from peftx.toolkits.serving.prefix import PrefixCache
from peftx.toolkits.serving.rows import Rows, prove
from peftx.toolkits.serving.server import Server

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack

PATIENCE = 1.0
"""Seconds that rows wait for those who want the model for something else."""


class QueueFull(PeftxError):
    """More requests wait than the scheduler allows."""


class Engine:
    """Runs a server's requests. Use it in a `with` block, or call `start` and `close`.

    Raises:
        PeftxError: the model generates no text, or a plugin's `serve` hook failed.
    """

    def __init__(self, server: Server) -> None:
        stack = server.stack
        if not stack.model.can_generate():
            raise UnsupportedError(f"{type(stack.model).__name__} generates no text, so it cannot be served")
        server.prepare()
        scheduler = server.scheduler
        self.server = server
        self.served = 0  # requests that were taken from the queue
        self.batches = 0  # times that some were
        self.prefixes = (
            PrefixCache(stack.model, entries=scheduler.prefix_entries) if scheduler.prefix_cache else None
        )
        self.whole = ""
        """Why batches run whole; empty where rows come and go."""
        self._batch: Rows | Batches
        stack.model.eval()
        self.packed = pack(stack.model) if scheduler.pack_weights else 0  # linear layers
        answers = Answers(stack)
        try:
            prove(stack, answers)
            self._batch = Rows(stack, answers, most=scheduler.max_batch, prefixes=self.prefixes)
        except UnsupportedError as reason:
            self.whole = str(reason)
            self._batch = Batches(answers, most=scheduler.max_batch, prefixes=self.prefixes)
        self._tokenizer = stack.tokenizer
        self._guests = 0  # threads that want the model between two steps
        self._tokenizing = threading.Lock()  # a tokenizer's settings are its own, not a call's
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._running = threading.Lock()
        self._closed = False
        self._retiring = False
        self._thread: threading.Thread | None = None

    # -- the front ---------------------------------------------------------------------------------------------------

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; None where the model sets no limit."""
        return free_positions(self.server.stack.model)

    @property
    def queued(self) -> int:
        with self._changed:
            return len(self._waiting)

    def submit(self, request: Request) -> Job:
        """Put a request in the queue.

        Raises:
            PeftxError: an empty prompt, or one that does not fit the model's context.
            QueueFull: too many wait already.
        """
        ids = self.ids_of(request)
        job = Job(request, ids, self.room_of(request, ids))
        with self._changed:
            if self._closed or self._retiring:
                raise PeftxError(f"'{self.server.name}' is closing", hint="ask another model: GET /v1/models")
            if len(self._waiting) >= self.server.scheduler.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests wait already", hint="try again later")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def ids_of(self, request: Request) -> list[int]:
        """The prompt's tokens. Raises PeftxError where there is none, or the model has no such token."""
        if request.ids:
            check_ids(self.server.stack, request.ids)
            return list(request.ids)
        with self._tokenizing:
            if request.rendered:
                ids = self._tokenizer(
                    require_text(request.prompt, "the prompt"), add_special_tokens=False
                ).input_ids
            else:
                ids = ids_for(self.server.stack, request.prompt)
        if not ids:
            raise PeftxError("the prompt has no tokens")
        return list(ids)

    def text_of(self, ids: list[int]) -> str:
        """What tokens say, special ones with it."""
        if ids:
            check_ids(self.server.stack, ids)
        with self._tokenizing:
            return str(self._tokenizer.decode(ids))

    def room_of(self, request: Request, ids: list[int]) -> int:
        """Tokens that the answer may have. Raises PeftxError where they do not fit with the prompt."""
        stack = self.server.stack
        if request.max_tokens is not None:
            check_length(stack, len(ids), request.max_tokens)
            return request.max_tokens
        apart = 0 if stack.model.config.is_encoder_decoder else len(ids)
        left = MOST_LEFT if self.context is None else min(MOST_LEFT, self.context - apart)
        check_length(stack, len(ids), max(1, left))
        return left

    @contextmanager
    def using(self) -> Iterator[Stack]:
        """The model and its tokenizer for something else than a request's text: nothing else runs meanwhile."""
        with self._changed:
            self._guests += 1
        try:
            with self._running, self._tokenizing:
                yield self.server.stack
        finally:
            with self._changed:
                self._guests -= 1
                self._changed.notify_all()

    def start(self) -> Engine:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="peftx-engine", daemon=True)
            self._thread.start()
        return self

    def retire(self) -> None:
        """Take no more requests, answer those that wait, end the thread."""
        with self._changed:
            self._retiring = True
            self._changed.wait_for(lambda: not self._waiting)
        self.close()

    def close(self) -> None:
        """Finish the running batch, turn the waiting requests away, end the thread."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for job in waiting:
            job.finish(None, PeftxError("the server is closing"))
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while (jobs := self._taken()) is not None:
            self.batches += bool(jobs)
            self.served += len(jobs)
            with self._running:
                self._batch.step(jobs)

    def _taken(self) -> list[Job] | None:
        """What begins now, with its company; nothing where rows go on alone, None when the engine closes."""
        batch, scheduler = self._batch, self.server.scheduler
        with self._changed:
            while not self._waiting and not batch.busy and not self._closed:
                self._changed.wait()
            self._changed.wait_for(lambda: not self._guests, PATIENCE)
            if not self._closed and self._waiting:
                until = self._waiting[0].arrived + scheduler.max_wait_ms / 1000
                self._changed.wait_for(
                    lambda: self._closed or batch.ready(self._waiting), until - time.monotonic()
                )
            if self._closed:
                return [] if batch.busy else None
            self._drop_cancelled()
            if not self._waiting or not batch.free:
                return []
            jobs = batch.choose(scheduler.order(self._waiting))
            self._waiting = [job for job in self._waiting if job not in jobs]
            self._changed.notify_all()
            return jobs

    def _drop_cancelled(self) -> None:
        """Nobody waits for these any more."""
        for job in self._waiting:
            if job.cancelled:
                job.finish(None, PeftxError("the request was cancelled"))
        self._waiting = [job for job in self._waiting if not job.cancelled]
        self._changed.notify_all()
