"""A cluster of Ray: the one that `RAY_ADDRESS` names, or one on this machine. Ray comes with the extra `peftx[ray]`."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peftx.errors import ClusterError, MissingExtraError

ANSWER = 5.0
"""Seconds that a cluster has to answer. Ray itself waits for minutes."""


def require_ray(what: str) -> None:
    """Raises MissingExtraError where Ray is not installed. `what` needs it."""
    try:
        import ray.train.torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{what} needs {error.name}, which is not installed", hint="pip install 'peftx[ray]'"
        ) from error


@contextmanager
def cluster() -> Iterator[dict[str, float]]:
    """The cluster that this process is joined to, or that it joins or starts for so long.

    Yields:
        What it has, by Ray's names: CPU, GPU, ...

    Raises:
        ClusterError: none answers at `RAY_ADDRESS`.
    """
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    # Not whichever ran here last, which Ray looks for by itself, and waits for where it is dead.
    own: dict[str, Any] = {} if address else {"address": "local", "include_dashboard": False}
    try:
        if host and "/" not in host and port.isdecimal():
            socket.create_connection((host, int(port)), timeout=ANSWER).close()
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {last_line(error)}",
            hint="start it, or unset RAY_ADDRESS for processes on this machine",
        ) from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def last_line(error: BaseException) -> str:
    """Of what libraries say in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
