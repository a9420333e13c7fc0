"""Few stacks in which many pairs stand, in the order asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy
from numpy.typing import NDArray

Pair = tuple[str, str]


class Cover:
    """Stacks of up to `size` plugins such that every pair stands in one of them, the first before the second.

    Args:
        pairs: that may stand together, in this order; a stack has no others.
        fits: whether more than two go together.
        seed: which of many covers it is.
    """

    def __init__(
        self, pairs: Collection[Pair], fits: Callable[[Sequence[str]], bool], *, size: int, seed: int = 0
    ) -> None:
        self.names = sorted({name for pair in pairs for name in pair})
        random.Random(seed).shuffle(self.names)
        self.at = {name: i for i, name in enumerate(self.names)}
        self.fits, self.size = fits, size
        self.allowed = self._matrix(pairs)
        self.avoided: list[frozenset[int]] = []

    def avoid(self, names: Collection[str]) -> None:
        """Let these no longer stand in one stack: they fail together."""
        self.avoided.append(frozenset(self.at[name] for name in names))
        if len(names) == 2:
            first, second = (self.at[name] for name in names)
            self.allowed[first, second] = False

    def stacks(self, pairs: Collection[Pair]) -> Iterator[tuple[str, ...]]:
        """Stacks, greedily: each is begun with a pair that no other has, and grows by whatever brings most new ones."""
        left = self._matrix(pairs)
        twins = [int(i) for i in numpy.flatnonzero(left.diagonal())]  # a plugin beside itself
        numpy.fill_diagonal(left, False)
        for i in twins:
            yield self.names[i], self.names[i]
        while left.any():
            degrees = left.sum(1) + left.sum(0)
            scores = numpy.where(left, degrees[:, None] + degrees[None, :], -1)
            first, second = divmod(int(scores.argmax()), len(self.names))
            stack = self._grown([first, second], left)
            for i, one in enumerate(stack):
                for other in stack[i + 1 :]:
                    left[one, other] = False
            yield tuple(self.names[i] for i in stack)

    def _grown(self, stack: list[int], left: NDArray[numpy.bool_]) -> list[int]:
        while len(stack) < self.size:
            for longer in self._longer(stack, left):
                if not self._avoids(longer) and self.fits([self.names[i] for i in longer]):
                    stack = longer
                    break
            else:
                return stack
        return stack

    def _longer(self, stack: list[int], left: NDArray[numpy.bool_]) -> list[list[int]]:
        """The stack with one plugin more, at the place where it brings most pairs; the best few."""
        found: list[tuple[int, int, int]] = []  # gain, place, plugin
        for place in range(len(stack) + 1):
            ahead, behind = stack[:place], stack[place:]
            gain = left[ahead].sum(0) + left[:, behind].sum(1)
            may = self.allowed[ahead].all(0) & self.allowed[:, behind].all(1)
            may[stack] = False
            gain = numpy.where(may, gain, 0)
            for i in numpy.argsort(-gain, kind="stable")[:3]:
                if gain[i] > 0:
                    found.append((int(gain[i]), place, int(i)))
        found.sort(key=lambda one: -one[0])
        return [[*stack[:place], i, *stack[place:]] for _, place, i in found[:6]]

    def _avoids(self, stack: list[int]) -> bool:
        """Does it hold plugins that fail together, in whatever order."""
        return any(len(group) > 2 and group <= set(stack) for group in self.avoided)

    def _matrix(self, pairs: Collection[Pair]) -> NDArray[numpy.bool_]:
        found: NDArray[numpy.bool_] = numpy.zeros((len(self.names), len(self.names)), dtype=bool)
        for first, second in pairs:
            found[self.at[first], self.at[second]] = True
        return found
