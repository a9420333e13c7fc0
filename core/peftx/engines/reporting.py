"""Who is told how a run goes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from peftx.errors import MissingExtraError, OptionError

if TYPE_CHECKING:
    from peftx_spec.training import TrainSpec


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


def check_reports(spec: TrainSpec, output: object) -> None:
    """Raises PeftxError where the Trainer could not report, or nobody would find what it did."""
    for name in spec.trackers:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"report_to: {name} is not installed", hint=f"pip install {name}")
    if "tensorboard" in spec.trackers and output is None:
        raise OptionError(
            "report_to: tensorboard writes beside the checkpoints", hint="give an output folder"
        )
