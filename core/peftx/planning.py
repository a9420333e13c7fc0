"""What a run would do, computed on the meta device: no weights are loaded, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from peftx.composition.conflicts import find_conflicts
from peftx.composition.registry import Registry
from peftx.engines.data.sources import check_rows_serve, training_rows
from peftx.engines.models import load_model
from peftx.engines.training.feeders import check_source
from peftx.engines.training.packing import check_member
from peftx.errors import ArchitectureError, PeftxError, UnsupportedError
from peftx.kernel.anatomy import Anatomy, Site
from peftx.kernel.members import Member
from peftx.kernel.parts import BasePart, DeltaPart, ReplacedPart
from peftx.kernel.phases import spans
from peftx.stack import CALIBRATION_LENGTH, CALIBRATION_SAMPLES, Stack
from peftx.toolkits.compression import QuantLinear
from peftx_spec import Plan, PlannedConflict, PlannedStage, Totals, TouchedModule
from peftx_spec.models import Pipeline
from peftx_spec.stages import stages_of


def plan(
    pipeline: Pipeline,
    *,
    registry: Registry | None = None,
    where: dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of a pipeline. A conflict, or a plugin that this model cannot carry, is in `conflicts`, not raised."""
    registry = registry or Registry()
    places = where or {}
    members = [
        Member(e.id, registry.load(e.use)(**e.options), places.get(e.id, ""), e.phase) for e in pipeline.stack
    ]
    conflicts = [
        PlannedConflict(plugins=(c.first, c.second), reason=c.reason, remedy=", ".join(c.working_order))
        for c in find_conflicts(members)
    ]
    model, tokenizer = load_model(
        pipeline.model.id,
        dtype=pipeline.model.dtype,
        device=pipeline.model.device,
        trust_remote_code=trust_remote_code,
        meta=True,
    )
    stages = stages_of(pipeline, registry)
    try:
        check_rows_serve(model, pipeline, members, stages)
    except UnsupportedError as error:
        conflicts.append(_refused(("data.train",), error))
    held_out = training_rows(pipeline.data)[1] if pipeline.data.holdout is not None else None
    planned = tuple(
        PlannedStage(
            name=stage.kind,
            plugins=() if stage.kind in ("evaluate", "save") else stage.ids,
            reads=_reads(pipeline, stage.kind),
            writes=(pipeline.output,) if stage.kind == "save" and pipeline.output else (),
            detail=str(held_out) if stage.kind == "evaluate" and held_out is not None else stage.round,
        )
        for stage in stages
    )
    base = sum(p.numel() for p in model.parameters())
    base_bytes = sum(p.nbytes for p in model.parameters())
    if conflicts:
        totals = Totals(base_params=base, base_bytes=base_bytes, final_bytes=base_bytes)
        return Plan(model=pipeline.model.id, stages=planned, conflicts=tuple(conflicts), totals=totals)
    try:
        stack = Stack(model, members, tokenizer=tokenizer, inject=False)
    except ArchitectureError as error:
        blamed = tuple(m.id for m in members if error.message.startswith((f"{m.id}:", f"'{m.id}'")))
        refused = _refused(blamed or tuple(m.id for m in members), error)
        totals = Totals(base_params=base, base_bytes=base_bytes, final_bytes=base_bytes)
        return Plan(model=pipeline.model.id, stages=planned, conflicts=(refused,), totals=totals)
    injecting = [index for index, stage in enumerate(stages) if stage.kind == "inject"]
    before = [stage.ids for stage in stages[: min(injecting, default=0)] if stage.kind == "compress"]
    early = {id for ids in before for id in ids}
    source = pipeline.data.calibration or pipeline.data.train
    length = CALIBRATION_LENGTH if source is None or source.max_length is None else source.max_length
    tokens = CALIBRATION_SAMPLES * length
    promised: dict[str, Compression] = {}
    for ahead in (True, False):  # what compresses first leaves packed layers to the others
        for member in members:
            with _noting(conflicts, member), torch.device("meta"):
                if member.implements("compress") and (member.id in early) is ahead:
                    promised[member.id] = _compression(stack, member, tokens, stand_in=ahead)
        if ahead:
            for member in members:
                with _noting(conflicts, member), torch.device("meta"):
                    stack.inject([member.id])
    stack.ledger.parts = [
        p for p in stack.ledger.parts if p.owner not in early or not isinstance(p, ReplacedPart)
    ]
    modules, saved = _touched(stack, promised)
    reach = f"stands on {_reach(stack):.1%} of the numbers in the layers' matrices"
    runs = {index: pipeline.train_settings(s) for index, s in enumerate(stages) if s.train is not None}
    steps = {index: spec.steps for index, spec in runs.items() if spec.num_train_epochs is None}
    phases = {index: _phases(stack, total, conflicts) for index, total in steps.items()}
    for member in members if any(spec.packing for spec in runs.values()) else ():
        with _noting(conflicts, member):
            check_member(member)
    for member in members if runs else ():
        for name in member.plugin.sources:
            with _noting(conflicts, member):
                check_source(pipeline.data.sources, name, owner=member.id)
    planned = tuple(
        s.model_copy(update={"detail": "; ".join(filter(None, (s.detail, phases[index])))})
        if index in phases
        else s
        for index, s in enumerate(planned)
    )
    details = {
        "inject": lambda stage: reach,
        "compress": lambda stage: _duration([promised[id] for id in stage.plugins if id in promised], tokens),
    }
    planned = tuple(
        s.model_copy(update={"detail": "; ".join(filter(None, (s.detail, details[s.name](s))))})
        if s.name in details
        else s
        for s in planned
    )
    trainable = stack.trainable_parameters()
    added = sum(m.params for m in modules)
    totals = Totals(
        base_params=base,
        base_bytes=base_bytes,
        added_params=added,
        trainable_params=trainable,
        final_bytes=base_bytes + sum(t.nbytes for m in members for t in _own(stack, m)) - saved,
    )
    return Plan(
        model=pipeline.model.id,
        stages=planned,
        modules=tuple(modules),
        conflicts=tuple(conflicts),
        totals=totals,
    )


