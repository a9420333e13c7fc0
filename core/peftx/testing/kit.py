"""The conformance kit: what every plugin must show, generated from its hooks and claims.

    test_conformance = conformance("propulsion")      # a test function for pytest, one case an architecture
    results = run_checks("propulsion")                # the same without pytest: `peftx check propulsion`

A check that does not apply is not generated, so the ids of a run say what was proven. With PEFTX_ARCHITECTURES=draw in
the environment pytest runs a plugin's first architecture and one more, which its source draws: seconds for hundreds of
plugins, which together run them all.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch

from peftx.composition.members import default_id
from peftx.composition.registry import Registry
from peftx.errors import OptionError, PeftxError, nearest
from peftx.kernel.members import line_in
from peftx.kernel.plugin import Plugin
from peftx.testing.case import Case
from peftx.testing.checks import CHECKS, Check
from peftx.testing.models import ARCHITECTURES
from peftx.testing.subject import GENERATIVE, ODD, TEXT, Subject, default_models, default_rows

if TYPE_CHECKING:
    import pytest

Outcome = Literal["passed", "failed", "expected", "not-run"]

DRAW = "PEFTX_ARCHITECTURES"
"""Environment variable: `all`, or `draw` for the first architecture and one more."""


@dataclass(frozen=True)
class Planned:
    """One check on one architecture ("" where no model is built); `expected` says why it is to fail."""

    check: Check
    subject: Subject
    arch: str
    expected: str | None = None

    @property
    def id(self) -> str:
        return f"{self.arch}-{self.check.name}" if self.arch else self.check.name

    def run(self) -> None:
        """Run the check in a world of its own; torch's, Python's and numpy's generators come back as they were.

        Raises:
            AssertionError: the plugin does not show it; or it does, and was expected not to.
        """
        # The legacy global generator of numpy is one of those to be left alone.
        state = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
        try:
            with tempfile.TemporaryDirectory(prefix="peftx-conformance-") as folder:
                self._run(Case(self.subject, self.arch, Path(folder)))
        finally:
            random.setstate(state[0])
            numpy.random.set_state(state[1])  # noqa: NPY002
            torch.random.set_rng_state(state[2])

    def _run(self, case: Case) -> None:
        if self.expected is None:
            self.check.run(case)
            return
        try:
            self.check.run(case)
        except (AssertionError, PeftxError):
            return
        raise AssertionError(f"{self.id} passes, and was expected to fail ({self.expected}); take it out")


@dataclass(frozen=True)
class CheckResult:
    """How one check went; `expected`: it failed, as its author says it must."""

    name: str
    arch: str
    outcome: Outcome
    seconds: float
    message: str = ""

    @property
    def id(self) -> str:
        return f"{self.arch}-{self.name}" if self.arch else self.name


def conformance(
    plugin: str | type[Plugin],
    *,
    options: Mapping[str, Any] | None = None,
    models: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    not_on: Mapping[str, str] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Callable[[list[Planned], pytest.Subtests], None]:
    """A pytest function with one case for each architecture, in which each check is a subtest that is named like
    `llama-merge_equals_unmerged`; `package` holds those that need no model.

    Args:
        plugin: an installed plugin's name, or a class.
        options: of the plugin; `Plugin.example` if left out.
        models: architectures; the core's five and `Plugin.architectures` if left out, as far as the hooks call for.
        expected_failures: check or `arch-check` -> reason; `Plugin.exempt` if left out. Strict: one that passes is a
            failure.
        not_on: architecture -> why the plugin does not work there; `Plugin.refuses` if left out. That it refuses,
            before anything runs, is then checked.
        rows: to train and evaluate on, where those of the format that the plugin takes do not do.

    Raises:
        PeftxError: an unknown check, architecture or plugin, another word than `all` or `draw` in the environment.
    """
    import pytest

    planned = plan_checks(
        plugin, options=options, models=models, expected_failures=expected_failures, not_on=not_on, rows=rows
    )
    by_arch: dict[str, list[Planned]] = {}
    for item in drawn(planned):
        by_arch.setdefault(item.arch or "package", []).append(item)

    @pytest.mark.parametrize("checks", [pytest.param(items, id=arch) for arch, items in by_arch.items()])
    def test_conformance(checks: list[Planned], subtests: pytest.Subtests) -> None:
        settle()
        for item in checks:
            with subtests.test(item.id):
                item.run()

    return test_conformance


def drawn(planned: Sequence[Planned]) -> list[Planned]:
    """Those that are to run: all, or as the environment asks for (see above).

    The second architecture hangs on the plugin's name and source, so that a changed plugin may meet another one; of
    the odd ones one is drawn likewise. What runs on the first architecture of a kind, or is to be refused, always does;
    of the companions that it has to go with, one does.
    """
    asked = os.environ.get(DRAW, "all")
    if asked not in ("all", "draw"):
        raise OptionError(f"{DRAW} is '{asked}'", hint="all, or draw")
    if asked == "all" or not planned:
        return list(planned)
    subject = planned[0].subject
    source = Path(inspect.getfile(subject.plugin)).read_bytes()
    seed = int.from_bytes(hashlib.sha256(subject.id.encode() + source).digest()[:8], "big")
    first, *others = subject.models or ("",)
    chosen = {first, *others[seed % len(others) :][:1]} if others else {first}
    odd = list(dict.fromkeys(item.arch for item in planned if item.check.on == "odd"))
    chosen |= {arch for i, arch in enumerate(odd) if i == seed % len(odd)}
    always = ("package", "first", "first-text", "first-generative", "refused")
    left = [item for item in planned if item.arch in chosen or item.check.on in always]
    groups: dict[str, list[Planned]] = {}
    for item in left:
        if item.check.one_of:
            groups.setdefault(item.check.one_of, []).append(item)
    out = {id(item) for each in groups.values() for i, item in enumerate(each) if i != seed % len(each)}
    return [item for item in left if id(item) not in out]


@cache
def settle() -> None:
    """Import what a first training imports, and take all that lives now out of the garbage collector's sight:
    accelerate collects after every training, which is most of the time of a short one."""
    for name in ("accelerate", "transformers.trainer", "peftx.engines.training.run", "peftx.pipeline"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@contextmanager
def _settled() -> Iterator[None]:
    """The same for a while: what lives here is the caller's."""
    if gc.get_freeze_count():
        yield
        return
    settle.__wrapped__()
    try:
        yield
    finally:
        gc.unfreeze()


