"""Which plugins go together: every ordered pair, lived through in covering stacks on a tiny model, or refused.

    matrix = run_matrix(["lora", "mezo", "prefixquant"])        # `peftx matrix` shows it

A pair *works* if a stack in which it stands in this order trains some steps to finite losses, moves what it trains, is
saved, comes back bit for bit and generates the same tokens; metrics and servers are tried in one of the two orders. It
is *refused* if its claims collide: before anything is built, with the reason and the order that would work; or if both
want one place, and then the model is bit for bit what it was. It is *not for this model* if one of the two cannot stand
on the pair's architecture by itself. Anything else *failed*, and is a bug.

Pairs grow with the square of the plugins. Claims tell refused ones without a model; the others stand in stacks of up to
twelve plugins (`peftx.testing.covering`), which show 66 pairs at once. Stacks are built first, which tells in some
hundredths of a second what is refused then, and what may stand together is lived through. A stack that fails is taken
apart until the fault has no plugin too many, and is tried again without one of these. What a stack showed is kept, by
what it ran: the files of the core and the modules of its plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, count, islice
from pathlib import Path
from typing import Literal

import torch

from peftx.comparing.processes import fresh
from peftx.composition.conflicts import find_conflicts
from peftx.composition.registry import Registry
from peftx.kernel.names import HOOKS
from peftx.testing.covering import Cover, Pair, around_threes, count_threes
from peftx.testing.kit import settle
from peftx.testing.shown import Group, Shown
from peftx.testing.tried import (
    STANDS,
    arch_of,
    plain,
    stands_on,
)
from peftx.testing.trying import Names, New, build_stack, fits, try_alone, try_group, try_stack

Outcome = Literal["works", "refused", "other-model", "failed"]
Try = Callable[[str, Names, New], list[Group]]
Submit = Callable[[Try, str, Iterable[tuple[Names, New]]], Iterator[Group]]
"""(what tries, architecture, stacks and the pairs of each that nothing has shown) -> what they showed."""
SIZE = 12
"""Plugins of a stack at most."""
AHEAD = 3
"""Stacks that wait for each process."""
SETTLED = 25
"""Stacks of a process after which it takes what they left in caches from the collector's sight."""
_TRIED = count(1)
ROUNDS = 3
"""Times that pairs which no stack was built with are built in others, before any is lived through."""


@dataclass(frozen=True)
class Cell:
    """`first` before `second` in a stack.

    `order` is the one that works where this one is refused; `arch` the tiny model that it was tried on; `stack` the
    plugins that stood together where it works.
    """

    first: str
    second: str
    outcome: Outcome
    reason: str = ""
    claims: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    arch: str = ""
    stack: tuple[str, ...] = ()


@dataclass
class Matrix:
    """All cells; `plugins` are grouped by hook, as a page shows them."""

    plugins: list[str]
    hooks: dict[str, str]
    """Plugin -> the hook that its folder names, the first of its metadata."""
    cells: list[Cell] = field(default_factory=list)
    families: dict[str, str] = field(default_factory=dict)
    together: list[Group] = field(default_factory=list)
    """Plugins of which every two work, and that fail or are refused together: three and more, two on another model."""
    stacks: int = 0
    """Stacks that were lived through for it, those of former runs left out."""
    threes: tuple[int, int] = (0, 0)
    """Ordered triples of plugins that stood in a stack that works, and those of which every two do, on one model."""

    @property
    def failing(self) -> list[Group]:
        return [group for group in self.together if not group.refused]

    def count(self, outcome: Outcome) -> int:
        return sum(cell.outcome == outcome for cell in self.cells)


