"""Errors as the user sees them: the cause, the place, the way out; no traceback unless it is asked for."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

import typer

from peftx_cli import explained
from peftx_spec.errors import FileError, PeftxError, visible
from peftx_spec.problems import Problem, SpecError

PLACES = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""What a system says against a place: not allowed, full, a name that cannot be."""
BAD_INPUT = 2
INTERRUPTED = 130
_quiet = ContextVar("quiet", default=False)
_ours_alone = ContextVar("ours_alone", default=False)


def quiet() -> bool:
    """Are results and errors all that the user wants to see: `peftx --quiet COMMAND`."""
    return _quiet.get()


@contextmanager
def reported(*, traceback: bool = False, quiet: bool = False) -> Iterator[None]:
    """Print `PeftxError`s, and what the system says against a place on the disk, on stderr and exit with 2; Ctrl-C
    exits with 130. What comes out of a plugin's code names it; everything else is a bug of ours and stays one. `quiet`:
    while it lasts, no progress and no warnings."""
    before = _quiet.set(quiet)
    try:
        yield
    except Exception as error:
        told = error if isinstance(error, PeftxError) else _of_a_place(error) or _of_a_plugin(error)
        if told is None:
            raise
        if traceback:
            import traceback as module

            print(visible(module.format_exc(), lines=True), file=sys.stderr)
        show(told)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        say("interrupted", hint="nothing half-written is left behind")
        raise typer.Exit(INTERRUPTED) from error
    finally:
        _quiet.reset(before)


def _of_a_plugin(error: Exception) -> PeftxError | None:
    """An error that a plugin's code raised outside of its hooks, in a module of its own or in a term of the loss; None
    of one that came through no plugin's."""
    if "torch" not in sys.modules:
        return None  # and no plugin
    from peftx.composition.registry import Registry
    from peftx.errors import PluginError
    from peftx.kernel.members import line_in

    for name, module in Registry().modules():
        if module in sys.modules and (line := line_in(error, module)):
            said = f"plugin '{name}' failed at {line}: {type(error).__name__}: {error}"
            return PluginError(said, hint="'peftx --traceback ...' shows the way there")
    return None


def _of_a_place(error: Exception) -> PeftxError | None:
    """The system's error as one that the user can mend; None where it is not about a file or folder that is named."""
    if not isinstance(error, OSError) or error.errno not in PLACES or error.filename is None:
        return None
    return FileError(
        f"{error.filename}: {error.strerror}", hint="give another place, or make room or way there"
    )


def show(error: PeftxError) -> None:
    """One error, or all problems of a spec; those of another kind than the last line says name the page on them."""
    code, message, hint = error.code, error.message, error.hint
    if isinstance(error, SpecError):
        codes = {problem.code or error.code for problem in error.problems}
        code = codes.pop() if len(codes) == 1 else error.code
        for problem in error.problems:
            _print_problem(problem, more="" if problem.code in ("", code) else explained.more(problem.code))
        count = len(error.problems)
        message, hint = f"{count} problem{'s' if count > 1 else ''} in the spec; nothing was run", None
    say(message, hint=hint, title=f"error[{code}]", more=explained.more(code))


def say(message: str, *, hint: str | None = None, title: str = "error", more: str = "") -> None:
    """A message on stderr: a panel on a terminal, plain lines elsewhere, so that logs stay readable.

    `more`: the command that tells more.
    """
    title, message, hint = visible(title), visible(message, lines=True), visible(hint or "", lines=True)
    if not sys.stderr.isatty():
        lines = (f"{title}: {message}", f"hint: {hint}" if hint else "", f"more: {more}" if more else "")
        print("\n".join(filter(None, lines)), file=sys.stderr)
        return
    from rich.panel import Panel
    from rich.text import Text

    from peftx_cli.terminal import console

    body = Text(message)
    if hint:
        body.append(f"\n{hint}", style="cyan")
    if more:
        body.append(f"\n{more}", style="dim")
    style = "yellow" if title == "warning" else "red"
    console(stderr=True).print(
        Panel(body, title=Text(title), title_align="left", border_style=style, expand=False)
    )


def warn(message: str) -> None:
    """Something that the user should know, and that stops nothing."""
    if not quiet():
        say(message, title="warning")


def tell_warnings() -> None:
    """Our own warnings are messages to the user; those of other libraries stay as Python shows them."""
    others = warnings.showwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        place = Path(filename)
        ours = "peftx" in place.parts or place.name.startswith("peftx_")
        if ours and issubclass(category, UserWarning):
            warn(str(message))
        elif not (quiet() or _ours_alone.get()):
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = shown


@contextmanager
def ours_alone() -> Iterator[None]:
    """While it lasts, other libraries show neither warnings nor bars: for many short runs, of which each repeats them.

    Imports transformers.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    before = _ours_alone.set(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        _ours_alone.reset(before)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _print_problem(problem: Problem, *, more: str = "") -> None:
    text = f"{problem}\n  more: {more}" if more else str(problem)  # a problem's text is fit to be shown
    if not sys.stderr.isatty():
        print(f"{text}\n", file=sys.stderr)
        return
    from rich.text import Text

    from peftx_cli.terminal import console

    first, _, rest = text.partition("\n")
    shown = Text(first, style="bold red")
    if rest:
        shown.append(f"\n{rest}", style="not bold default")
    if problem.suggestion:
        shown.highlight_words([visible(problem.suggestion)], style="cyan")
    console(stderr=True).print(shown, "\n", soft_wrap=True)
