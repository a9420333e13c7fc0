"""Which plugins go together: every ordered pair, lived through in covering stacks on a tiny model, or refused.

    matrix = run_matrix(["lora", "mezo", "prefixquant"])        # `peftx matrix` shows it

A pair *works* if a stack in which it stands in this order trains some steps to finite losses, moves what it trains, is
saved, comes back bit for bit and generates the same tokens. It is *refused* if its claims collide: before anything is
built, with the reason and the order that would work; or if both want one place, and then the model is bit for bit what
it was. It is *not for this model* if one of the two cannot stand on the pair's architecture by itself. Anything else
*failed*, and is a bug.

Pairs grow with the square of the plugins. Claims and places tell the refused ones without a model; the others stand
in stacks of up to eight plugins (`peftx.testing.covering`), each of which shows 28 pairs at once. A stack that fails is
taken apart until the fault has no plugin too many. What a stack showed is kept, by what it ran: the files of the core
and the modules of its plugins.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from peftx.comparing.processes import fresh
from peftx.composition.conflicts import find_conflicts
from peftx.composition.registry import Registry
from peftx.errors import ConflictError, PeftxError
from peftx.kernel.names import HOOKS
from peftx.kernel.plugin import Claim
from peftx.testing.case import inputs_for, output
from peftx.testing.covering import Cover, around_threes, count_threes
from peftx.testing.kit import settle
from peftx.testing.life import built, early_ids, live
from peftx.testing.models import tiny
from peftx.testing.planned import refused_by_plan
from peftx.testing.shown import Group, Shown
from peftx.testing.tried import (
    STANDS,
    arch_of,
    lived_alone,
    members_as_tried,
    places,
    plain,
    soft,
    specified,
    stands_on,
)

Outcome = Literal["works", "refused", "other-model", "failed"]
Try = Callable[[str, tuple[str, ...]], Group]
Submit = Callable[[Try, str, Sequence[tuple[str, ...]]], Iterator[Group]]
SOFT = 16
"""Soft tokens of a stack at most, beside a row of `LENGTH`, unless one plugin has more by itself; a pair may have more,
and fails where it matters."""
SIZE = 8
"""Plugins of a stack."""


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
    cells: dict[tuple[str, str], Cell] = {}

    def note(cell: Cell) -> None:
        cells[cell.first, cell.second] = cell
        if progress is not None:
            progress(len(cells), len(chosen) ** 2, cell)

    found = Matrix(chosen, hooks, families={name: facts[name].family for name in chosen})
    with _workers(jobs) as submit:
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
                if group.arch == arch:
                    cover.avoid(group.fault)
            more = around_threes(cover, shown.of(arch), count=threes, seed=seed)
            for group in submit(try_group, arch, more):
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
        for group in submit(try_alone, arch, new):
            shown.keep(group)
            known.append(group)
        STANDS.update({(g.names[0], arch): g.reason or None for g in known if g is not None})


def _told_ahead(names: Sequence[str], note: Callable[[Cell], None]) -> dict[str, set[tuple[str, str]]]:
    """Note all cells that claims, models and places tell; what is left, by the model it is to be tried on."""
    rest: dict[str, set[tuple[str, str]]] = {}
    for first in names:
        for second in names:
            cell = _by_claims(first, second)
            if cell is None and (
                places(first, arch_of(first, second)) & places(second, arch_of(first, second))
            ):
                cell = try_pair(first, second)
            if cell is not None:
                note(cell)
            else:
                rest.setdefault(arch_of(first, second), set()).add((first, second))
    return rest


def _lived(
    arch: str,
    pairs: set[tuple[str, str]],
    beside: Sequence[tuple[str, str]],
    matrix: Matrix,
    note: Callable[[Cell], None],
    submit: Submit,
    shown: Shown,
    seed: int,
) -> int:
    """Live through stacks until every pair was in one that works, or has its fault; how many that took. `beside`: pairs
    that work on another model, and may fill stacks of this one."""
    lived = 0

    def judge(group: Group) -> None:
        """Note what a stack showed of its pairs."""
        names, fault = group.names, group.fault
        told: list[Cell] = []
        if not fault:
            told = [
                Cell(a, b, "works", arch=arch, stack=names)
                for i, a in enumerate(names)
                for b in names[i + 1 :]
            ]
        elif len(fault) == 1:
            why = f"{fault[0]} by itself: {group.reason}"
            told = [Cell(*pair, "failed", why, arch=arch) for pair in sorted(pairs) if fault[0] in pair]
        elif len(fault) == 2:
            told = [try_pair(*fault)]  # refused, or failed; where it works alone, longer rows do it
        if len(fault) > 2 or (len(fault) == 2 and told[0].outcome == "works"):
            matrix.together.append(group)
        if fault:
            cover.avoid(fault)
        for cell in told:
            if (cell.first, cell.second) in pairs:
                pairs.remove((cell.first, cell.second))
                note(cell)

    cover = Cover(pairs, fits, size=SIZE, seed=seed, beside=beside)
    for group in shown.of(arch):
        if not group.fault:
            judge(group)
    while pairs:
        todo: list[tuple[str, ...]] = []
        for names in cover.stacks(pairs):
            known = shown.known(arch, names)
            if known is None:
                todo.append(names)
            else:
                judge(known)
        for group in submit(try_group, arch, todo):
            lived += 1
            shown.keep(group)
            judge(group)
    return lived


@contextmanager
def _workers(jobs: int) -> Iterator[Submit]:
    """What tries stacks, in so many processes, and gives what they showed as it comes."""
    if jobs <= 1:
        yield lambda attempt, arch, stacks: (attempt(arch, names) for names in stacks)
        return
    # Not a fork of this process: threads of torch do not survive one.
    pool = ProcessPoolExecutor(jobs, mp_context=fresh(__name__), initializer=_begin)

    def run(attempt: Try, arch: str, stacks: Sequence[tuple[str, ...]]) -> Iterator[Group]:
        for done in as_completed([pool.submit(attempt, arch, names) for names in stacks]):
            yield done.result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    torch.set_num_threads(1)
    settle()


def fits(names: Sequence[str]) -> bool:
    """Do these plugins go together by their claims and rows, and leave the tiny models positions for a text."""
    tokens = [*map(soft, names)]
    return sum(tokens) <= max(SOFT, *tokens) and not find_conflicts(plain(names))


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


def try_pair(first: str, second: str) -> Cell:
    """One cell by itself. Whatever goes wrong is in it, never raised."""
    cell = _by_claims(first, second)
    if cell is not None:
        return cell
    arch = arch_of(first, second)
    found = Cell(first, second, "works", arch=arch, stack=(first, second))
    model = tiny(arch)
    try:
        built(members_as_tried(first, second), model)
    except ConflictError as error:
        inputs = inputs_for(model)
        packed = early_ids(members_as_tried(first, second))  # and so it is not what it was
        if not packed and not torch.equal(output(model, inputs), output(tiny(arch), inputs)):
            return replace(
                found, outcome="failed", reason=f"refused, and the model is not what it was: {error}"
            )
        one, two = (set(member.plugin.claims) for member in members_as_tried(first, second))
        return replace(found, outcome="refused", reason=str(error), claims=tuple(sorted(one & two)), stack=())
    except Exception as error:  # noqa: BLE001  as in `trouble`
        return replace(found, outcome="failed", reason=f"{type(error).__name__}: {error}")
    why = trouble((first, second), arch)
    return replace(found, outcome="failed", reason=why) if why else found


def try_alone(arch: str, names: tuple[str, ...]) -> Group:
    """Whether a plugin stands on a model, as a stack of one."""
    why = lived_alone(names[0], arch)
    return Group(arch, names, names if why else (), why or "", refused=bool(why))


def try_group(arch: str, names: tuple[str, ...]) -> Group:
    """Live through a stack, and take it apart where it fails until no plugin is too many. The last one goes first: what
    works on others is gone then before these are."""
    reason = trouble(names, arch)
    fault = names if reason else ()
    for name in reversed(fault):
        less = tuple(other for other in fault if other != name)
        if less and fits(less) and not _stands_first(less[0]) and (why := trouble(less, arch)):
            fault, reason = less, why
    return Group(arch, names, fault, reason, refused=bool(fault) and _refused(fault, arch))


def _refused(names: Sequence[str], arch: str) -> bool:
    """Is the stack refused when it is built."""
    try:
        built(members_as_tried(*names), tiny(arch))
    except Exception as error:  # noqa: BLE001  any other is the failure that was seen
        return isinstance(error, ConflictError)
    return False


def _stands_first(name: str) -> bool:
    """Would a plugin that works on what stands before it stand before all others, which is a fault of its own."""
    (member,) = plain((name,))
    return member.claims(Claim.WORKS_ON_PREVIOUS)


def trouble(names: Sequence[str], arch: str) -> str:
    """Why a stack of these plugins does not live, or is refused by `plan` though it does; empty otherwise."""
    try:
        with tempfile.TemporaryDirectory(prefix="peftx-matrix-") as folder, warnings.catch_warnings():
            warnings.simplefilter("error")
            live(members_as_tried(*names), arch, Path(folder) / "bundle")
            said = refused_by_plan(specified(names), arch)
            assert not said, f"it works, and plan refuses it: {said[0]}"
    except (AssertionError, PeftxError) as error:
        return str(error) or "assertion failed"
    except Exception as error:  # noqa: BLE001  a stack may break in any way, and the table is to say so
        return f"{type(error).__name__}: {error}"
    return ""
