"""From the file of a search to its stacks, and from a point of its space to a pipeline."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from peftx_spec.based import BasedReader, Source, one_line, problem_of, written
from peftx_spec.catalogue import Catalogue
from peftx_spec.checks import check
from peftx_spec.compare_checks import value_text
from peftx_spec.errors import PeftxError, nearest
from peftx_spec.loader import Document, Fault, read_tolerantly
from peftx_spec.models import DataSpec, Pipeline, SourceSpec
from peftx_spec.overrides import Overridden, entry_ids, override
from peftx_spec.problems import Path, Problem, SpecError
from peftx_spec.raw import Data, list_of, mapping_of
from peftx_spec.resolve import absolute, resolved
from peftx_spec.search import SearchFile, SearchSpec, SpanSpec
from peftx_spec.search_checks import OF_TRAINING, check_search
from peftx_spec.translate import Finding, examine, examine_options

Point = Mapping[str, object]
"""Key of the space -> its value."""


class Samplers(Protocol):
    """Those who can propose points, by name."""

    def names(self) -> list[str]: ...

    def config(self, name: str) -> type[BaseModel]: ...


@dataclass(frozen=True)
class Candidate:
    """One stack that a search may take.

    Attributes:
        name: its ids, `lora + prefixquant`. keys: of the space, those that are its own or of its training.
        place: `file:line:column` of the stack. trains: does anything train.
        probes: points that were looked at, both ends of each key among them; they are valid one by one.
    """

    name: str
    place: str
    keys: tuple[str, ...]
    trains: bool
    probes: tuple[Point, ...] = field(repr=False)
    data: Data = field(repr=False)
    base: Source = field(repr=False)

    def pipeline(self, point: Point) -> Pipeline:
        """The pipeline of a point, with absolute paths.

        Raises:
            SpecError: values that do not fit each other.
        """
        found = override(self.data, [f"{key}={written(value)}" for key, value in point.items()])
        problems = [
            found.problem(finding.message, found.source(finding.path) or (0, 1), finding.path)
            for finding in examine(Pipeline, found.data)
        ]
        if problems:
            raise SpecError(problems)
        pipeline = Pipeline.model_validate(found.data, by_alias=True, by_name=False)
        return resolved(pipeline, self.base.folder)

    @property
    def rows(self) -> SourceSpec | None:
        """The training rows of the base, which a pipeline of a stack that does not read them lacks."""
        data = DataSpec.model_validate(mapping_of(self.base.data, "data"))
        return (
            None
            if data.train is None
            else data.train.model_copy(update={"path": absolute(data.train.path, self.base.folder)})
        )


@dataclass(frozen=True)
class LoadedSearch:
    """A search that can be run."""

    spec: SearchSpec
    metric: str
    candidates: tuple[Candidate, ...]
    validation: float | SourceSpec
    """With an absolute path."""


def load_search(path: str | os.PathLike[str], *, catalogue: Catalogue, samplers: Samplers) -> LoadedSearch:
    """Read and check the file of a search; its stacks too, each with both ends of all that is varied.

    Raises:
        SpecError: what is wrong with the file, all at once. PeftxError: the file cannot be read.
    """
    return _Reader(*read_tolerantly(path), catalogue, samplers).loaded()


class _Reader(BasedReader):
    """Collects problems in two rounds: the file's own, then those of its stacks."""

    def __init__(
        self, document: Document, faults: list[Fault], catalogue: Catalogue, samplers: Samplers
    ) -> None:
        super().__init__(document, faults, catalogue, "search", OF_TRAINING)
        self.samplers = samplers

    def loaded(self) -> LoadedSearch:
        base = self.base()
        self.whole_file(base, [*check_search(self.data), *self._sampler()], SearchFile)
        self.give_up()
        assert base is not None
        spec = SearchFile.model_validate(self.data, by_alias=True, by_name=False).search
        candidates = self._candidates(spec, base)
        self.give_up()
        return LoadedSearch(
            spec, self.metric(spec.metric, base), candidates, self.validation(spec.validation)
        )

    def _sampler(self) -> list[Finding]:
        found = self.own.get("sampler")
        use = found.get("use") if isinstance(found, dict) else found
        if not isinstance(use, str):
            return []
        bare = not isinstance(found, dict)
        path: Path = ("search", "sampler") if bare else ("search", "sampler", "use")
        names = self.samplers.names()
        if use not in names:
            return [Finding(path, f"no sampler '{use}' is installed", expected=f"one of {', '.join(names)}",
                            suggestion=nearest(use, names))]  # fmt: skip
        try:
            config = self.samplers.config(use)
        except PeftxError as error:
            return [Finding(path, error.message, suggestion=error.hint or "")]
        options = mapping_of(found, "with") if isinstance(found, dict) else {}
        return [
            Finding(("search", "sampler", "with", *each.path), each.message, each.at_key, each.expected, each.got,
                    each.suggestion)
            for each in examine_options(config, options, plugin=use)
        ]  # fmt: skip

    def _candidates(self, spec: SearchSpec, base: Source) -> tuple[Candidate, ...]:
        slots = list_of(self.own, "stack")
        options = [list(enumerate(slot)) if isinstance(slot, list) else [(None, slot)] for slot in slots]
        found: list[Candidate] = []
        for drawn in itertools.product(*options):
            places: list[Path] = []
            stack: list[object] = []
            for slot, (index, item) in enumerate(drawn):
                if item is not None:
                    own: Path = ("search", "stack", slot)
                    places.append(own if index is None else (*own, index))
                    stack.append(item)
            candidate = self._candidate(spec, base, stack, places)
            if candidate.name in (other.name for other in found):
                finding = Finding((), f"two stacks are named '{candidate.name}'",
                                  suggestion="give one of the plugins another 'id:'")  # fmt: skip
                self.problems.append(problem_of(self.document, finding, (places or [("search", "stack")])[0]))
            found.append(candidate)
        return tuple(found)

    def _candidate(
        self, spec: SearchSpec, base: Source, stack: list[object], places: list[Path]
    ) -> Candidate:
        data, trains = self.pipeline(stack, base)
        ids = entry_ids(data)
        heads = {*ids, *(("train",) if trains else ())}
        keys = tuple(key for key in spec.space if key.partition(".")[0] in heads)
        first = {key: _ends(spec.space[key])[0] for key in keys}
        points = [first, *({**first, key: end} for key in keys for end in _ends(spec.space[key])[1:])]
        for point in points:
            self._examine(data, point, base, places)
        name = " + ".join(ids) or "base"
        place = self.place(places[0] if places else ("search", "stack"))
        return Candidate(name, place, keys, trains, tuple(points), data, base)

    def _examine(self, data: Data, point: dict[str, object], base: Source, places: list[Path]) -> None:
        """Note what is wrong with a point; what several points say is said once."""
        done = override(data, [f"{key}={written(value)}" for key, value in point.items()])
        for problem in done.problems:
            key = list(point)[int(problem.file.removeprefix("--set #")) - 1]
            finding = Finding((), problem.message, expected=problem.expected, suggestion=problem.suggestion)
            self._note_once(problem_of(self.document, finding, ("search", "space", key)))
        seen: set[Path] = set()
        for finding in [*check(done.data, self.catalogue), *examine(Pipeline, done.data)]:
            if finding.path not in seen:
                self._note_once(self._located(finding, done, point, base, places))
            seen.add(finding.path)

    def _note_once(self, problem: Problem) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _located(
        self, finding: Finding, done: Overridden, point: dict[str, object], base: Source, places: list[Path]
    ) -> Problem:
        """A problem of a stack, where the file says what causes it."""
        source = done.source(finding.path)
        if source is not None:
            key = list(point)[source[0]]
            return problem_of(
                self.document, finding, ("search", "space", key, *self._rest(finding, key, point))
            )
        if finding.path[:1] == ("stack",):
            index = finding.path[1] if len(finding.path) > 1 else 0
            place = places[index] if isinstance(index, int) and index < len(places) else ("search", "stack")
            return problem_of(self.document, finding, (*place, *finding.path[2:]))
        return base.problem(finding)

    def _rest(self, finding: Finding, key: str, point: Mapping[str, object]) -> Path:
        """Where below its key the value of a point stands; nowhere if the key is what is wrong."""
        values = mapping_of(self.own, "space")[key]
        if finding.at_key:
            return ()
        if isinstance(values, list):
            return ([value_text(value) for value in values].index(value_text(point[key])),)
        assert isinstance(values, dict)
        ((kind, ends),) = values.items()
        return (kind, ends.index(point[key]))


def _ends(space: SpanSpec | tuple[Any, ...]) -> tuple[Any, ...]:
    """What is looked at of a key before anything runs: all values of a choice, both ends of a span."""
    return space.ends if isinstance(space, SpanSpec) else space


def reason_of(error: PeftxError) -> str:
    """An error as a trial's reason."""
    if isinstance(error, SpecError):
        return "; ".join(one_line(problem) for problem in error.problems)
    return error.message + (f" ({error.hint})" if error.hint else "")
