"""From the file of a comparison to its rows: a pipeline each, or the reason why there is none."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath

from peftx_spec.catalogue import Catalogue
from peftx_spec.checks import check
from peftx_spec.compare import BaseFile, BaseSpec, CompareFile, CompareSpec
from peftx_spec.compare_checks import check_base, check_compare, value_text
from peftx_spec.errors import PeftxError
from peftx_spec.loader import Document, Fault, read_tolerantly
from peftx_spec.models import Pipeline, SourceSpec
from peftx_spec.overrides import override
from peftx_spec.problems import Path, Problem, SpecError
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.resolve import absolute, resolved
from peftx_spec.scalars import escape
from peftx_spec.translate import Finding, examine

TRAINING = frozenset({"inject", "train_step"})
"""Hooks of which one must be there for anything to train."""


@dataclass(frozen=True)
class Compared:
    """One row: a method, or a point of its grid.

    Attributes:
        name: of the row, `lora rank=4`. options: the point, `{"lora.rank": 4}`. place: `file:line:column`.
        learning_rates: what is tried; empty where nothing trains.
        pipeline: with absolute paths, and without steps, rate and seed of its own; None where it is invalid.
        reason: why it is.
    """

    name: str
    method: str
    place: str
    options: Mapping[str, object] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    pipeline: Pipeline | None = None
    reason: str = ""


@dataclass(frozen=True)
class LoadedCompare:
    """A comparison that can be run: at least one row has a pipeline."""

    spec: CompareSpec
    metric: str
    rows: tuple[Compared, ...]
    validation: float | SourceSpec
    """With an absolute path."""


def load_compare(path: str | os.PathLike[str], *, catalogue: Catalogue) -> LoadedCompare:
    """Read and check the file of a comparison; options and stacks of its rows too. No plugin is loaded before the rest
    of the file is known to be right.

    Raises:
        SpecError: what is wrong with the file, all at once; names that nothing has (of plugins, of options); or every
            row is invalid.
        PeftxError: the file cannot be read.
    """
    return _Reader(*read_tolerantly(path), catalogue).loaded()


@dataclass(frozen=True)
class _Source:
    """Where the base stands: in the comparison's document, or in one of its own."""

    data: Data
    document: Document
    prefix: Path

    def problem(self, finding: Finding) -> Problem:
        return _problem(self.document, finding, (*self.prefix, *finding.path))


def _problem(document: Document, finding: Finding, path: Path) -> Problem:
    words = {"expected": finding.expected, "got": finding.got, "suggestion": finding.suggestion}
    return document.problem(finding.message, document.position(path, key=finding.at_key), path, **words)


