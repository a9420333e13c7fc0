"""The queue, and the one thread that runs the model.

A batch is the first waiting request and those that arrive within `max_wait_ms` and sample alike; it runs as one call,
left-padded, to the longest of their lengths, and each row is cut to its own.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from peftx.engines.data.gate import require_text
from peftx.errors import PeftxError, UnsupportedError
from peftx.kernel.positions import free_positions
from peftx.toolkits.decoding.generation import decode
from peftx.toolkits.decoding.text import COLDEST, check_ids, check_length, ids_for, request_of_ids
from peftx.toolkits.serving.job import MOST_LEFT, Completion, Job, Request
from peftx.toolkits.serving.prefix import PrefixCache
from peftx.toolkits.serving.scoring import scores_of, shaping
from peftx.toolkits.serving.server import Server
from peftx.toolkits.serving.stream import TextStream, cut_at_stop

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack
    from peftx.toolkits.decoding import Generation


class QueueFull(PeftxError):
    """More requests wait than the scheduler allows."""


class _Cancelled(StoppingCriteria):
    """Ends the loop when every job of the batch was cancelled."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        gone = all(job.cancelled for job in self._jobs)
        return torch.full((input_ids.shape[0],), gone, dtype=torch.bool, device=input_ids.device)


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
        self.server = server
        self.served = 0  # requests that were taken from the queue
        self.batches = 0
        self.prefixes = (
            PrefixCache(stack.model, entries=server.scheduler.prefix_entries)
            if server.scheduler.prefix_cache
            else None
        )
        self._tokenizer = stack.tokenizer
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
        with self._running, self._tokenizing:
            yield self.server.stack

    def start(self) -> Engine:
        if self._thread is None:
            self.server.stack.model.eval()
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
        while (jobs := self._next_batch()) is not None:
            if not jobs:
                continue
            self.batches += 1
            self.served += len(jobs)
            try:
                with self._running:
                    self._run(jobs)
            except Exception as error:  # noqa: BLE001  what a plugin raises is the answer of these requests, not the end
                for job in jobs:
                    job.finish(None, error)

    def _next_batch(self) -> list[Job] | None:
        """Wait for a request and its company; None when the engine closes, nothing where all were cancelled."""
        scheduler = self.server.scheduler
        with self._changed:
            while not self._waiting and not self._is_closed():
                self._changed.wait()
            if self._is_closed():
                return None
            until = self._waiting[0].arrived + scheduler.max_wait_ms / 1000
            while not self._is_closed() and len(self._waiting) < scheduler.max_batch:
                left = until - time.monotonic()
                if left <= 0 or self._waiting[0].request.alone:
                    break
                self._changed.wait(left)
            if self._is_closed():
                return None
            self._drop_cancelled()
            if not self._waiting:
                return []
            ordered = scheduler.order(self._waiting)
            first = ordered[0]
            jobs = [first]
            if not first.request.alone:
                alike = [
                    job
                    for job in ordered[1:]
                    if not job.request.alone and job.request.key == first.request.key
                ]
                jobs += self._fitting(first, alike)[: scheduler.max_batch - 1]
            self._waiting = [job for job in self._waiting if job not in jobs]
            self._changed.notify_all()
            return jobs

    def _is_closed(self) -> bool:
        return self._closed  # another thread may set it during a wait

    def _drop_cancelled(self) -> None:
        """Nobody waits for these any more."""
        for job in self._waiting:
            if job.cancelled:
                job.finish(None, PeftxError("the request was cancelled"))
        self._waiting = [job for job in self._waiting if not job.cancelled]
        self._changed.notify_all()

    def _fitting(self, first: Job, others: list[Job]) -> list[Job]:
        """Those that, padded to the longest prompt and run to the largest length, stay inside the context."""
        if self.context is None:
            return others
        prompt, new = first.prompt_tokens, first.max_tokens
        chosen = []
        for job in others:
            longer, more = max(prompt, job.prompt_tokens), max(new, job.max_tokens)
            if longer + more <= self.context:
                chosen.append(job)
                prompt, new = longer, more
        return chosen

    def _run(self, jobs: list[Job]) -> None:
        first, stack = jobs[0].request, self.server.stack
        choice: dict[str, Any] = {"do_sample": False}
        if first.temperature >= COLDEST:
            choice = {"do_sample": True, "temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
        if first.stop:
            choice["stop_strings"] = list(first.stop)
        longest = max(job.max_tokens for job in jobs)
        if longest == 0:  # the prompt alone is looked at
            jobs[0].finish(self._scored(jobs[0], Completion("", "length", jobs[0].prompt_tokens, 0), []))
            return
        generation = request_of_ids(stack, [job.ids for job in jobs], longest, first.seed, choice)
        generation.stopping_criteria.append(_Cancelled(jobs))
        written = 1 if stack.model.config.is_encoder_decoder else generation.input_ids.shape[1]
        generation.logits_processors += shaping(first, start=written)
        if first.stream:
            generation.streamer = TextStream(self._tokenizer, stop=first.stop, send=jobs[0].send)
        alone = len(jobs) == 1 and self.prefixes is not None
        if alone:
            self._start_from_prefix(generation)
        ids = decode(stack, generation)
        if alone and self.prefixes is not None and generation.past_key_values is not None:
            self.prefixes.keep(ids[0].tolist(), generation.past_key_values)
        for job, row in zip(jobs, ids[:, written:].tolist(), strict=True):
            job.finish(self._completion(job, row, generation))

    def _start_from_prefix(self, generation: Generation) -> None:
        assert self.prefixes is not None
        generation.past_key_values = self.prefixes.take(generation.input_ids[0].tolist())

    def _completion(self, job: Job, row: list[int], generation: Generation) -> Completion:
        """Cut a row at its own length, at an end token, at a stop string."""
        row = row[: job.max_tokens]
        ends = generation.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        place = next((index for index, token in enumerate(row) if token in ends), None)
        if place is not None:
            row = row[: place + 1]
        stop = job.request.stop
        text, stopped = cut_at_stop(self._text(row), stop)
        if stopped:
            # In a batch the row may have gone on: up to the token that completed the stop string it counts.
            whole = row
            last = bisect_left(
                range(len(row)), True, key=lambda i: cut_at_stop(self._text(whole[: i + 1]), stop)[1]
            )
            row = row[: last + 1]
        reason = "stop" if stopped or place is not None else "length"
        return self._scored(job, Completion(text, reason, job.prompt_tokens, len(row)), row)

    def _scored(self, job: Job, completion: Completion, row: list[int]) -> Completion:
        """With the prompt in front and log-probabilities, where these are asked for."""
        request = job.request
        if request.logprobs is not None:
            scores = scores_of(
                self.server.stack, job.ids, row, top=request.logprobs, echo=request.echo, text=self._text
            )
            completion = replace(completion, scores=scores)
        if request.echo:
            front = request.prompt if not request.ids else self._text(job.ids)
            completion = replace(completion, text=front + completion.text)
        return completion

    def _text(self, row: list[int]) -> str:
        return str(self._tokenizer.decode(row, skip_special_tokens=True))
