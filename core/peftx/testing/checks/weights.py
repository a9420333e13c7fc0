"""Merging into the weights."""

from __future__ import annotations

import torch

from peftx.errors import MergeError
from peftx.kernel.parts import DeltaPart
from peftx.kernel.plugin import Claim
from peftx.kernel.slots.carrier import OutputCarrier
from peftx.stack import Stack
from peftx.testing.case import (
    Case,
    assert_close,
    assert_equal,
    assert_same_tensors,
    base_tensors,
    difference,
    error_of,
    largest,
    output,
)
from peftx.testing.checks.check import check, injects
from peftx.testing.subject import Subject

_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
"""Relative to the largest logit."""
_DRAWS = 4
"""Of a model with experts: rounding sends a token to other ones in a third of all draws, whatever stands on it, and the
logits are far apart then. A plugin that folds wrongly is wrong in all."""


def _merges(subject: Subject) -> bool:
    return subject.claims(Claim.MERGEABLE)


@check(when=_merges)
def check_merge_equals_unmerged(case: Case) -> None:
    """Folded into the weights, the plugin computes the same, to float32's rounding."""
    _merged_equals_unmerged(case, torch.float32)


@check(when=_merges)
def check_merge_in_bfloat16(case: Case) -> None:
    """Folded into bfloat16 weights, the plugin computes the same, to bfloat16's rounding."""
    _merged_equals_unmerged(case, torch.bfloat16)


def _merged_equals_unmerged(case: Case, dtype: torch.dtype) -> None:
    tolerance = _ROUNDING[dtype]
    for seed in range(_DRAWS):
        stack = case.stack(dtype=dtype)
        if case.subject.implements("train_step") and stack.trainable_parameters():
            case.train(stack, 1)  # a plugin may set at its first step what it starts from
        case.perturb(stack, seed=seed)
        before = case.output(stack)
        stack.merge(case.id)
        after = case.output(stack)
        routed = any(site.role == "router" for site in stack.anatomy.sites)
        if not routed or difference(after, before) <= tolerance * largest(before):
            break
    assert_close(after, before, tolerance, f"merged and unmerged logits in {dtype}")


@check(on="first", when=_merges)
def check_merge_rounds_once(case: Case) -> None:
    """bfloat16 weights after a merge are what float32 arithmetic gives, rounded once."""
    stack = case.stack(dtype=torch.bfloat16)
    case.perturb(stack)
    case.output(stack)
    wide = Stack(
        case.model(torch.bfloat16).float(), [(case.id, case.subject.make())], tokenizer=stack.tokenizer
    )
    tensors = wide.ledger.tensors(case.id)
    with torch.no_grad():
        for name, tensor in stack.ledger.tensors(case.id).items():
            tensors[name].copy_(tensor)
    for one in (stack, wide):
        one.merge(case.id)
    expected = base_tensors(wide.model)
    for name, tensor in base_tensors(stack.model).items():
        differ = (tensor != expected[name].to(tensor.dtype)).float().mean().item() if tensor.numel() else 0.0
        assert differ == 0, f"{differ:.1%} of {name} are rounded more than once"


@check(when=_merges)
def check_unmerge_is_exact(case: Case) -> None:
    """After merge and unmerge every weight is the same bits as before, and so are the logits."""
    for dtype in (torch.float32, torch.bfloat16):
        stack = case.stack(dtype=dtype)
        case.perturb(stack)
        weights, before = base_tensors(stack.model), case.output(stack)
        stack.merge(case.id)
        stack.unmerge()
        assert_same_tensors(base_tensors(stack.model), weights, f"weights after unmerge and before, {dtype}")
        assert_equal(case.output(stack), before, f"logits after unmerge and before, {dtype}")


@check(on="first", when=_merges)
def check_export_is_plain(case: Case) -> None:
    """The exported checkpoint is a plain `transformers` model that computes the same, or the export is refused."""
    stack = case.stack()
    case.perturb(stack)
    before = case.output(stack)
    try:
        folder = stack.export(case.folder / "export")
    except MergeError:
        return  # the architecture has no place for the merged weights, and the user is told
    plain = type(stack.model).from_pretrained(folder, dtype=torch.float32)
    assert_close(
        output(plain, case.inputs()), before, _ROUNDING[torch.float32], "exported and unmerged logits"
    )


@check(on="first", when=lambda subject: injects(subject) and not _merges(subject))
def check_merge_is_refused(case: Case) -> None:
    """A plugin that does not claim to be mergeable is refused, and is indeed not."""
    stack = case.stack()
    error = error_of(MergeError, lambda: stack.merge(case.id))
    assert error is not None, f"it merged, and {Claim.MERGEABLE} is not claimed"
    assert case.id in str(error), f"the message does not name '{case.id}': {error}"
    parts = stack.ledger.of(case.id)
    foldable = [
        isinstance(part, DeltaPart) and part.module.can_fold() and not isinstance(part.place, OutputCarrier)
        for part in parts
    ]
    assert not (parts and all(foldable)), f"every delta folds, and {Claim.MERGEABLE} is not claimed"


CHECKS = (
    check_merge_equals_unmerged,
    check_merge_in_bfloat16,
    check_merge_rounds_once,
    check_unmerge_is_exact,
    check_export_is_plain,
    check_merge_is_refused,
)
