"""What a check is: a function of a `Case`, where it runs, and for which plugins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from peftx.testing.case import Case
from peftx.testing.subject import Subject

On = Literal[
    "package", "model", "text", "generative", "first", "first-text", "first-generative", "odd", "refused"
]
"""Once without a model; on every architecture, those that read text, those that generate; on the first of each of
these; on the odd ones; on those that the plugin does not work on."""


@dataclass(frozen=True)
class Check:
    """One behaviour that a plugin must show."""

    name: str
    run: Callable[[Case], None]
    on: On
    applies: Callable[[Subject], bool]
    one_of: str = ""
    """Of checks with the same word here one is drawn, where architectures are."""

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").split("\n")[0]


def check(
    *, on: On = "model", when: Callable[[Subject], bool] = lambda subject: True, one_of: str = ""
) -> Callable[[Callable[[Case], None]], Check]:
    """Turn `check_xxx(case)` into the check `xxx`; it raises AssertionError with the numbers."""

    def wrap(function: Callable[[Case], None]) -> Check:
        return Check(function.__name__.removeprefix("check_"), function, on, when, one_of)

    return wrap


def injects(subject: Subject) -> bool:
    return subject.implements("inject")


def trains(subject: Subject) -> bool:
    return subject.implements("inject", "train_step")


def changes_model(subject: Subject) -> bool:
    return subject.implements("inject", "compress")
