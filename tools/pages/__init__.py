"""What the pages of the site say that follows from the code.

A line `<!-- made: NAME -->` in a page stands for Markdown that is made from the code whenever the site is built, or a
test asks. The prose around it is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial

from pages import (
    architectures,
    claims,
    commands,
    excerpts,
    figures,
    gallery,
    leaderboards,
    spec,
    streams,
    together,
)

NOTE = "*What is made from the code stands here in the site alone: `make docs`.*\n\n"
"""For those who read the file itself."""
LINE = re.compile(r"^<!-- made: (\S+) -->$", re.MULTILINE)

MADE: dict[str, Callable[[], str]] = {
    **spec.MADE,
    **leaderboards.MADE,
    **figures.MADE,
    **streams.MADE,
    "setup": excerpts.setup,
    "demo": excerpts.demo,
    "said": excerpts.said,
    **{f"method-{name}": partial(excerpts.method, name, *parts) for name, parts in excerpts.METHODS.items()},
    "beside": excerpts.beside,
    "versions": excerpts.versions,
    "citation": excerpts.citation,
    "architectures": architectures.table,
    "claims": claims.table,
    "claims-rules": claims.rules_table,
    "commands": commands.all_commands,
    "goals": gallery.goals,
    "gallery": gallery.table,
    "matrix": together.table,
}


class UnknownPart(ValueError):
    """A page asks for what nobody makes; names file and line."""


@cache
def made(name: str) -> str:
    return MADE[name]()


def filled(markdown: str, page: str) -> str:
    """A page with what is made in its place; `page` is what an error calls it.

    Raises:
        UnknownPart: `<!-- made: NAME -->` with a name that is not in `MADE`.
    """

    def part(found: re.Match[str]) -> str:
        if found[1] not in MADE:
            line = markdown.count("\n", 0, found.start()) + 1
            raise UnknownPart(
                f"{page}:{line}: nothing makes '{found[1]}'; there are: {', '.join(sorted(MADE))}"
            )
        return made(found[1])

    return LINE.sub(part, markdown.replace(NOTE, ""))
