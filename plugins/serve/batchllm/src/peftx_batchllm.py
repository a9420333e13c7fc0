"""BatchLLM: prompts that begin alike run as groups, and what a group begins with is read once.

"BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and Throughput-oriented Token Batching"
(arXiv:2412.03594). Of the radix tree of all prompts some nodes are chosen; a prompt's group is the deepest chosen node
above it, so that there is one level of prefixes:

    saved      S = sum_u (m_u - 1) d_u                     [u: chosen nodes; m_u: prompts in its group; d_u: tokens from
                                                            the root to u]
    one level  best(u, a) = max( t_u d_a + sum_c best(c, a),  t_u d_u + sum_c best(c, u) - d_u )
                                                           [a: the chosen node above u; t_u: prompts that end at u]
    order      groups by  tokens to write / tokens to read,  the largest first
    admission  while  sum_running (prompt + answer) + prefixes <= M

Nothing else changes: each answer is computed from the same tokens, in another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from pydantic import Field
from transformers import Cache, DynamicCache, PreTrainedModel

from peftx import Claim, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.errors import (
    ArchitectureError,
    ConflictError,
    PeftxError,
    ServerError,
    StackError,
    UnsupportedError,
)
from peftx.toolkits.decoding.cache import fork_cache
from peftx.toolkits.decoding.text import check_writes
from peftx.toolkits.serving import Engine, Job, Request, Server
from peftx.toolkits.serving.prefix import PrefixCache, read
from peftx.toolkits.serving.radix import Node, RadixTree
from peftx.toolkits.serving.rows import PIECE, refuse_whole_batches
from peftx.toolkits.serving.slots import check_layers

Tokens = Sequence[int]
Place = Node[list[int]]


class BatchLLMConfig(PluginConfig):
    """Options of BatchLLM; the paper gives M as a share of the GPU's memory, and reads 2048 tokens an iteration."""

    kv_tokens: int = Field(
        65536,
        ge=2,
        description="M: tokens whose keys and values are held at once, of what runs with its answers, and of prefixes",
    )
    rows: int = Field(128, ge=1, description="requests at a time at most, where M would allow more")
    min_prefix: int = Field(16, ge=1, description="tokens from which on a prefix is read apart")


class Group(NamedTuple):
    """Prompts `members`, by their places, whose first `shared` tokens are the same."""

    shared: int
    members: list[int]


def groups_of(prompts: Sequence[list[int]], *, least: int = 1) -> list[Group]:
    """The groups of one level with the most tokens saved; each prompt keeps its last token to itself.

    Args:
        least: tokens of a prefix at least.
    """
    tree = RadixTree[list[int]](list)  # at a node the prompts that end there
    keys = [prompt[:-1] for prompt in prompts]
    for i in sorted(range(len(keys)), key=lambda i: keys[i]):
        tree.insert(keys[i]).data.append(i)
    down = sorted([tree.root, *tree.nodes()], key=lambda u: u.depth)  # from the root
    chains: dict[Place | None, list[int]] = {None: []}  # depths of a node and of those above it
    best: dict[Place, list[int]] = {}  # by who is chosen: one above, or u itself
    for u in down:
        chains[u] = [*chains[u.above], u.depth]
        best[u] = [len(u.data) * depth for depth in chains[u]]
    for u in reversed(down[1:]):
        assert u.above is not None
        best[u][-1] = best[u][-1] - u.depth if u.depth >= least else -1
        more = [max(other, best[u][-1]) for other in best[u][:-1]]
        best[u.above] = [sum(pair) for pair in zip(best[u.above], more, strict=True)]
    place = {tree.root: (tree.root, 0)}  # whose group a node is in, and where that one stands in its chain
    found: dict[Place, list[int]] = {}
    for u in down:
        if u.above is not None:
            chosen, at = place[u.above]
            place[u] = (u, len(chains[u]) - 1) if best[u][-1] > best[u][at] else (chosen, at)
        found.setdefault(place[u][0], []).extend(u.data)
    groups = [Group(0, [i]) for i in found.pop(tree.root)]
    return groups + [Group(u.depth, sorted(members)) for u, members in found.items()]


