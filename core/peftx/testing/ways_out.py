"""The ways out that refusals name, followed as a user would who does what the message says.

    ends = [end for result in results if result.outcome.startswith("refused") for end in dead_ends(result)]

A hint is a promise: the order, the option, the plugin beside it that it proposes gives a stack that trains. A form of
words that is not known here counts as none: a new hint gets its line in `_FORMS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from peftx.composition.conflicts import Conflict, find_conflicts
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.testing.models import tiny
from peftx.testing.recipes import Entry, Recipe, registry, stands
from peftx.testing.stacks import Result, try_stack

Follow = Callable[[Result, "re.Match[str]"], "list[Recipe]"]


@dataclass(frozen=True)
class Way:
    """One way out of a refusal, as its message names it: the stacks that it proposes (any of them is to train)."""

    text: str
    proposed: tuple[Recipe, ...] = ()
    known: bool = True
    exact: bool = False
    """Is it said to work as it is: an order."""


@dataclass(frozen=True)
class DeadEnd:
    """A refusal that leads nowhere, and the stacks that its words proposed."""

    result: Result
    way: Way
    reason: str

    @property
    def kind(self) -> str:
        """What dead ends of one hint have in common."""
        words = re.sub(r"\d+|'[^']*'", "N", self.way.text) or f"no hint: {self.result.cause}"
        return f"{words} | {self.reason.split(' [')[0].split(':')[0]}"


def ways_out(result: Result) -> list[Way]:
    """What a refusal proposes; a way without a stack is one that nobody could follow here."""
    recipe = result.recipe
    if result.outcome == "refused-before-build":
        return [_way_of(recipe, conflict) for conflict in find_conflicts(recipe.members())]
    text = f"{result.reason} | {result.hint}"
    matches = [(follow, re.search(pattern, text)) for pattern, follow in _FORMS]
    known = [(follow, match) for follow, match in matches if match is not None]
    proposed = tuple(recipe for follow, match in known for recipe in follow(result, match))
    return [Way(result.hint or result.reason if known else result.hint, proposed, known=bool(known))]


def _way_of(recipe: Recipe, conflict: Conflict) -> Way:
    entries = {entry.key: entry for entry in recipe.entries}
    if conflict.working_order:
        order = tuple(entries[id] for id in conflict.working_order)
        return Way(str(conflict), (replace(recipe, entries=order),), exact=True)
    if replaced := re.fullmatch(r"put an adapter such as lora in the place of '(.+)'", conflict.way_out):
        return Way(str(conflict), (recipe.without(replaced[1]).with_lora(),))
    return Way(str(conflict), (recipe.without(conflict.first), recipe.without(conflict.second)))


def dead_ends(result: Result, *, depth: int = 8) -> list[DeadEnd]:
    """Of a refused stack: ways out that lead to no stack that trains, though everything that stands in the way is
    followed in its turn. A way whose stack has a plugin that does not go with the model by itself is left out.
    """
    found = []
    for way in ways_out(result):
        if not way.proposed:
            why = "is of no known form" if way.text else "names no way out"
            found.append(DeadEnd(result, way, "cannot be followed" if way.known else why))
            continue
        fitting = [r for r in way.proposed if all(stands(e.name, r.arch) for e in r.entries)]
        if way.exact and fitting and trained(fitting[0]).outcome == "refused-before-build":
            found.append(DeadEnd(result, way, f"is refused too: {trained(fitting[0]).reason}"))
            continue
        ends = [_end(trained(recipe), depth) for recipe in fitting]
        if ends and None not in ends:
            last = ends[0]
            assert last is not None
            found.append(
                DeadEnd(result, way, f"ends at [{last.recipe}] {last.outcome}: {last.reason} | {last.hint}")
            )
    return found


def _end(result: Result, depth: int) -> Result | None:
    """Where a user ends who does what each message says; None: at a stack that trains."""
    if result.steps and not result.outcome.startswith("refused"):
        return None
    if depth == 0 or result.outcome == "failed":
        return result
    for way in ways_out(result):
        ends = [_end(trained(recipe), depth - 1) for recipe in way.proposed]
        if None not in ends:
            return ends[0] if ends else result
    return None


_TRAINED: dict[str, Result] = {}


def trained(recipe: Recipe) -> Result:
    """As far as the training and compression; each stack once."""
    key = repr(recipe)
    if key not in _TRAINED:
        _TRAINED[key] = try_stack(recipe, until="compression")
    return _TRAINED[key]


def _named(result: Result) -> list[Entry]:
    """All plugins that the message names, the first one first."""
    places = {
        e: re.search(rf"(?<![\w-]){re.escape(e.key)}(?![\w-])", result.reason) for e in result.recipe.entries
    }
    return sorted((e for e, match in places.items() if match), key=lambda e: places[e].start())  # type: ignore[union-attr]


def _speaker(result: Result) -> Entry:
    """The plugin that refuses: the last one in front of a colon (`mezo: train_step: lora: ...`), else the first."""
    head = re.match(r"(?:[\w'-]+: )*", result.reason)
    spoken = [e for e in _named(result) if head is not None and f"{e.key}: " in head[0]]
    return spoken[-1] if spoken else _named(result)[0]


def _with(result: Result, **options: Any) -> list[Recipe]:
    """The refusing plugin with other options; nothing where it has none of the kind."""
    entry = _speaker(result)
    known = registry().load(entry.name).Config.model_fields
    return [result.recipe.changed(entry.key, **options)] if options.keys() <= known.keys() else []


def _without_role(result: Result, key: str, role: str) -> list[Recipe]:
    """A plugin's targets without one role; nothing where it has no targets."""
    entry = next(e for e in result.recipe.entries if e.key == key)
    targets = registry().load(entry.name)(**entry.options).config.model_dump().get("targets")
    return [] if targets is None else [result.recipe.changed(key, targets=f"{targets} !{role}")]


