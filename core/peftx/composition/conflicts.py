"""Which plugins of a stack cannot stand together, or not in this order, and the order that works: by `rules.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from peftx.composition.rules import EXCLUSIVE, RULES, Rule, changes_model
from peftx.errors import ConflictError
from peftx.kernel.members import Member
from peftx.kernel.plugin import Claim, compresses_own


@dataclass(frozen=True)
class Conflict:
    """Two plugins that collide, by which claims, why, and the order that would work (empty if none does)."""

    first: str
    second: str
    claims: tuple[str, ...]
    reason: str
    working_order: tuple[str, ...] = ()
    way_out: str = "keep one of them"
    """Where no order works."""

    @property
    def remedy(self) -> str:
        return f"this order works: {', '.join(self.working_order)}" if self.working_order else self.way_out

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


NO_ADAPTERS = (Claim.BESIDE_WEIGHTS, Claim.EDITS_INPUTS, Claim.TRAINS_BASE)
"""Claims of plugins that train something else than deltas on the output of layers."""


def find_conflicts(members: Sequence[Member]) -> list[Conflict]:
    """All conflicts of a stack, in stack order. Nothing is built or touched."""
    found = [_with_order(conflict, rule, members) for conflict, rule in _collisions(members)]
    return found + _without_adapters(members) + _with_nothing_before(members) + _rows_that_do_not_fit(members)


def _collisions(members: Sequence[Member]) -> list[tuple[Conflict, Rule | None]]:
    """Two by two, in stack order. A side of a rule is asked once for each member, and not for each pair."""
    late = {member.id for member in _compressing_late(members)}
    found: list[tuple[tuple[int, ...], tuple[Conflict, Rule | None]]] = []  # with what they are sorted by
    for claim, why in EXCLUSIVE.items():
        for i, j in combinations((i for i, m in enumerate(members) if m.claims(claim)), 2):
            said = f"{members[i]} and {members[j]} {why}"
            found.append(((i, j, 0), (Conflict(members[i].id, members[j].id, (claim,), said), None)))
    for number, rule in enumerate(RULES):
        ones = [
            i for i, m in enumerate(members) if rule.one.is_it(m.plugin) and (m.id in late or not rule.late)
        ]
        twos = [i for i, m in enumerate(members) if rule.two.is_it(m.plugin)] if ones else []
        for i, j in ((i, j) for i in ones for j in twos if i < j or (i > j and not rule.ordered)):
            first, second = sorted((i, j))
            said = rule.reason.format(one=members[i], two=members[j])
            conflict = Conflict(members[first].id, members[second].id, rule.claims, said)
            found.append(((first, second, 1, number, i), (conflict, rule)))
    return [one for _, one in sorted(found, key=lambda each: each[0])]


def _compressing_late(members: Sequence[Member]) -> list[Member]:
    """Those that compress a model on which plugins stand already; `stages_of` of a spec decides in the same way."""
    first = next((i for i, m in enumerate(members) if m.implements("inject")), len(members))
    late = [
        i > first or compresses_own(m.plugin) if m.phase is None else m.phase == "after-training"
        for i, m in enumerate(members)
    ]
    return [m for m, is_late in zip(members, late, strict=True) if is_late and m.implements("compress")]


def _with_order(conflict: Conflict, rule: Rule | None, members: Sequence[Member]) -> Conflict:
    """The conflict with an order of the whole stack that works, if one of the two moved past the other makes one."""
    if rule is None or not (rule.ordered or rule.late):
        return conflict
    first, second = (next(m for m in members if m.id == id) for id in (conflict.first, conflict.second))
    if first.claims(Claim.TRAINS_BASE) and second.claims(Claim.TRAINS_BASE):
        return conflict  # which weights, only a model tells
    later = [m for m in members if m is not first]
    earlier = [m for m in members if m is not second]
    later.insert(later.index(second) + 1, first)
    earlier.insert(earlier.index(first), second)
    at_the_end = [*(m for m in members if m is not first), first]
    compressed_first = [first, *(m for m in members if m is not first)]
    for order in (later, earlier, at_the_end, compressed_first):
        free = not _collisions(order) and _unfit(order) is None
        if free and not _without_adapters(order) and _stays_known(members, order):
            return replace(conflict, working_order=tuple(m.id for m in order))
    return conflict


def _without_adapters(members: Sequence[Member]) -> list[Conflict]:
    """Plugins that work on adapters, in a stack that trains other things only."""
    trained = [m for m in members if m.implements("inject") and not m.claims(Claim.NEEDS_ADAPTERS)]
    kinds = [next((claim for claim in NO_ADAPTERS if m.claims(claim)), None) for m in trained]
    if not trained or None in kinds:
        return []
    return [
        Conflict(
            member.id,
            trained[0].id,
            (Claim.NEEDS_ADAPTERS, str(kinds[0])),
            f"{member} works on what adapters add to the output of layers, and {trained[0]} adds nothing there "
            f"({kinds[0]})",
            way_out=f"put an adapter such as lora in the place of '{trained[0].id}'",
        )
        for member in members
        if member.claims(Claim.NEEDS_ADAPTERS)
    ]


def _with_nothing_before(members: Sequence[Member]) -> list[Conflict]:
    """Plugins that work on what stands before them, where all that there is stands behind, or is of another kind."""
    found = []
    for place, member in enumerate(members):
        if not member.claims(Claim.WORKS_ON_PREVIOUS):
            continue
        others = [m for m in members if m is not member and changes_model(m.plugin)]
        attaching = [m for m in others if _attaches_parameters(m)]
        if not others or any(m in members[:place] for m in attaching):
            continue
        other = next(iter(attaching), others[0])
        what = "comes after it" if attaching else "brings nothing of the kind"
        reason = f"{member} works on what the plugins before it attached, and {other} {what}"
        way = f"put an adapter such as lora before '{member.id}'"
        found.append(Conflict(member.id, other.id, (Claim.WORKS_ON_PREVIOUS,), reason, (), way))
    return found


def _stays_known(members: Sequence[Member], order: Sequence[Member]) -> bool:
    """Does another order stand on nothing that only a model tells: what others work on stood before them already, and
    nothing new stands behind those that leave smaller layers but what packs these, or packs what others take."""
    for member in order:
        before, now = members[: members.index(member)], order[: order.index(member)]
        if member.claims(Claim.WORKS_ON_PREVIOUS):
            kept = [m for m in before if _attaches_parameters(m)]
            if not kept or not all(m in now for m in kept):
                return False
        if member.claims(Claim.TAKES_WEIGHTS) and any(
            m.claims(Claim.QUANTIZES) and m not in before for m in now
        ):
            return False
        moved = member in _compressing_late(members) and member not in _compressing_late(order)
        if moved and member.claims(Claim.TRAINS_BASE):  # what it packs is trained first, wherever it stands
            return False
        behind = [m for m in order[order.index(member) + 1 :] if m in before]
        if member.claims(Claim.NARROWS) and not all(m.claims(Claim.QUANTIZES) for m in behind):
            return False
    return True


def _attaches_parameters(member: Member) -> bool:
    """May it bring matrices of its own that train: heads are none of these. What it does bring, only a model tells."""
    others = (Claim.WORKS_ON_PREVIOUS, Claim.CLASSIFIES, Claim.OWN_LAYOUT)
    return changes_model(member.plugin) and not any(member.claims(claim) for claim in others)


def _rows_that_do_not_fit(members: Sequence[Member]) -> list[Conflict]:
    """Plugins whose training rows differ: what one leaves behind must be what the next one takes."""
    found = _unfit(members)
    if found is None:
        return []
    one, two, reason = found
    order = [m for m in members if m is not two]
    order.insert(order.index(one), two)
    works = _unfit(order) is None and not _collisions(order)
    claims = (f"takes {'/'.join(one.plugin.takes) or 'any'}", f"takes {'/'.join(two.plugin.takes)}")
    return [Conflict(one.id, two.id, claims, reason, tuple(m.id for m in order) if works else ())]


def _unfit(members: Sequence[Member]) -> tuple[Member, Member, str] | None:
    """The first pair: a plugin that narrowed the rows' format, and a later one that takes none of what is left."""
    formats: frozenset[str] | None = None  # any
    by = members[0] if members else None
    for member in members:
        if takes := frozenset(member.plugin.takes):
            left = takes if formats is None else takes & formats
            if not left:
                assert by is not None
                assert formats is not None
                verb = "leaves" if by.plugin.gives else "trains on"
                reason = (
                    f"{by} {verb} rows of format {' or '.join(sorted(formats))}, and {member} trains on "
                    f"{' or '.join(sorted(takes))}"
                )
                return by, member, reason
            formats, by = left, member
        if member.plugin.gives and formats is not None:
            formats, by = frozenset(member.plugin.gives.get(f, f) for f in formats), member
    return None


def starting_format(members: Sequence[Member]) -> str | None:
    """A format of rows that goes through all `prepare_data` hooks; None: any does."""
    candidates = next((member.plugin.takes for member in members if member.plugin.takes), ())
    for candidate in candidates:
        now, fits = candidate, True
        for member in members:
            fits = fits and (not member.plugin.takes or now in member.plugin.takes)
            now = member.plugin.gives.get(now, now)
        if fits:
            return candidate
    return candidates[0] if candidates else None


def check(members: Sequence[Member]) -> None:
    """Raise the first conflicts of a stack, all in one message.

    Raises:
        ConflictError: names both plugins, their places, the claims, and an order that works.
    """
    conflicts = find_conflicts(members)
    if conflicts:
        raise ConflictError("\n".join(str(c) for c in conflicts), hint="peftx plan shows the stack")
