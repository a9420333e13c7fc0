"""Few stacks in which many pairs stand, in the order asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import combinations
from random import Random
from typing import TypeAlias

import numpy
from numpy.typing import NDArray

from peftx.testing.shown import Group

Pair = tuple[str, str]
Left: TypeAlias = NDArray[numpy.bool_]
"""What no stack has yet, by numbers of plugins in their order: pairs [N, N], or triples [N, N, N]."""
SEVERAL = 2
"""Others behind which two fail, until they stand behind none."""
TRIES = 50
"""Triples that are drawn for a stack before there is none."""


class Cover:
    """Stacks of up to `size` plugins such that every pair stands in one of them, the first before the second.

    Args:
        pairs: that are to stand in a stack. beside: further ones that may; a stack has no others.
        fits: whether more than two go together.
        seed: which of many covers it is.
    """

    def __init__(
        self,
        pairs: Collection[Pair],
        fits: Callable[[Sequence[str]], bool],
        *,
        size: int,
        seed: int = 0,
        beside: Collection[Pair] = (),
    ) -> None:
        self.names = sorted({name for some in (pairs, beside) for pair in some for name in pair})
        Random(seed).shuffle(self.names)
        self.at = {name: i for i, name in enumerate(self.names)}
        self.fits, self.size = fits, size
        self.allowed = self._matrix(pairs) | self._matrix(beside)
        self.avoided: list[frozenset[int]] = []
        self.behind: dict[tuple[int, int], int] = {}
        """Pairs that failed behind a third plugin -> how many of these there were."""

    def knows(self, names: Collection[str]) -> bool:
        """Has any pair each of these."""
        return self.at.keys() >= set(names)

    def avoid(self, names: Collection[str]) -> None:
        """Let these no longer stand in one stack: they fail together. Two that failed behind several others each stand
        behind none from then on."""
        self.avoided.append(frozenset(self.at[name] for name in names))
        if len(names) == 3:
            _, one, two = (self.at[name] for name in names)
            self.behind[one, two] = self.behind.get((one, two), 0) + 1
        if len(names) == 2:
            first, second = (self.at[name] for name in names)
            self.allowed[first, second] = False

    def stacks(self, pairs: Collection[Pair]) -> Iterator[tuple[str, ...]]:
        """Stacks, greedily: each is begun with a pair that no other has, and grows by the plugin that brings most new
        ones, or where none does by such a pair. What fails while they are asked for stands in no later one."""
        left = self._matrix(pairs)
        twins = [int(i) for i in numpy.flatnonzero(left.diagonal())]  # a plugin beside itself
        numpy.fill_diagonal(left, False)
        for i in twins:
            yield self.names[i], self.names[i]
        while (left := left & self.allowed).any():
            degrees = left.sum(1) + left.sum(0)
            scores = numpy.where(left, degrees[:, None] + degrees[None, :], -1)
            first, second = divmod(int(scores.argmax()), len(self.names))
            stack = self._grown([first, second], left)
            names = tuple(self.names[i] for i in stack)
            self.take(names, left)
            yield names

    def _grown(self, stack: list[int], left: Left) -> list[int]:
        while len(stack) < self.size:
            for longer in self._longer(stack, left):
                if not self._avoids(longer) and self.fits([self.names[i] for i in longer]):
                    stack = longer
                    break
            else:
                return stack
        return stack

    def _longer(self, stack: list[int], left: Left) -> list[list[int]]:
        """The stack with one plugin more, at the place where it brings most of what is left; the best few."""
        found: list[tuple[int, int, int]] = []  # gain, place, plugin
        for place in range(len(stack) + 1):
            ahead, behind = stack[:place], stack[place:]
            gain = _gain(left, ahead, behind)
            may = self.allowed[ahead].all(0) & self.allowed[:, behind].all(1)
            may[stack] = False
            gain = numpy.where(may, gain, 0)
            for i in numpy.argsort(-gain, kind="stable")[:3]:
                if gain[i] > 0:
                    found.append((int(gain[i]), place, int(i)))
        found.sort(key=lambda one: -one[0])
        if not found and left.ndim == 2 and len(stack) + 2 <= self.size:
            return self._with_pair(stack, left)
        return [[*stack[:place], i, *stack[place:]] for _, place, i in found[:6]]

    def _with_pair(self, stack: list[int], left: Left) -> list[list[int]]:
        """The stack with a pair of what is left more, behind it or ahead of it; a few."""
        longer: list[list[int]] = []
        for behind, may in ((True, self.allowed[stack].all(0)), (False, self.allowed[:, stack].all(1))):
            may[stack] = False
            for pair in numpy.argwhere(left & may[:, None] & may[None, :])[:6].tolist():
                longer.append([*stack, *pair] if behind else [*pair, *stack])
        return longer

    def threes(self) -> Left:
        """All ordered triples of plugins that may stand together two by two."""
        may = self.allowed & ~numpy.eye(len(self.names), dtype=bool)
        return may[:, :, None] & may[:, None, :] & may[None, :, :]

    def take(self, stack: Sequence[str], left: Left) -> None:
        """What a stack shows is no longer left."""
        for some in combinations([self.at[name] for name in stack if name in self.at], left.ndim):
            left[some] = False

    def drawn(self, left: Left, random: Random) -> tuple[str, ...]:
        """A stack around a triple that is drawn of those that are left, and that brings many others; empty where none
        that is drawn goes together."""
        places = numpy.argwhere(left)
        for row in random.sample(range(len(places)), min(TRIES, len(places))):
            stack = [int(i) for i in places[row]]
            if not self._avoids(stack) and self.fits([self.names[i] for i in stack]):
                return tuple(self.names[i] for i in self._grown(stack, left))
            left[tuple(stack)] = False
        return ()

    def _avoids(self, stack: list[int]) -> bool:
        """Does it hold plugins that fail together, in whatever order, or two that fail behind others."""
        held, places = set(stack), {i: place for place, i in enumerate(stack)}
        return any(len(group) > 2 and group <= held for group in self.avoided) or any(
            count >= SEVERAL and one in held and two in held and 0 < places[one] < places[two]
            for (one, two), count in self.behind.items()
        )

    def _matrix(self, pairs: Collection[Pair]) -> Left:
        found: Left = numpy.zeros((len(self.names), len(self.names)), dtype=bool)
        for first, second in pairs:
            found[self.at[first], self.at[second]] = True
        return found


def around_threes(cover: Cover, shown: Iterable[Group], *, count: int, seed: int) -> list[tuple[str, ...]]:
    """At most `count` stacks, each around a triple that no stack has."""
    left, random = cover.threes(), Random(seed)
    for group in shown:
        cover.take(group.names, left)
    stacks: list[tuple[str, ...]] = []
    while len(stacks) < count and (names := cover.drawn(left, random)):
        stacks.append(names)
        cover.take(names, left)
    return stacks


def count_threes(cover: Cover, shown: Iterable[Group]) -> tuple[int, int]:
    """Ordered triples that stood in a stack which works, and all that may."""
    left = cover.threes()
    whole = int(left.sum())
    for group in shown:
        if not group.fault:
            cover.take(group.names, left)
    return whole - int(left.sum()), whole


def _gain(left: Left, ahead: list[int], behind: list[int]) -> NDArray[numpy.int64]:
    """How much of what is left each plugin would bring between these [N]."""
    if left.ndim == 2:
        return left[ahead].sum(0) + left[:, behind].sum(1)
    found: NDArray[numpy.int64] = numpy.zeros(len(left), dtype=numpy.int64)
    for one, two in combinations(ahead, 2):
        found += left[one, two]
    for one in ahead:
        for two in behind:
            found += left[one, :, two]
    for one, two in combinations(behind, 2):
        found += left[:, one, two]
    return found
