"""A pipeline as a job runs it: with its steps and seed, on rows of its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from peftx.engines.data.sources import format_of, training_rows
from peftx.engines.files import make_place, sha256, write_text
from peftx.engines.models import asset_path
from peftx_spec.models import DataSpec, HoldoutSpec, Pipeline, SourceSpec
from peftx_spec.training import TrainSpec


def trained(pipeline: Pipeline, seed: int, **settings: object) -> Pipeline:
    """With a seed, and other settings of its training."""
    given = (pipeline.train or TrainSpec()).model_copy(update={**settings, "seed": seed})
    return pipeline.model_copy(update={"train": given})


def untrained(pipeline: Pipeline, hooks: frozenset[str]) -> Pipeline:
    """Without a training section, and without rows that nothing reads then."""
    data = pipeline.data
    reads = "prepare_data" in hooks or ("compress" in hooks and data.calibration is None)
    if not reads and data.holdout is None:
        data = data.model_copy(update={"train": None})
    return pipeline.model_copy(update={"train": None, "data": data})


def on_validation(pipeline: Pipeline, metric: str, validation: float | SourceSpec, seed: int) -> Pipeline:
    """The same, measured by the chosen metric alone, on validation rows in place of `data.eval`."""
    data = pipeline.data
    held: dict[str, object] = {"eval": validation, "holdout": None}
    if not isinstance(validation, SourceSpec):
        held = {"eval": None, "holdout": HoldoutSpec(share=validation, seed=seed)}
        if (
            data.calibration is not None
            and data.train is not None
            and data.calibration.path == data.train.path
        ):
            held["calibration"] = None  # which means the rows that are trained on
    metrics = tuple(each for each in pipeline.evaluate if each.metric == metric)
    return pipeline.model_copy(update={"data": data.model_copy(update=held), "evaluate": metrics})


def split(pipeline: Pipeline, folder: Path) -> Pipeline:
    """Two files in place of `data.holdout`: what is held out of the training rows to measure on must stay apart from
    what is held out of the rest to choose rates on."""
    data = pipeline.data
    if data.holdout is None or data.train is None:
        return pipeline
    rows, held = training_rows(data)
    assert rows is not None
    assert held is not None
    make_place(folder / "rows")
    digest = split_digest(data)
    sources: dict[str, SourceSpec] = {}
    for name, part in (("train", rows), ("eval", held.rows)):
        file = folder / f"{name}-{digest}.jsonl"
        if not file.exists():
            write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
        sources[name] = SourceSpec(path=str(file.absolute()), format=format_of(data.train), columns={},  # type: ignore[arg-type]
                                   max_length=data.train.max_length)  # fmt: skip
    return pipeline.model_copy(update={"data": data.model_copy(update={**sources, "holdout": None})})


def split_digest(data: DataSpec) -> str:
    """What decides about a split: the file, and how it is read and parted. Eight digits."""
    assert data.train is not None
    assert data.holdout is not None
    text = f"{sha256(asset_path(data.train.path))} {data.train!r} {data.holdout!r}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]
