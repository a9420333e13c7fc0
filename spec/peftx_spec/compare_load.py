"""From the file of a comparison to its rows: a pipeline each, or the reason why there is none."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from peftx_spec.based import BasedReader, Source, one_line, problem_of, written
from peftx_spec.catalogue import Catalogue
from peftx_spec.checks import check
from peftx_spec.compare import CompareFile, CompareSpec
from peftx_spec.compare_checks import OF_TRAINING, check_compare, value_text
from peftx_spec.loader import Document, Fault, read_tolerantly
from peftx_spec.models import Pipeline, SourceSpec
from peftx_spec.overrides import override
from peftx_spec.problems import Path, Problem
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.resolve import resolved
from peftx_spec.translate import Finding, examine


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


class _Reader(BasedReader):
    """Collects problems in two rounds: the file's own, then those of its rows."""

    def __init__(self, document: Document, faults: list[Fault], catalogue: Catalogue) -> None:
        super().__init__(document, faults, catalogue, "compare", OF_TRAINING)

    def loaded(self) -> LoadedCompare:
        base = self.base()
        self.whole_file(base, list(check_compare(self.data)), CompareFile)
        self.give_up()
        assert base is not None
        spec = CompareFile.model_validate(self.data, by_alias=True, by_name=False).compare
        rows = self._rows(spec, base)
        return LoadedCompare(spec, self.metric(spec.metric, base), rows, self.validation(spec.validation))

    def _rows(self, spec: CompareSpec, base: Source) -> tuple[Compared, ...]:
        """All rows. A name that nothing has is a slip and is raised; a value that does not fit makes a row invalid."""
        rows: list[Compared] = []
        every: list[Problem] = []
        for name, method in mapping_of(self.own, "methods").items():
            assert isinstance(method, dict)
            rates = spec.methods[name].learning_rate or spec.learning_rate
            for point in _points(method):
                row, problems = self._row(name, method, point, rates, base)
                rows.append(row)
                every += problems
        if not any(row.pipeline for row in rows):
            self.problems += every
        self.give_up()
        return tuple(rows)

    def _row(
        self, name: str, method: Data, point: Mapping[str, object], rates: tuple[float, ...], base: Source
    ) -> tuple[Compared, list[Problem]]:
        told = row_name(name, point)
        place = self.place(("compare", "methods", name))
        data, trains = self.pipeline(list_of(method, "stack"), base)
        overridden = override(data, [f"{key}={written(value)}" for key, value in point.items()])
        problems = []
        for problem in overridden.problems:
            key = list(point)[int(problem.file.removeprefix("--set #")) - 1]
            finding = Finding((), problem.message, expected=problem.expected, suggestion=problem.suggestion)
            problems.append(problem_of(self.document, finding, ("compare", "methods", name, "grid", key)))
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
            if is_a_name(finding):
                self.problems.append(found)
        if problems:
            reason = "; ".join(one_line(problem) for problem in problems)
            return Compared(told, name, place, point, rates, None, reason), problems
        pipeline = Pipeline.model_validate(overridden.data, by_alias=True, by_name=False)
        pipeline = resolved(pipeline, base.folder)
        return Compared(told, name, place, point, rates if trains else (), pipeline), []

    def _located(
        self, finding: Finding, method: str, key: str | None, point: Mapping[str, object], base: Source
    ) -> Problem:
        """A problem of a row, where the file says what causes it."""
        own: Path = ("compare", "methods", method)
        if key is not None:
            values = list_of(mapping_of(mapping_of(mapping_of(self.own, "methods"), method), "grid"), key)
            # At the key where the key is wrong, else at the value of this row.
            rest: Path = (
                ()
                if finding.at_key
                else ([value_text(value) for value in values].index(value_text(point[key])),)
            )
            return problem_of(self.document, finding, (*own, "grid", key, *rest))
        if finding.path[:1] == ("stack",):
            return problem_of(self.document, finding, (*own, *finding.path))
        return base.problem(finding)


def is_a_name(finding: Finding) -> bool:
    """Is it about a name that nothing has: of a plugin, or of an option."""
    return finding.path[:1] == ("stack",) and (finding.path[-1] == "use" or finding.at_key)


def _points(method: Data) -> Iterator[dict[str, object]]:
    """The combinations of a grid's values, the last key running fastest; one empty point without a grid."""
    grid = mapping_of(method, "grid")
    for values in itertools.product(*(list_of(grid, key) for key in grid)):
        yield dict(zip(grid, values, strict=True))


def row_name(method: str, point: Mapping[str, object]) -> str:
    """`lora rank=4`; the whole key where two keys end alike."""
    last = [key.rpartition(".")[2] for key in point]
    keys = [end if last.count(end) == 1 else key for key, end in zip(point, last, strict=True)]
    return " ".join(
        [method, *(f"{key}={value_text(value)}" for key, value in zip(keys, point.values(), strict=True))]
    )
