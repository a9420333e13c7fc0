"""ADED: drafts from a tri-gram table that adapts to the text, found by Monte Carlo tree search.

"Adaptive Draft-Verification for Efficient Large Language Model Decoding" (arXiv:2407.12021):

    table     M[a, b][c] = count(a, b, c) / count(a, b), the 12 most frequent c of each pair          [a, b, c: tokens]
    adapt     M[a, b][c] <- min(M[a, b][c] + 0.04, 3)  for each tri-gram of the last 16 tokens, before every draft
    select    child of n with the largest  Q/N + (c1 + ln((N_n + c2 + 1) / c2)) P sqrt(N_n) / (1 + N)
              P = M of the child's token, N visits, Q sum of values, N_n visits of n; a child without visits comes first
    value     1 + sum of M along the path, which goes on at random, in proportion to M, to the full depth
    draft     the 24 most visited nodes, each with its path from the root and the best successor of its last pair

The target checks the whole tree in one forward and keeps what it would have written itself, so the text is unchanged.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple, final

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftx import Claim, Generation, ModelView, Plugin, PluginConfig, Stack, hookimpl
from peftx.engines.data import detect_format, read_dataset, tokenize_dataset
from peftx.engines.models import asset_path
from peftx.errors import ArchitectureError
from peftx.toolkits.decoding import Drafter, DraftTree, per_row, speculative_generate


class AdedConfig(PluginConfig):
    """Options of ADED; the defaults are those of the paper's code."""

    corpus: str | None = Field(None, description="file to count, in any format of training data")
    successors: int = Field(12, ge=1, description="most frequent successors kept for each pair of tokens")
    window: int = Field(16, ge=3, description="last tokens whose tri-grams are strengthened before a draft")
    increment: float = Field(0.04, ge=0, description="added to M for each of them; 0 adapts nothing")
    cap: float = Field(3.0, gt=0, description="what M grows to at most")
    depth: int = Field(4, ge=2, description="length of a drafted path: all but its last token are searched")
    iterations: int = Field(150, ge=1, description="iterations of the tree search for each draft")
    sequences: int = Field(24, ge=1, description="most visited paths that become the draft")
    draft_tokens: int = Field(64, ge=1, le=1024, description="nodes of the draft at most")
    c1: float = Field(32.0, ge=0, description="weight of P against Q/N in the search")
    c2: float = Field(8.0, gt=0, description="how slowly that weight grows with the visits")
    keep_updates: bool = Field(True, description="what one text taught the table serves the next ones")
    seed: int = Field(0, ge=0, description="of the search's random paths; the text does not depend on it")

    @model_validator(mode="after")
    def _used(self) -> AdedConfig:
        if self.cap < self.increment:
            raise ValueError(
                f"cap {self.cap:g} is less than the increment {self.increment:g}, which it would cut"
            )
        if self.corpus is None and self.increment == 0:
            raise ValueError(
                "without a corpus and with increment 0 the table stays empty, and drafts nothing"
            )
        if self.corpus is None and self.successors != type(self).model_fields["successors"].default:
            raise ValueError("successors cuts the counts of a corpus, and there is none")
        return self


Pair = tuple[int, int]


class Row(NamedTuple):
    """Successors of one pair, the best first, with M and its running sums."""

    tokens: list[int]
    values: list[float]
    sums: list[float]


