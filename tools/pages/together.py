"""What goes together, from the claims and from the committed run of `peftx matrix`; nothing here is by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from pages.gallery import REGISTRY, listed
from peftx.composition.rules import rules

ROOT = Path(__file__).resolve().parents[2]
MATRIX = ROOT / "benchmarks/results/matrix.html"
WORKS, REFUSED = "w", "r"


@cache
def matrix() -> dict[str, Any]:
    """`plugins`, and `cells` row by row: [outcome's letter, reason's place, claims, working order, stack, model]."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', MATRIX.read_text("utf-8")
    )
    found: dict[str, Any] = json.loads(text)
    return found


def script() -> str:
    """The same for docs/assets/together.js: a script, so that a page opened from disk reads it too."""
    return f"window.MATRIX = {json.dumps(matrix(), separators=(',', ':'))};\n"


def outcomes(name: str) -> dict[str, tuple[str, str]]:
    """Other plugin -> the letters of (`name` first, the other first)."""
    plugins, cells = matrix()["plugins"], matrix()["cells"]
    place, count = plugins.index(name), len(plugins)
    return {
        other: (cells[place * count + at][0], cells[at * count + place][0])
        for at, other in enumerate(plugins)
        if at != place
    }


def _kind(letters: tuple[str, str]) -> str:
    """In both orders, in one, or why in none."""
    works = letters.count(WORKS)
    return ("none", "one", "both")[works] if works else ("refused" if REFUSED in letters else "other")


def table() -> str:
    """A line a plugin: with how many others it stood in a stack that works."""
    links = {each.name: each.link for each in listed()}
    lines = [
        "| plugin | both orders work | one order works | refused | another model, or failed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in sorted(matrix()["plugins"]):
        counts = Counter(map(_kind, outcomes(name).values()))
        shown = f"[{name}]({links[name]})" if name in links else name
        cells = " | ".join(str(counts[kind]) for kind in ("both", "one", "refused", "other"))
        lines.append(f"| {shown} | {cells} |")
    return "\n".join(lines)


def goes_with(name: str, up: str) -> str:
    """The section at the end of a plugin's page.

    Args:
        up: from the page to the site's root, as in `../../../`.
    """
    lines = ["## Goes with", ""]
    told = rules(REGISTRY.outline(name)) if name in REGISTRY.names() else []
    lines += [f"- {rule}" for rule in told] + [""] * bool(told)
    together = f"[What goes together]({up}choose/together.md)"
    if name not in matrix()["plugins"]:
        return "\n".join(
            [*lines, f"It came after the last run of the matrix. {together} has the others.", ""]
        )
    found = outcomes(name)
    counts = Counter(map(_kind, found.values()))
    lines.append(
        f"In the matrix it stood beside {counts['both'] + counts['one']} of {len(found)} other plugins in a stack that "
        f"works, with {counts['one']} of them in one order only. {together} has each pair with its reason."
    )
    refused = sorted(other for other, letters in found.items() if _kind(letters) == "refused")
    if refused:
        lines += ["", f"Refused beside it, in either order: {', '.join(refused)}."]
    return "\n".join([*lines, ""])
