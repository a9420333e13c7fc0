"""A server on a socket (needs uvicorn)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from peftx.toolkits.serving.app import build_app
from peftx.toolkits.serving.models import Loader
from peftx.toolkits.serving.server import Server

HEADERS_WITHIN = 30.0
"""Seconds in which the headers of a connection's first request must have come."""


class _Impatient(H11Protocol):
    """Closes connections whose first request never comes."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.giving_up = self.loop.call_later(HEADERS_WITHIN, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self.giving_up.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def run_http(
    *servers: Server, host: str, port: int, allowed_hosts: Sequence[str] | None, loader: Loader | None = None
) -> None:
    """Serve on a socket until the process is told to stop."""
    app = build_app(*servers, allowed_hosts=allowed_hosts, loader=loader)
    uvicorn.run(app, host=host, port=port, log_level="info", http=_Impatient)
