"""`Server`: what the `serve` hook gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import DynamicCache

from peftx.errors import ServerError
from peftx.kernel.carried import has_rows
from peftx.kernel.plugin import Claim
from peftx.kernel.stack import Stack
from peftx.toolkits.serving.job import Job
from peftx.toolkits.serving.prefix import PrefixCache

METHODS = ("GET", "POST")


@dataclass
class Scheduler:
    """Which requests run together, and when. The `serve` hook may assign every field.

    Attributes:
        max_batch: rows in one call of the model at most.
        max_wait_ms: how long the first request of a batch that runs whole waits for others; rows that come and go wait
            for nobody.
        pack_weights: on a CPU, lay float32 weights out for its products once: two to three times as fast for several
            rows, and their memory once more (left out where it would take half of what is free).
        prefix_cache: keep keys and values of served prompts, and start from them where a prompt begins alike. Off by
            default: results are the same up to rounding, not bit for bit.
        prefix_entries: prompts that are kept.
        prefixes: a store of a plugin's own in the place of the one that `prefix_cache` makes.
        max_queue: requests that wait at most; more are turned away.
        order: puts the waiting jobs in the order in which they run; first come, first served if left out. Those that it
            leaves out go on waiting, as long as others run.
    """

    max_batch: int = 32
    max_wait_ms: float = 5.0
    pack_weights: bool = True
    prefix_cache: bool = False
    prefix_entries: int = 16
    prefixes: PrefixCache | None = None
    max_queue: int = 256
    order: Callable[[Sequence[Job]], list[Job]] = list

    def begin_from(self, prefixes: PrefixCache, *, owner: str) -> None:
        """Have requests begin from a store of the plugin `owner`.

        Raises:
            ServerError: another plugin's is there.
        """
        if self.prefixes is not None:
            raise ServerError(
                f"{owner}: the server has a store of prefixes already, {type(self.prefixes).__name__}",
                hint="keep one of the two plugins",
            )
        self.prefixes = prefixes

    def check(self) -> None:
        """Raise PeftxError where a field makes no sense."""
        for name, least in (("max_batch", 1), ("max_wait_ms", 0), ("prefix_entries", 1), ("max_queue", 1)):
            value = {"max_batch": self.max_batch, "max_wait_ms": self.max_wait_ms,
                     "prefix_entries": self.prefix_entries, "max_queue": self.max_queue}[name]  # fmt: skip
            if value < least:
                raise ServerError(f"scheduler: {name} is {value}", hint=f"at least {least}")


@dataclass(frozen=True)
class Route:
    """An HTTP route of a plugin's own: `endpoint` is a function as FastAPI takes it."""

    method: str
    path: str
    endpoint: Callable[..., Any]


@dataclass
class Server:
    """A stack that is about to be served. The `serve` hooks of its plugins run once, before the first request.

    Attributes:
        stack: the stack. name: what clients call the model.
        scheduler: policy of batching and caching.
        routes: routes of plugins, beside the server's own.
        max_body: bytes that the body of a request may have.
        max_tokens: tokens that an answer may have; None for as many as the context has room for.
        max_seconds: seconds from a request to the end of its answers, the wait with it; None for any.
        api_key: what `Authorization: Bearer ...` must say, everywhere but at the page and `/health`; nothing if None.
    """

    stack: Stack
    name: str = "peftx"
    scheduler: Scheduler = field(default_factory=Scheduler)
    routes: list[Route] = field(default_factory=list)
    max_body: int = 1_000_000
    max_tokens: int | None = None
    max_seconds: float | None = None
    api_key: str | None = field(default=None, repr=False)
    _ready: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.scheduler = replace(self.scheduler)  # its plugins may change it, and those of no other server

    def add_route(self, method: str, path: str, endpoint: Callable[..., Any]) -> None:
        """Add a route.

        Raises:
            PeftxError: another method than GET and POST, a path that is taken, or one that does not begin with `/`.
        """
        if method not in METHODS or not path.startswith("/"):
            raise ServerError(f"route {method} {path}: a method is GET or POST, and a path begins with /")
        taken = [*OWN_ROUTES, *((route.method, route.path) for route in self.routes)]
        if (method, path) in taken:
            raise ServerError(f"route {method} {path} is taken", hint="two plugins cannot answer one route")
        self.routes.append(Route(method, path, endpoint))

    def prepare(self) -> None:
        """Run the `serve` hooks, in stack order; a second call does nothing.

        Raises:
            PeftxError: a plugin's hook failed, or left a setting that makes no sense.
        """
        if self._ready:
            return
        self._ready = True
        stack = self.stack
        loop = next((member for member in stack.members if member.claims(Claim.REPLACES_DECODING)), None)
        if loop is not None and not loop.claims(Claim.EXACT_CACHE):
            self.scheduler.max_batch = (
                1  # a drafting loop works on one sequence, one that shares a cache on several
            )
        for member in stack.implementers("serve"):
            stack.call(member, "serve", server=self)
        self.scheduler.check()
        for name, most in (("max_tokens", self.max_tokens), ("max_seconds", self.max_seconds)):
            if most is not None and not most > 0:
                raise ServerError(f"{name} is {most}", hint="above 0, or None for no limit")
        if (self.scheduler.prefix_cache or self.scheduler.prefixes) and (reason := self._no_prefix_cache()):
            raise ServerError(f"prefix_cache: {reason}", hint="leave it off")

    def _no_prefix_cache(self) -> str:
        """Why rows of the cache are not the prompt's tokens, or not to be had; empty where they are."""
        for member in self.stack.members:
            for claim in (Claim.VIRTUAL_TOKENS, Claim.PREFIX_CACHE, Claim.REPLACES_DECODING, Claim.EVICTS):
                if member.claims(claim):
                    return f"'{member.id}' claims {claim}"
        if self.stack.model.config.is_encoder_decoder:
            return "an encoder-decoder model keeps no cache of its prompt"
        own = self.scheduler.prefixes is None  # a plugin's store may go on from states
        if own and not has_rows(DynamicCache(config=self.stack.model.config)):
            return "the model keeps states, and no keys and values of tokens"
        return ""


OWN_ROUTES = (
    ("GET", "/"), ("GET", "/health"), ("GET", "/healthz"), ("GET", "/metrics"), ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/embeddings"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/tokenize"), ("POST", "/detokenize"),
)  # fmt: skip
