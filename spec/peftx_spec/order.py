"""The stages that a run carries out, in order: those of `run:`, or what follows from the rest where it is absent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftx_spec.stages import ALL, HOOK_OF_STAGE, EvaluateStage, RunStage, SaveStage, TrainStage

if TYPE_CHECKING:
    from peftx_spec.catalogue import Catalogue
    from peftx_spec.models import Pipeline, StackEntry


def stages_of(pipeline: Pipeline, catalogue: Catalogue) -> tuple[RunStage, ...]:
    """The stages that a run carries out, in order, with every `all` replaced by the ids that it stands for.

    Without `run`: compress (before training), inject, prepare, train (if `train` is given), compress (after
    training), evaluate (if a metric is listed, or a plugin evaluates and there are rows for it), save (if `output` is
    given); a stage that no plugin takes part in is left out. The pipeline must be valid (`load_pipeline`).
    """
    stack = pipeline.stack
    if pipeline.run is not None:
        flat = (stage for outer in pipeline.run for stage in outer.rounds())
        return tuple(_expanded(stage, stack, catalogue) for stage in flat)
    early, late = _compression(stack, catalogue)
    stages = [
        *_listing("compress", early),
        *_listing("inject", _with_hook(stack, catalogue, "inject")),
        *_listing("prepare", _with_hook(stack, catalogue, "prepare_data")),
    ]
    if pipeline.train is not None:
        plugins = tuple(entry.id for entry in stack)
        stages.append(RunStage(train=TrainStage(plugins=plugins) if plugins else TrainStage()))
    stages += _listing("compress", late)
    rows = pipeline.data.eval is not None or pipeline.data.holdout is not None
    if pipeline.evaluate or (rows and _with_hook(stack, catalogue, "evaluate")):
        stages.append(RunStage(evaluate=EvaluateStage()))
    if pipeline.output is not None:
        stages.append(RunStage(save=SaveStage()))
    return tuple(stages)


def _with_hook(stack: tuple[StackEntry, ...], catalogue: Catalogue, hook: str) -> tuple[str, ...]:
    return tuple(entry.id for entry in stack if hook in catalogue.hooks(entry.use))


def _compression(
    stack: tuple[StackEntry, ...], catalogue: Catalogue
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ids that compress before and after training.

    `phase` decides; without it the order of the stack does, because that is the order of effect: what stands
    before the first plugin that injects compresses the plain model. Who compresses what it injected itself does so
    behind the training.
    """
    early: list[str] = []
    late: list[str] = []
    injected = False
    for entry in stack:
        hooks = catalogue.hooks(entry.use)
        if "compress" in hooks:
            first = entry.phase is None and not injected and not catalogue.compresses_own(entry.use)
            before = entry.phase == "before-training" or first
            (early if before else late).append(entry.id)
        injected = injected or "inject" in hooks
    return tuple(early), tuple(late)


def _listing(kind: Literal["prepare", "inject", "compress"], ids: tuple[str, ...]) -> list[RunStage]:
    return [RunStage.model_validate({kind: ids})] if ids else []


def _expanded(stage: RunStage, stack: tuple[StackEntry, ...], catalogue: Catalogue) -> RunStage:
    if stage.ids != (ALL,):
        return stage
    hook = HOOK_OF_STAGE.get(stage.kind)
    everyone = tuple(entry.id for entry in stack)
    ids = everyone if hook is None else _with_hook(stack, catalogue, hook)
    if stage.train is not None:
        return stage.model_copy(update={"train": stage.train.model_copy(update={"plugins": ids})})
    return stage.model_copy(update={stage.kind: ids})