class Groups(PrefixCache):
    """The plan for the requests that wait, and keys and values of the prefixes of those that run.

    Args:
        model: a causal language model. config: options.

    Attributes:
        read, reused_tokens: tokens of prefixes that were read, and that requests began from.
        most: tokens that were held at once.
    """

    def __init__(self, model: PreTrainedModel, config: BatchLLMConfig) -> None:
        super().__init__(model, entries=1)
        self.model, self.config = model, config
        self.read = self.most = 0
        self.live: dict[tuple[int, ...], Cache] = {}
        self.prefix: dict[Job, tuple[int, ...]] = {}  # of all that are not answered; empty for none
        self.rank: dict[Job, int] = {}
        self.left = Counter[tuple[int, ...]]()

    # -- which run, and when ------------------------------------------------------------------------------------------
    def order(self, waiting: Sequence[Job]) -> list[Job]:
        """Those that M has room for beside what runs, group by group."""
        waiting = [job for job in waiting if not self.refused(job)]
        if any(job not in self.prefix for job in waiting):
            self.plan(waiting)
        running = self.prefix.keys() - set(waiting)
        prefixes = {self.prefix[job] for job in running} | set(self.live)
        held = sum(map(_size, running)) + sum(map(len, prefixes))
        chosen = []
        for job in sorted(waiting, key=lambda job: self.rank[job]):
            prefix = self.prefix[job]
            held += _size(job) + (0 if prefix in prefixes else len(prefix))
            if held > self.config.kv_tokens:
                break
            self.most = max(self.most, held)
            prefixes.add(prefix)
            chosen.append(job)
        return chosen

    def refused(self, job: Job) -> bool:
        """Answer a request that M could never hold."""
        if _size(job) <= self.config.kv_tokens:
            return False
        said = (
            f"batchllm: prompt and answer take {_size(job)} tokens, and kv_tokens is {self.config.kv_tokens}"
        )
        job.finish(None, ServerError(said, hint="ask for a shorter answer, or serve with more kv_tokens"))
        job.cancel()
        return True

    def plan(self, waiting: Sequence[Job]) -> None:
        """Groups of all that wait, in the order in which they run; what runs already keeps its prefix."""
        ratios = list[tuple[float, list[Job]]]()
        for shared, members in groups_of([job.ids for job in waiting], least=self.config.min_prefix):
            jobs = [waiting[i] for i in members]
            if shared + max(map(_size, jobs)) > self.config.kv_tokens:
                shared = 0  # the prefix and one of them are more than M
            for job in jobs:
                if job not in self.prefix:
                    job.future.add_done_callback(partial(self.answered, job))
                self.prefix[job] = tuple(job.ids[:shared])
            read = shared + sum(len(job.ids) - shared for job in jobs)
            ratios.append((sum(job.max_tokens for job in jobs) / read, jobs))
        ratios.sort(key=lambda ratio: -ratio[0])
        self.rank = {job: place for place, job in enumerate(job for _, jobs in ratios for job in jobs)}
        self.left = Counter(self.prefix.values())
        self.live = {prefix: cache for prefix, cache in self.live.items() if self.left[prefix]}

    def answered(self, job: Job, _: object) -> None:
        """A request is done with; behind the last one of its group the prefix goes."""
        prefix = self.prefix.pop(job)
        self.left[prefix] -= 1
        if not self.left[prefix]:
            self.live.pop(prefix, None)

    # -- what they begin from -----------------------------------------------------------------------------------------
    def take(self, ids: list[int]) -> Cache:
        """A cache of the prefix of these tokens' group, which is read if it was not."""
        prefix = next((prefix for job, prefix in self.prefix.items() if job.ids == ids), ())
        if not prefix:
            return DynamicCache(config=self.model.config)
        if prefix not in self.live:
            self.live[prefix] = prefix_of(self.model, prefix)
            self.read += len(prefix)
        self.hits += 1
        self.reused_tokens += len(prefix)
        return fork_cache(self.live[prefix])

    def keep(self, ids: list[int], cache: Cache) -> None:
        """Nothing: what will be asked again is known beforehand."""

    def keep_row(self, ids: list[int], cache: Cache, row: int) -> None:
        """Nothing."""

    def figures(self) -> dict[str, int]:
        """Tokens of prefixes that were read and begun from, those that were not read again, and the most held."""
        return {
            "prefix_tokens_read": self.read, "prefix_tokens_used": self.reused_tokens,
            "tokens_saved": self.reused_tokens - self.read, "tokens_held_at_most": self.most,
        }  # fmt: skip


