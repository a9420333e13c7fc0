"""Names of files that every system takes, Windows too, whatever a plugin, a row or a figure is called."""

from __future__ import annotations

import hashlib
import re

LONGEST = 120
"""Bytes of a name; systems take 255, and an ending and the marks of a half-written file are added."""
_ILLEGAL = re.compile('[<>:"/\\\\|?*\x00-\x1f\x7f\ud800-\udfff]')
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³]|conin\$|conout\$) *(\.|$)", re.IGNORECASE)
"""Windows opens a device for these, with any ending."""


def portable(name: str) -> str:
    """`name` itself where it can be the name of a file or folder everywhere, else one like it that can.

    Signs that Windows refuses become hyphens, dots and spaces at the end go away, a name of a device gets `_` in front,
    and what is too long ends in a digest of all of it.
    """
    found = _ILLEGAL.sub("-", name).rstrip(". ") or "_"
    if _DEVICE.match(found):
        found = f"_{found}"
    if len(found.encode()) <= LONGEST:
        return found
    digest = hashlib.sha256(found.encode()).hexdigest()[:8]
    return f"{found.encode()[: LONGEST - 9].decode(errors='ignore')}-{digest}"
