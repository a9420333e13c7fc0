"""What a spec and its files tell of a run before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from peftx.composition.registry import Registry
from peftx.engines.clusters import require_ray
from peftx.engines.data.gate import check_all_learned
from peftx.engines.data.sources import format_of, rows_of
from peftx.engines.reporting import check_reports
from peftx.engines.training.processes import check_processes, launched
from peftx.errors import BundleError, DataError, with_code
from peftx.kernel.members import Member
from peftx.planning import plan
from peftx.toolkits.evaluation.run import check_metrics
from peftx_spec.models import Pipeline
from peftx_spec.stages import RunStage, stream_of


def check_runtime(pipeline: Pipeline, members: Sequence[Member], stages: Sequence[RunStage]) -> None:
    """Raises PeftxError where the processes or the tracker that are asked for cannot be, or nothing would be left."""
    check_processes(members, max(pipeline.runtime.workers, launched()))
    for stage in stages:
        if stage.train is not None:
            check_reports(pipeline.train_settings(stage), pipeline.output)
    if pipeline.runtime.engine == "ray":
        require_ray("runtime: ray")
        if not any(stage.save is not None for stage in stages):
            raise BundleError(
                "processes of Ray leave what they save, and no stage saves", hint="run: [..., save]"
            )


def check_plan(
    pipeline: Pipeline, registry: Registry, where: dict[str, str], *, trust_remote_code: bool
) -> None:
    """Raises what the plan says against the run, before a weight is loaded and anything is paid for."""
    found = plan(pipeline, registry=registry, where=where, trust_remote_code=trust_remote_code)
    for conflict in found.conflicts:
        raise with_code(conflict.code)(conflict.reason, hint=conflict.remedy or None)


def check_data(
    pipeline: Pipeline, members: Sequence[Member], stages: Sequence[RunStage], rows: Dataset | None
) -> None:
    """Raises PeftxError where rows cannot be read, are not those that a metric reads, or are not there to train on.

    Args:
        rows: of `data.train`, without those held out, which must be learned as they are unless a plugin changes them.
    """
    data = pipeline.data
    learned = any(stage.train is not None and data.trained_in(stage) is data.train for stage in stages)
    as_they_are = not any(member.implements("prepare_data") for member in members)
    if data.train is not None and rows is not None and learned and as_they_are:
        check_all_learned(rows, format_of(data.train))
    for source in (data.eval, data.calibration, *data.sources.values()):
        if source is not None:
            rows_of(source, limit=1)
    own = [member.id for member in members if member.implements("evaluate")]
    measured = any(stage.evaluate is not None for stage in stages)
    check_metrics(pipeline, own, measured=measured, stream=stream_of(stages))
    if any(stage.train is not None and data.trained_in(stage) is None for stage in stages):
        raise DataError("the pipeline trains, but names no training data", hint="data: {train: train.jsonl}")


def outputs(pipeline: Pipeline, stages: Sequence[RunStage]) -> list[Path]:
    """The folders that bundles will stand in."""
    saved = [stage.save.path for stage in stages if stage.save is not None]
    return [Path(path) for path in dict.fromkeys([pipeline.output, *saved]) if path is not None]


def check_outputs(pipeline: Pipeline, stages: Sequence[RunStage]) -> None:
    """Raises BundleError for a place that holds something else."""
    for path in outputs(pipeline, stages):
        holds = path.is_dir() and any(path.iterdir()) and not (path / "manifest.json").exists()
        if path.is_file() or holds:
            raise BundleError(
                f"output '{path}' exists and is no bundle", hint="choose another folder, or empty it"
            )