@final
class TrigramTable(nn.Module):
    """M[a, b][c]: counts of a corpus in compressed rows, and what was learned since then in memory.

    Args:
        pairs: [R] int64, a * 2**32 + b, ascending. ends: [R] int64, row r holds entries ends[r - 1]:ends[r].
        totals: [R] int64, count(a, b). tokens, counts: [E] int32, most frequent first in each row.
    """

    def __init__(self, pairs: Tensor, ends: Tensor, totals: Tensor, tokens: Tensor, counts: Tensor) -> None:
        super().__init__()
        self.register_buffer("pairs", pairs)
        self.register_buffer("ends", ends)
        self.register_buffer("totals", totals)
        self.register_buffer("tokens", tokens)
        self.register_buffer("counts", counts)
        self._learned: dict[Pair, dict[int, float]] = {}
        self._rows: dict[Pair, Row] = {}

    @classmethod
    def count(cls, sequences: Sequence[Sequence[int]], successors: int) -> TrigramTable:
        """The table of token sequences, cut to the most frequent `successors` (ties: the lower token)."""
        none = np.empty((0, 3), dtype=np.int64)
        grams = [np.lib.stride_tricks.sliding_window_view(np.asarray(s), 3) for s in sequences if len(s) > 2]
        trigrams, counts = np.unique(np.concatenate([none, *grams]), axis=0, return_counts=True)  # sorted
        pairs = (trigrams[:, 0] << 32) + trigrams[:, 1]
        unique, first = np.unique(pairs, return_index=True)
        totals = np.add.reduceat(counts, first)  # count(a, b), over all successors
        order = np.lexsort((-counts, pairs))
        rank = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
        kept = order[rank < successors]
        ends = np.searchsorted(pairs[kept], unique, side="right")
        wide = [torch.from_numpy(column.astype(np.int64)) for column in (unique, ends, totals)]
        narrow = [torch.from_numpy(column.astype(np.int32)) for column in (trigrams[kept, 2], counts[kept])]
        return cls(*wide, *narrow)

    def forget(self) -> None:
        """Back to the corpus."""
        self._learned.clear()
        self._rows.clear()

    def adapt(self, tokens: Sequence[int], increment: float, cap: float) -> None:
        """M[a, b][c] <- min(M[a, b][c] + increment, cap) for each tri-gram of `tokens`."""
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            pair = (a, b)
            if pair not in self._learned:
                self._learned[pair] = self._counted(pair)
            learned = self._learned[pair]
            old = learned.get(c, 0.0)
            learned[c] = max(old, min(old + increment, cap))
            self._rows.pop(pair, None)

    def row(self, pair: Pair) -> Row:
        """Successors of a pair; empty if it has none."""
        if pair not in self._rows:
            found = self._learned[pair] if pair in self._learned else self._counted(pair)
            tokens = sorted(
                found, key=found.__getitem__, reverse=True
            )  # stable: a tie keeps the corpus's order
            values = [found[token] for token in tokens]
            self._rows[pair] = Row(tokens, values, list(accumulate(values)))
        return self._rows[pair]

    def _counted(self, pair: Pair) -> dict[int, float]:
        """The corpus's row: M = count(a, b, c) / count(a, b)."""
        key = (pair[0] << 32) + pair[1]
        at = int(torch.searchsorted(self.pairs, key))
        if at == len(self.pairs) or int(self.pairs[at]) != key:
            return {}
        entries = slice(int(self.ends[at - 1]) if at else 0, int(self.ends[at]))
        values = self.counts[entries].double() / self.totals[at]
        return dict(zip(self.tokens[entries].tolist(), values.tolist(), strict=True))


@dataclass(slots=True, eq=False)
class Node:
    """One place in the search tree: the tokens after the start; `mean` = Q / N, `share` = P / (1 + N)."""

    pair: Pair
    path: tuple[int, ...]
    prior: float
    share: float
    children: list[Node] | None = None
    visits: int = 0
    total: float = 0.0
    mean: float = math.inf


def grow(table: TrigramTable, start: Pair, config: AdedConfig, rng: random.Random) -> list[Node]:
    """The tree of a Monte Carlo search from the pair `start`: all nodes, the root first, in the order of expansion."""
    c1, c2 = config.c1, config.c2
    weight = [
        (c1 + math.log((n + c2 + 1) / c2)) * math.sqrt(n) for n in range(config.iterations)
    ]  # n: N of the parent
    nodes = [Node(start, (), 0.0, 0.0)]
    for _ in range(config.iterations if table.row(start).tokens else 0):
        trail = [nodes[0]]
        while trail[-1].children and len(trail) < config.depth:  # select
            factor, best = weight[trail[-1].visits], -1.0
            for child in trail[-1].children:
                score = child.mean + factor * child.share
                if score > best:
                    node, best = child, score
            trail.append(node)
        node = trail[-1]
        if node.children is None and len(trail) < config.depth:  # expand, and go to the likeliest child
            row = table.row(node.pair)
            node.children = [
                Node((node.pair[1], token), (*node.path, token), prior, prior)
                for token, prior in zip(row.tokens, row.values, strict=True)
            ]
            nodes += node.children
            trail += node.children[:1]
        value = 1.0 + sum(node.prior for node in trail)
        pair, length = trail[-1].pair, len(trail)
        while length < config.depth and (row := table.row(pair)).tokens:  # go on in proportion to M
            chosen = min(bisect(row.sums, rng.random() * row.sums[-1]), len(row.tokens) - 1)
            value += row.values[chosen]
            pair, length = (pair[1], row.tokens[chosen]), length + 1
        for node in trail:
            node.visits += 1
            node.total += value
            node.mean = node.total / node.visits
            node.share = node.prior / (1 + node.visits)
    return nodes


