"""Figures of the front door, counted in the pages themselves: minutes of the jobs, blocks, pages, links."""

from __future__ import annotations

import re
from pathlib import Path

from pages.blocks import blocks
from pages.links import dead, links_of
from pages.shown import shown

ROOT = Path(__file__).resolve().parents[2]
FOLLOWED = ("start", "how-to", "concepts", "reference")
"""Folders of `docs/` whose pages a test follows from top to bottom: tests/docs/test_guides.py."""
SECONDS = re.compile(r"^\$ .*  # (\d+\.\d) s$", re.MULTILINE)
CLOCK = re.compile(r"^By the clock: (\d+) minutes", re.MULTILINE)


def transcripts() -> list[Path]:
    """Pages of jobs that were done, but for the one that leads to them."""
    return sorted(page for page in (ROOT / "docs/jobs").glob("*.md") if page.stem != "index")


def minutes(page: Path) -> float:
    """What the commands of a transcript took, all together."""
    return sum(float(found) for found in SECONDS.findall(page.read_text("utf-8"))) / 60


def jobs() -> str:
    """A row for each transcript."""
    rows = ["| job | minutes of its commands | by the clock |", "| --- | --- | --- |"]
    for page in transcripts():
        text = page.read_text("utf-8")
        clock = CLOCK.search(text)
        if clock is None:
            raise LookupError(f"{page}: no line 'By the clock: N minutes'")
        title = text.splitlines()[0].removeprefix("# ")
        rows.append(f"| [{title}]({page.name}) | {minutes(page):.1f} | {clock[1]} |")
    return "\n".join(rows)


def documents() -> list[Path]:
    """README, CONTRIBUTING and `docs/`; then the plugins' READMEs."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted(ROOT.glob("plugins/*/*/README.md")),
    ]


def counts() -> str:
    """Blocks by language, and pages and links."""
    found = [block for page in documents() for block in blocks(page, ROOT)]
    rows = ["| | there | run | excused, with a reason |", "| --- | --- | --- | --- |"]
    for languages, name in ((("python",), "Python"), (("yaml",), "YAML"), (("console", "bash"), "commands")):
        those = [block for block in found if block.language in languages]
        run = sum(block.runs for block in those)
        rows.append(f"| blocks of {name} | {len(those)} | {run} | {len(those) - run} |")
    pages = {*documents(), *shown(".md")}
    links = sum(len(links_of(page)) for page in pages)
    return "\n".join(
        [*rows, "", f"{len(pages)} pages, {links} links on them, {len(dead(pages, ROOT))} of them dead."]
    )


MADE = {"jobs": jobs, "counts": counts}
