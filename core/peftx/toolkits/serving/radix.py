"""A radix tree over token ids: what texts have in common is there once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from peftx.toolkits.serving.prefix import alike

T = TypeVar("T")


@dataclass(eq=False)
class Node(Generic[T]):
    """Tokens `edge` behind those of the node `above`, which is None at the root; `data` is whose tree it is."""

    edge: tuple[int, ...]
    above: Node[T] | None
    data: T
    children: dict[int, Node[T]] = field(default_factory=dict)
    """By the first token of their edges."""

    def __post_init__(self) -> None:
        self.depth: int = len(self.edge) + (self.above.depth if self.above is not None else 0)
        """Tokens from the root."""


class RadixTree(Generic[T]):
    """Nodes where texts end or part.

    Args:
        new: what a node holds at first.
        split: takes what belongs to the first tokens of an edge from what its node holds, and gives it to the node that
            is put behind these. Left out: that one holds what is new.
        join: puts what a node holds in front of what its only child holds, as the node goes.
    """

    def __init__(
        self,
        new: Callable[[], T],
        *,
        split: Callable[[T, int], T] | None = None,
        join: Callable[[T, T], None] | None = None,
    ) -> None:
        self._new, self._split, self._join = new, split, join
        self.root: Node[T] = Node((), None, new())

    def nodes(self) -> Iterator[Node[T]]:
        """All but the root, each before its children."""
        left = [*self.root.children.values()][::-1]
        while left:
            node = left.pop()
            yield node
            left += [*node.children.values()][::-1]

    def walk(self, ids: Sequence[int]) -> tuple[list[Node[T]], int]:
        """The nodes on a text's way, the root first; and its tokens that are known: the last node's may be in part."""
        way, matched = [self.root], 0
        while (
            matched == way[-1].depth < len(ids) and (child := way[-1].children.get(ids[matched])) is not None
        ):
            matched += alike(child.edge, ids[matched : matched + len(child.edge)])
            way.append(child)
        return way, matched

    def insert(self, ids: Sequence[int]) -> Node[T]:
        """The node behind the last token of a text; it is made where there is none."""
        way, matched = self.walk(ids)
        node = way[-1]
        if matched < node.depth:
            node = self._cut(node, len(node.edge) - (node.depth - matched))
        if matched < len(ids):
            child = Node(tuple(ids[matched:]), node, self._new())
            node.children[ids[matched]] = node = child
        return node

    def _cut(self, node: Node[T], tokens: int) -> Node[T]:
        """A node behind the first tokens of an edge."""
        assert node.above is not None
        data = self._new() if self._split is None else self._split(node.data, tokens)
        upper = Node(node.edge[:tokens], node.above, data)
        node.above.children[node.edge[0]] = upper
        upper.children[node.edge[tokens]] = node
        node.edge, node.above = node.edge[tokens:], upper
        return upper

    def remove(self, node: Node[T]) -> None:
        """Take out a node that has one child at most, whose edge then begins with the node's.

        Raises:
            ValueError: it has more, or is the root.
        """
        if node.above is None or len(node.children) > 1:
            raise ValueError(f"a node with {len(node.children)} children, or the root, cannot go")
        if not node.children:
            del node.above.children[node.edge[0]]
        for child in node.children.values():
            if self._join is not None:
                self._join(node.data, child.data)
            child.edge, child.above = node.edge + child.edge, node.above
            node.above.children[child.edge[0]] = child

    def copied(self, data: Callable[[T], T]) -> RadixTree[T]:
        """The same tree, each node with what `data` makes of the original's."""
        twin = RadixTree(self._new, split=self._split, join=self._join)
        twins = {self.root: twin.root}
        for node in self.nodes():
            assert node.above is not None
            above = twins[node.above]
            twins[node] = above.children[node.edge[0]] = Node(node.edge, above, data(node.data))
        return twin
