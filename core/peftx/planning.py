"""What a run would do, computed on the meta device: no weights are loaded, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from peftx.composition.conflicts import find_conflicts
from peftx.composition.registry import Registry
from peftx.engines.bundle.sizes import base_in_bundle, doubts, own_bytes
from peftx.engines.data.sources import check_rows_serve, training_rows
from peftx.engines.models import load_model, slow_dtype, usable_device
from peftx.engines.training.feeders import check_source
from peftx.engines.training.packing import check_member
from peftx.engines.training.processes import check_processes
from peftx.errors import ArchitectureError, ConflictError, PeftxError, UnsupportedError
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.kernel.anatomy.site import Site
from peftx.kernel.members import Member
from peftx.kernel.parts import BasePart, DeltaPart, ReplacedPart
from peftx.kernel.phases import spans
from peftx.kernel.plugin import Claim, compresses_own
from peftx.kernel.view import BoundSite
from peftx.stack import CALIBRATION_LENGTH, CALIBRATION_SAMPLES, Stack
from peftx.toolkits.compression import NarrowLinear, QuantLinear
from peftx.toolkits.compression.names import dtype_name
from peftx_spec import Plan, PlannedConflict, PlannedPlugin, PlannedStage, Totals, TouchedModule
from peftx_spec.models import Pipeline
from peftx_spec.order import stages_of


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
        PlannedConflict(plugins=(c.first, c.second), reason=c.reason, remedy=c.remedy)
        for c in find_conflicts(members)
    ]
    try:
        check_processes(members, pipeline.runtime.workers)
    except ConflictError as error:
        conflicts.append(_refused(_blamed(members, error), error))
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
            writes=() if stage.save is None else tuple(filter(None, [stage.save.path or pipeline.output])),
            detail=str(held_out) if stage.kind == "evaluate" and held_out is not None else stage.round,
        )
        for stage in stages
    )
    base, device = sum(p.numel() for p in model.parameters()), usable_device(pipeline.model.device)
    base_bytes = sum(p.nbytes for p in model.parameters())
    try:
        stack = None if conflicts else Stack(model, members, tokenizer=tokenizer, inject=False)
    except ArchitectureError as error:
        conflicts.append(_refused(_blamed(members, error), error))
        stack = None
    if stack is None:
        return Plan(
            model=pipeline.model.id,
            stages=planned,
            plugins=_told(members, (), conflicts, otherwise="not looked at, since the stack is refused"),
            conflicts=tuple(conflicts),
            totals=Totals(base_params=base, base_bytes=base_bytes, final_bytes=base_bytes),
        )
    source = pipeline.data.calibration or pipeline.data.train
    length = CALIBRATION_LENGTH if source is None or source.max_length is None else source.max_length
    tokens = CALIBRATION_SAMPLES * length
    last = max((index for index, stage in enumerate(stages) if stage.kind == "inject"), default=-1)
    promised: dict[str, Compression] = {}
    touched: dict[tuple[str, str], TouchedModule] = {}
    narrowed: set[str] = set()
    trainable, details = 0, dict[int, str]()
    runs = {index: pipeline.train_settings(s) for index, s in enumerate(stages) if s.train is not None}
    for member in members[:1] if last < 0 else ():  # nothing injects, and that asks whether all go together
        with _noting(conflicts, member), torch.device("meta"):
            stack.inject([member.id])
    for index, stage in enumerate(stages):
        for member in members if stage.kind in ("inject", "compress", "merge") else ():
            if member.id in stage.ids:
                with _noting(conflicts, member), torch.device("meta"):
                    _carry_out(stack, member, stage.kind, promised, tokens, stand_in=index < last)
        if stage.kind == "inject":
            touched |= _touched(stack)
            trainable = max(trainable, stack.trainable_parameters())
            details[index] = f"stands on {_reach(stack):.1%} of the numbers in the layers' matrices"
        elif stage.kind == "compress":
            narrowed |= {m.id for m in members if m.id in stage.ids and compresses_own(m.plugin)}
            details[index] = _duration([promised[id] for id in stage.ids if id in promised], tokens)
        elif stage.kind == "train":
            training = [m for m in members if m.id not in narrowed and runs[index].num_train_epochs is None]
            phases = _phases(training, runs[index].steps, conflicts)
            details[index] = "; ".join(filter(None, (phases, slow_dtype(model.dtype, device))))
        elif stage.kind == "save" and runs:
            details[index] = doubts(stack)
    stack.ledger.parts = [p for p in stack.ledger.parts if not isinstance(p, ReplacedPart)]
    packed = _packed(promised)
    left = [*_left(packed).values()]
    modules = [*touched.values(), *packed]
    for member in members if any(spec.packing for spec in runs.values()) else ():
        with _noting(conflicts, member):
            check_member(member)
    for member in members if runs else ():
        for name in member.plugin.sources:
            with _noting(conflicts, member):
                check_source(pipeline.data.sources, name, owner=member.id)
    planned = tuple(
        s.model_copy(update={"detail": "; ".join(filter(None, (s.detail, details.get(index, ""))))})
        for index, s in enumerate(planned)
    )
    own = [tensor for member in members for tensor in stack.ledger.tensors(member.id).values()]
    before = {site.path: _bytes_of(site) for found in promised.values() for site, _ in found.replaced}
    totals = Totals(
        base_params=base,
        base_bytes=base_bytes,
        added_params=sum(m.params for m in modules),
        trainable_params=trainable,
        final_bytes=base_bytes
        + sum(t.nbytes for t in own)
        + sum(m.bytes for m in left)
        - sum(before.values()),
        bundle_bytes=own_bytes(stack, whole=bool(left), trains=bool(runs))
        + base_in_bundle(
            stack,
            pipeline.model.id,
            base_bytes,
            {row.path: row.bytes for row in left},
            [row.path for row in left if row.path in promised[row.plugin].cut],
        ),
    )
    return Plan(
        model=pipeline.model.id,
        stages=planned,
        plugins=_told(members, modules, conflicts, otherwise="changes no module"),
        modules=tuple(modules),
        conflicts=tuple(conflicts),
        totals=totals,
    )


def _phases(members: Sequence[Member], steps: int, conflicts: list[PlannedConflict]) -> str:
    """What the phases of a stretch of training are; a plugin whose phases do not fit is a conflict."""
    told = []
    for member in members:
        with _noting(conflicts, member):
            found = spans(member.plugin.phases(), steps, owner=member.id)
            told += [f"{member.id}: {', '.join(map(str, found))} steps"] if found else []
    return "; ".join(told)


def _told(
    members: Sequence[Member],
    modules: Sequence[TouchedModule],
    conflicts: Sequence[PlannedConflict],
    *,
    otherwise: str,
) -> tuple[PlannedPlugin, ...]:
    """A line a plugin, whatever became of it; `otherwise`: what is said of one without a module."""
    refused = {id for conflict in conflicts for id in conflict.plugins}
    found = []
    for member in members:
        own = [module for module in modules if module.plugin == member.id]
        detail = "refused" if member.id in refused else "" if own else otherwise
        params, size = sum(module.params for module in own), sum(module.bytes for module in own)
        found.append(PlannedPlugin(id=member.id, modules=len(own), params=params, bytes=size, detail=detail))
    return tuple(found)


@dataclass(frozen=True)
class Compression:
    """What one plugin's `compress` says ahead."""

    replaced: list[tuple[Site, int]]
    """Layers, and the bytes that they take then."""
    seconds: tuple[float, float]
    cut: frozenset[str]
    """Paths of the layers that lose rows or columns and keep the other numbers as the base has them."""


