"""The pages on errors, `errors/CODE.md`: what each means, its usual causes, and the way out of each.

A page's first paragraph is what the error's class says of itself. `docs/` has no copy: the site shows these files.
"""

from __future__ import annotations

from pathlib import Path

PAGES = Path(__file__).parent / "errors"


def codes() -> list[str]:
    """Those that have a page; a class of another author may state a code that has none."""
    return sorted(page.stem for page in PAGES.glob("*.md"))


def page(code: str) -> str:
    """The page as markdown.

    Raises:
        UsageError: there is none.
    """
    known = codes()
    if code not in known:
        from peftx.errors import UsageError, nearest

        raise UsageError(f"no error has the code '{code}'", hint=nearest(code, known) or "peftx explain")
    return (PAGES / f"{code}.md").read_text("utf-8")


def sentence(code: str) -> str:
    """The page's first paragraph, on one line."""
    return " ".join(page(code).split("\n\n")[1].split())


def more(code: str) -> str:
    """The command that prints the page of an error; nothing for a code without one."""
    return f"peftx explain {code}" if code in codes() else ""
