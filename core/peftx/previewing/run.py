"""A spec's rows, read, prepared and tokenized by the code that trains on them."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftx.composition.registry import Registry
from peftx.engines.data import TrainingData
from peftx.engines.data.sources import check_rows_serve, format_of, rows_of
from peftx.engines.models import load_model
from peftx.engines.reporting import Reporter, Silent
from peftx.engines.training.examples import encoded, examples_of
from peftx.engines.training.run import as_training_data
from peftx.errors import DataError, PluginError, nearest
from peftx.kernel.objective import objective_of
from peftx.kernel.plugin import Claim
from peftx.pipeline import Run
from peftx.previewing.found import Prepared, Preview, classes_of, sizes_of
from peftx.run_result import RunResult
from peftx.stack import Stack
from peftx_spec import load_spec, resolved, stages_of
from peftx_spec.models import Pipeline
from peftx_spec.stages import RunStage, TrainStage, stream_of
from peftx_spec.training import TrainSpec

if TYPE_CHECKING:
    from datasets import Dataset

    from peftx_spec.models import SourceSpec

TRAIN, EVAL = "train", "eval"


class Preparation(Run):
    """A run up to its first training. Args: as `Run`; `pipeline`'s output is not looked at, and nothing is written."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        registry: Registry,
        where: dict[str, str] | None = None,
        reporter: Reporter | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        kept = tuple(stage for stage in stages_of(pipeline, registry) if stage.save is None)
        super().__init__(
            pipeline.model_copy(update={"run": kept, "output": None}),
            registry=registry,
            where=where,
            reporter=reporter,
            trust_remote_code=trust_remote_code,
        )
        self.weights = False

    @property
    def settings(self) -> TrainSpec:
        """Of the first training."""
        for stage in self.stages:
            if stage.train is not None:
                return self.pipeline.train_settings(stage)
        return self.pipeline.train or TrainSpec()

    def build(self, *, weights: bool) -> Stack:
        """The stack that the stages act on. `weights`: with them; else on the meta device, as `peftx plan` has it."""
        spec, seed = self.pipeline.model, self.settings.seed
        self.reporter.stage("load", [])
        started = time.perf_counter()
        model, tokenizer = load_model(
            spec.id, dtype=spec.dtype, device=spec.device, trust_remote_code=self.trust_remote_code,
            meta=not weights,
        )  # fmt: skip
        plugins = {e.id: self.registry.load(e.use)(**e.options) for e in self.pipeline.stack}
        self.members = [replace(m, plugin=plugins[m.id]) for m in self.members]  # another attempt left traces
        stack = Stack(model, self.members, tokenizer=tokenizer, seed=seed, inject=False)
        stack.base_id = spec.id
        check_rows_serve(stack.model, self.pipeline, self.members, self.stages)
        self.weights, self.data, self.result = weights, None, RunResult(stack, held_out=self.held_out)
        detail = "weights, since a plugin reads rows with the model" if weights else "no weights"
        self.reporter.finished("load", time.perf_counter() - started, detail)
        return stack

    def inject(self) -> None:
        """The `inject` stages before the first training: they decide how long a text may be, and which columns the
        model reads."""
        for stage in self._before_training():
            if stage.inject is not None:
                self._stack.inject(stage.ids)

    def prepare(self, data: TrainingData) -> list[Prepared]:
        """The `prepare` stages before the first training, one plugin after the other."""
        data.progress = lambda done, total: self.reporter.progress(done, total, {})
        found = []
        for stage in self._before_training():
            for member in self._stack.implementers("prepare_data", stage.ids) if stage.prepare else ():
                found.append(self._prepare_one(data, member.id))
        return found

    def _prepare_one(self, data: TrainingData, id: str) -> Prepared:
        rows, format, gone = len(data.train or ()), data.format, len(data.dropped)
        self.reporter.stage("prepare", [id])
        started = time.perf_counter()
        self._stack.prepare(data, [id])
        left = len(data.train or ())
        self.reporter.finished("prepare", time.perf_counter() - started, f"{id}: {rows} rows became {left}")
        reasons = Counter(one.reason for one in data.dropped[gone:])
        return Prepared(id, rows, left, dict(reasons), format, data.format)

    def _before_training(self) -> list[Any]:
        found = []
        for stage in self.stages:
            if stage.train is not None:
                break
            found.append(stage)
        return found

    # -- which rows ----------------------------------------------------------------------------------------------

    def rows(self, source: str) -> tuple[SourceSpec, Dataset, bool]:
        """The source's place, its rows, and whether the `prepare_data` hooks see them.

        Raises:
            DataError: the spec names no such rows, or they cannot be read.
        """
        data = self.pipeline.data
        if source == TRAIN:
            if data.train is None or self._rows is None:
                raise DataError("the spec names no rows to train on", hint="data: {train: train.jsonl}")
            return data.train, self._rows, True
        if source == EVAL:
            return self._eval_rows()
        if source not in data.sources:
            raise DataError(
                f"there is no source '{source}' of rows in the spec",
                hint=nearest(source, data.sources)
                or (f"there are: {', '.join(data.sources)}" if data.sources else "data: {sources: {...}}"),
            )
        spec = data.sources[source]
        return spec, rows_of(spec, limit=spec.limit), source in stream_of(self.stages)

    def _eval_rows(self) -> tuple[SourceSpec, Dataset, bool]:
        data = self.pipeline.data
        if data.eval is not None:
            spec, rows = data.eval, rows_of(data.eval, limit=data.eval.limit)
        elif self.held_out is not None and data.train is not None:
            spec, rows = data.train, self.held_out.rows
        else:
            raise DataError("the spec names no rows to evaluate on", hint="data: {eval: held_out.jsonl}")
        # Metrics read rows as they are; where a plugin has a head of its own, or two answers are compared, the
        # plugin alone knows how.
        own = any(member.claims(Claim.CLASSIFIES) for member in self.members)
        return spec, rows, own or format_of(spec) == "preference"

    def training_data(self, source: str) -> TrainingData:
        """Rows before the hooks, as training takes them."""
        spec, rows, hooks = self.rows(source)
        if source == TRAIN:
            return self._training_data(self.settings, RunStage(train=TrainStage()))
        length = (spec.max_length if source == EVAL else None) or self.settings.max_length
        format = format_of(spec) if source == EVAL or hooks else "auto"
        return as_training_data(self._stack, rows, seed=self.settings.seed, max_length=length, format=format)

    def attempt(self, source: str, *, weights: bool) -> tuple[list[Prepared], TrainingData, Dataset]:
        """What the hooks did, the rows as they left them, and the examples."""
        _, _, hooks = self.rows(source)
        stack = self.build(weights=weights)
        self.inject()
        data = self.training_data(source)
        prepared = self.prepare(data) if hooks else []
        self.reporter.stage("tokenize", [])
        started = time.perf_counter()
        examples = examples_of(stack, data, lambda done, total: self.reporter.progress(done, total, {}))
        detail = f"{len(data.train or ())} rows became {len(examples)} examples"
        self.reporter.finished("tokenize", time.perf_counter() - started, detail)
        return prepared, data, examples