def search(table: TrigramTable, start: Pair, config: AdedConfig, rng: random.Random) -> list[list[int]]:
    """The most visited paths of tokens after the pair `start`; most visited first."""
    nodes = grow(table, start, config, rng)
    chosen = sorted(nodes[1:], key=lambda node: -node.visits)[: config.sequences]
    # Each goes on with the best successor of its last pair.
    return [[*node.path, *table.row(node.pair).tokens[:1]] for node in chosen]


@final
class TrigramDrafter(Drafter):
    """Adapts the table to the text, then searches it."""

    def __init__(self, table: TrigramTable, config: AdedConfig) -> None:
        self.table, self.config = table, config
        self.rng = random.Random(config.seed)

    def begin(self, generation: Generation) -> None:
        self.rng.seed(self.config.seed)
        if not self.config.keep_updates:
            self.table.forget()

    def propose(self, ids: Tensor, limit: int) -> DraftTree:
        recent = ids[-self.config.window :].tolist()
        if self.config.increment:
            self.table.adapt(recent, self.config.increment, self.config.cap)
        paths = search(self.table, (recent[-2], recent[-1]), self.config, self.rng) if len(recent) > 1 else []
        prefixes = dict.fromkeys(tuple(path[:end]) for path in paths for end in range(1, len(path) + 1))
        return DraftTree.from_sequences(
            islice(prefixes, self.config.draft_tokens)
        )  # each after its own prefix


class Aded(Plugin):
    """See the module."""

    Config = AdedConfig
    claims = {
        Claim.IDENTITY_AT_START, Claim.BESIDE_WEIGHTS, Claim.LOSSLESS_DECODING
    }  # fmt: skip
    refuses = {
        "bert": "an encoder writes no text",
        "t5": "drafts are checked on decoders alone",
        "mamba": "its state cannot go back over rejected tokens",
    }
    example = {"iterations": 40, "sequences": 8, "draft_tokens": 16}
    config: AdedConfig
    table: TrigramTable

    def suits(self, model: ModelView) -> None:
        module = model.module
        refused = {
            "does not write text": not module.can_generate(),
            "is no decoder alone": bool(model.config.is_encoder_decoder),
            "has a state that cannot go back over rejected tokens": module._is_stateful,
        }
        if found := [reason for reason, wrong in refused.items() if wrong]:
            raise ArchitectureError(
                f"{model.owner}: {type(module).__name__} {' and '.join(found)}",
                hint="take a causal language model with attention",
            )

    @hookimpl
    def inject(self, model: ModelView, stack: Stack) -> None:
        blank = model.restoring or model.module.device.type == "meta" or self.config.corpus is None
        self.table = model.keep("table", TrigramTable.count([], 1) if blank else self.count(stack))

    def count(self, stack: Stack) -> TrigramTable:
        """The corpus's table, tokenized as training data are."""
        file = asset_path(self.config.corpus)
        kind = detect_format(file)
        rows = tokenize_dataset(read_dataset(file), stack.tokenizer, format=kind, max_length=2**30)
        return TrigramTable.count(rows["input_ids"][:], self.config.successors)

    @hookimpl
    def decode(self, request: Generation) -> Tensor:
        drafter = TrigramDrafter(self.table, self.config)
        return per_row(request, lambda row: speculative_generate(row, drafter))
