"""Runs the stages of a spec: the declaration becomes a stack, the stack becomes a bundle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx.composition.conflicts import check
from peftx.composition.registry import Registry
from peftx.engines.data import TrainingData
from peftx.engines.data.sources import (
    check_rows_serve,
    format_of,
    further_rows,
    pinned,
    rows_of,
    task_rows,
    training_rows,
)
from peftx.engines.files import checkpoints, dropped_rows, folder_bytes, make_place
from peftx.engines.models import asset_path, base_bytes
from peftx.engines.reporting import Reporter, Silent
from peftx.engines.training.on_ray import together
from peftx.engines.training.processes import leads
from peftx.engines.training.run import as_training_data, train
from peftx.errors import BundleError
from peftx.interop.importing import begin_with
from peftx.kernel.members import Member
from peftx.run_checks import check_data, check_outputs, check_plan, check_runtime, outputs
from peftx.run_result import RunResult
from peftx.stack import Stack
from peftx.toolkits.compression.batches import calibration_texts
from peftx.toolkits.evaluation.streams import SUMMARY, in_brief
from peftx_spec import load_spec, resolved, stages_of
from peftx_spec.models import LM_EVAL, EvaluateSpec, Pipeline
from peftx_spec.stages import RunStage, stream_of
from peftx_spec.training import TrainSpec

if TYPE_CHECKING:
    from datasets import Dataset

    from peftx.toolkits.evaluation import Score
    from peftx_spec.validate import LoadedSpec


class Run:
    """One run of one pipeline.

    Args:
        pipeline: valid, with absolute paths. where: id -> file:line:column, for errors.
        registry: the plugins. reporter: who is told. resume: train from the last checkpoint.
        trust_remote_code: run Python code that the checkpoint brings along; no spec can ask for it.

    What can be checked without the model is checked in the constructor (`run_checks`), so bad input changes nothing.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        registry: Registry | None = None,
        where: dict[str, str] | None = None,
        reporter: Reporter | None = None,
        resume: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.pipeline = pipeline = pinned(pipeline)
        self.trust_remote_code = trust_remote_code
        self.registry = registry or Registry()
        self.leads = leads()
        self.reporter = (reporter if self.leads else None) or Silent()
        self.resume = resume
        self.where = places = where or {}
        self.members = [
            Member(
                entry.id,
                self.registry.load(entry.use)(**entry.options),
                places.get(entry.id, ""),
                entry.phase,
            )
            for entry in pipeline.stack
        ]
        check(self.members)
        self.stages = stages_of(pipeline, self.registry)
        check_runtime(pipeline, self.members, self.stages)
        self._rows, self.held_out = training_rows(pipeline.data)
        check_data(pipeline, self.members, self.stages, self._rows)
        check_outputs(pipeline, self.stages)
        self.data: TrainingData | None = None
        self._max_length = 0
        self._source = ""
        """Whose rows `data` holds: a source of the spec, or empty for data.train."""
        self._trained_on = False
        """Was anything trained on the rows since they were prepared."""
        self.result: RunResult | None = None

    def run(self) -> RunResult:
        """Carry out all stages, here or in the processes that `runtime` asks for."""
        check_plan(self.pipeline, self.registry, self.where, trust_remote_code=self.trust_remote_code)
        return self._on_ray() if self.pipeline.runtime.engine == "ray" else self.here()

    def _on_ray(self) -> RunResult:
        from peftx.loading import load

        output = Path(str(self.pipeline.output))
        make_place(output)
        if not self.resume:  # whoever begins again goes on from what is there
            shutil.rmtree(checkpoints(output), ignore_errors=True)
        found = together(
            partial(_work, self.pipeline, self.registry, self.where, self.trust_remote_code),
            self.pipeline.runtime,
            place=output.parent / f".{output.name}.ray",
            reporter=self.reporter,
        )
        stack = load(found["output"], trust_remote_code=self.trust_remote_code)
        self.result = RunResult(stack, held_out=self.held_out, **found)
        return self.result

    def here(self) -> RunResult:
        """Carry out all stages in this process. Of several that train together each goes as far as the last training,
        and the first does what is behind it."""
        model = self.pipeline.model
        last = max((index for index, stage in enumerate(self.stages) if stage.train is not None), default=-1)
        for target in outputs(self.pipeline, self.stages):
            make_place(target)
        self.reporter.stage("load", [])
        started = time.perf_counter()
        seed = self.pipeline.train.seed if self.pipeline.train is not None else 0
        stack = Stack(
            model.id,
            self.members,
            dtype=model.dtype,
            device=model.device,
            trust_remote_code=self.trust_remote_code,
            seed=seed,
            inject=False,
        )
        stack.pipeline = self.pipeline
        check_rows_serve(stack.model, self.pipeline, self.members, self.stages)
        self.result = RunResult(
            stack, bytes_before=base_bytes(stack.base_id, stack.model), held_out=self.held_out
        )
        self._ended("load", time.perf_counter() - started, f"{stack.base_parameters():,} parameters")
        for index, stage in enumerate(self.stages if self.leads else self.stages[: last + 1]):
            self._begin(stage)
            started = time.perf_counter()
            detail = getattr(self, f"_{stage.kind}")(stage, index)
            seconds = self.result.seconds[f"{index}-{stage.kind}"] = time.perf_counter() - started
            self._ended(stage.kind, seconds, detail, stage)
        return self.result

    def _begin(self, stage: RunStage) -> None:
        self.reporter.stage(stage.told, stage.ids)

    def _ended(self, kind: str, seconds: float, detail: str, stage: RunStage | None = None) -> None:
        self.reporter.finished(kind, seconds, detail)
        name, ids = (kind, []) if stage is None else (stage.told, stage.ids)
        self._stack.history.staged(kind, seconds, detail, name=name, plugins=ids)

    # -- stages: each returns a line on what it did ----------------------------------------------------------------

    @property
    def _stack(self) -> Stack:
        assert self.result is not None
        return self.result.stack

    def _training_data(self, settings: TrainSpec, stage: RunStage) -> TrainingData:
        source = self.pipeline.data.trained_in(stage)
        assert source is not None  # `check_data` saw to it
        if self.data is None or stage.source != self._source:
            self._source = stage.source
            rows = task_rows(source, stage.place) if stage.source else self._rows
            assert rows is not None
            self.data = as_training_data(
                self._stack,
                rows,
                seed=settings.seed,
                max_length=source.max_length or settings.max_length,
                format=format_of(source),
            )
            self._max_length = self.data.max_length
        wanted = source.max_length or settings.max_length  # each stage has its own
        untouched = self.data.max_length == self._max_length  # a plugin may have taken room for its tokens
        self.data.max_length = wanted if untouched else min(wanted, self.data.max_length)
        self._max_length = wanted if untouched else self._max_length
        return self.data

    def _prepare(self, stage: RunStage, index: int) -> str:
        if self._trained_on:  # a round begins: its rows are made anew, by the model as it is now
            self.data, self._trained_on = None, False
        data = self._training_data(self.pipeline.train or TrainSpec(), stage)
        data.progress = lambda done, total: self.reporter.progress(done, total, {})
        before = len(data.train or ())
        self._stack.prepare(data, stage.ids)
        done = f"{before} rows became {len(data.train or ())}"
        output = self.pipeline.output if self.leads else None
        return done if output is None else done + data.write_dropped(dropped_rows(Path(output)))

    def _inject(self, stage: RunStage, index: int) -> str:
        self._stack.inject(stage.ids)
        paths = {entry.id: entry.path for entry in self.pipeline.stack if entry.id in stage.ids}
        begin_with(self._stack, paths, self.registry)
        count = self._stack.trainable_parameters()
        assert self.result is not None
        self.result.trainable = max(self.result.trainable, count)
        share = 100 * count / max(1, self._stack.base_parameters())
        return f"{count:,} parameters train ({share:.2f} %)"

    def _train(self, stage: RunStage, index: int) -> str:
        assert self.result is not None
        assert stage.train is not None
        stack, settings = self._stack, self.pipeline.train_settings(stage)
        awake = [name for name in stack.plugins if not stack.standing[name].frozen]
        resting = [name for name in awake if name not in stage.train.plugins]
        if resting:
            stack.freeze(*resting)
        self.result.trainable = max(self.result.trainable, stack.trainable_parameters())
        output = self.pipeline.output
        folder = None if output is None else checkpoints(Path(output)) / f"stage-{index}"
        resume = self.resume and folder is not None and any(folder.glob("checkpoint-*"))
        rows = self._measured() if settings.eval_steps is not None else None
        started = time.perf_counter()

        def resumed(where: str) -> None:
            self.reporter.finished("resume", time.perf_counter() - started, where)
            self._begin(stage)

        report = train(
            stack,
            self._training_data(settings, stage),
            output=folder,
            resume=resume,
            progress=self.reporter.progress,
            options=settings,
            prepare=False,
            sources=further_rows(self.pipeline.data, self.stages),
            measure=None if rows is None else stack.measuring(rows),
            resumed=resumed,
        )
        self._trained_on = True
        if resting:
            stack.unfreeze(*resting)
        self.result.training.append(report)
        done = f"{report.steps} steps, loss {report.first_loss:.3f} to {report.last_loss:.3f}"
        if report.best is not None:
            name, (step, value) = settings.metric_for_best_model, report.best
            done += f"; best {name} {value:.4g} at step {step}"
        if report.full:
            length = self._training_data(settings, stage).max_length
            done += f"; {report.full} of {report.examples} rows reach max_length {length}: longer are cut"
        return done

    def _freeze(self, stage: RunStage, index: int) -> str:
        self._stack.freeze(*stage.ids)
        return f"{self._stack.trainable_parameters():,} parameters still train"

    def _merge(self, stage: RunStage, index: int) -> str:
        self._stack.merge(*stage.ids, keep=False)
        return "folded into the weights"

    def _drop(self, stage: RunStage, index: int) -> str:
        for name in stage.ids:
            self._stack.remove(name)
        return "removed"

    def _compress(self, stage: RunStage, index: int) -> str:
        source = self.pipeline.data.calibration or self.pipeline.data.train
        rows = self._rows  # without those that are held out
        if self.pipeline.data.calibration is not None:
            rows = rows_of(self.pipeline.data.calibration, limit=self.pipeline.data.calibration.limit)
        texts = None if rows is None else calibration_texts(rows, self._stack.tokenizer)
        dropped = {id for later in self.stages[index:] if later.kind == "drop" for id in later.ids}
        length = {} if source is None or source.max_length is None else {"length": source.max_length}
        self._stack.compress(
            texts, stage.ids, keep=bool(dropped & set(stage.ids)),
            progress=lambda done, total: self.reporter.progress(done, total, {}), **length,
        )  # fmt: skip
        return f"{sum(t.nbytes for o in stage.ids for t in self._stack.ledger.tensors(o).values()):,} bytes"

    def _measured(self, limit: int | None = None) -> Dataset | None:
        """Rows that are not trained on."""
        source = self.pipeline.data.eval
        if source is not None:
            return rows_of(source, limit=limit or source.limit)
        return None if self.held_out is None else self.held_out.rows

    def _evaluate(self, stage: RunStage, index: int) -> str:
        assert self.result is not None
        assert stage.evaluate is not None
        stack = self._stack
        found: dict[str, Score] = {}
        specs: list[EvaluateSpec] = list(self.pipeline.evaluate)
        named = {spec.metric for spec in specs}
        for member in stack.members:
            at = stack.standing[member.id]
            ready = (at.compressed or not member.implements("compress")) and stack.stands(member.id)
            if member.implements("evaluate") and member.id not in named and ready:
                specs.append(EvaluateSpec.model_validate({member.id: {}}))
        for spec in specs:
            options = spec.options
            rows = self._measured(options.limit) if options.path is None else asset_path(options.path)
            trained = None if spec.metric == LM_EVAL else self.pipeline.train  # it has rows of its own
            maximum = options.max_length or (trained.max_length if trained is not None else None)
            found |= stack.evaluate(
                rows,
                output_dir=self._figures(),
                metrics=[spec.metric],
                limit=options.limit,
                format=options.format,
                max_length=maximum,
                progress=lambda done, total: self.reporter.progress(done, total, {}),
                **(options.of_tasks | ({"tasks": stream_of(self.stages)} if spec.metric == SUMMARY else {})),
            )
        name = stage.evaluate.name or self.result.moment(self.stages[:index])
        self.result.scores[name] = found
        stack.history.evaluated(name, found)
        return ", ".join(f"{name} {found[name].value:.4g}" for name in in_brief(found) if name != "nll")

    def _figures(self) -> Path | None:
        """Where `evaluate` plugins put figures: beside the bundle, which holds no strange file."""
        if self.pipeline.output is None or not self.leads:
            return None
        output = Path(self.pipeline.output)
        return output.parent / f"{output.name}.figures"

    def _save(self, stage: RunStage, index: int) -> str:
        assert self.result is not None
        assert stage.save is not None
        target = stage.save.path or self.pipeline.output
        if target is None:
            raise BundleError("nowhere to save", hint="output: out/")
        if not self.leads:
            return ""
        self.result.output = self._stack.save(target)
        self.result.bytes_after = folder_bytes(self.result.output)
        shutil.rmtree(checkpoints(Path(target)), ignore_errors=True)  # the run is complete
        return f"{self.result.output} ({self.result.bytes_after:,} bytes)"


