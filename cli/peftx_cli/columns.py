"""Names of columns on the command line."""

from __future__ import annotations

from peftx.errors import UsageError


def pairs_of(text: str | None) -> dict[str, str]:
    """`prompt=ask,completion=reply` as a mapping.

    Raises:
        PeftxError: not such pairs.
    """
    found: dict[str, str] = {}
    for pair in text.split(",") if text is not None else ():
        ours, equals, theirs = (word.strip() for word in pair.partition("="))
        if not (ours and equals and theirs) or ours in found:
            raise UsageError(
                f"--columns {text}: '{pair}' is no pair of names, or names one twice",
                hint="OURS=THEIRS, as in --columns prompt=ask,completion=reply",
            )
        found[ours] = theirs
    return found
