"""What a plugin's distribution says of it in its metadata: nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint

MARKS = {
    "fidelity": {
        "equal": "computes what official code, or a peer's, computes on the same weights",
        "equations": "written from the paper's equations and text",
        "reconstruction": "in part the plugin's own and not the paper's, as its README says",
    },
    "evidence": {
        "shown": "the paper's effect shows on real data, beyond the spread of the figures",
        "not-shown": "measured on real data, where the effect does not show beyond the spread",
        "not-measured": "not measured on real data",
    },
}
"""The two marks of a plugin, each with its values and what they say. As a keyword of the package: `fidelity:equal`."""


@dataclass(frozen=True)
class Entry:
    """One plugin as its distribution's metadata tells it; nothing is imported."""

    name: str
    distribution: str
    version: str
    summary: str
    hooks: tuple[str, ...]
    paper: str
    """`arXiv:2106.09685`, or an empty string."""
    family: str
    fidelity: str
    """One of `MARKS`, an empty string where the package says nothing, or whatever else it says."""
    evidence: str
    point: EntryPoint
    keywords: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    """Requirements as the distribution states them: `peftx>=0.2,<0.3`."""

    @property
    def url(self) -> str:
        return self.paper.replace("arXiv:", "https://arxiv.org/abs/") if self.paper else ""

    @property
    def readme(self) -> str:
        """The README, which travels in the distribution's metadata; empty where it brings none."""
        metadata = self.point.dist.read_text("METADATA") if self.point.dist is not None else None
        return (metadata or "").partition("\n\n")[2].strip()  # the headers end at the first empty line

    @property
    def citations(self) -> list[str]:
        """The BibTeX blocks of the README."""
        return re.findall(r"^```bibtex\n(.*?)^```", self.readme, re.MULTILINE | re.DOTALL)

    @property
    def license(self) -> str:
        """As the distribution states it: `Apache-2.0`; empty where it states none."""
        if self.point.dist is None:
            return ""
        return "".join(self.point.dist.metadata.get_all("License-Expression") or ())


def keywords(point: EntryPoint) -> list[str]:
    """The keywords of the distribution that publishes a plugin."""
    return [] if point.dist is None else words_of(point.dist.metadata.get_all("Keywords"))


def keyword_values(words: Iterable[str], kind: str) -> list[str]:
    """`low-rank` for the kind `family`, where `family:low-rank` is among the keywords."""
    return [word.removeprefix(f"{kind}:") for word in words if word.startswith(f"{kind}:")]


def words_of(lines: Iterable[str] | None) -> list[str]:
    """The keywords on lines of metadata, where commas part them."""
    return [word.strip() for word in ",".join(lines or ()).replace("\n", ",").split(",")]
