"""The root of every error that peftx raises on purpose, and the search for the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftxError(Exception):
    """Something the user can mend: the message names the cause and the place, `hint` the way out.

    The CLI prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = _printable(message)
        super().__init__(message)
        self.message = message
        self.hint = None if hint is None else _printable(hint)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


LONGEST = 20_000
"""Characters of a message: it may quote a file, and a damaged one has lines of megabytes."""


def _printable(text: str) -> str:
    """Without halves of surrogate pairs, which no terminal takes, and not endless."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} more characters)"


def nearest_names(name: str, choices: Iterable[str], *, limit: int = 3) -> list[str]:
    """The choices that look most like `name`, best first; upper and lower case do not matter."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=limit, cutoff=0.6)
    return [by_lower[key] for key in found]


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'lora'?`, or an empty string where nothing is near."""
    names = nearest_names(name, choices)
    return f"did you mean {' or '.join(repr(n) for n in names)}?" if names else ""
