"""How a run goes, on stderr: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from peftx_cli import failures
from peftx_cli.terminal import console
from peftx_spec.errors import visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LOG_SECONDS = 15.0  # between two lines of a long stage in a log


class ClosingReporter(Protocol):
    """`peftx.pipeline.Reporter`, and it must be closed."""

    def stage(self, name: str, ids: Sequence[str]) -> None: ...

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None: ...

    def finished(self, name: str, seconds: float, detail: str) -> None: ...

    def __enter__(self) -> ClosingReporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def reporter() -> ClosingReporter:
    """The one that suits stderr, or none where the user wants it quiet."""
    if failures.quiet():
        return QuietReporter()
    return BarReporter() if sys.stderr.isatty() else LineReporter()


def _title(name: str, ids: Sequence[str]) -> str:
    return visible(f"{name} {', '.join(ids)}".rstrip())


def _line(name: str, seconds: float, detail: str) -> str:
    return visible(f"{name:<9} {seconds:7.2f} s  {detail}".rstrip())


def _values(values: dict[str, float | str]) -> str:
    told = (value if isinstance(value, str) else f"{value:.4g}" for value in values.values())
    return visible("  ".join(f"{name} {value}" for name, value in zip(values, told, strict=True)))


class Interrupts:
    """Remembers Ctrl-C. A KeyboardInterrupt that arrives inside a destructor or callback of a library is lost there;
    `check`, called at every step, raises it again."""

    def __init__(self) -> None:
        self._seen = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        raise KeyboardInterrupt

    @property
    def seen(self) -> bool:
        return self._seen

    def check(self) -> None:
        if self._seen:
            raise KeyboardInterrupt


class Interruptible:
    """A reporter whose `progress` also looks for a Ctrl-C that was lost."""

    def __init__(self, inner: ClosingReporter, interrupts: Interrupts) -> None:
        self._inner, self._interrupts = inner, interrupts

    def stage(self, name: str, ids: Sequence[str]) -> None:
        self._interrupts.check()
        self._inner.stage(name, ids)

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        self._interrupts.check()
        self._inner.progress(done, total, values)

    def finished(self, name: str, seconds: float, detail: str) -> None:
        self._inner.finished(name, seconds, detail)


class LineReporter:
    """Plain lines: when a stage ends, and every quarter of a minute while it lasts."""

    def __init__(self) -> None:
        self._name = ""
        self._next = 0.0

    def stage(self, name: str, ids: Sequence[str]) -> None:
        self._name = _title(name, ids)
        self._next = time.monotonic() + LOG_SECONDS

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_SECONDS
            print(f"{self._name}: {done} of {total}  {_values(values)}".rstrip(), file=sys.stderr, flush=True)

    def finished(self, name: str, seconds: float, detail: str) -> None:
        print(_line(name, seconds, detail), file=sys.stderr, flush=True)

    def __enter__(self) -> LineReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class QuietReporter(LineReporter):
    """Nothing."""

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        return None

    def finished(self, name: str, seconds: float, detail: str) -> None:
        return None


class BarReporter:
    """A spinner that becomes a bar as soon as a stage tells how far it is; gone when the stage is done."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str, ids: Sequence[str]) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._stop()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[values]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(_title(name, ids), total=None, values="")
        self._bar.start()

    def progress(self, done: int, total: int, values: dict[str, float | str]) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, values=_values(values))

    def finished(self, name: str, seconds: float, detail: str) -> None:
        self._stop()
        self._console.print(_line(name, seconds, detail), markup=False, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def __enter__(self) -> BarReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
