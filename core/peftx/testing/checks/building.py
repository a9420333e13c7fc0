"""Right after `inject`."""

from __future__ import annotations

import random

import numpy
import torch

from peftx.kernel.anatomy.site import LINEAR_KINDS
from peftx.kernel.attention import AttentionEdit
from peftx.kernel.parts import BasePart, ContextPart, DeltaPart, FreePart, PromptPart, ReplacedPart
from peftx.kernel.plugin import Claim
from peftx.kernel.slots import Delta
from peftx.stack import Stack
from peftx.testing.case import Case, assert_equal, assert_same_tensors, difference
from peftx.testing.checks.check import changes_model, check, injects
from peftx.testing.subject import TEXT, Subject


def _may_change(subject: Subject) -> bool:
    return injects(subject) and not subject.claims(Claim.IDENTITY_AT_START)


@check(when=injects)
def check_same_under_a_seed(case: Case) -> None:
    """Two stacks of one seed hold the same tensors, whatever the global generators did in between."""
    first = case.stack()
    torch.rand(5), random.random(), numpy.random.rand()  # noqa: NPY002  the global one is what must not matter
    second = case.stack()
    expected = {name: t.detach() for name, t in first.ledger.tensors(case.id).items()}
    found = {name: t.detach() for name, t in second.ledger.tensors(case.id).items()}
    assert_same_tensors(found, expected, "two builds with seed 0")


@check(when=lambda subject: subject.claims(Claim.IDENTITY_AT_START))
def check_identity_at_start(case: Case) -> None:
    """The model computes exactly what it computed before, with padding too."""
    assert_equal(case.output(case.stack()), case.base_output(), "logits after inject and of the base")
    if case.arch in TEXT:
        padded = case.output(case.stack(), padding=case.padding)
        assert_equal(
            padded, case.base_output(padding=case.padding), "padded logits after inject and of the base"
        )


@check(on="first", when=_may_change)
def check_identity_not_hidden(case: Case) -> None:
    """A plugin that does not claim identity at start changes the output, or else should claim it."""
    stack = case.stack()
    if _visible(stack):
        changed = difference(case.output(stack), case.base_output())
        assert changed > 0, (
            f"the output is the base's to the bit, and {Claim.IDENTITY_AT_START} is not claimed"
        )


@check(when=injects)
def check_only_declared_parameters_train(case: Case) -> None:
    """What requires a gradient is what the plugin's parts hold: no more, no less."""
    stack = case.stack()
    declared = {id(p) for p in stack.ledger.parameters(case.id) if p.is_floating_point()}
    names = {id(p): name for name, p in stack.model.named_parameters()}
    training = {id(p) for p in stack.model.parameters() if p.requires_grad}
    undeclared = sorted(names[i] for i in training - declared)
    lost = sorted(names.get(i, "outside the model") for i in declared - training)
    assert not undeclared, f"{len(undeclared)} parameters train that no part holds, first {undeclared[0]}"
    assert not lost, f"{len(lost)} declared parameters do not train, first {lost[0]}"


SHOWN = (Claim.TRAINS_BASE, Claim.VIRTUAL_TOKENS, Claim.REPLACES_ATTENTION, Claim.COMPUTES_LAYERS)
"""Claims that follow from what stands on the model, so they are shown by all who claim them and by nobody else."""


@check(when=changes_model)
def check_effects_match_claims(case: Case) -> None:
    """What the plugin does to the model is what it claims."""
    stack = case.stack()
    subject = case.subject
    effects = _effects(stack)
    for claim in SHOWN:
        assert not (claim in effects and not subject.claims(claim)), f"shows {claim}, and does not claim it"
    beside = Claim.BESIDE_WEIGHTS
    if subject.claims(beside):
        assert beside in effects, f"claims {beside}, and attaches to {_linear_places(stack)[0]}"
    elif not subject.implements("compress") and not subject.claims(Claim.TRAINS_BASE) and _visible(stack):
        assert beside not in effects, f"attaches nothing to a linear layer, and does not claim {beside}"
    case.compress(stack)
    effects |= _effects(stack)
    for claim in (*SHOWN, Claim.QUANTIZES):
        assert not (subject.claims(claim) and claim not in effects), f"claims {claim}, and does not show it"


def _visible(stack: Stack) -> bool:
    """Does anything stand on the model; modules that a plugin only keeps do not."""
    return any(not isinstance(part, FreePart | ContextPart) for part in stack.ledger.parts)


def _linear_places(stack: Stack) -> list[str]:
    linear = {s.path for s in stack.anatomy.sites if s.kind in LINEAR_KINDS}
    return [part.path for part in stack.ledger.all(DeltaPart) if part.path in linear]


def _effects(stack: Stack) -> set[Claim]:
    parts = stack.ledger.parts
    found = set()
    if stack.ledger.all(BasePart):
        found.add(Claim.TRAINS_BASE)
    if stack.ledger.all(PromptPart):
        found.add(Claim.VIRTUAL_TOKENS)
    if any(isinstance(part.module, AttentionEdit) and part.module.replaces() for part in parts):
        found.add(Claim.REPLACES_ATTENTION)
    if any(part.module.has_base() for part in stack.ledger.all(DeltaPart)):  # type: ignore[operator]
        found.add(Claim.COMPUTES_LAYERS)
    if any(not t.is_floating_point() for p in stack.ledger.all(ReplacedPart) for t in p.tensors().values()):
        found.add(Claim.QUANTIZES)
    if not _linear_places(stack):
        found.add(Claim.BESIDE_WEIGHTS)
    return found


@check(on="first", when=injects)
def check_builds_on_meta(case: Case) -> None:
    """On the meta device, as `peftx plan` builds it: the same tensors, and none of them has values."""
    real = case.stack()
    with torch.device("meta"):
        shape = Stack(
            case.model().to("meta"),
            [(case.id, case.subject.make())],
            tokenizer=real.tokenizer,
            seed=real.seed,
        )
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in stack.ledger.tensors(case.id).items()}
        for stack in (shape, real)
    )
    assert found == expected, f"tensors on meta: {found}, with values: {expected}"
    solid = [name for name, tensor in shape.ledger.tensors(case.id).items() if not tensor.is_meta]
    assert not solid, f"{solid[0]} has values, on the meta device"


@check(on="first", when=injects)
def check_input_edits_are_claimed(case: Case) -> None:
    """`edits-inputs` is claimed if, and only if, a delta edits what goes into its layer."""
    stack = case.stack()
    shown = [
        part.key
        for part in stack.ledger.of(case.id)
        if isinstance(part.module, Delta) and part.module.has_pre()
    ]
    claimed = Claim.EDITS_INPUTS in stack.plugins[case.id].claims
    assert shown or not claimed, f"claims edits-inputs, and no delta has a `pre` on '{case.arch}'"
    assert claimed or not shown, f"the delta at {shown[0]} edits its input: claim edits-inputs"


@check(on="first", when=changes_model)
def check_modes_are_the_models(case: Case) -> None:
    """All that it puts on a model is in training or evaluation as the model is: else dropout acts on answers."""
    stack = case.stack()
    case.compress(stack)
    training = stack.model.training
    other = next((name for name, m in stack.model.named_modules() if m.training is not training), None)
    assert other is None, f"{other} is not in the mode of the model, training={training}"


CHECKS = (
    check_modes_are_the_models,
    check_same_under_a_seed,
    check_identity_at_start,
    check_identity_not_hidden,
    check_only_declared_parameters_train,
    check_effects_match_claims,
    check_builds_on_meta,
    check_input_edits_are_claimed,
)
