"""Links of Markdown pages that lead nowhere, each with its file and line; nothing is fetched, and no MkDocs needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import unquote

REPOSITORY = "https://github.com/peftx/peftx/"
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:\s+\"[^\"]*\")?\)")
CODE = re.compile(r"`+[^`\n]*`+")
REFERENCE = re.compile(r"\]\s?\[([^\]\n]*)\]")
NAMED = re.compile(r'\bid="([^"]+)"|\{ *#([\w-]+)')
HEADING = re.compile(r"^#{1,6} +(.*?)(?: *\{[^}]*\})? *#*$")


@dataclass(frozen=True)
class Link:
    page: Path
    line: int
    """From 1; 0 of one in a part that is made."""
    target: str


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Lines outside of fences, from 1."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        found = re.match(r" *(`{3,}|~{3,})", line)
        if found and (not fence or (found[1].startswith(fence) and not line.strip().strip("`~"))):
            fence = "" if fence else found[1]
        elif not fence:
            yield number, line


def links_of(page: Path, text: str | None = None) -> list[Link]:
    """All links and pictures of a page, or of its text with what is made in it; what stands in code is none."""
    return [
        Link(page, number, target)
        for number, line in prose(page.read_text("utf-8") if text is None else text)
        for target in LINK.findall(CODE.sub("x", line))
    ]


def slug(heading: str) -> str:
    """The anchor that GitHub and Python-Markdown give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(text: str) -> set[str]:
    """What `#...` may name on a page."""
    found = {slug(heading[1]) for _, line in prose(text) if (heading := HEADING.match(line))}
    return found | {one or two for one, two in NAMED.findall(text)}


def dead(
    pages: Sequence[Path], root: Path, read: Callable[[Path], str] = lambda page: page.read_text("utf-8")
) -> list[str]:
    """One line for each dead link: `docs/data.md:12: the link 'x.md' leads nowhere: there is no docs/x.md`.

    Args:
        root: links out of it are dead; those to `REPOSITORY` are looked up in it.
        read: a page's text with what is made in it, whose links are looked at and whose headings are anchors too.
    """
    known = cache(lambda page: anchors(read(page)))
    found = []
    for link in (link for page in pages for link in _with_made(page, read)):
        if why := _why_dead(link, root, known):
            place = link.page.relative_to(root).as_posix()
            line = f":{link.line}" if link.line else ", in what is made"
            found.append(f"{place}{line}: the link '{link.target}' {why}")
    return found + [problem for page in pages for problem in _references(page, root)]


def _references(page: Path, root: Path) -> Iterator[str]:
    """`[words][name]`, which MkDocs looks up in all pages, and which none here means: brackets of a formula."""
    for number, line in prose(page.read_text("utf-8")):
        if line.startswith("    "):  # code
            continue
        for name in REFERENCE.findall(LINK.sub("", CODE.sub("x", line))):
            place = page.relative_to(root).as_posix()
            yield f"{place}:{number}: '[...] [{name}]' reads as a link to '{name}', which is nowhere: put it in `code`"


def _with_made(page: Path, read: Callable[[Path], str]) -> list[Link]:
    written = links_of(page)
    targets = {link.target for link in written}
    return written + [
        replace(link, line=0) for link in links_of(page, read(page)) if link.target not in targets
    ]


def _why_dead(link: Link, root: Path, known: Callable[[Path], set[str]]) -> str:
    target = unquote(link.target)
    if target.startswith(REPOSITORY):
        _, _, inside = target.removeprefix(REPOSITORY).partition("blob/main/")
        place, _, anchor = inside.partition("#")
        path = root / place
    elif re.match(r"[a-z][a-z0-9+.-]*:", target):
        return ""
    else:
        place, _, anchor = target.partition("#")
        path = (link.page.parent / place).resolve() if place else link.page
    if not path.is_relative_to(root) or not path.exists():
        shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        return f"leads nowhere: there is no {shown}"
    if anchor and path.suffix == ".md" and anchor not in known(path):
        return f"leads nowhere: {path.relative_to(root).as_posix()} has no heading '#{anchor}'"
    return ""
