"""What is wrong with a pipeline that only its data files and its plugins' claims can tell, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from peftx.engines.reporting import check_reports
from peftx_cli import failures, selectors
from peftx_cli.peek import Unfit, labels, look
from peftx_spec.checks import metric_for
from peftx_spec.errors import DataError, PeftxError, nearest
from peftx_spec.models import METRIC_FORMATS, SourceSpec
from peftx_spec.order import stages_of
from peftx_spec.problems import Path, SpecError
from peftx_spec.resolve import absolute
from peftx_spec.training import TrainSpec
from peftx_spec.translate import Finding

if TYPE_CHECKING:
    from peftx.composition.registry import Registry
    from peftx.kernel.members import Member
    from peftx_spec import LoadedSpec, Pipeline


MOST_NAMES = 12
"""More of them a message does not list."""


@dataclass(frozen=True)
class Source:
    """A data file of a pipeline, and where the spec names it."""

    place: Path
    file: str
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None


def check(loaded: LoadedSpec, pipeline: Pipeline, registry: Registry) -> None:
    """Look at the data's first rows and at what the plugins claim. `pipeline` is the loaded one, its paths absolute.

    Raises:
        SpecError: everything that is wrong, each with its place.
    """
    formats: dict[Path, str | None] = {}
    findings: list[Finding] = []
    members = members_of(loaded, pipeline, registry) if pipeline.stack else []
    training = trained(pipeline, registry) if pipeline.stack else []
    as_they_are = not any(
        member.implements("prepare_data") for member in members
    )  # or a plugin may mend them
    for source in _sources(pipeline):
        try:
            formats[source.place] = look(
                source.file, format=source.format, columns=source.columns, limit=source.limit,
                learned=as_they_are and source.place in training,
            )  # fmt: skip
        except Unfit as error:
            blamed = _blamed(loaded.overridden.data, source.place, error.part)
            findings.append(Finding(blamed, error.message, suggestion=error.hint, code=DataError.code))
    findings += selectors.findings(loaded.overridden.data, registry, loaded.document.folder or FilePath.cwd())
    findings += _metrics(pipeline, formats)
    findings += _tasks(pipeline)
    findings += _reports(pipeline)
    if pipeline.stack:
        for place in training:
            findings += _rows(members, place, formats.get(place))
        classified = [
            source
            for source in _sources(pipeline)
            if formats.get(source.place) == "classification"
            and (training or source.place != ("data", "train"))
        ]
        findings += _labels(members, classified)
        if pipeline.data.calibration is None and pipeline.data.train is None:
            findings += _calibration(members)
    if findings:
        raise SpecError([loaded.problem(finding) for finding in findings])


def further(data: dict[str, Any], registry: Registry, folder: FilePath) -> Iterator[Finding]:
    """Selectors that find nothing and data files that cannot be read, of a spec that is wrong elsewhere: one hears of
    all at once."""
    yield from selectors.findings(data, registry, folder)
    section = data.get("data")
    if not isinstance(section, dict):
        return
    more = section.get("sources")
    named: dict[Path, Any] = {("data", name): section.get(name) for name in ("train", "eval", "calibration")}
    named |= {
        ("data", "sources", name): one for name, one in (more if isinstance(more, dict) else {}).items()
    }
    for place, value in named.items():
        try:
            spec = SourceSpec.model_validate(value)
        except ValidationError:  # which is a problem of its own
            continue
        try:
            path = absolute(spec.path, folder.absolute())
            look(path, format=spec.format, columns=spec.columns, limit=spec.limit)
        except Unfit as error:
            yield Finding(
                _blamed(data, place, error.part), error.message, suggestion=error.hint, code=DataError.code
            )


def _reports(pipeline: Pipeline) -> Iterator[Finding]:
    """Trackers that are not installed, where the spec names them."""
    settings: dict[Path, TrainSpec | None] = {("train",): pipeline.train}
    settings |= {
        ("run", index, "train"): pipeline.train_settings(stage)
        for index, stage in enumerate(pipeline.run or ())
        if stage.train is not None and stage.train.report_to is not None
    }
    for place, spec in settings.items():
        try:
            if spec is not None:
                check_reports(spec, pipeline.output)
        except PeftxError as error:
            yield Finding((*place, "report_to"), error.message, suggestion=error.hint or "", code=error.code)


def trained(pipeline: Pipeline, registry: Registry) -> list[Path]:
    """Where the spec names the rows that are trained on."""
    stages = [stage for stage in stages_of(pipeline, registry) if stage.train is not None]
    return list(dict.fromkeys(("data", *(("sources", s.source) if s.source else ("train",))) for s in stages))


def members_of(loaded: LoadedSpec, pipeline: Pipeline, registry: Registry) -> list[Member]:
    """The stack's plugins, and where the spec names them."""
    from peftx.kernel.members import Member

    return [
        Member(entry.id, registry.outline(entry.use)(**entry.options), loaded.place_of(entry.id), entry.phase)
        for entry in pipeline.stack
    ]


