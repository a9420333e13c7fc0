"""`Targets("attention.q,v layers=0-3 mlp.*")`: which places of a model a plugin acts on.

Words are separated by spaces. A word selects by role (`attention`, `attention.q`, `attention.q,v`, `mlp.*`, `norm`,
`all`: every linear inside the layers), or by regular expression on the raw module names (`re:q_proj$`), of stacked
experts on the parameters' too (`re:experts.down_proj$`); `!word` takes away. `layers=0-3,7,-1` and `tower=encoder`
restrict all words. A word that matches nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from peftx.errors import TargetError, nearest

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


class Selectable(Protocol):
    """What words select by; a `Site` has it."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def role(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def tower(self) -> str | None: ...
    @property
    def in_all(self) -> bool: ...


S = TypeVar("S", bound=Selectable)
ALL = "all"
_ALIASES = {"mlp": ("mlp", "experts", "shared_experts"), "attention": ("attention", "linear_attention")}
"""A mixture of experts has its feed-forward weights in the experts, so `mlp` means these there; and in models that mix
them, `attention` means the layers with a state too."""


class Targets:
    """A parsed selector; immutable, equal and printed by its text.

    Raises:
        TargetError: empty text, an empty word, a malformed range or regular expression.
    """

    __slots__ = ("_exclude", "_include", "_layers", "_towers", "text")

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())
        self._include: list[str] = []
        self._exclude: list[str] = []
        self._layers: str | None = None
        self._towers: frozenset[str] | None = None
        for word in self.text.split():
            if word.startswith("layers="):
                if self._layers is not None:
                    raise TargetError(
                        f"targets '{self.text}': 'layers=' stands twice", hint="for example layers=0-3,7"
                    )
                self._layers = word.removeprefix("layers=")
                _ranges(self._layers, None)
            elif word.startswith("tower="):
                if self._towers is not None:
                    raise TargetError(
                        f"targets '{self.text}': 'tower=' stands twice", hint="tower=encoder,decoder"
                    )
                self._towers = frozenset(word.removeprefix("tower=").split(","))
                if "" in self._towers:
                    raise TargetError(
                        f"targets '{self.text}': '{word}' is malformed", hint="tower=encoder,decoder"
                    )
            elif "=" in word and not word.startswith(("re:", "!re:")):
                name = word.split("=")[0]
                raise TargetError(
                    f"targets '{self.text}': unknown filter '{name}='",
                    hint=nearest(name, ["layers", "tower"]) or None,
                )
            elif word.startswith("!"):
                self._exclude += _expand(word[1:], self.text)
            else:
                self._include += _expand(word, self.text)
        if not self._include:
            raise TargetError(
                f"targets '{text}' select nothing",
                hint="for example: 'attention mlp', 'attention.q,v layers=0-3'",
            )

    def select(self, sites: Sequence[S], *, layers: int) -> list[S]:
        """The sites that the words select, in the model's order.

        Args:
            sites: candidates. layers: number of layers of the deepest tower, for negative indices.

        Raises:
            TargetError: a word, a layer or a tower that matches no site; names the nearest right ones.
        """
        pool = list(sites)
        if self._towers is not None:
            known = {site.tower for site in sites}
            for tower in sorted(self._towers - known):
                raise TargetError(
                    f"targets '{self.text}': the model has no tower '{tower}'",
                    hint=f"its towers: {', '.join(sorted(t for t in known if t))}",
                )
            pool = [site for site in pool if site.tower in self._towers]
        if self._layers is not None:
            wanted = _ranges(self._layers, layers)
            beyond = sorted(i for i in wanted if not 0 <= i < layers)
            if beyond:
                raise TargetError(
                    f"targets '{self.text}': layer {beyond[0]} does not exist",
                    hint=f"the model has layers 0 to {layers - 1}",
                )
            pool = [site for site in pool if site.layer in wanted]
        chosen: set[int] = set()
        for word in self._include:
            found = [i for i, site in enumerate(pool) if _matches(word, site)]
            if not found:
                raise self._nothing(word, pool or sites)
            chosen.update(found)
        for word in self._exclude:
            found = [i for i, site in enumerate(pool) if _matches(word, site)]
            if not found:
                raise self._nothing(f"!{word}", pool or sites)
            chosen.difference_update(found)
        if not chosen:
            raise TargetError(f"targets '{self.text}' exclude all that they select")
        return [pool[i] for i in sorted(chosen)]

    @property
    def names_all(self) -> bool:
        """Does the word `all` stand in it, without a restriction to layers or towers."""
        return ALL in self._include and self._layers is None and self._towers is None

    def _nothing(self, word: str, sites: Iterable[Selectable]) -> TargetError:
        roles = sorted({site.role for site in sites if not site.role.startswith("other")})
        groups = sorted({role.split(".")[0] for role in roles})
        near = nearest(word.lstrip("!"), [*roles, *groups, ALL])
        return TargetError(
            f"targets '{self.text}': '{word}' matches nothing in this model",
            hint=f"{near + ' ' if near else ''}(its roles: {', '.join(roles) or 'none'})",
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Targets) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Targets({self.text!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        def parse(value: object) -> Targets:
            if isinstance(value, Targets):
                return value
            if not isinstance(value, str):
                raise ValueError(f"targets are text such as 'attention mlp', not {type(value).__name__}")
            try:
                return cls(value)
            except TargetError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_plain_validator_function(
            parse,
            json_schema_input_schema=core_schema.str_schema(),
            serialization=core_schema.plain_serializer_function_ser_schema(
                str, return_schema=core_schema.str_schema()
            ),
        )


def _expand(word: str, text: str) -> list[str]:
    """`attention.q,v` -> `attention.q`, `attention.v`; `mlp.*` -> `mlp`."""
    if word.startswith("re:"):
        if word == "re:":
            raise TargetError(
                f"targets '{text}': 're:' without a regular expression", hint="for example 're:q_proj$'"
            )
        try:
            re.compile(word[3:])
        except re.error as error:
            raise TargetError(f"targets '{text}': '{word}' is no regular expression: {error}") from error
        return [word]
    group, dot, names = word.partition(".")
    if "" in group.split(",") or (dot and "" in names.split(",")):
        raise TargetError(
            f"targets '{text}': '{word}' is malformed", hint="for example 'attention.q,v' or 'mlp.*'"
        )
    if not dot:
        return group.split(",")
    return [group if name == "*" else f"{group}.{name}" for name in names.split(",")]


def _matches(word: str, site: Selectable) -> bool:
    if word.startswith("re:"):
        return any(re.search(word[3:], name) for name in site.names)
    if word == ALL:
        return site.in_all
    return any(site.role == w or site.role.startswith(f"{w}.") for w in _ALIASES.get(word, (word,)))


def _ranges(text: str, layers: int | None) -> set[int]:
    """`0-3,7,-1` -> {0, 1, 2, 3, 7, layers - 1}; with `layers` None only what is wrong for any number of layers."""
    wanted: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part)
        if match is None:
            raise TargetError(
                f"layers='{text}': '{part}' is no layer or range", hint="for example layers=0-3,7,-1"
            )
        low = int(match[1])
        high = low if match[2] is None else int(match[2])
        if layers is None:
            if high < low and (high < 0) == (low < 0):
                raise TargetError(f"layers='{text}': '{part}' runs backwards")
            continue
        low, high = (i + layers if i < 0 else i for i in (low, high))
        if high < low:
            raise TargetError(
                f"layers='{text}': '{part}' runs backwards", hint=f"the model has {layers} layers"
            )
        inside = low >= 0 and high < layers  # else the ends will do for the error
        wanted.update(range(low, high + 1) if inside else (low, high))
    return wanted
