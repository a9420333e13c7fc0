"""Marconi: a prefix cache for models that keep recurrent states beside keys and values.

"Marconi: Prefix Caching for the Era of Hybrid LLMs" (arXiv:2411.19379). A radix tree over token ids: an edge holds keys
and values of its tokens, a node may hold one recurrent state, that behind its last token.

    lookup     the deepest node with a state whose tokens begin the prompt: from there on the prompt is read
    admission  a state where a prompt leaves what is known, when it has more in common with it than the lookup gave (the
               common part was asked twice), and one at the end of each text: two a request at most
    eviction   of nodes with one child at most the one with the least
               U(n) = norm(1 / age_n) + alpha norm(E_n),  E_n = (F(l_n) - F(l_parent)) / bytes_n     [l: tokens from the
               root; norm: to 0 for the least and 1 for the most]
    FLOPs      F(l) = l [n_ssm (12 d^2 + 10 d) + 8 S + n_attn 8 d^2 + n_mlp 16 d^2] + n_attn 4 l^2 d         [S: numbers
               of the recurrent states; 8 S = n_ssm 16 d N where a layer's are 2 d x N]
    alpha      0 until the cache was full and 5 times as many requests came as had come by then; those are replayed on
               the tree as it was, and the alpha of the highest hit rate is taken

Without recurrent states every token's end is a place to go on from, and alpha = 0 is LRU. Layers that begin from a
state with one token alone (Mamba's) read the rest of a prompt token by token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, LinearAttentionLayer

from peftx import Claim, ModelView, Plugin, PluginConfig, hookimpl
from peftx.errors import ArchitectureError, ConflictError, ServerError, UnsupportedError
from peftx.kernel.stack import Stack
from peftx.toolkits.decoding.cache import StateCache, empty_cache
from peftx.toolkits.decoding.text import check_writes
from peftx.toolkits.serving import Server
from peftx.toolkits.serving.prefix import PrefixCache, read
from peftx.toolkits.serving.radix import Node, RadixTree

GRID = tuple(tenths / 10 for tenths in range(21))  # the values of alpha that are tried
ALONE = 8  # tokens of a text are read at once in about the time of one that is read alone

KeysValues = list[tuple[Tensor, Tensor]]  # of each layer with attention [1, H, tokens, D]; empty in a replay


class MarconiConfig(PluginConfig):
    """Options of Marconi; the paper takes what the GPU has left, and a multiplier of 5 to 15."""

    model_config = ConfigDict(allow_inf_nan=False)

    capacity_mb: float = Field(1024.0, gt=0, description="megabytes of keys, values and states")
    alpha: float | None = Field(
        None, ge=0, description="weight of saved FLOPs against age; found by replay if left out"
    )
    bootstrap: int = Field(
        5, ge=1, description="requests that are replayed, times those until the cache was full"
    )


@dataclass(frozen=True)
class Costs:
    """What a model's cache takes and saves: bytes of a token's keys and values, and of a state; sizes for F."""

    token: int
    state: int
    hidden: int
    ssm: int  # layers
    attention: int
    mlp: int
    numbers: int

    def bytes(self, tokens: int) -> int:
        """Of so many tokens with a state behind them."""
        return tokens * self.token + self.state

    def flops(self, length: int) -> float:
        """F: of reading so many tokens from the beginning."""
        d = self.hidden
        linear = self.ssm * (12 * d**2 + 10 * d) + 8 * self.numbers
        linear += self.attention * 8 * d**2 + self.mlp * 16 * d**2
        return length * linear + self.attention * 4 * length**2 * d


@dataclass(eq=False)
class Held:
    """At a node: keys and values of its edge, what recurrent layers keep behind it, None if that is not known, and when
    it was last gone on from."""

    kept: KeysValues = field(default_factory=list)
    state: Sequence[LinearAttentionLayer] | None = None
    used: int = 0

    def split(self, tokens: int) -> Held:
        """Without the first tokens of the edge, which are given back, as old as they were."""
        first = Held(_cut(self.kept, 0, tokens), used=self.used)
        self.kept = _cut(self.kept, tokens, None)
        return first

    def join(self, child: Held) -> None:
        """Give keys and values on to the only child."""
        pairs = zip(self.kept, child.kept, strict=True)
        child.kept = [(torch.cat([k, key], 2), torch.cat([v, value], 2)) for (k, v), (key, value) in pairs]


Place = Node[Held]


class Found(NamedTuple):
    """Tokens that can be gone on from, by way of `node`; and those that are the same."""

    reach: int
    matched: int
    node: Place


class Tree:
    """The radix tree, within `capacity` bytes; `full` is called once, before anything is evicted."""

    def __init__(
        self, costs: Costs, capacity: float, alpha: float, full: Callable[[], None] | None = None
    ) -> None:
        self.costs, self.capacity, self.alpha, self.full = costs, capacity, alpha, full
        self.radix = RadixTree(Held, split=Held.split, join=Held.join)
        self.bytes = self.now = self.evicted = 0

    def find(self, ids: Sequence[int]) -> Found:
        """How far a text is known."""
        way, matched = self.radix.walk(ids)
        if not self.costs.state:
            return Found(matched, matched, way[-1])
        states = (node for node in reversed(way) if node.data.state is not None and node.depth <= matched)
        hit = next(states, self.radix.root)
        return Found(hit.depth, matched, hit)

    def touch(self, node: Place) -> None:
        """It is gone on from; the nodes above it stay as old as they are."""
        self.now += 1
        node.data.used = self.now

    def insert(self, ids: Sequence[int], kept: KeysValues, state: Sequence[LinearAttentionLayer]) -> None:
        """Remember a text with the state behind it; one that would fill more than all is left."""
        if self.costs.bytes(len(ids)) > self.capacity:
            return
        while self.bytes + self.needed(ids) > self.capacity:
            self.evict()
        self.bytes += self.needed(ids)
        node = self.radix.insert(ids)
        held = node.data
        held.kept = held.kept or _cut(kept, node.depth - len(node.edge), node.depth)
        held.state = state if held.state is None else held.state
        self.touch(node)

    def needed(self, ids: Sequence[int]) -> int:
        """Bytes that a text would take, with its state, beside what is known of it."""
        reach, matched, _ = self.find(ids)
        return (len(ids) - matched) * self.costs.token + (self.costs.state if reach < len(ids) else 0)

    def evict(self) -> None:
        """A leaf goes with all it holds; of a node with one child the state, and its edge becomes the child's."""
        if self.full is not None:
            self.full()
            self.full = None
        node = self.worst()
        self.evicted += 1
        passed_on = len(node.edge) * self.costs.token if node.children else 0
        self.bytes -= self.held(node) - passed_on
        self.radix.remove(node)

    def worst(self) -> Place:
        """The node of least utility among those with one child at most."""
        nodes = [node for node in self.radix.nodes() if len(node.children) <= 1]
        ages = _normed([1 / (self.now + 1 - node.data.used) for node in nodes])
        gains = _normed([self.efficiency(node) for node in nodes])
        return min(
            zip(ages, gains, nodes, strict=True),
            key=lambda each: (each[0] + self.alpha * each[1], each[2].data.used),
        )[2]

    def efficiency(self, node: Place) -> float:
        """FLOPs that a node saves beyond the one above it, for a byte; nothing where it holds nothing."""
        above, held = node.depth - len(node.edge), self.held(node)
        return (self.costs.flops(node.depth) - self.costs.flops(above)) / held if held else 0.0

    def held(self, node: Place) -> int:
        """Bytes of its edge and state."""
        return len(node.edge) * self.costs.token + (self.costs.state if node.data.state is not None else 0)

    def bare(self, alpha: float) -> Tree:
        """The same tree, with nothing at its nodes."""
        twin = Tree(self.costs, self.capacity, alpha)
        twin.radix = self.radix.copied(
            lambda one: Held(state=None if one.state is None else (), used=one.used)
        )
        twin.bytes, twin.now = self.bytes, self.now
        return twin


