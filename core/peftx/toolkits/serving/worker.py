"""A queue, and the one thread that runs a model."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from peftx.errors import ServerError
from peftx.toolkits.serving.batches import Batches
from peftx.toolkits.serving.job import Job
from peftx.toolkits.serving.rows import Rows
from peftx.toolkits.serving.server import Scheduler

PATIENCE = 1.0
"""Seconds that rows wait for those who want the model for something else."""


class QueueFull(ServerError):
    """More requests wait than the scheduler allows."""

    code = "queue-full"


class Worker:
    """Runs requests, of one stack or of several that share a batch.

    Args:
        batch: what runs them. scheduler: the policy.

    Attributes:
        served: requests that were taken from the queue, by model. batches: times that some were.
    """

    def __init__(self, batch: Rows | Batches, scheduler: Scheduler) -> None:
        self.batch, self.scheduler = batch, scheduler
        self.served, self.batches = Counter[str](), Counter[str]()
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._running = threading.Lock()
        self._guests, self._gone = 0, 0  # threads that want the model between two steps, and that had it
        self._closed = False
        self._thread: threading.Thread | None = None

    def waiting(self, model: str) -> int:
        """Requests to a model that are not taken yet."""
        with self._changed:
            return sum(job.model == model for job in self._waiting)

    def put(self, job: Job) -> None:
        """Put a request in the queue.

        Raises:
            QueueFull: too many to its model wait already. PeftxError: the worker is closed.
        """
        with self._changed:
            if self._closed:
                raise ServerError(f"'{job.model}' is closing", hint="ask another model: GET /v1/models")
            already = sum(other.model == job.model for other in self._waiting)
            if already >= self.scheduler.max_queue:
                waiting = "1 request waits" if already == 1 else f"{already} requests wait"
                raise QueueFull(f"{waiting} already", hint="try again later")
            self._waiting.append(job)
            self._changed.notify_all()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """The model for something else: nothing else runs meanwhile."""
        with self._changed:
            self._guests += 1
        try:
            with self._running:
                yield
        finally:
            with self._changed:
                self._guests -= 1
                self._gone += 1
                self._changed.notify_all()

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="peftx-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Finish what runs, turn the waiting requests away, end the thread."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for job in waiting:
            job.finish(None, ServerError("the server is closing"))
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _loop(self) -> None:
        while (jobs := self._taken()) is not None:
            self.served.update(job.model for job in jobs)
            self.batches.update({job.model for job in jobs})
            with self._running:
                self.batch.step(jobs)

    def _taken(self) -> list[Job] | None:
        """What begins now, with its company; nothing where rows go on alone, None when the worker closes."""
        with self._changed:
            while not self._waiting and not self.batch.busy and not self._closed:
                self._changed.wait()
            these = self._gone + self._guests  # and not who comes meanwhile, or guests could keep it for ever
            self._changed.wait_for(lambda: self._gone >= these, PATIENCE)
            if not self._closed and self._waiting:
                until = self._waiting[0].arrived + self.scheduler.max_wait_ms / 1000
                self._changed.wait_for(
                    lambda: self._closed or self.batch.ready(self._waiting), until - time.monotonic()
                )
            if self._closed:
                return [] if self.batch.busy else None
            self._drop_cancelled()
            if not self._waiting or not self.batch.free:
                return []
            ordered = self._ordered()
            if not ordered:
                if self.batch.busy or not self._waiting:
                    return []
                ordered = self._waiting[:1]  # or nothing would ever run
            jobs = self.batch.choose(ordered)
            self._waiting = [job for job in self._waiting if job not in jobs]
            return jobs

    def _ordered(self) -> list[Job]:
        """As the policy has it: each once, and none but those that wait. Where it raises, that is their answer."""
        try:
            ordered = self.scheduler.order(list(self._waiting))
        except Exception as error:  # noqa: BLE001  of a plugin, and not the end
            failed, self._waiting = self._waiting, []
            for job in failed:
                job.finish(None, error)
            return []
        known = set(self._waiting)
        return [job for job in dict.fromkeys(ordered) if job in known]

    def _drop_cancelled(self) -> None:
        """Nobody waits for these any more."""
        for job in self._waiting:
            if job.cancelled:
                job.finish(None, ServerError("the request was cancelled"))
        self._waiting = [job for job in self._waiting if not job.cancelled]