class _Reader:
    """Collects problems in two rounds: the file's own, then those of its rows."""

    def __init__(self, document: Document, faults: list[Fault], catalogue: Catalogue) -> None:
        if not isinstance(document.data, dict):
            raise TypeError(f"the loader gave {type(document.data).__name__}, not a mapping")
        self.document, self.data, self.catalogue = document, document.data, catalogue
        self.compare = mapping_of(self.data, "compare")
        self.problems = [fault.problem for fault in faults]
        self.silent = {fault.path for fault in faults if fault.path}

    def loaded(self) -> LoadedCompare:
        base = self._base()
        self._whole_file(base)
        self._raise()
        assert base is not None
        spec = CompareFile.model_validate(self.data, by_alias=True, by_name=False).compare
        rows = self._rows(spec, base)
        folder = self.document.folder or FilePath.cwd()
        validation = spec.validation
        if isinstance(validation, SourceSpec):
            validation = validation.model_copy(update={"path": absolute(validation.path, folder)})
        metric = spec.metric or BaseSpec.model_validate(_plain(base.data)).evaluate[0].metric
        return LoadedCompare(spec, metric, rows, validation)

    # -- the file ----------------------------------------------------------------------------------------------------

    def _base(self) -> _Source | None:
        """The base; None where the file names none."""
        found = self.compare.get("base")
        if isinstance(found, dict):
            return _Source(found, self.document, ("compare", "base"))
        if not isinstance(found, str) or not found:
            return None
        place = absolute(found, self.document.folder or FilePath.cwd())
        try:
            document, faults = read_tolerantly(place)
        except SpecError as error:
            self.problems += error.problems
            return None
        except PeftxError as error:
            self._note([Finding(("compare", "base"), error.message, suggestion=error.hint or "")])
            return None
        self.problems += [fault.problem for fault in faults]
        return _Source(document.data, document, ()) if isinstance(document.data, dict) else None

    def _whole_file(self, base: _Source | None) -> None:
        # The base has a model of its own: as one of two ways to write it, it would be said to be no text.
        stand_in = {"base": "base"} if isinstance(self.compare.get("base"), dict) else {}
        data = {**self.data, "compare": {**self.compare, **stand_in}} if self.compare else self.data
        self._note([*check_compare(self.data), *examine(CompareFile, data)])
        if base is None:
            return
        model = BaseFile if base.document is not self.document else BaseSpec
        seen: set[Path] = set()
        for finding in [*check_base(base.data, self.compare.get("metric")), *examine(model, base.data)]:
            if finding.path == ("metric",):
                self._note([Finding(("compare", "metric"), finding.message, False, finding.expected, "",
                                    finding.suggestion)])  # fmt: skip
            elif finding.path not in seen:
                self.problems.append(base.problem(finding))
            seen.add(finding.path)

    def _note(self, findings: list[Finding]) -> None:
        seen: set[Path] = set()
        for finding in findings:
            around = (finding.path[: end + 1] for end in range(len(finding.path)))
            if finding.path not in seen and self.silent.isdisjoint(around):
                self.problems.append(_problem(self.document, finding, finding.path))
            seen.add(finding.path)

    def _raise(self) -> None:
        if self.problems:
            unique = dict.fromkeys(self.problems)  # what many rows say is said once
            raise SpecError(sorted(unique, key=lambda problem: (problem.file, problem.line, problem.column)))

    # -- its rows ----------------------------------------------------------------------------------------------------

    def _rows(self, spec: CompareSpec, base: _Source) -> tuple[Compared, ...]:
        """All rows. A name that nothing has is a slip and is raised; a value that does not fit makes a row invalid."""
        rows: list[Compared] = []
        every: list[Problem] = []
        for name, method in mapping_of(self.compare, "methods").items():
            assert isinstance(method, dict)
            rates = spec.methods[name].learning_rate or spec.learning_rate
            for point in _points(method):
                row, problems = self._row(name, method, point, rates, base)
                rows.append(row)
                every += problems
        if not any(row.pipeline for row in rows):
            self.problems += every
        self._raise()
        return tuple(rows)

    def _row(
        self, name: str, method: Data, point: Mapping[str, object], rates: tuple[float, ...], base: _Source
    ) -> tuple[Compared, list[Problem]]:
        told = _row_name(name, point)
        place = self._place(("compare", "methods", name))
        data, trains = self._pipeline(method, base)
        overridden = override(data, [f"{key}={_written(value)}" for key, value in point.items()])
        problems = []
        for problem in overridden.problems:
            key = list(point)[int(problem.file.removeprefix("--set #")) - 1]
            finding = Finding((), problem.message, expected=problem.expected, suggestion=problem.suggestion)
            problems.append(_problem(self.document, finding, ("compare", "methods", name, "grid", key)))
        seen: set[Path] = set()
        for finding in [*check(overridden.data, self.catalogue), *examine(Pipeline, overridden.data)]:
            if finding.path in seen:
                continue
            seen.add(finding.path)
            source = overridden.source(finding.path)
            found = self._located(
                finding, name, None if source is None else list(point)[source[0]], point, base
            )
            problems.append(found)
            if _is_a_name(finding):
                self.problems.append(found)
        if problems:
            reason = "; ".join(_one_line(problem) for problem in problems)
            return Compared(told, name, place, point, rates, None, reason), problems
        pipeline = Pipeline.model_validate(overridden.data, by_alias=True, by_name=False)
        pipeline = resolved(pipeline, base.document.folder or FilePath.cwd())
        return Compared(told, name, place, point, rates if trains else (), pipeline), []

    def _pipeline(self, method: Data, base: _Source) -> tuple[Data, bool]:
        """The raw pipeline of a method without its grid, and whether it trains; data that its stack does not read is
        left out."""
        stack = list_of(method, "stack")
        hooks = self._hooks(stack)
        trains = bool(hooks & TRAINING)
        sources = dict(mapping_of(base.data, "data"))
        if "compress" not in hooks:
            sources.pop("calibration", None)
        reads = trains or "prepare_data" in hooks or ("compress" in hooks and "calibration" not in sources)
        if not reads and "holdout" not in sources:
            sources.pop("train", None)
        data: Data = {**base.data, "peftx": 1, "data": sources, "stack": stack}
        data.pop("train", None)
        if trains:
            data["train"] = base.data.get("train") or {}
        return data, trains

    def _hooks(self, stack: list[object]) -> frozenset[str]:
        found: set[str] = set()
        for item in stack:
            use = item.get("use") if isinstance(item, dict) else item
            if isinstance(use, str) and use in self.catalogue.names():
                try:
                    found |= self.catalogue.hooks(use)
                except PeftxError:
                    continue  # the checks of the row say why
        return frozenset(found)

    def _located(
        self, finding: Finding, method: str, key: str | None, point: Mapping[str, object], base: _Source
    ) -> Problem:
        """A problem of a row, where the file says what causes it."""
        own: Path = ("compare", "methods", method)
        if key is not None:
            values = list_of(mapping_of(mapping_of(mapping_of(self.compare, "methods"), method), "grid"), key)
            # At the key where the key is wrong, else at the value of this row.
            rest: Path = (
                ()
                if finding.at_key
                else ([value_text(value) for value in values].index(value_text(point[key])),)
            )
            return _problem(self.document, finding, (*own, "grid", key, *rest))
        if finding.path[:1] == ("stack",):
            return _problem(self.document, finding, (*own, *finding.path))
        return base.problem(finding)

    def _place(self, path: Path) -> str:
        position = self.document.position(path, key=True)
        return f"{self.document.file}:{position.line}:{position.column}"