def _cut(kept: KeysValues, begin: int, end: int | None) -> KeysValues:
    """Of tokens begin to end, and memory of their own: a view would hold all of them."""
    return [(keys[:, :, begin:end].clone(), values[:, :, begin:end].clone()) for keys, values in kept]


def _normed(values: list[float]) -> list[float]:
    """From 0 for the least to 1 for the most."""
    least, span = min(values), max(values) - min(values)
    return [(value - least) / span if span else 0.0 for value in values]


class RadixCache(PrefixCache):
    """The store that a server asks, for a stack.

    Raises:
        UnsupportedError: the model does not go on from a cache as it reads a text at once.
        ServerError: the capacity holds no token.
    """

    def __init__(self, stack: Stack, config: MarconiConfig) -> None:
        super().__init__(stack.model, entries=1)
        self.model, self.config = stack.model, config
        self.form, self.costs, self.one_by_one = measured(stack)
        capacity = config.capacity_mb * 2**20
        if self.costs.bytes(1) > capacity:
            said = f"marconi: capacity_mb is {config.capacity_mb}, and one token takes {self.costs.bytes(1)} bytes"
            raise ServerError(said, hint="more capacity_mb")
        watch = self.watch if config.alpha is None else None
        self.tree = Tree(self.costs, capacity, config.alpha or 0.0, watch)
        self.requests = self.tokens = self.window = 0
        self.before: Tree | None = None  # the tree when it was full, while requests are noted
        self.noted: list[tuple[bool, list[int]]] = []  # asked, or kept

    def take(self, ids: list[int]) -> Cache:
        """A cache of what is known of these tokens, short of the last one; what they share with others beyond that is
        read now, and kept."""
        known = ids[:-1]
        reach, matched, node = self.tree.find(known)
        self.tree.touch(node)
        if self.before is not None:
            self.noted.append((True, known))
        begun = cache = self.cache_of(reach, node)
        if matched > reach:
            cache = self.read_on(known[:matched], cache)
            self.tree.insert(known[:matched], *parts_of(cache))
        if self.one_by_one and matched:
            cache = self.read_on(known, cache)
        reach *= cache is begun
        self.requests, self.tokens = self.requests + 1, self.tokens + len(ids)
        self.hits, self.reused_tokens = self.hits + bool(reach), self.reused_tokens + reach
        return cache

    def read_on(self, ids: Sequence[int], cache: Cache) -> Cache:
        """A cache of all these tokens, of which it holds the first; another one where to go on from it does not pay."""
        rest = ids[int(cache.get_seq_length()) :]
        if not self.pays(len(ids) - len(rest), len(ids)):
            cache, rest = empty_cache(self.model.config), ids
        alone = self.one_by_one and cache.get_seq_length()
        for part in [[token] for token in rest] if alone else [rest]:
            read(self.model, part, cache)
        return cache

    def pays(self, known: int, tokens: int) -> bool:
        """Is a text read sooner from what is known of it than from its beginning."""
        return not self.one_by_one or tokens > ALONE * (tokens - known)

    def keep(self, ids: list[int], cache: Cache) -> None:
        """Remember a text; `cache` holds all of it but the last tokens."""
        ids = ids[: int(cache.get_seq_length())]
        self.tree.insert(ids, *parts_of(cache))
        if self.before is None:
            return
        self.noted.append((False, ids))
        if sum(asked for asked, _ in self.noted) >= self.window:
            self.tree.alpha = max(GRID, key=self.replayed)
            self.before, self.noted = None, []

    def keep_row(self, ids: list[int], cache: Cache, row: int) -> None:
        """Remember one row of a cache of attention alone, of which `ids` are the last columns."""
        pairs, at = parts_of(cache)[0], (slice(row, row + 1), slice(None), slice(-len(ids), None))
        self.tree.insert(ids, [(k[at], v[at]) for k, v in pairs], ())

    def cache_of(self, reach: int, node: Place) -> DynamicCache:
        """Keys and values on the way to a node, what plugins note beside them, and its state."""
        found, states = empty_cache(self.model.config), iter(node.data.state or ())
        way: list[KeysValues] = []
        while node.above is not None:
            way.insert(0, node.data.kept)
            node = node.above
        if not reach:
            return found
        if isinstance(found, StateCache):
            found.tokens = reach
        layers = zip(*way, strict=True)  # of each its edges
        found.layers = [copy.copy(layer) for layer in self.form]
        for index, layer in enumerate(self.form):
            if type(layer) is LinearAttentionLayer:
                found.layers[index] = copy.deepcopy(next(states))
            elif type(layer) is DynamicLayer:
                own, parts = found.layers[index], zip(*next(layers), strict=True)
                own.keys, own.values = (torch.cat(part, 2)[:, :, :reach] for part in parts)
        return found

    def watch(self) -> None:
        """The cache is full: note what is asked from here on."""
        self.before, self.window = self.tree.bare(0.0), self.config.bootstrap * self.requests

    def replayed(self, alpha: float) -> int:
        """Tokens that the noted requests would have had for nothing."""
        assert self.before is not None
        tree, tokens = self.before.bare(alpha), 0
        for asked, ids in self.noted:
            reach, matched, node = tree.find(ids)
            if not asked:
                tree.insert(ids, [], ())
                continue
            tree.touch(node)
            tokens += reach * (self.pays(reach, matched) and self.pays(matched, len(ids)))
            if matched > reach:
                tree.insert(ids[:matched], [], ())
        return tokens

    def figures(self) -> dict[str, float]:
        """What an operator wants to know."""
        nodes = list(self.tree.radix.nodes())
        return {
            "requests": self.requests, "hits": self.hits, "prompt_tokens": self.tokens,
            "reused_tokens": self.reused_tokens, "token_hit_rate": self.reused_tokens / max(1, self.tokens),
            "bytes": self.tree.bytes, "capacity": self.tree.capacity, "nodes": len(nodes),
            "states": sum(bool(node.data.state) for node in nodes), "evicted": self.tree.evicted,
            "alpha": self.tree.alpha,
        }  # fmt: skip


