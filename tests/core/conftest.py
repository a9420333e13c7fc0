"""A server on a port."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

Listening = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def listening() -> Listening:
    """`with listening(server, ...) as url`: an application on a port of the loopback interface."""
    import uvicorn

    from peftx.toolkits.serving import Server
    from peftx.toolkits.serving.app import build_app

    @contextmanager
    def served(*servers: Server) -> Iterator[str]:
        config = uvicorn.Config(build_app(*servers), port=0, log_level="error", lifespan="on")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.should_exit = True
            thread.join()

    return served
