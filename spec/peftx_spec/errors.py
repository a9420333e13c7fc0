"""The root of every error that peftx raises on purpose, and the search for the nearest right name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import ClassVar

UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""What steers a terminal, or is not seen: control characters, marks of direction, spaces of no width, surrogates."""


class PeftxError(Exception):
    """Something the user can mend: the message names the cause and the place, `hint` the way out.

    The CLI prints it without a traceback and exits with code 2.

    Attributes:
        code: short and stable; `peftx explain CODE` prints a page on it. A class without one of its own has that of
            the class that it is derived from, so errors of other authors have `general` or what they refine.
    """

    code: ClassVar[str] = "general"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = _printable(message)
        super().__init__(message)
        self.message = message
        self.hint = None if hint is None else _printable(hint)

    def __str__(self) -> str:
        text = self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"
        return visible(text, lines=True)


class DataError(PeftxError):
    """A data file or rows that are missing, empty, undecodable or malformed; names file and line."""

    code = "data"


class FileError(PeftxError):
    """A file or folder that is not there, stands in the way, or cannot be read or written."""

    code = "file"


def visible(text: str, *, lines: bool = False) -> str:
    """Text of a file, a model or another author, so that no character of it acts on the terminal: `\\x1b[31m`.

    `lines`: line breaks and tabs stay as they are.
    """
    return UNSEEN.sub(lambda found: found[0] if lines and found[0] in "\n\t" else _escaped(found[0]), text)


def _escaped(char: str) -> str:
    return repr(char)[1:-1] if char < "\u0100" else f"\\u{ord(char):04x}"


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
