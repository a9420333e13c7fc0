"""Phases of a training run: a plugin says which it has, and plan, step and progress say which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftx.errors import OptionError


@dataclass(frozen=True)
class Phase:
    """One phase of a run."""

    name: str
    share: float | None = None
    """Below 1: of the run's steps, one at least; from 1 on: how many steps; None: those that are left."""


@dataclass(frozen=True)
class Span:
    """A phase of a run whose length is known: optimizer steps `first` to `end - 1`; `end` is None of an endless run."""

    name: str
    first: int
    end: int | None

    def __str__(self) -> str:
        return f"{self.name} {'' if self.end is None else self.end - self.first}".rstrip()


def at(lying: Sequence[Span], index: int) -> Span:
    """The one of a run's spans that its optimizer step `index`, from 0, is in; the last one behind its end."""
    return next((span for span in lying if span.end is None or index < span.end), lying[-1])


def spans(phases: Sequence[Phase], total: int | None, *, owner: str) -> list[Span]:
    """Where the phases of a run of `total` steps lie (None: nobody knows).

    Raises:
        PeftxError: they do not fit, or are shares of a length that is not known.
    """
    found: list[Span] = []
    first = 0
    for index, phase in enumerate(phases):
        last = index == len(phases) - 1
        if phase.share is None:
            if not last:
                raise OptionError(
                    f"{owner}: only the last phase takes the steps that are left, and '{phase.name}' is none"
                )
            end = total
        elif phase.share >= 1:
            end = first + int(phase.share)
        elif total is None:
            raise OptionError(
                f"{owner}: the phase '{phase.name}' is {phase.share:g} of a run whose length is not known",
                hint="say it: stack.train_step(..., total=steps); stack.train does",
            )
        else:
            end = first + max(1, round(phase.share * total))
        left = total is None or (
            end is not None and (end < total or (last and end <= total and first < total))
        )
        if not left:
            rest = [other.name for other in phases[index + 1 :]]
            raise OptionError(
                f"{owner}: '{phase.name}' takes the run's {total} steps up to {end}"
                + (f", and none is left for '{rest[0]}'" if rest else ""),
                hint=f"{f'more than {end}' if (phase.share or 0) >= 1 else 'more'} steps, or a shorter phase",
            )
        found.append(Span(phase.name, first, end))
        first = end if end is not None else first
    return found