def _carry_out(
    stack: Stack, member: Member, kind: str, promised: dict[str, Compression], tokens: int, *, stand_in: bool
) -> None:
    """One stage of one plugin. What is in the weights then is taken from the model: no number of its own is left.

    Args:
        stand_in: put layers there, on the meta device, as those find them who come after.
    """
    view = stack.view(member.id)
    if kind == "inject":
        stack.inject([member.id])
    elif kind == "merge":
        _into_weights(stack, member)
    else:
        folds = member.claims(Claim.FOLDS_PREVIOUS)
        earlier = stack.members[: stack.members.index(member)] if folds else ()
        folded = [m for m in earlier if m.claims(Claim.MERGEABLE) and stack.ledger.of(m.id)]
        replaced = list(member.plugin.planned(view))
        cut = {site.path for site, _ in replaced} - _trained(stack) if member.claims(Claim.NARROWS) else ()
        found = promised[member.id] = Compression(
            replaced, member.plugin.seconds(view, tokens), frozenset(cut)
        )
        for other in folded:
            _into_weights(stack, other)
        if replaced and compresses_own(member.plugin):  # else what it attached stays
            _into_weights(stack, member)
        if stand_in:
            for site, _ in found.replaced:
                _stand_in(view.bound(site), narrow=member.claims(Claim.NARROWS))
            stack.anatomy = Anatomy(stack.model)
            stack.standing[member.id].compressed = True


