"""The models of an application, by the names that clients ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from peftx.copies import base_of
from peftx.errors import ServerError, nearest
from peftx.toolkits.serving.engine import Engine, Together
from peftx.toolkits.serving.server import Server

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loader = Callable[[str, str], Server]
"""(name, path as a client says it) -> what is served from then on."""


class UnknownModel(ServerError):
    """No model of that name is served."""

    code = "unknown-model"


class Models:
    """Engines; those of one base share a batch and a thread where they can. Use it in a `with` block.

    Args:
        servers: the first one answers where a request names none. loader: for models that come while others are served.

    Raises:
        PeftxError: two of one name; a model that cannot be served.
    """

    def __init__(self, servers: Sequence[Server], loader: Loader | None = None) -> None:
        self._engines: dict[str, Engine] = {}
        self._batches: dict[PreTrainedModel, Together] = {}
        self._many = len(servers) > 1 or loader is not None
        for server in servers:
            if server.name in self._engines:
                raise ServerError(
                    f"two models are named '{server.name}'", hint="NAME=BUNDLE gives another name"
                )
            self._engines[server.name] = self._engine(server)
        self._first, self._loader = servers[0].name, loader
        self._loading = threading.Lock()
        self._leaving: set[str] = set()
        self._running = False

    def _engine(self, server: Server) -> Engine:
        """In one batch with the others of its base, if it can be."""
        server.prepare()  # its plugins have their say in the policy
        store = server.scheduler.prefixes
        if (other := next((e for e in self if store is not None and e.prefixes is store), None)) is not None:
            raise ServerError(
                f"'{server.name}' and '{other.server.name}' have one store of prefixes, which are one model's",
                hint="give each its own",
            )
        base = base_of(server.stack.model)
        alone = not self._many or base is server.stack.model
        if not alone and base not in self._batches:
            self._batches[base] = Together(base, server.scheduler)
        engine = Engine(server, None if alone else self._batches[base])
        engine.about()  # it finds who stops rows now, not while answers wait
        return engine

    def __iter__(self) -> Iterator[Engine]:
        return iter(list(self._engines.values()))

    def engine(self, name: str | None) -> Engine:
        """Raises UnknownModel."""
        found = self._engines.get(self._first if name is None else name)
        if found is None:
            names = list(self._engines)
            there = ", ".join(f"'{known}'" for known in names)
            raise UnknownModel(f"no model '{name}' here; {nearest(str(name), names) or f'there is {there}'}")
        return found

    def load(self, name: str, path: str) -> None:
        """Serve one more.

        Raises:
            PeftxError: the server loads none, the name is taken, or the bundle is not to be had.
        """
        if self._loader is None:
            raise ServerError("this server loads no adapters", hint="peftx serve --adapters FOLDER")
        with self._loading:
            if name in self._engines:
                raise ServerError(f"'{name}' is served already", hint="unload it first, or take another name")
            if name in self._leaving:
                raise ServerError(f"'{name}' is still answering what was asked of it", hint="try again later")
            server = self._loader(name, path)
            server.prepare()
            if server.routes:
                raise ServerError(
                    f"'{path}' brings routes of its own, which are set up when a server starts",
                    hint="name it on the command line",
                )
            engine = self._engine(server)
            self._engines[name] = engine.start() if self._running else engine

    def unload(self, name: str) -> None:
        """Serve one less; what was asked of it is answered.

        Raises:
            UnknownModel: it is not served. PeftxError: it is the one that answers where no model is named.
        """
        with self._loading:
            engine = self.engine(name)
            if name == self._first:
                raise ServerError(
                    f"'{name}' answers where no model is named, and stays",
                    hint="start the server with another one first",
                )
            del self._engines[name]
            self._leaving.add(name)
        engine.retire()
        with self._loading:
            self._leaving.remove(name)

    def __enter__(self) -> Models:
        self._running = True
        for engine in self:
            engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        for engine in self:
            engine.close()