def _work(
    pipeline: Pipeline, registry: Registry, where: dict[str, str], trust_remote_code: bool, reporter: Reporter
) -> dict[str, Any]:
    """What a process of Ray does: the pipeline, from its last checkpoint if there is one. Returns what is told of a
    `RunResult` beside its stack."""
    run = Run(
        pipeline, registry=registry, where=where, reporter=reporter, resume=True,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    result = run.here()
    return {f.name: getattr(result, f.name) for f in fields(result) if f.name not in ("stack", "held_out")}


def load_run(
    spec: str | Path | LoadedSpec,
    *,
    overrides: Sequence[str] = (),
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> Run:
    """Read and check a spec (a file, or YAML text); nothing runs yet.

    Raises:
        SpecError: everything that is wrong with the spec, each with its place.
    """
    registry = registry or Registry()
    loaded = (
        load_spec(spec, catalogue=registry, overrides=overrides) if isinstance(spec, str | Path) else spec
    )
    base = loaded.document.folder or Path.cwd()
    pipeline = resolved(loaded.pipeline, base)
    where = {entry.id: loaded.place_of(entry.id) for entry in pipeline.stack}
    return Run(
        pipeline, registry=registry, where=where, reporter=reporter, resume=resume,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def run(
    spec: str | Path,
    *,
    overrides: Sequence[str] = (),
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> RunResult:
    """Read a spec and carry it out."""
    return load_run(
        spec, overrides=overrides, registry=registry, reporter=reporter, resume=resume,
        trust_remote_code=trust_remote_code,
    ).run()  # fmt: skip
