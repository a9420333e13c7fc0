"""Together with others, in both orders."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peftx
from peftx.engines.bundle import holds_base
from peftx.errors import ConflictError
from peftx.kernel.plugin import Plugin
from peftx.stack import Stack
from peftx.testing.case import Case, assert_equal, error_of
from peftx.testing.checks.check import check
from peftx.testing.checks.decoding import decoded
from peftx.testing.models import tiny_tokenizer
from peftx.testing.reference import COMPANION, ReferenceGain, ReferenceLowRank, ReferencePrompt
from peftx.testing.subject import GENERATIVE, Subject


def _composes(subject: Subject) -> bool:
    return subject.implements("inject", "train_step", "compress", "decode")


@check(on="first", when=_composes, one_of="companions")
def check_composes_with_weights(case: Case) -> None:
    """With a low-rank update of the weights: works in both orders, or the conflict names both."""
    _both_orders(case, COMPANION, ReferenceLowRank)


@check(on="first", when=_composes, one_of="companions")
def check_composes_with_norms(case: Case) -> None:
    """With gains behind the norms: works in both orders, or the conflict names both."""
    _both_orders(case, "reference-gain", ReferenceGain)


@check(on="first", when=_composes, one_of="companions")
def check_composes_with_prompt(case: Case) -> None:
    """With soft tokens: works in both orders, or the conflict names both."""
    _both_orders(case, "reference-prompt", ReferencePrompt)


def _both_orders(case: Case, other: str, kind: type[Plugin]) -> None:
    for order in (f"{other}, {case.id}", f"{case.id}, {other}"):
        first = order.startswith(other)
        build = partial(_stack, case, other, kind, first)
        use = partial(_use, case, build, first, case.folder / str(first), order)
        error = error_of(ConflictError, use)
        if error is not None:
            silent = [name for name in (case.id, other) if name not in str(error)]
            assert not silent, f"{order}: the conflict does not name {', '.join(silent)}: {error}"
        elif case.subject.implements("inject") and not case.subject.implements("compress"):
            stack, alone = build(), Stack(case.model(), [(other, kind())])
            stack.remove(case.id)
            what = f"{order}: logits after removal and of {other} alone"
            assert_equal(case.output(stack), case.output(alone), what)


def _stack(case: Case, other: str, kind: type[Plugin], first: bool) -> Stack:
    """The other plugin, then this one; or this one, with its compression, then the other."""
    if first:
        return case.stack(before=[(other, kind())])
    stack = case.stack(after=[(other, kind())], inject=False)
    stack.inject([case.id])
    case.compress(stack)
    stack.inject([other])
    return stack


def _use(case: Case, build: Callable[[], Stack], first: bool, folder: Path, order: str) -> None:
    """A step of training, compression, decoding, saving, loading."""
    stack = build()
    losses = case.train(stack, 1)
    assert all(map(math.isfinite, losses)), f"{order}: losses are {losses}"
    if first:
        case.compress(stack)
    before = case.output(stack)
    assert bool(before.isfinite().all()), f"{order}: some logits are not finite"
    if case.subject.implements("decode") and case.arch in GENERATIVE:
        decoded(case, stack)
    stack.save(folder)
    model = None if holds_base(folder) else case.model()
    loaded = peftx.load(folder, model=model, tokenizer=tiny_tokenizer())
    assert_equal(case.output(loaded), before, f"{order}: logits loaded and saved")


CHECKS = (check_composes_with_weights, check_composes_with_norms, check_composes_with_prompt)
