"""Who is told how a run goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Reporter(Protocol):
    """Who is told how a run goes; the CLI draws it."""

    def stage(self, name: str, ids: Sequence[str]) -> None:
        """A stage begins."""

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        """The stage's work so far."""

    def finished(self, name: str, seconds: float, detail: str) -> None:
        """The stage is done."""


class Silent:
    """Reports nothing."""

    def stage(self, name: str, ids: Sequence[str]) -> None: ...

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None: ...

    def finished(self, name: str, seconds: float, detail: str) -> None: ...
