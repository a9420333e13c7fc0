"""Which files of the repository the site shows besides `docs/`, and how their text changes for it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "cli/peftx_cli/errors/*.md",
    "benchmarks/README.md",
    "benchmarks/results/*",
    "plugins/*/*/README.md",
)
ASKS = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=\"((?:https?:)?//[^\"]+)\""
    r"|<link\b(?![^>]*\brel=\"(?:canonical|alternate)\")[^>]*?\bhref=\"((?:https?:)?//[^\"]+)\"",
)


def shown(ending: str = "") -> list[Path]:
    """All, or those whose name ends so."""
    return [path for pattern in SHOWN for path in sorted(ROOT.glob(pattern)) if path.name.endswith(ending)]


def as_in_site(markdown: str, uri: str, *, is_shown: bool) -> str:
    """In the site `docs/` is the root: links out of it lose a step, links into it lose its name."""
    markdown = without_reasons(markdown)
    if is_shown:
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    up = "../" * (uri.count("/") + 1)
    return markdown.replace(f"]({up}", f"]({up[3:]}")


def without_reasons(markdown: str) -> str:
    """Fences without `norun="..."`, why a block does not run in the tests: superfences knows no such option."""
    return re.sub(r'^(```\w+) norun="[^"\n]*"$', r"\1", markdown, flags=re.MULTILINE)


def from_elsewhere(html: str) -> list[str]:
    """What a page loads from other hosts when it is opened; links to click are none."""
    return [one or two for one, two in ASKS.findall(html)]