def _size(job: Job) -> int:
    """Tokens whose keys and values a request may need."""
    return len(job.ids) + job.max_tokens


def prefix_of(model: PreTrainedModel, ids: Tokens) -> Cache:
    """Keys and values of tokens, read in pieces."""
    cache = DynamicCache(config=model.config)
    for begin in range(0, len(ids), PIECE):
        read(model, ids[begin : begin + PIECE], cache)
    return cache


@dataclass(frozen=True)
class Completed:
    """What came of a batch: a text for each prompt in its order, None for those in `refused`; tokens of prompts that
    were read, and that would have been beside them."""

    texts: list[str | None]
    refused: dict[int, PeftxError]
    read: int
    saved: int


def complete(stack: Stack, prompts: Sequence[str], **wishes: Any) -> Completed:
    """Answer prompts that are all known, greedily unless `temperature` says otherwise.

    Args:
        stack: with BatchLLM in it. wishes: fields of `Request`, such as `max_tokens`.

    Raises:
        PeftxError: no BatchLLM in the stack.
    """
    server = Server(stack)
    engine = Engine(server)
    groups = server.scheduler.prefixes
    if not isinstance(groups, Groups):
        raise StackError("batchllm: it is not in the stack", hint="Stack(model, [..., BatchLLM()])")
    server.scheduler.max_queue = max(1, len(prompts))
    jobs, refused = dict[int, Job](), dict[int, PeftxError]()
    for i, prompt in enumerate(prompts):
        try:
            jobs[i] = engine.submit(Request(prompt, **{"temperature": 0.0} | wishes))
        except PeftxError as error:  # an empty prompt, or one that does not fit: the others run
            refused[i] = error
    texts: list[str | None] = [None] * len(prompts)
    with engine:
        for i, job in jobs.items():
            try:
                texts[i] = job.result().text
            except PeftxError as error:
                refused[i] = error
    saved = groups.figures()["tokens_saved"]
    return Completed(
        texts, refused, sum(len(job.ids) for i, job in jobs.items() if i not in refused) - saved, saved
    )


class BatchLLM(Plugin):
    """See the module."""

    Config = BatchLLMConfig
    claims = {Claim.EXACT_CACHE, Claim.KEEPS_PREFIXES}
    refuses = {"bert": "an encoder writes no text", "t5": "an encoder reads a prompt at once"}
    config: BatchLLMConfig

    def suits(self, model: ModelView) -> None:
        check_writes(model)
        try:
            check_layers(DynamicCache(config=model.config))
        except UnsupportedError as error:
            said = f"{model.owner}: {type(model.module).__name__}: {error.message}"
            raise ArchitectureError(said, hint="take a model of attention alone") from error

    def check(self, stack: Stack) -> None:
        try:
            refuse_whole_batches(stack)
        except UnsupportedError as error:
            said = f"batchllm needs requests that come and go on their own: {error.message}"
            raise ConflictError(
                said,
                hint="leave out plugins of decoding, and beams, caches and stop strings of generation settings",
            ) from error

    @hookimpl
    def serve(self, server: Server) -> None:
        groups, scheduler = Groups(server.stack.model, self.config), server.scheduler
        scheduler.begin_from(groups, owner="batchllm")
        scheduler.order, scheduler.max_batch = groups.order, self.config.rows
        server.add_route("GET", "/v1/batchllm", groups.figures)
