"""Serving a stack over HTTP: one model thread, requests in batches, OpenAI's completions.

server.py   Server: what the `serve` hook gets and may change
job.py      a request on its way
engine.py   Engine: the queue and the thread that runs the model
models.py   several of them, by name; folder.py where clients have more loaded from
metrics.py  what Prometheus reads
structured.py  answers that are JSON
stream.py   text as it is written
prefix.py   keys and values of prompts that were served before
app.py      the HTTP routes (needs fastapi, which is not imported here); guards.py before them
bodies.py   what clients send; replies.py and errors.py what they get; openapi.py how that is told
http.py     on a socket (needs uvicorn)
"""

from __future__ import annotations

from peftx.toolkits.serving.engine import Engine
from peftx.toolkits.serving.job import Job, Request
from peftx.toolkits.serving.server import Route, Scheduler, Server

__all__ = ["Engine", "Job", "Request", "Route", "Scheduler", "Server"]
