"""From a file or a text to a valid pipeline, or to everything that is wrong with it at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from peftx_spec.adapters import with_adapters
from peftx_spec.catalogue import Catalogue
from peftx_spec.checks import check
from peftx_spec.loader import Document, Fault, parse_tolerantly, read_tolerantly
from peftx_spec.models import Pipeline
from peftx_spec.overrides import Overridden, override
from peftx_spec.problems import Path, Problem, SpecError
from peftx_spec.resolve import from_here
from peftx_spec.several import pointer, several
from peftx_spec.trainer_names import by_our_names
from peftx_spec.translate import Finding, examine


@dataclass(frozen=True)
class LoadedSpec:
    """A valid pipeline, the document it was read from, and the overrides that went into it."""

    pipeline: Pipeline
    document: Document
    overridden: Overridden

    def problem(self, finding: Finding) -> Problem:
        """A problem that was found later, in the place where the spec or an override says so."""
        return _located(finding, self.document, self.overridden)

    def place(self, path: Path) -> str:
        """`file:line:column` of a path in the spec, or `--set #1` for what an override set."""
        source = self.overridden.source(path)
        if source is not None:
            return f"--set #{source[0] + 1}"
        position = self.document.position(path)
        return f"{self.document.file}:{position.line}:{position.column}"

    def place_of(self, id: str) -> str:
        """`file:line:column` of the stack's entry with this id. Raises `KeyError`."""
        index = self.pipeline.stack.index(self.pipeline.entry(id))
        return self.place(("stack", index))


def load_pipeline(
    path_or_text: str | os.PathLike[str], *, catalogue: Catalogue, overrides: Sequence[str] = ()
) -> Pipeline:
    """The pipeline that a file or a text declares.

    A string that has a line break or starts with `{`, and the empty one, is a text; all else is the path of a
    file. `overrides` are `target=value`: `lora.rank=16`, `train.steps=50`; the last one wins. Places in them are seen
    from the working directory, those in a file from its folder.

    Raises `SpecError` with all problems, and `PeftxError` for a file that cannot be read.
    """
    return load_spec(path_or_text, catalogue=catalogue, overrides=overrides).pipeline


def load_spec(
    path_or_text: str | os.PathLike[str],
    *,
    catalogue: Catalogue,
    overrides: Sequence[str] = (),
    name: str = "<text>",
    more: Callable[[Mapping[str, object]], Iterable[Finding]] | None = None,
) -> LoadedSpec:
    """As `load_pipeline`, and keeps the positions, so that later errors can name the place in the spec.

    `name` is what errors call a text; `more` finds what else is wrong in the data of a spec that has problems already.
    """
    document, faults = by_our_names(*_open(path_or_text, name))
    if not isinstance(document.data, dict):
        raise TypeError(f"the loader gave {type(document.data).__name__}, not a mapping")
    overridden = override(document.data, overrides)
    from_here(overridden)
    faults = [fault for fault in faults if overridden.source(fault.path) is None]
    overridden, unread = with_adapters(overridden, catalogue, document.folder)
    problems = [fault.problem for fault in faults]
    silent = {fault.path for fault in faults if fault.path}
    seen: set[Path] = set()
    for finding in [*unread, *check(overridden.data, catalogue), *examine(Pipeline, overridden.data)]:
        # the checks come first: they know more than the models about the same place
        around = (finding.path[: end + 1] for end in range(len(finding.path)))
        if finding.path in seen or not silent.isdisjoint(around):
            continue
        seen.add(finding.path)
        problems.append(_located(finding, document, overridden))
    problems += overridden.problems
    if problems:
        if more is not None:
            problems += [
                _located(finding, document, overridden)
                for finding in more(overridden.data)
                if finding.path not in seen
            ]
        raise SpecError(sorted(problems, key=lambda problem: _order(problem, document)))
    pipeline = Pipeline.model_validate(overridden.data, by_alias=True, by_name=False)
    return LoadedSpec(pipeline, document, overridden)


def _open(path_or_text: str | os.PathLike[str], name: str) -> tuple[Document, list[Fault]]:
    if isinstance(path_or_text, str):
        start = path_or_text.lstrip()[:1]
        if "\n" in path_or_text or start in ("", "{"):
            return parse_tolerantly(path_or_text, file=name)
    return read_tolerantly(path_or_text)


def _order(problem: Problem, document: Document) -> tuple[bool, int, str, int, int]:
    """The file first, then the overrides by number: `--set #2` before `--set #10`."""
    return problem.file != document.file, len(problem.file), problem.file, problem.line, problem.column


def _located(finding: Finding, document: Document, overridden: Overridden) -> Problem:
    words = {
        "expected": finding.expected, "got": finding.got, "suggestion": finding.suggestion, "code": finding.code
    }  # fmt: skip
    source = overridden.source(finding.path)
    if source is not None:
        asked = several(overridden.texts[source[0]]) if "number" in finding.expected else None
        if asked is not None:
            words["suggestion"] = pointer(overridden.data, *asked)
        return overridden.problem(finding.message, source, finding.path, **words)
    position = document.position(finding.path, key=finding.at_key)
    return document.problem(finding.message, position, finding.path, **words)