def run_matrix(
    names: Sequence[str] = (),
    *,
    jobs: int = 1,
    kept: Path | None = None,
    seed: int = 0,
    threes: int = 0,
    progress: Callable[[int, int, Cell], None] | None = None,
) -> Matrix:
    """Every ordered pair of these plugins (of all that are installed), a plugin with itself included.

    Args:
        jobs: processes. kept: a file of what former runs showed; written as soon as a stack is through.
        seed: which stacks cover the pairs. threes: further stacks, each around a triple that is drawn of those that no
            stack has shown, on the model that most pairs stand on.
        progress: called with (cells done, cells in all, the last one).

    Raises:
        RegistryError: a name that is not installed, or a plugin that does not import.
    """
    registry = Registry()
    chosen = list(dict.fromkeys(names)) or sorted(registry.names())
    for name in chosen:
        registry.load(name)
    facts = {name: registry.describe(name) for name in chosen}
    hooks = {name: next(iter(facts[name].hooks), "") for name in chosen}
    chosen.sort(key=lambda name: (HOOKS.index(hooks[name]) if hooks[name] else len(HOOKS), name))
    cells: dict[Pair, Cell] = {}

    def note(cell: Cell) -> None:
        cells[cell.first, cell.second] = cell
        if progress is not None:
            progress(len(cells), len(chosen) ** 2, cell)

    found = Matrix(chosen, hooks, families={name: facts[name].family for name in chosen})
    with _workers(jobs, chosen) as submit:
        shown = Shown(kept)
        _find_places(chosen, submit, shown)
        rest = _told_ahead(chosen, note)
        tried = {arch: frozenset(pairs) for arch, pairs in rest.items()}
        for arch, pairs in sorted(rest.items(), key=lambda one: -len(one[1])):
            both = (pair for pair, cell in cells.items() if cell.outcome == "works")
            beside = [pair for pair in both if not any(stands_on(name, arch) for name in pair)]
            found.stacks += _lived(arch, pairs, beside, found, note, submit, shown, seed)
        if tried:
            arch = max(tried, key=lambda one: len(tried[one]))
            working = {pair for pair in tried[arch] if cells[pair].outcome == "works"}
            cover = Cover(working, fits, size=SIZE, seed=seed)
            for group in found.together:
                if group.arch == arch and cover.knows(group.fault):
                    cover.avoid(group.fault)
            more = around_threes(cover, shown.of(arch), count=threes, seed=seed)
            for group in submit(try_stack, arch, ((names, {}) for names in more)):
                found.stacks += 1
                shown.keep(group)
                found.together += [group] if group.fault else []
            found.threes = count_threes(cover, shown.of(arch))
    found.cells = [cells[a, b] for a in chosen for b in chosen]
    return found


def _find_places(names: Sequence[str], submit: Submit, shown: Shown) -> None:
    """Settle whether each plugin stands on each model that another one of them has to be tried on."""
    for arch in sorted({arch_of(name) for name in names} - {"llama"}):
        known = [shown.known(arch, (name,)) for name in names]
        new = [(name,) for name, group in zip(names, known, strict=True) if group is None]
        for group in submit(try_alone, arch, ((one, {}) for one in new)):
            shown.keep(group)
            known.append(group)
        STANDS.update({(g.names[0], arch): g.reason or None for g in known if g is not None})


def _told_ahead(names: Sequence[str], note: Callable[[Cell], None]) -> dict[str, set[Pair]]:
    """Note all cells that claims and models tell; what is left, by the model it is to be tried on."""
    rest: dict[str, set[Pair]] = {}
    for first in names:
        for second in names:
            if (cell := _by_claims(first, second)) is not None:
                note(cell)
            else:
                rest.setdefault(arch_of(first, second), set()).add((first, second))
    return rest


