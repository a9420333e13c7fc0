"""Which plugins cannot stand together, or not in this order. Stated by claim, never by a plugin's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from peftx.errors import ConflictError
from peftx.hooks import hooks_of
from peftx.plugin import Claim, Plugin


@dataclass(frozen=True)
class Member:
    """One plugin in its place: id in the stack, where the spec names it (file:line:column, or empty)."""

    id: str
    plugin: Plugin
    where: str = ""
    phase: str | None = None

    def __str__(self) -> str:
        return f"'{self.id}'" + (f" ({self.where})" if self.where else "")

    def claims(self, claim: Claim) -> bool:
        return claim in self.plugin.claims

    def implements(self, hook: str) -> bool:
        return hook in hooks_of(self.plugin)

    @property
    def acts_on_weights(self) -> bool:
        return self.implements("inject") and not self.claims(Claim.DATA_ONLY)


@dataclass(frozen=True)
class Conflict:
    """Two plugins that collide, by which claims, why, and the order that would work (empty if none does)."""

    first: str
    second: str
    claims: tuple[str, ...]
    reason: str
    working_order: tuple[str, ...] = ()

    def __str__(self) -> str:
        way = (
            f"; this order works: {', '.join(self.working_order)}"
            if self.working_order
            else "; keep one of them"
        )
        return f"{self.reason}{way}"


EXCLUSIVE = {
    Claim.REPLACES_STEP: "both replace the training step, and a step has one loss and one update",
    Claim.REPLACES_ATTENTION: "both compute the attention themselves",
    Claim.REPLACES_DECODING: "both replace the decoding loop",
    Claim.CLASSIFIES: "both bring the head that names a text's class",
    Claim.QUANTIZES: "both replace the weights by integers",
}

NO_ADAPTERS = (Claim.BESIDE_WEIGHTS, Claim.EDITS_INPUTS, Claim.TRAINS_BASE)
"""Claims of plugins that train something else than deltas on the output of layers."""


def find_conflicts(members: Sequence[Member]) -> list[Conflict]:
    """All conflicts of a stack, in stack order. Nothing is built or touched."""
    found = []
    for one, two in combinations(members, 2):
        for claim, why in EXCLUSIVE.items():
            if one.claims(claim) and two.claims(claim):
                found.append(Conflict(one.id, two.id, (claim,), f"{one} and {two} {why}"))
        for step, other in ((one, two), (two, one)):
            if step.claims(Claim.REPLACES_STEP) and other.claims(Claim.NEEDS_GRADIENTS):
                reason = (
                    f"{other} needs gradients, and {step} replaces the training step by one that makes none"
                )
                found.append(Conflict(one.id, two.id, (Claim.REPLACES_STEP, Claim.NEEDS_GRADIENTS), reason))
        for row, soft in ((one, two), (two, one)):
            if row.claims(Claim.OWN_LAYOUT) and soft.claims(Claim.VIRTUAL_TOKENS):
                reason = (
                    f"{row} lays its rows out with positions and a mask of its own, and the soft tokens of {soft} "
                    "would stand in front of the first text alone"
                )
                claims = (Claim.OWN_LAYOUT, Claim.VIRTUAL_TOKENS)
                found.append(Conflict(one.id, two.id, claims, reason))
        for reader, taker in ((one, two), (two, one)):
            takes = next((c for c in (Claim.CLASSIFIES, Claim.OWN_LAYOUT) if taker.claims(c)), None)
            if reader.claims(Claim.NEEDS_LABELS) and takes is not None:
                reason = f"{reader} reads labels of tokens in its step, and the rows of {taker} have none of the kind"
                found.append(Conflict(one.id, two.id, (Claim.NEEDS_LABELS, takes), reason))
        if one.claims(Claim.FINAL) and two.acts_on_weights:
            reason = (
                f"{one} measures and compresses the finished model, so {two}, which comes after it and changes the "
                "model, would undo what it measured"
            )
            order = tuple(m.id for m in members if m is not one)
            found.append(Conflict(one.id, two.id, (Claim.FINAL,), reason, (*order, one.id)))
        folds = (
            one.claims(Claim.MERGEABLE) or one.claims(Claim.BESIDE_WEIGHTS) or one.claims(Claim.TRAINS_BASE)
        )
        if two.claims(Claim.FOLDS_PREVIOUS) and one.acts_on_weights and not folds:
            reason = f"{two} starts from merged weights, and {one} does not fold into the weights"
            found.append(Conflict(one.id, two.id, (Claim.FOLDS_PREVIOUS,), reason))
    return found + _without_adapters(members) + _rows_that_do_not_fit(members)


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
            f"({kinds[0]}); put an adapter such as lora beside it",
        )
        for member in members
        if member.claims(Claim.NEEDS_ADAPTERS)
    ]


def _rows_that_do_not_fit(members: Sequence[Member]) -> list[Conflict]:
    """Plugins whose training rows differ: what one leaves behind must be what the next one takes."""
    found = _unfit(members)
    if found is None:
        return []
    one, two, reason = found
    order = [m for m in members if m is not two]
    order.insert(order.index(one), two)
    works = _unfit(order) is None
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


def rules(plugin: type[Plugin] | Plugin) -> list[str]:
    """What a plugin does not go with, in sentences; from its claims alone."""
    own = plugin.claims
    found = [f"one in a stack: {claim}" for claim in EXCLUSIVE if claim in own]
    if Claim.REPLACES_STEP in own:
        found.append(f"not beside a plugin that claims {Claim.NEEDS_GRADIENTS}")
    if Claim.NEEDS_GRADIENTS in own:
        found.append(f"not beside a plugin that claims {Claim.REPLACES_STEP}")
    if Claim.NEEDS_LABELS in own:
        found.append(f"not beside a plugin that claims {Claim.CLASSIFIES} or {Claim.OWN_LAYOUT}")
    if Claim.OWN_LAYOUT in own:
        found.append(f"not beside a plugin that claims {Claim.VIRTUAL_TOKENS}")
    if Claim.VIRTUAL_TOKENS in own:
        found.append(f"not beside a plugin that claims {Claim.OWN_LAYOUT}")
    if Claim.NEEDS_ADAPTERS in own:
        found.append("with an adapter, whose deltas add to the output of layers")
    if plugin.takes:
        made = sorted(set(plugin.gives.values()))
        gives = f", and leaves {' or '.join(made)}" if made else ""
        found.append(f"trains on rows of format {' or '.join(plugin.takes)}{gives}")
    if Claim.FINAL in own:
        found.append("after every plugin that changes the model")
    if Claim.FOLDS_PREVIOUS in own:
        found.append("what stands before it must fold into the weights")
    if "inject" in hooks_of(plugin) and not own & {Claim.MERGEABLE, Claim.BESIDE_WEIGHTS, Claim.TRAINS_BASE}:
        found.append(f"not before a plugin that claims {Claim.FOLDS_PREVIOUS}")
    return found
