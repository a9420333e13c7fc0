"""Drafts: trees of guessed tokens, and the interface of the objects that guess them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, final

import torch

from peftx.errors import GenerationError

if TYPE_CHECKING:
    from peftx.toolkits.decoding.generation import Generation

MAX_NODES = 1024  # the tree mask is dense: N nodes cost N * (cached rows + N) booleans


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DraftTree:
    """Guessed continuations of a sequence, merged into a tree; node i guesses one token after its parent's.

    The root is the last token of the sequence and is not a node. A node's parent stands before it, and no two
    children of one parent carry the same token, so a token decides the way down.

    Attributes:
        tokens: [N] int64, on the CPU.
        parents: [N] int64, on the CPU; index of the parent node, -1 for children of the root.
        probs: [N, V] float, optional: row i is the distribution that `tokens[i]` was *drawn* from. It lets sampling
            accept a token with probability min(1, p/q); linear drafts only. Without it each token counts as a fixed
            guess, which is exact too.

    Raises:
        PeftxError: shapes or dtypes do not fit, a parent does not precede its child, two siblings carry one token,
            there are more than 1024 nodes, or `probs` comes with a draft that branches.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    probs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("parents", self.parents)):
            if value.dim() != 1 or value.dtype != torch.int64 or value.device.type != "cpu":
                raise GenerationError(
                    f"draft {name}: expected a 1-D int64 tensor on the CPU, got {tuple(value.shape)} {value.dtype} "
                    f"on {value.device}"
                )
        if len(self.tokens) != len(self.parents):
            raise GenerationError(f"draft: {len(self.tokens)} tokens but {len(self.parents)} parents")
        if len(self.tokens) > MAX_NODES:
            raise GenerationError(
                f"draft: {len(self.tokens)} nodes, at most {MAX_NODES} are verified at once"
            )
        seen: set[tuple[int, int]] = set()
        for node, (parent, token) in enumerate(zip(self.parents.tolist(), self.tokens.tolist(), strict=True)):
            if not -1 <= parent < node:
                raise GenerationError(f"draft node {node}: parent {parent} does not precede it")
            if (parent, token) in seen:
                raise GenerationError(
                    f"draft node {node}: token {token} is already a child of node {parent}",
                    hint="DraftTree.from_sequences merges common prefixes",
                )
            seen.add((parent, token))
        if self.probs is not None:
            if not self.is_linear:
                raise GenerationError("draft: `probs` needs a linear draft; this one branches")
            if self.probs.dim() != 2 or len(self.probs) != len(self.tokens):
                raise GenerationError(
                    f"draft probs: expected [{len(self.tokens)}, V], got {tuple(self.probs.shape)}"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    # ------------------------------------------------------------------------------------------- construction
    @classmethod
    def empty(cls) -> DraftTree:
        """No guess: one plain decoding step."""
        return cls.linear([])

    @classmethod
    def linear(cls, tokens: Sequence[int] | torch.Tensor, probs: torch.Tensor | None = None) -> DraftTree:
        """One guessed continuation. `tokens`: [N]; `probs`: [N, V], see the class."""
        values = torch.as_tensor(tokens, dtype=torch.int64).cpu()
        return cls(tokens=values, parents=torch.arange(len(values)) - 1, probs=probs)

    @classmethod
    def from_sequences(cls, sequences: Iterable[Sequence[int]]) -> DraftTree:
        """Several guessed continuations, common prefixes merged. An earlier sequence's nodes come first."""
        tokens: list[int] = []
        parents: list[int] = []
        node_of: dict[tuple[int, int], int] = {}
        for sequence in sequences:
            parent = -1
            for token in sequence:
                node = node_of.setdefault((parent, int(token)), len(tokens))
                if node == len(tokens):
                    tokens.append(int(token))
                    parents.append(parent)
                parent = node
        return cls(
            tokens=torch.tensor(tokens, dtype=torch.int64), parents=torch.tensor(parents, dtype=torch.int64)
        )

    # ------------------------------------------------------------------------------------------------ geometry
    @cached_property
    def is_linear(self) -> bool:
        """Whether each node's parent is the node before it (true for the empty draft)."""
        return bool((self.parents == torch.arange(len(self.parents)) - 1).all())

    @cached_property
    def depths(self) -> torch.Tensor:
        """[N] int64: distance to the root; the root's children have depth 1."""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return torch.tensor(depths, dtype=torch.int64)

    @cached_property
    def ancestor_mask(self) -> torch.Tensor:
        """[N, N] bool: (i, j) is true where j is i itself or one of its ancestors."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask

    @cached_property
    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) -> node."""
        pairs = zip(self.parents.tolist(), self.tokens.tolist(), strict=True)
        return {pair: node for node, pair in enumerate(pairs)}

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`."""
        nodes: list[int] = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]

    def truncated(self, depth: int) -> DraftTree:
        """The nodes down to `depth`, in their order."""
        if len(self) == 0 or int(self.depths.max()) <= depth:
            return self
        keep = (self.depths <= depth).nonzero()[:, 0]
        new_index = torch.full((len(self) + 1,), -1, dtype=torch.int64)  # the last entry serves parent -1
        new_index[keep] = torch.arange(len(keep))
        return DraftTree(
            tokens=self.tokens[keep],
            parents=new_index[self.parents[keep]],
            probs=None if self.probs is None else self.probs[keep.to(self.probs.device)],
        )

    def longest_path(self) -> DraftTree:
        """The first of the deepest paths, as a linear draft."""
        if self.is_linear:
            return self
        return DraftTree.linear(self.tokens[self.path(int(self.depths.argmax()))])


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class VerifiedStep:
    """What one forward of the target taught; handed to `Drafter.observe`.

    Attributes:
        tree: the draft that was verified (cut to the limit, or to one path where the model cannot take a tree).
        accepted: nodes of `tree` that were accepted, root's child first.
        tokens: [len(accepted) + 1] int64, the new tokens: the accepted ones and the target's own next token (fewer
            where generation ended).
        logits: [1 + N, V], raw, of the last token and of each node; in the model's dtype.
        rows: [R] int64, the tokens whose keys and values entered the cache for good: the part of the prompt that was
            fed (first step; the last chunk under `prefill_chunk_size`) or the last token, then the accepted nodes.
        hidden: one [R, D] tensor for the embeddings and each layer, aligned with `rows`; None unless the drafter
            asks with `needs_hidden`.
    """

    tree: DraftTree
    accepted: tuple[int, ...]
    tokens: torch.Tensor
    logits: torch.Tensor
    rows: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None


class Drafter(ABC):
    """Guesses continuations; whatever it guesses, verification keeps the target's output.

    Class attributes:
        needs_hidden: ask the target for the hidden states of every layer.
    """

    needs_hidden: ClassVar[bool] = False

    def begin(self, generation: Generation) -> None:  # noqa: B027 - optional, most drafters need no preparation
        """Called once before each generation, to forget the last one."""

    @abstractmethod
    def propose(self, ids: torch.Tensor, limit: int) -> DraftTree:
        """Guess what follows.

        Args:
            ids: [L] int64, prompt and tokens so far, on the target's device.
            limit: greatest useful depth, >= 1; deeper nodes are cut.

        Returns:
            The draft; may be empty. A drafter that *samples* its guesses under `do_sample` gives their
            distributions in `DraftTree.probs` to gain more acceptance; without them the output is exact all the same
            as long as the guess was made without looking at the target's own random draw.
        """

    def observe(self, step: VerifiedStep) -> None:  # noqa: B027 - optional, most drafters look at the text only
        """Learn from one verified step. Called after each, also after the last."""
