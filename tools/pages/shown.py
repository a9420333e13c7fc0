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


WAYS_BACK = {
    "peftx": "",
    "What goes together": "choose/together/",
    "Leaderboards": "choose/leaderboards/",
    "Benchmarks": "benchmarks/",
}
"""Of a page that a command wrote, which stands in the site without the site's own head."""


def with_ways_back(html: str, uri: str) -> str:
    """Such a page with a bar of links into the site, above all else."""
    up = "../" * uri.count("/")
    links = " &middot; ".join(f'<a href="{up}{to}">{name}</a>' for name, to in WAYS_BACK.items())
    style = "margin:-1rem 0 1rem;padding:.4rem 0;border-bottom:1px solid #8884"
    colour = "<style>nav.site a { color: #00897b; }</style>"
    return html.replace("<body>", f'<body><nav class="site" style="{style}">{colour}{links}</nav>', 1)


def without_reasons(markdown: str) -> str:
    """Fences without `norun="..."`, why a block does not run in the tests: superfences knows no such option."""
    return re.sub(r'^(```\w+) norun="[^"\n]*"$', r"\1", markdown, flags=re.MULTILINE)


def from_elsewhere(html: str) -> list[str]:
    """What a page loads from other hosts when it is opened; links to click are none."""
    return [one or two for one, two in ASKS.findall(html)]