def preview(
    spec: Pipeline | str | Path,
    *,
    source: str = TRAIN,
    registry: Registry | None = None,
    where: dict[str, str] | None = None,
    reporter: Reporter | None = None,
    trust_remote_code: bool = False,
) -> Preview:
    """Rows as a run would train on them. No weights are read unless a plugin needs the model for it.

    Args:
        spec: a file, YAML text, or a pipeline with absolute paths.
        source: `train`, `eval` (held-out rows, if there is no file of them), or the name of one of `data.sources`.

    Raises:
        DataError: no such rows, or rows that a run would refuse. Others: as `Run`.
    """
    registry = registry or Registry()
    if not isinstance(spec, Pipeline):
        loaded = load_spec(spec, catalogue=registry)
        spec = resolved(loaded.pipeline, loaded.document.folder or Path.cwd())
        where = {entry.id: loaded.place_of(entry.id) for entry in spec.stack}
    reporter = reporter or Silent()
    reporter.stage("read", [])
    run = Preparation(
        spec, registry=registry, where=where, reporter=reporter, trust_remote_code=trust_remote_code
    )
    place, _, _ = run.rows(source)
    try:
        prepared, data, examples = run.attempt(source, weights=False)
    except DataError:
        raise  # the rows are at fault, with or without weights
    except PluginError:
        # A plugin asked the model for numbers, and the meta device has none. What is wrong besides is wrong again.
        prepared, data, examples = run.attempt(source, weights=True)
    held = len(run.held_out.rows) if run.held_out is not None and source == TRAIN else 0
    names, (full, cut) = class_names(run), _cut(run, data, examples)
    return Preview(
        source=source,
        file=place.path,
        objective=objective_of(run._stack.model),
        max_length=data.max_length,
        read=len(run.rows(source)[1]) + held,
        held_out=held,
        prepared=prepared,
        rows=data,
        examples=examples,
        cut=cut,
        full=full,
        weights=run.weights,
        classes=classes_of(examples, names),
        names=names,
        stack=run._stack,
        seed=run.settings.seed,
    )


def class_names(run: Preparation) -> list[str]:
    """Of the classes that rows are of, in the order of their numbers: a plugin's own, or the model's."""
    for member in run.members:
        option = member.plugin.labels_option
        if option and getattr(member.plugin.config, option):
            return list(getattr(member.plugin.config, option))
    config = run._stack.model.config
    if objective_of(run._stack.model) != "class":
        return []
    return [config.id2label[n] for n in range(config.num_labels)]


def _cut(run: Preparation, data: TrainingData, examples: Dataset) -> tuple[int, int | None]:
    """Examples that fill `max_length`, and rows of which a part is gone.

    Only a full example can be a cut one, so these alone are tokenized again, without a limit.
    """
    sizes = sizes_of(examples, "input_ids")
    places = np.flatnonzero(sizes >= data.max_length).tolist()
    if data.format == "tokenized":
        return len(places), None
    if data.format == "text" or not places:  # blocks and pieces lose nothing
        return len(places), 0
    assert data.train is not None
    whole = encoded(run._stack, replace(data, train=data.train.select(places), max_length=sys.maxsize))
    return len(places), int((sizes_of(whole, "input_ids") > sizes[places]).sum())