def _is_a_name(finding: Finding) -> bool:
    """Is it about a name that nothing has: of a plugin, or of an option."""
    return finding.path[:1] == ("stack",) and (finding.path[-1] == "use" or finding.at_key)


def _points(method: Data) -> Iterator[dict[str, object]]:
    """The combinations of a grid's values, the last key running fastest; one empty point without a grid."""
    grid = mapping_of(method, "grid")
    for values in itertools.product(*(list_of(grid, key) for key in grid)):
        yield dict(zip(grid, values, strict=True))


def _row_name(method: str, point: Mapping[str, object]) -> str:
    """`lora rank=4`; the whole key where two keys end alike."""
    last = [key.rpartition(".")[2] for key in point]
    keys = [end if last.count(end) == 1 else key for key, end in zip(point, last, strict=True)]
    return " ".join(
        [method, *(f"{key}={value_text(value)}" for key, value in zip(keys, point.values(), strict=True))]
    )


def _written(value: object) -> str:
    return escape(json.dumps(value, ensure_ascii=False))


def _one_line(problem: Problem) -> str:
    parts = [f"{problem.file}:{problem.line}:{problem.column}: {problem.message}"]
    if problem.expected:
        parts.append(f"expected {problem.expected}")
    if problem.got:
        parts.append(f"got {problem.got}")
    return ", ".join(parts) + (f" ({problem.suggestion})" if problem.suggestion else "")


def _plain(data: Data) -> Data:
    return {key: value for key, value in data.items() if key in BaseSpec.model_fields}
