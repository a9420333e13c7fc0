"""What stands between the network and the application: sizes, patience, and clients that never finish."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

OPEN = ("/", "/health", "/healthz")
"""Paths that need no key."""
BODY_WITHIN = 30.0
"""Seconds in which the body of a request must have come."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:@]+))(?::\d*)?")


def _name(host: str) -> str | None:
    """A Host header's name or address, without brackets and port; None where it is malformed."""
    found = _HOST.fullmatch(host.lower())
    return None if found is None else found[1] or found[2]


class TooSlow(Exception):
    """The body did not come in time."""


class Guard:
    """ASGI middleware: refuses names that are not the server's, wrong keys, bodies of unknown or excessive length, and
    those that never end.

    Not one of Starlette's `http` middlewares: these hide from the application that its client is gone.

    Args:
        app: what is guarded. most: bytes of a body. within: seconds for a body.
        refusal: (status, message) -> JSON of an error. key: that requests must bring; none if None.
        hosts: names in the Host header that are answered; any if None.
    """

    def __init__(
        self,
        app: Any,
        *,
        most: int,
        refusal: Callable[[int, str], dict[str, Any]],
        within: float = BODY_WITHIN,
        key: str | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self.hosts = hosts
        self.key = None if key is None else f"Bearer {key}".encode()
        self.app = app
        self.most = most
        self.within = within
        self.refusal = refusal

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.hosts is not None and _name(host) not in self.hosts:
            await self._refuse(send, 400, f"'{host[:200]}' is no name of this server")
            return
        said = dict(scope["headers"]).get(b"authorization", b"")
        if self.key is not None and scope["path"] not in OPEN and not hmac.compare_digest(said, self.key):
            await self._refuse(send, 401, "this server wants its key: Authorization: Bearer ...")
            return
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if scope["method"] == "POST" and not length:
            await self._refuse(send, 413, "the body's length must be told (Content-Length)")
            return
        if length and (not length.isdecimal() or len(length) > 18 or int(length) > self.most):
            await self._refuse(send, 413, f"the body has {length[:20]} bytes; at most {self.most} are read")
            return
        until = asyncio.get_running_loop().time() + self.within
        whole = False

        async def in_time() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise TooSlow from None
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        try:
            await self.app(scope, in_time, send)
        except TooSlow:
            await self._refuse(send, 408, f"the body did not come within {self.within:g} s")

    async def _refuse(self, send: Send, status: int, message: str) -> None:
        body = json.dumps(self.refusal(status, message)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"connection", b"close")],
            }
        )
        await send({"type": "http.response.body", "body": body})