def warn(pipeline: Pipeline) -> None:
    """Say what may be meant, and often is not: to measure on the rows that are trained on."""
    train, held_out = pipeline.data.train, pipeline.data.eval
    files = [
        metric.options.path or (held_out.path if held_out is not None else None)
        for metric in pipeline.evaluate
    ]
    if train is not None and train.path in files:
        failures.warn(
            f"{train.path} is both trained on and evaluated on: the numbers say nothing about rows that are new"
        )


def _sources(pipeline: Pipeline) -> Iterator[Source]:
    data = pipeline.data
    for name, spec in (("train", data.train), ("eval", data.eval), ("calibration", data.calibration)):
        if spec is not None:
            yield Source(("data", name), spec.path, spec.format, spec.columns, spec.limit)
    for name, spec in data.sources.items():
        yield Source(("data", "sources", name), spec.path, spec.format, spec.columns, spec.limit)
    for index, metric in enumerate(pipeline.evaluate):
        own = metric.options
        if own.path is not None:
            yield Source(("evaluate", index, metric.metric), own.path, own.format, limit=own.limit)


def _blamed(data: Mapping[str, Any], place: Path, part: str) -> Path:
    """The part of a source, where it is written out: `train: rows.jsonl` has none."""
    value: Any = data
    for key in place:
        value = value[key]
    return (*place, part) if isinstance(value, dict) and part in value else place


def _metrics(pipeline: Pipeline, formats: Mapping[Path, str | None]) -> Iterator[Finding]:
    """Metrics that cannot read the rows that they are given."""
    held_out = ("data", "train" if pipeline.data.holdout is not None else "eval")
    for index, metric in enumerate(pipeline.evaluate):
        own: Path = ("evaluate", index, metric.metric)
        format = formats.get(own if metric.options.path is not None else held_out)
        fitting = METRIC_FORMATS.get(metric.metric)
        if format is not None and fitting and format not in fitting:
            message = f"{metric.metric} reads rows of {' or '.join(fitting)}, and these are {format}"
            yield Finding(own, message, at_key=True, suggestion=metric_for(format))


def _tasks(pipeline: Pipeline) -> Iterator[Finding]:
    """Tasks of lm-eval that do not exist, or would run code."""
    from peftx.engines.tasks import find_tasks
    from peftx.errors import UnsupportedError

    for index, metric in enumerate(pipeline.evaluate):
        include = metric.options.include
        for at, name in enumerate(metric.options.tasks):
            own: Path = ("evaluate", index, metric.metric)
            try:
                find_tasks([name], None if include is None else FilePath(include))
            except UnsupportedError as error:
                yield Finding(own, error.message, at_key=True, suggestion=error.hint or "", code=error.code)
                return
            except PeftxError as error:
                yield Finding(
                    (*own, "tasks", at), error.message, suggestion=error.hint or "", code=error.code
                )


def _rows(members: Sequence[Member], place: Path, format: str | None) -> Iterator[Finding]:
    """Rows that the plugins do not train on; what they leave to one another is a matter of conflicts."""
    from peftx.composition.conflicts import find_conflicts

    if format is None or find_conflicts(members):
        return
    now = format
    for index, member in enumerate(members):
        takes = member.plugin.takes
        if takes and now not in takes:
            message = f"'{member.id}' trains on rows of {' or '.join(takes)}, and these are {now}"
            remedy = f"give {'.'.join(map(str, place))} such rows, or map their columns"
            yield Finding(("stack", index), message, suggestion=remedy)
            return
        now = member.plugin.gives.get(now, now)
    if now == "preference" and not any(
        m.implements("prepare_data") or now in m.plugin.takes for m in members
    ):
        message = "no plugin of the stack trains on rows of preference"
        yield Finding(place, message, suggestion="peftx info NAME says which rows a plugin trains on")


def _labels(members: Sequence[Member], sources: Sequence[Source]) -> Iterator[Finding]:
    """Rows of classes that a plugin does not name; a run would say so after the base is loaded and measured."""
    for index, member in enumerate(members):
        option = member.plugin.labels_option
        known: Sequence[str] | None = getattr(member.plugin.config, option) if option else None
        if known is None:
            continue
        for source in sources:
            found = labels(source.file, columns=source.columns)
            strange = next((label for label in found if label not in known), None)
            if strange is not None:
                message = (
                    f"{source.file}: row {found[strange]} (counting from 0) is of class {strange!r}, and '{member.id}' "
                    f"names {_some(known)}"
                )
                remedy = (
                    nearest(strange, known) or f"the rows have {_some(list(found))}: name all in '{option}'"
                )
                yield Finding(("stack", index), message, suggestion=remedy)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")


def _calibration(members: Sequence[Member]) -> Iterator[Finding]:
    from peftx.kernel.plugin import Claim

    for index, member in enumerate(members):
        if member.claims(Claim.NEEDS_CALIBRATION):
            message = f"'{member.id}' needs text to calibrate on, and the spec names none"
            yield Finding(("stack", index), message, suggestion="write 'data: {calibration: file}'")