def _lived(
    arch: str,
    pairs: set[Pair],
    beside: Sequence[Pair],
    matrix: Matrix,
    note: Callable[[Cell], None],
    submit: Submit,
    shown: Shown,
    seed: int,
) -> int:
    """Live through stacks until every pair was in one that works, or has its fault; how many that took. What building
    refuses is found first, by building alone.

    Args:
        beside: pairs that work on another model, and may fill stacks of this one; two that fail here do so by rows
            that others make longer.
    """
    lived, elsewhere, together, met = 0, set(beside), set[Names](), set[Pair]()

    def judge(group: Group) -> None:
        """Note what a stack showed of its pairs."""
        fault = group.fault
        told = [*combinations(group.names, 2)] if not fault else [fault] if len(fault) == 2 else []
        if len(fault) == 1:
            told = [pair for pair in sorted(pairs) if fault[0] in pair]
        elif (len(fault) > 2 or fault in elsewhere) and fault not in together:
            together.add(fault)  # once, whichever stacks show it
            matrix.together.append(group)
        if fault:
            cover.avoid(fault)
        else:
            met.update(told)
        for first, second in told:
            if (first, second) in pairs:
                pairs.remove((first, second))
                note(_cell(first, second, group))

    def new(stacks: Iterable[Names]) -> Iterator[tuple[Names, New]]:
        """Those of which nothing is known yet, and what of each."""
        for names in stacks:
            if (known := shown.known(arch, names)) is None:
                twins = len(set(names)) < len(names)
                told = {} if twins else pairs.intersection(combinations(names, 2))
                yield names, {pair: pair[::-1] not in met for pair in told}
            else:
                judge(known)

    cover = Cover(pairs, fits, size=SIZE, seed=seed, beside=beside)
    for group in shown.of(arch):
        if len(group.names) > 1 and cover.knows(group.fault):
            judge(group)
    unbuilt = set(pairs)
    for _ in range(ROUNDS):
        for group in submit(build_stack, arch, new(cover.stacks(unbuilt))):
            unbuilt.difference_update(combinations(group.names, 2) if not group.fault else [group.fault])
            if group.fault:
                shown.keep(group)
                judge(group)
    while pairs:
        for group in submit(try_stack, arch, new(cover.stacks(pairs))):
            lived += 1
            shown.keep(group)
            judge(group)
    return lived


@contextmanager
def _workers(jobs: int, names: Sequence[str]) -> Iterator[Submit]:
    """What tries stacks, in so many processes, and gives what they showed as it comes."""
    if jobs <= 1:
        yield lambda attempt, arch, stacks: chain.from_iterable(attempt(arch, *each) for each in stacks)
        return
    # Not a fork of this process: threads of torch do not survive one.
    pool = ProcessPoolExecutor(jobs, mp_context=fresh(__name__), initializer=_begin, initargs=(names,))

    def run(attempt: Try, arch: str, stacks: Iterable[tuple[Names, New]]) -> Iterator[Group]:
        # A stack is made when there is a place for it: so it is none that has in it what failed until then.
        ahead = (pool.submit(_attempted, attempt, arch, *each) for each in stacks)
        waiting = set(islice(ahead, AHEAD * jobs))
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for one in done:
                yield from one.result()
            waiting.update(islice(ahead, len(done)))

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(names: Sequence[str]) -> None:
    """With all plugins loaded, since no training is to look through what they hold for garbage."""
    torch.set_num_threads(1)
    registry = Registry()
    for name in names:
        registry.load(name)
    settle()


def _attempted(attempt: Try, arch: str, names: Names, new: New) -> list[Group]:
    """What a process does with a stack; from time to time it takes what stacks have cached from the collector."""
    found = attempt(arch, names, new)
    if next(_TRIED) % SETTLED == 0:
        settle()
    return found


def _by_claims(first: str, second: str) -> Cell | None:
    """The cell of a pair that claims refuse, or that is of two models; None for one that is to be tried."""
    arch, conflicts = arch_of(first, second), find_conflicts(plain((first, second)))
    if conflicts:
        known = conflicts[0]
        return Cell(first, second, "refused", known.reason, known.claims, known.working_order, arch)
    for name in dict.fromkeys((first, second)):
        if (why := stands_on(name, arch)) is not None:
            return Cell(first, second, "other-model", why, arch=arch)
    return None


def _cell(first: str, second: str, group: Group) -> Cell:
    """The cell of a pair by what a stack showed of it."""
    found = Cell(first, second, "works", arch=group.arch, stack=group.names)
    if not group.fault:
        return found
    if len(group.fault) == 1:
        return replace(
            found, outcome="failed", reason=f"{group.fault[0]} by itself: {group.reason}", stack=()
        )
    one, two = (set(member.plugin.claims) for member in plain((first, second)))
    return replace(
        found, outcome="refused" if group.refused else "failed", reason=group.reason, stack=(),
        claims=tuple(sorted(one & two)) if group.refused else (),
    )  # fmt: skip


def try_pair(first: str, second: str) -> Cell:
    """One cell by itself. Whatever goes wrong is in it, never raised."""
    found = _by_claims(first, second)
    return found or _cell(first, second, try_group(arch_of(first, second), (first, second)))
