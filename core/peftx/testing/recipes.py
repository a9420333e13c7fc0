"""Random stacks of installed plugins on tiny models, as recipes that can be written down."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from peftx.composition.conflicts import find_conflicts
from peftx.composition.registry import Registry
from peftx.errors import PeftxError
from peftx.kernel.members import Member
from peftx.kernel.names import GROUP
from peftx.kernel.plugin import hooks_of
from peftx.stack import Stack
from peftx.testing.models import tiny, tiny_tokenizer
from peftx.testing.reference import COMPANION, QUANTIZER
from peftx.testing.subject import ENCODERS

if TYPE_CHECKING:
    pass

ARCHITECTURES = ("llama", "gpt2", "qwen3", "gemma2", "mixtral", "phi3", "bert", "t5", "mamba", "opt")
SAYINGS = {"en": "All is well.", "de": "Alles ist gut.", "fr": "Tout va bien."}
"""One sentence in three languages, for what compares languages."""
Until = Literal["build", "compression", "removal"]
Outcome = Literal[
    "works", "refused-before-build", "refused-at-build", "refused-at-start", "refused-late", "failed"
]


@dataclass(frozen=True)
class Entry:
    """One plugin of a stack."""

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    id: str = ""
    phase: str | None = None

    @property
    def key(self) -> str:
        return self.id or self.name


@dataclass(frozen=True)
class Recipe:
    """A stack on the tiny model of an architecture."""

    arch: str
    entries: tuple[Entry, ...]
    merges: bool = False
    """Is everything folded into the weights for good after the training."""

    def __str__(self) -> str:
        options = (f"{e.key}{e.options or ''}" for e in self.entries)
        return f"{self.arch}: {', '.join(options)}{'; merged' if self.merges else ''}"

    @property
    def code(self) -> str:
        """Python that makes it."""
        entries = []
        for e in self.entries:
            more = {"options": e.options, "id": e.id, "phase": e.phase}
            entries.append(", ".join([repr(e.name), *(f"{k}={v!r}" for k, v in more.items() if v)]))
        return f"Recipe({self.arch!r}, ({' '.join(f'Entry({entry}),' for entry in entries)}){', True' * self.merges})"

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(entry.key for entry in self.entries)

    def members(self) -> list[Member]:
        """Fresh plugins in their places."""
        load = registry().load
        return [Member(e.key, load(e.name)(**e.options), phase=e.phase) for e in self.entries]

    def without(self, id: str) -> Recipe:
        return replace(self, entries=tuple(e for e in self.entries if e.key != id))

    def changed(self, id: str, **options: Any) -> Recipe:
        """One plugin with other options."""
        entries = (replace(e, options=e.options | options) if e.key == id else e for e in self.entries)
        return replace(self, entries=tuple(entries))

    def with_lora(self) -> Recipe:
        """With a LoRA in front, behind what compresses the plain model."""
        beside = Entry("lora", {"rank": 2}, "lora-beside")
        return self if beside.key in self.ids else self._behind_early(beside)

    def accompanied(self) -> Recipe:
        """With the kit's low-rank update in front."""
        return self._behind_early(Entry(COMPANION))

    def first(self, id: str) -> Recipe:
        """One plugin before all others, which come in their order."""
        entries = sorted(self.entries, key=lambda e: e.key != id)
        return replace(self, entries=tuple(replace(e, phase=None) for e in entries))

    def last(self, id: str) -> Recipe:
        """One plugin behind all others."""
        return replace(self, entries=tuple(sorted(self.entries, key=lambda e: e.key == id)))

    def _behind_early(self, entry: Entry) -> Recipe:
        early = [e for e in self.entries if e.phase == "before-training"]
        late = [e for e in self.entries if e.phase != "before-training"]
        return replace(self, entries=(*early, entry, *late))


@cache
def registry() -> Registry:
    """The installed plugins, and two of the kit."""
    own = {
        COMPANION: "peftx.testing.reference:ReferenceLowRank",
        QUANTIZER: "peftx.testing.reference:ReferenceQuantizer",
    }
    points = [EntryPoint(name, value, GROUP) for name, value in own.items()]
    return Registry([*entry_points(group=GROUP), *points])


def draw(
    count: int,
    *,
    seed: int = 0,
    names: Sequence[str] = (),
    architectures: Sequence[str] = ARCHITECTURES,
    sizes: Sequence[int] = (2, 3, 3, 3, 4, 4, 5),
) -> Iterator[Recipe]:
    """Stacks that cover as many triples of plugins as so few can; every fifth is taken as it falls, and may well be
    refused."""
    rng = random.Random(seed)
    known = list(names) or registry().names()
    seen: set[tuple[str, ...]] = set()
    for number in range(count):
        arch = rng.choice(list(architectures))
        if number % 5 == 4:
            chosen = _one(rng, known, arch, rng.choice(sizes))
        else:
            standing = [name for name in known if stands(name, arch)]
            drawn = [_one(rng, standing, arch, rng.choice(sizes)) for _ in range(24)]
            free = [recipe for recipe in drawn if not find_conflicts(recipe.members())]
            chosen = max(free or drawn, key=lambda recipe: len(_groups(recipe) - seen) / len(recipe.ids) ** 2)
        seen |= _groups(chosen)
        yield chosen


def _groups(recipe: Recipe) -> set[tuple[str, ...]]:
    names = sorted({entry.name for entry in recipe.entries})
    return {*combinations(names, 2), *combinations(names, 3)}


def _one(rng: random.Random, names: Sequence[str], arch: str, size: int) -> Recipe:
    chosen = [rng.choice(names) if rng.random() < 0.05 else "" for _ in range(size)]
    fresh = iter(rng.sample(list(names), min(size, len(names))))
    entries: list[Entry] = []
    for name in [name or next(fresh) for name in chosen]:
        twice = sum(entry.name == name for entry in entries)
        plugin = registry().load(name)
        needed = any(option.is_required() for option in plugin.Config.model_fields.values())
        needed = needed or "prepare_data" in hooks_of(plugin)  # columns of its rows, models that are here
        options = {} if rng.random() < 0.2 and not needed else dict(plugin.example)
        phase = "before-training" if name == QUANTIZER and rng.random() < 0.7 else None
        entries.append(Entry(name, options, f"{name}-{twice + 1}" if twice else "", phase))
    entries.sort(key=lambda entry: entry.phase is None)  # what compresses the plain model stands first
    return Recipe(arch, tuple(entries))


@cache
def stands(name: str, arch: str) -> bool:
    """Is the plugin alone built on the model."""
    plugin = registry().load(name)
    left = {plugin.gives.get(format, format) for format in plugin.takes}
    if arch in ENCODERS and left and "tokenized" not in left:
        return False  # its rows ask for more text, and the model fills in
    try:
        Stack(tiny(arch), [(name, plugin(**plugin.example))], tokenizer=tiny_tokenizer())
    except PeftxError:
        return False
    return True
