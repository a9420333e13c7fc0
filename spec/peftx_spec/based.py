"""A file that says what many pipelines have in common, and its base: a comparison's, or a search's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from pydantic import BaseModel

from peftx_spec.catalogue import Catalogue
from peftx_spec.compare import BaseFile, BaseSpec
from peftx_spec.compare_checks import check_base
from peftx_spec.errors import PeftxError
from peftx_spec.loader import Document, Fault, read_tolerantly
from peftx_spec.models import SourceSpec
from peftx_spec.problems import Path, Problem, SpecError
from peftx_spec.raw import Data, mapping_of
from peftx_spec.resolve import absolute
from peftx_spec.scalars import escape
from peftx_spec.trainer_names import by_our_names
from peftx_spec.translate import Finding, examine

TRAINING = frozenset({"inject", "train_step"})
"""Hooks of which one must be there for anything to train."""


@dataclass(frozen=True)
class Source:
    """Where the base stands: in the file's own document, or in one of its own."""

    data: Data
    document: Document
    prefix: Path

    def problem(self, finding: Finding) -> Problem:
        return problem_of(self.document, finding, (*self.prefix, *finding.path))

    @property
    def folder(self) -> FilePath:
        return self.document.folder or FilePath.cwd()


def problem_of(document: Document, finding: Finding, path: Path) -> Problem:
    words = {"expected": finding.expected, "got": finding.got, "suggestion": finding.suggestion}
    return document.problem(finding.message, document.position(path, key=finding.at_key), path, **words)


class BasedReader:
    """Collects the problems of a file with a base.

    Args:
        key: what the file is under: `compare`, `search`. of_training: settings that the base's training may not have,
            with what to do instead.
    """

    def __init__(
        self,
        document: Document,
        faults: list[Fault],
        catalogue: Catalogue,
        key: str,
        of_training: Mapping[str, str],
    ) -> None:
        document, faults = by_our_names(document, faults)
        if not isinstance(document.data, dict):
            raise TypeError(f"the loader gave {type(document.data).__name__}, not a mapping")
        self.document, self.data, self.catalogue = document, document.data, catalogue
        self.key, self.of_training = key, of_training
        self.own = mapping_of(self.data, key)
        self.problems = [fault.problem for fault in faults]
        self.silent = {fault.path for fault in faults if fault.path}

    @property
    def folder(self) -> FilePath:
        return self.document.folder or FilePath.cwd()

    def base(self) -> Source | None:
        """The base; None where the file names none."""
        found = self.own.get("base")
        if isinstance(found, dict):
            return Source(found, self.document, (self.key, "base"))
        if not isinstance(found, str) or not found:
            return None
        place = absolute(found, self.folder)
        try:
            document, faults = by_our_names(*read_tolerantly(place))
        except SpecError as error:
            self.problems += error.problems
            return None
        except PeftxError as error:
            self.note(
                [Finding((self.key, "base"), error.message, suggestion=error.hint or "", code=error.code)]
            )
            return None
        self.problems += [fault.problem for fault in faults]
        return Source(document.data, document, ()) if isinstance(document.data, dict) else None

    def whole_file(self, base: Source | None, own: list[Finding], model: type[BaseModel]) -> None:
        """Note what is wrong with the file: `own` findings, those of its model, and those of its base."""
        # The base has a model of its own: as one of two ways to write it, it would be said to be no text.
        stand_in = {"base": "base"} if isinstance(self.own.get("base"), dict) else {}
        data = {**self.data, self.key: {**self.own, **stand_in}} if self.own else self.data
        self.note([*own, *examine(model, data)])
        if base is None:
            return
        of_base = BaseFile if base.document is not self.document else BaseSpec
        seen: set[Path] = set()
        found = check_base(base.data, self.own.get("metric"), self.key, self.of_training)
        for finding in [*found, *examine(of_base, base.data)]:
            if finding.path == ("metric",):
                self.note([Finding((self.key, "metric"), finding.message, False, finding.expected, "",
                                   finding.suggestion)])  # fmt: skip
            elif finding.path not in seen:
                self.problems.append(base.problem(finding))
            seen.add(finding.path)

    def note(self, findings: list[Finding]) -> None:
        seen: set[Path] = set()
        for finding in findings:
            around = (finding.path[: end + 1] for end in range(len(finding.path)))
            if finding.path not in seen and self.silent.isdisjoint(around):
                self.problems.append(problem_of(self.document, finding, finding.path))
            seen.add(finding.path)

    def give_up(self) -> None:
        """Raise what was found so far, if anything was."""
        if self.problems:
            unique = dict.fromkeys(self.problems)  # what many rows say is said once
            raise SpecError(sorted(unique, key=lambda problem: (problem.file, problem.line, problem.column)))

    def metric(self, given: str | None, base: Source) -> str:
        """What is chosen by."""
        plain = {key: value for key, value in base.data.items() if key in BaseSpec.model_fields}
        return given or BaseSpec.model_validate(plain).evaluate[0].metric

    def validation(self, given: float | SourceSpec) -> float | SourceSpec:
        """With an absolute path."""
        if isinstance(given, SourceSpec):
            return given.model_copy(update={"path": absolute(given.path, self.folder)})
        return given

    def pipeline(self, stack: list[object], base: Source) -> tuple[Data, bool]:
        """The raw pipeline of a stack, and whether it trains; data that the stack does not read is left out."""
        hooks = self.hooks(stack)
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

    def hooks(self, stack: list[object]) -> frozenset[str]:
        found: set[str] = set()
        for item in stack:
            use = item.get("use") if isinstance(item, dict) else item
            if isinstance(use, str) and use in self.catalogue.names():
                try:
                    found |= self.catalogue.hooks(use)
                except PeftxError:
                    continue  # the checks of the row say why
        return frozenset(found)

    def place(self, path: Path) -> str:
        position = self.document.position(path, key=True)
        return f"{self.document.file}:{position.line}:{position.column}"


def written(value: object) -> str:
    """A value as an override has it."""
    return escape(json.dumps(value, ensure_ascii=False))


def one_line(problem: Problem) -> str:
    parts = [f"{problem.file}:{problem.line}:{problem.column}: {problem.message}"]
    if problem.expected:
        parts.append(f"expected {problem.expected}")
    if problem.got:
        parts.append(f"got {problem.got}")
    return ", ".join(parts) + (f" ({problem.suggestion})" if problem.suggestion else "")
