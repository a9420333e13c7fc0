"""The terminal as Rich draws on it, for messages, results and bars alike."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """Rich's, without colors, bold and underlines where NO_COLOR is set (it leaves out the colors alone by itself)."""
    from rich.console import Console

    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")
