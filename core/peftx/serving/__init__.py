"""Serving a stack over HTTP: one model thread, requests in batches, OpenAI's completions.

server.py   Server: what the `serve` hook gets and may change
engine.py   Engine: the queue and the thread that runs the model
stream.py   text as it is written
prefix.py   keys and values of prompts that were served before
app.py      the HTTP routes (needs fastapi, which is not imported here)
"""

from __future__ import annotations

from peftx.serving.engine import Engine, Job
from peftx.serving.server import Request, Route, Scheduler, Server

__all__ = ["Engine", "Job", "Request", "Route", "Scheduler", "Server"]