def _trained(stack: Stack) -> set[str]:
    """Paths of layers whose numbers a run changes: something on them trains, or they do."""
    deltas = (p for p in stack.ledger.all(DeltaPart) if next(p.module.parameters(), None) is not None)
    return {part.path for part in deltas} | {part.key for part in stack.ledger.all(BasePart)}


def _into_weights(stack: Stack, member: Member) -> None:
    for part in reversed(stack.ledger.of(member.id)):
        if not isinstance(part, BasePart):
            part.undo()
            stack.ledger.parts.remove(part)


def _stand_in(site: BoundSite, *, narrow: bool) -> None:
    i, o, bias = site.in_features, site.out_features, site.bias is not None
    if not narrow:
        site.replace(QuantLinear(in_features=i, out_features=o, bits=8, bias=bias))
    elif site.kind == "linear":  # of the full size: by how much it is narrower, only the training tells
        site.replace(NarrowLinear(in_features=i, out_features=o, bias=bias, dtype=dtype_name(site.dtype)))


def _refused(plugins: tuple[str, ...], error: PeftxError) -> PlannedConflict:
    return PlannedConflict(plugins=plugins, reason=error.message, remedy=error.hint or "", code=error.code)


def _blamed(members: Sequence[Member], error: PeftxError) -> tuple[str, ...]:
    """Whom a refusal begins with; all where it names none."""
    found = tuple(m.id for m in members if error.message.startswith((f"{m.id}:", f"'{m.id}'")))
    return found or tuple(m.id for m in members)


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
    """The share of the numbers in the layers' matrices that plugins stand on, or train; packed ones count too."""
    places = [part.place for part in stack.ledger.all(DeltaPart)]
    places += [part.module for part in stack.ledger.all(BasePart)]
    touched = {id(t): t for m in places for t in m._parameters.values() if t is not None and t.ndim > 1}
    sites = (site for site in stack.anatomy.sites if site.kind == "quantized" and site.layer is not None)
    packed = {id(site.module): site.in_features * site.out_features for site in sites}
    inside = sum(t.numel() for t in touched.values()) + sum(packed.get(n, 0) for n in {id(m) for m in places})
    total = stack.anatomy.uncovered()[1] + sum(packed.values())
    return min(1.0, inside / total) if total else 0.0


def _touched(stack: Stack) -> dict[tuple[str, str], TouchedModule]:
    """Rows of the table, by plugin and place: what stands on the model now."""
    roles = {site.key: site for site in stack.anatomy.sites} | {
        site.path: site for site in stack.anatomy.sites if site.rows is None
    }
    rows = {}
    for part in stack.ledger.parts:
        if isinstance(part, ReplacedPart):
            continue
        tensors = part.tensors().values()
        site = roles.get(part.key)
        rows[part.owner, part.key] = TouchedModule(
            path=part.key,
            role=site.role if site is not None else part.what,
            shape=tuple(site.shape) if site is not None else (),
            plugin=part.owner,
            params=0 if isinstance(part, BasePart) else sum(t.numel() for t in tensors),
            bytes=sum(t.nbytes for t in tensors),
        )
    return rows


def _packed(promised: Mapping[str, Compression]) -> list[TouchedModule]:
    """Rows of the layers that are replaced; what one plugin leaves smaller, the next one finds so."""
    rows: list[TouchedModule] = []
    for id, found in promised.items():
        before = _left(rows)
        for site, size in found.replaced:
            whole = _bytes_of(site)
            if site.path in before and whole:
                size = size * before[site.path].bytes // whole
            rows.append(
                TouchedModule(path=site.path, role=site.role, shape=site.shape, plugin=id, bytes=size)
            )
    return rows


def _left(packed: Sequence[TouchedModule]) -> dict[str, TouchedModule]:
    """Of the layers that are replaced, by path, what is there at the end."""
    return {row.path: row for row in packed}


def _bytes_of(site: Site) -> int:
    parameter = site.module._parameters.get(site.parameter)
    return 0 if parameter is None else parameter.nbytes


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