def _leave_layer(result: Result, match: re.Match[str]) -> list[Recipe]:
    """Without the layer that two plugins want, in one of them."""
    anatomy = Anatomy(tiny(result.recipe.arch))
    roles = [site.role for site in anatomy.sites if site.path == match["path"]]
    return [
        recipe for e in _named(result) for role in roles[:1] for recipe in _without_role(result, e.key, role)
    ]


def _elsewhere(*architectures: str) -> Follow:
    """The same stack on another model."""
    return lambda result, _: [replace(result.recipe, arch=arch) for arch in architectures]


def _drop(result: Result, match: re.Match[str]) -> list[Recipe]:
    """Keep one of those that the message names."""
    return [result.recipe.without(entry.key) for entry in _named(result)]


_FORMS: list[tuple[str, Follow]] = [
    (r"rank at most (?P<n>\d+)", lambda r, m: _with(r, rank=int(m["n"]))),
    (
        r"leave it out of targets: '!(?P<role>[\w.]+)'",
        lambda r, m: _without_role(r, _speaker(r).key, m["role"]),
    ),
    (
        r"leave it out of (?P<id>[\w-]+)'s targets: '!(?P<roles>[\w. !]+)'",
        lambda r, m: _without_role(r, m["id"], m["roles"]),
    ),
    (r"weights of (?P<path>[\w.]+\w) as they are.*leave the layer out of one of them", _leave_layer),
    (r"put (?P<id>[\w-]+) behind (?P<other>[\w-]+)(?: if|$)", lambda r, m: [r.recipe.last(m["id"])]),
    (
        r"'(?P<id>[\w-]+)' stands on .* pruned .*an adapter in its place",
        lambda r, m: [r.recipe.first(m["id"]), r.recipe.without(m["id"]).with_lora()],
    ),
    (r"(?:the base's|computes) (?P<path>[\w.]+\w).*leave the layer out of one of them", _leave_layer),
    (r"such as lora|a plugin with parameters|add one that injects", lambda r, _: [r.recipe.with_lora()]),
    (r"merge them for good first: stack.merge\(keep=False\)", lambda r, _: [replace(r.recipe, merges=True)]),
    (r"merge or detach what is attached first", lambda r, _: [replace(r.recipe, merges=True)]),
    (r"\| keep one$|\| keep one of (?:them|the two plugins)$|or keep one of the two$", _drop),
    (r"\| put '?(?P<id>[\w-]+)'? (?:first|before '[\w-]+')$", lambda r, m: [r.recipe.first(m["id"])]),
    (r"with (?P<id>[\w-]+) before what quantizes it", lambda r, m: [r.recipe.first(m["id"])]),
    (r"put (?P<id>[\w-]+) before the plugin that quantizes", lambda r, m: [r.recipe.first(m["id"])]),
    (r"put (?P<id>[\w-]+) behind the plugin", lambda r, m: [r.recipe.last(m["id"])]),
    (
        r"and (?P<id>[\w-]+) does something else.*an adapter such as lora in its place",
        lambda r, m: [r.recipe.without(m["id"]).with_lora()],
    ),
    (r"target unfused linear layers, for example 'mlp'", lambda r, _: _with(r, targets="mlp")),
    (r"use a method that works on weights", lambda r, _: [r.recipe.without(_speaker(r).key).with_lora()]),
    (r"it works on Mamba", _elsewhere("mamba")),
    (r"three decoders", _elsewhere("llama")),
    (r"Llama, Mistral, Qwen|take a decoder|evaluate a decoder", _elsewhere("llama")),
    (r"(?P<name>\w+_layers), or \w+ = 0", lambda r, m: _with(r, **{m["name"]: [0, 1]})),
    (r"_layers, or (?P<name>\w+) = 0", lambda r, m: _with(r, **{m["name"]: 0})),
    (r"did you mean '(?P<role>[\w.]+)'", lambda r, m: _with(r, targets=m["role"])),
    (r"\(its roles: (?P<roles>[\w., ]+)\)", lambda r, m: _with(r, targets=m["roles"].split(", ")[-1])),
    (r"or sparsity: (?P<n>[\d.]+)", lambda r, m: _with(r, sparsity=float(m["n"]))),
    (r"or a higher alpha", lambda r, _: _with(r, alpha=1.0)),
    (r"dense_answers = false", lambda r, _: _with(r, dense_answers=False)),
    (r"singular: 0", lambda r, _: _with(r, singular=0)),
    (r"fewer soft tokens", lambda r, _: _with(r, length=4)),
]
"""How each known form of a hint is followed."""