def run_checks(
    plugin: str | type[Plugin],
    *,
    options: Mapping[str, Any] | None = None,
    models: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    not_on: Mapping[str, str] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    only: Sequence[str] | None = None,
    progress: Callable[[int, int, CheckResult], None] | None = None,
    deadline: float | None = None,
) -> list[CheckResult]:
    """Run the checks one after another, without pytest.

    Args:
        only: checks or `arch-check` ids to run; all if left out.
        progress: called with (checks done, checks planned, the last result).
        deadline: seconds; what has not begun by then is `not-run`.

    Raises:
        PeftxError: an unknown check, architecture or plugin.
    """
    planned = plan_checks(
        plugin, options=options, models=models, expected_failures=expected_failures, not_on=not_on, rows=rows
    )
    if only is not None:
        _check_names(only, planned)
        planned = [item for item in planned if item.id in only or item.check.name in only]
    results: list[CheckResult] = []
    began = time.perf_counter()
    with _settled():
        for item in planned:
            if deadline is not None and time.perf_counter() - began >= deadline:
                said = f"the deadline of {deadline:g} s was over"
                result = CheckResult(item.check.name, item.arch, "not-run", 0.0, said)
            else:
                result = _result(item)
            results.append(result)
            if progress is not None:
                progress(len(results), len(planned), result)
    return results


def _result(item: Planned) -> CheckResult:
    started = time.perf_counter()
    outcome: Outcome = "passed" if item.expected is None else "expected"
    message = item.expected or ""
    try:
        item.run()
    except AssertionError as error:
        outcome, message = "failed", str(error) or "assertion failed"
    except Exception as error:  # noqa: BLE001  a plugin may raise anything; that is what the report shows
        line = line_in(error, item.subject.plugin.__module__)
        outcome, message = "failed", f"{type(error).__name__}: {error}" + (f" ({line})" if line else "")
    return CheckResult(item.check.name, item.arch, outcome, time.perf_counter() - started, message)


def plan_checks(
    plugin: str | type[Plugin],
    *,
    options: Mapping[str, Any] | None = None,
    models: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    not_on: Mapping[str, str] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> list[Planned]:
    """Which checks a plugin gets, in the order they run; nothing is built."""
    cls, id = (Registry().load(plugin), plugin) if isinstance(plugin, str) else (plugin, default_id(plugin))
    own = options is None or dict(options) == dict(cls.example)  # what the class says is of its example
    refused = dict(not_on if not_on is not None else cls.refuses)
    chosen = [arch for arch in (default_models(cls) if models is None else models) if arch not in refused]
    for arch in (*chosen, *refused):
        if arch not in ARCHITECTURES:
            raise OptionError(
                f"no tiny model of '{arch}'",
                hint=nearest(arch, ARCHITECTURES) or f"there are: {', '.join(ARCHITECTURES)}",
            )
    subject = Subject(
        cls,
        id,
        dict(cls.example if options is None else options),
        tuple(chosen),
        default_rows(cls) if rows is None else tuple(rows),
        refused,
    )
    reasons = dict(expected_failures if expected_failures is not None else cls.exempt if own else {})
    bare = [
        Planned(check, subject, arch)
        for check in CHECKS
        if check.applies(subject)
        for arch in _architectures(check, subject)
    ]
    _check_names(reasons, bare)
    return [
        Planned(item.check, subject, item.arch, reasons.get(item.id, reasons.get(item.check.name)))
        for item in bare
    ]


def _architectures(check: Check, subject: Subject) -> list[str]:
    chosen = list(subject.models)
    match check.on:
        case "package":
            return [""]
        case "model":
            return chosen
        case "text":
            return [arch for arch in chosen if arch in TEXT]
        case "generative":
            return [arch for arch in chosen if arch in GENERATIVE]
        case "first":
            return chosen[:1]
        case "first-text":
            return [arch for arch in chosen if arch in TEXT][:1]
        case "first-generative":
            return [arch for arch in chosen if arch in GENERATIVE][:1]
        case "odd":
            text_only = subject.implements("compress")  # calibration is text
            return [
                a
                for a in ODD
                if a not in chosen and a not in subject.refused and (a in TEXT or not text_only)
            ]
        case "refused":
            return list(subject.refused)


def _check_names(names: Sequence[str] | Mapping[str, str], planned: Sequence[Planned]) -> None:
    known = dict.fromkeys([item.check.name for item in planned] + [item.id for item in planned])
    for name in names:
        if name not in known:
            raise OptionError(
                f"no check '{name}' is generated for this plugin",
                hint=nearest(name, known)
                or f"there are: {', '.join(dict.fromkeys(i.check.name for i in planned))}",
            )
