"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`$PEFTX_CACHE`; else `peftx` in `$XDG_CACHE_HOME` or `~/.cache`. None where `PEFTX_CACHE` is empty: then nothing
    is kept."""
    place = os.environ.get("PEFTX_CACHE")
    if place == "":
        return None
    if place is not None:
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftx"
