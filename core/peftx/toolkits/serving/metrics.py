"""What an operator watches, in Prometheus' format (needs prometheus_client)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from peftx.toolkits.serving.engine import Engine
    from peftx.toolkits.serving.job import Job

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Collector):
    """Counters of the requests that ended, by model; and how many wait, asked for when somebody looks.

    Args:
        engines: those that are served, whenever they are asked for.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        self.engines, self.registry = engines, CollectorRegistry()
        model, own = ("model",), self.registry
        by = ("model", "reason")
        self.requests = Counter("peftx_requests", "Requests that ended, by how", by, registry=own)
        self.prompt = Counter("peftx_prompt_tokens", "Tokens of prompts", model, registry=own)
        self.written = Counter("peftx_generation_tokens", "Tokens of answers", model, registry=own)
        self.seconds = Histogram(
            "peftx_request_seconds",
            "From a request to its whole answer",
            model,
            registry=own,
            buckets=SECONDS,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        waiting = GaugeMetricFamily("peftx_requests_waiting", "Requests in the queue", labels=("model",))
        for engine in self.engines:
            waiting.add_metric((engine.server.name,), engine.about()["queued"])
        yield waiting

    def follow(self, model: str, job: Job) -> None:
        """Count the request when it ends."""

        def ended(future: Future[Any]) -> None:
            if job.cancelled or future.exception() is not None:
                self.requests.labels(model, "cancelled" if job.cancelled else "error").inc()
                return
            done = future.result()
            self.requests.labels(model, done.finish_reason).inc()
            self.prompt.labels(model).inc(done.prompt_tokens)
            self.written.labels(model).inc(done.completion_tokens)
            self.seconds.labels(model).observe(time.monotonic() - job.arrived)

        job.future.add_done_callback(ended)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