def parts_of(cache: Cache) -> tuple[KeysValues, list[LinearAttentionLayer]]:
    """Keys and values as they are, and a copy of the recurrent states."""
    kept = [(layer.keys, layer.values) for layer in cache.layers if type(layer) is DynamicLayer]
    return kept, [copy.deepcopy(layer) for layer in cache.layers if type(layer) is LinearAttentionLayer]


def measured(stack: Stack) -> tuple[list[CacheLayerMixin], Costs, bool]:
    """The layers of a stack's cache, and what they take; do they begin from a state with one token alone. Of a few
    tokens that are read at once, in two parts, and at last one by one, which must be the same."""
    model, ids = stack.model, list(range(3, 15))
    whole = read(model, ids, cache := empty_cache(model.config))

    def apart(*parts: list[int]) -> float:
        parted = empty_cache(model.config)
        last = [read(model, part, parted) for part in parts][-1]
        return float((last - whole).abs().max() / whole.abs().max())

    near = torch.finfo(whole.dtype).eps ** 0.5
    one_by_one = not apart(ids[:-2], ids[-2:]) <= near
    if one_by_one and not (far := apart(ids[:-2], ids[-2:-1], ids[-1:])) <= near:
        said = f"marconi: {type(model).__name__} reads a text in parts otherwise than at once ({far:.0e})"
        raise UnsupportedError(said, hint="its layers begin from no state; take a model whose layers do")
    kept, states = parts_of(cache)
    numbers = [part for layer in states for part in layer.recurrent_states.values() if part is not None]
    windows = [part for layer in states for part in layer.conv_states.values() if part is not None]
    return cache.layers, Costs(
        token=sum(part.nbytes for pair in kept for part in pair) // len(ids),
        state=sum(part.nbytes for part in numbers + windows),
        hidden=stack.anatomy.hidden_size, ssm=len(states), attention=len(kept),
        mlp=sum(site.role == "block.mlp" for site in stack.anatomy.sites),
        numbers=sum(part.numel() for part in numbers),
    ), one_by_one  # fmt: skip


class Marconi(Plugin):
    """See the module."""

    Config = MarconiConfig
    claims = {Claim.EXACT_CACHE, Claim.KEEPS_PREFIXES}
    architectures = ("qwen3_next", "mamba")
    refuses = {"bert": "an encoder writes no text", "t5": "an encoder reads a prompt at once"}
    config: MarconiConfig

    def suits(self, model: ModelView) -> None:
        check_writes(model)
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if others := kinds - {DynamicLayer, DummyLayer, LinearAttentionLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in others))
            who = f"{model.owner}: {type(model.module).__name__}"
            raise ArchitectureError(
                f"{who} has layers of kind {names} in its cache", hint="take full attention"
            )

    def check(self, stack: Stack) -> None:
        for member in stack.implementers("decode"):
            said = f"marconi: '{member.id}' has a say in how a text is written, and so in its cache"
            raise ConflictError(said, hint="keep one of them")

    @hookimpl
    def serve(self, server: Server) -> None:
        store = RadixCache(server.stack, self.config)
        server.scheduler.begin_from(store, owner="marconi")
        if store.costs.state:
            # Batches that run whole begin from a cache, and give one back, for one row alone.
            server.scheduler.max_batch = 1
        server.add_route("GET", "/v1/marconi", store.figures)
