"""The root of every error that peftx raises on purpose, and the search for the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftxError(Exception):
    """Something the user can mend: the message names the cause and the place, `hint` the way out.

    The CLI prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


def nearest_names(name: str, choices: Iterable[str], *, limit: int = 3) -> list[str]:
    """The choices that look most like `name`, best first; upper and lower case do not matter."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=limit, cutoff=0.6)
    return [by_lower[key] for key in found]


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'lora'?`, or an empty string where nothing is near."""
    names = nearest_names(name, choices)
    return f"did you mean {' or '.join(repr(n) for n in names)}?" if names else ""
