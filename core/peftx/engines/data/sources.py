"""Rows that a spec names, and those that are held out of them to evaluate on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from peftx.engines.data.formats import detect_format, read_dataset
from peftx.engines.data.places import row_for_row, select
from peftx.engines.hub import is_hub, pinned_rows
from peftx.engines.models import asset_path
from peftx.errors import DataError
from peftx.kernel.members import Member
from peftx.kernel.objective import check_objective
from peftx.kernel.plugin import Claim
from peftx_spec.models import FORMATS, DataSpec, EvaluateSpec, HoldoutSpec, Pipeline, SourceSpec
from peftx_spec.stages import RunStage, stream_of

TASK = "task"
"""The column that says which task a row is of: in rows to measure on its name, in a batch its place in the stream."""


@dataclass(frozen=True)
class HeldOut:
    """Rows of the training data that are evaluated on and not trained on."""

    rows: Dataset
    of: int
    """Rows that there were."""
    seed: int

    def __str__(self) -> str:
        return f"{len(self.rows):,} of {self.of:,} rows held out, seed {self.seed}"


def format_of(source: SourceSpec) -> str:
    if source.format != "auto":
        return source.format
    return detect_format(asset_path(source.path), columns=source.columns or None)


def training_rows(data: DataSpec) -> tuple[Dataset | None, HeldOut | None]:
    """The rows that are trained on, and those that are held out of them.

    Raises:
        DataError: the file cannot be read, or none of its rows can be held out.
    """
    if data.train is None:
        return None, None
    rows = rows_of(data.train, limit=data.train.limit)
    if data.holdout is None:
        return rows, None
    held = _chosen(rows.select_columns(list(FORMATS[format_of(data.train)])), data.holdout)
    if not held:
        raise DataError(
            f"{data.train.path}: none of its {len(rows)} rows can be held out: there are no two that differ",
            hint="give data to evaluate on: data: {eval: file} (--eval FILE), or evaluate nothing: --metric none of "
            "peftx apply",
        )
    rest = [index for index in range(len(rows)) if index not in held]
    return select(rows, rest), HeldOut(select(rows, sorted(held)), len(rows), data.holdout.seed)


def _chosen(rows: Dataset, holdout: HoldoutSpec) -> set[int]:
    """The rows to hold out, by what is in them: equal rows go together, and their order in the file plays no part."""
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        text = f"{holdout.seed}:{json.dumps(row, sort_keys=True)}"
        groups.setdefault(hashlib.sha256(text.encode()).digest(), []).append(index)
    if len(groups) < 2:
        return set()
    wanted = min(max(1, round(holdout.share * len(rows))), holdout.most or len(rows), len(rows) - 1)
    chosen: set[int] = set()
    for _, group in sorted(groups.items()):
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    smallest: list[int] = min(groups.values(), key=len)
    return chosen or set(smallest)


def pinned(pipeline: Pipeline) -> Pipeline:
    """The pipeline with rows of the Hub as they are now: commits in place of branches, so that it can be repeated.

    Raises:
        HubError: no such data set, revision or file.
    """

    def fixed(path: str | None) -> dict[str, str]:
        return {"path": pinned_rows(path)} if path is not None and is_hub(path) else {}

    def source(spec: SourceSpec | None) -> SourceSpec | None:
        return None if spec is None else spec.model_copy(update=fixed(spec.path))

    data = pipeline.data
    update: dict[str, Any] = {name: source(getattr(data, name)) for name in ("train", "eval", "calibration")}
    update["sources"] = {name: source(spec) for name, spec in data.sources.items()}
    metrics = (
        EvaluateSpec({m.metric: m.options.model_copy(update=fixed(m.options.path))})
        for m in pipeline.evaluate
    )
    return pipeline.model_copy(update={"data": data.model_copy(update=update), "evaluate": tuple(metrics)})


def rows_of(source: SourceSpec, *, limit: int | None) -> Dataset:
    path = asset_path(source.path)
    return read_dataset(path, format=format_of(source), columns=source.columns or None, limit=limit)


def measured_rows(data: DataSpec, *, limit: int | None = None) -> tuple[Dataset | None, str]:
    """The rows that a spec measures on, and what they are in words: those of `data.eval`, else those held out.

    Args:
        limit: read no more of `data.eval`.

    Raises:
        DataError: they cannot be read.
    """
    if data.eval is not None:
        return rows_of(data.eval, limit=limit or data.eval.limit), data.eval.path
    held = training_rows(data)[1]
    return (None, "") if held is None else (held.rows, str(held))


def task_rows(source: SourceSpec, place: int) -> Dataset:
    """Rows of one task of a stream, with its place in the stream, from 0, in the column `task` unless they have one."""
    rows = rows_of(source, limit=source.limit)
    return (
        rows if TASK in rows.column_names else row_for_row(rows.add_column(TASK, [place] * len(rows)), rows)
    )


def further_rows(data: DataSpec, stages: Sequence[RunStage]) -> dict[str, Dataset]:
    """The sources that plugins may ask for: those that no round is about, whose rows are there in that round alone."""
    own = stream_of(stages)
    return {
        name: rows_of(source, limit=source.limit) for name, source in data.sources.items() if name not in own
    }


def check_rows_serve(
    model: PreTrainedModel, pipeline: Pipeline, members: Sequence[Member], stages: Sequence[RunStage]
) -> None:
    """Raises UnsupportedError where the training rows do not serve what the model does; known before anything runs."""
    if any(m.claims(Claim.CLASSIFIES) or m.plugin.gives for m in members):
        return  # a plugin brings another task
    for stage in stages:
        source = pipeline.data.trained_in(stage)
        if stage.train is not None and source is not None:
            check_objective(model, format_of(source))