def _phases(stack: Stack, steps: int, conflicts: list[PlannedConflict]) -> str:
    """What the phases of a stretch of training are; a plugin whose phases do not fit is a conflict."""
    told = []
    for member in stack.members:
        with _noting(conflicts, member):
            found = spans(member.plugin.phases(), steps, owner=member.id)
            told += [f"{member.id}: {', '.join(map(str, found))} steps"] if found else []
    return "; ".join(told)


@dataclass(frozen=True)
class Compression:
    """What one plugin's `compress` says ahead."""

    replaced: list[tuple[Site, int]]
    """Layers, and the bytes that they take then."""
    seconds: tuple[float, float]


def _compression(stack: Stack, member: Member, tokens: int, *, stand_in: bool) -> Compression:
    """`stand_in`: put packed layers there, on the meta device, as those find them who come after."""
    view = stack.view(member.id)
    found = Compression(list(member.plugin.planned(view)), member.plugin.seconds(view, tokens))
    if stand_in:
        for site, _ in found.replaced:
            view.bound(site).replace(
                QuantLinear(
                    in_features=site.in_features,
                    out_features=site.out_features,
                    bits=8,
                    bias=site.bias is not None,
                )
            )
        stack.anatomy = Anatomy(stack.model)
        stack.standing[member.id].compressed = True
    return found


def _refused(plugins: tuple[str, ...], error: PeftxError) -> PlannedConflict:
    return PlannedConflict(plugins=plugins, reason=error.message, remedy=error.hint or "", code=error.code)


@contextmanager
def _noting(conflicts: list[PlannedConflict], member: Member) -> Iterator[None]:
    """What the plugin refuses goes into the plan."""
    try:
        yield
    except PeftxError as error:
        refused = _refused((member.id,), error)
        if refused not in conflicts:  # some ask the same twice
            conflicts.append(refused)


def _duration(compressions: Sequence[Compression], tokens: int) -> str:
    """What these plugins say that their compression takes."""
    least = sum(found.seconds[0] for found in compressions)
    most = sum(found.seconds[1] for found in compressions)
    if most < 2:
        return ""
    rounded = dict.fromkeys(f"{seconds:.2g}" for seconds in (least, most))
    return f"about {' to '.join(rounded)} s on one CPU core, for up to {tokens:,} tokens"


def _reach(stack: Stack) -> float:
    """The share of the numbers in the layers' matrices that plugins stand on, or train."""
    places = [part.place for part in stack.ledger.all(DeltaPart)]
    places += [part.module for part in stack.ledger.all(BasePart)]
    touched = {id(t): t for m in places for t in m._parameters.values() if t is not None and t.ndim > 1}
    inside = sum(t.numel() for t in touched.values())
    _, total, _ = stack.anatomy.uncovered()
    return min(1.0, inside / total) if total else 0.0


def _own(stack: Stack, member: Member) -> list[torch.Tensor]:
    return list(stack.ledger.tensors(member.id).values())


def _touched(stack: Stack, promised: Mapping[str, Compression]) -> tuple[list[TouchedModule], int]:
    """Rows of the table, and the bytes that compression would save."""
    roles = {site.key: site for site in stack.anatomy.sites} | {
        site.path: site for site in stack.anatomy.sites if site.rows is None
    }
    rows = []
    for part in stack.ledger.parts:
        tensors = part.tensors().values()
        site = roles.get(part.key)
        rows.append(
            TouchedModule(
                path=part.key,
                role=site.role if site is not None else part.what,
                shape=tuple(site.shape) if site is not None else (),
                plugin=part.owner,
                params=0 if isinstance(part, BasePart) else sum(t.numel() for t in tensors),
                bytes=sum(t.nbytes for t in tensors),
            )
        )
    saved = 0
    for id, found in promised.items():
        for site, size in found.replaced:
            parameter = site.module._parameters.get(site.parameter)
            saved += (0 if parameter is None else parameter.nbytes) - size
            rows.append(
                TouchedModule(path=site.path, role=site.role, shape=site.shape, plugin=id, bytes=size)
            )
    return rows, saved


def _reads(pipeline: Pipeline, kind: str) -> tuple[str, ...]:
    data = pipeline.data
    sources = {
        "prepare": [data.train],
        "train": [data.train],
        "compress": [data.calibration or data.train],
        "evaluate": [data.eval if data.holdout is None else data.train],
    }.get(kind, [])
    found = [source.path for source in sources if source is not None]
    if kind == "evaluate":
        found += [m.options.path for m in pipeline.evaluate if m.options.path is not None]
    return tuple(str(Path(p)) if not p.startswith(("peftx:", "hub:")) else p for p in found)
