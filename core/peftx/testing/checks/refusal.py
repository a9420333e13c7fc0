"""Where the plugin does not work, it says so."""

from __future__ import annotations

from peftx.errors import PeftxError
from peftx.testing.case import Case, crashed
from peftx.testing.checks.check import changes_model, check
from peftx.testing.checks.decoding import decoded
from peftx.testing.checks.generation import check_cached_equals_uncached, keeps_cache
from peftx.testing.subject import GENERATIVE


def _use(case: Case) -> None:
    """Everything that the plugin does, once."""
    stack = case.training_stack() if case.subject.implements("train_step") else case.stack()
    if not stack.trainable_parameters() or case.subject.implements("compress"):
        case.compress(stack)
    else:
        case.train(stack, 1)
    found = case.output(stack)
    assert bool(found.isfinite().all()), "some logits are not finite"
    if case.subject.implements("decode") and case.arch in GENERATIVE:
        decoded(case, stack)


def _is_clear(case: Case, error: PeftxError) -> None:
    assert not crashed(error), f"it crashed: {error}"
    text = str(error)
    named = [case.id, case.arch, type(case.model()).__name__, type(case.model().base_model).__name__]
    assert any(name in text for name in named), f"the message names neither the plugin nor the model: {text}"


@check(on="odd", when=changes_model)
def check_carries_or_refuses(case: Case) -> None:
    """An unusual architecture works, with its cache too, or is refused with a message that names the plugin or the
    model."""
    try:
        _use(case)
        if case.arch in GENERATIVE and keeps_cache(case.subject):
            check_cached_equals_uncached.run(case)
    except PeftxError as error:
        _is_clear(case, error)


@check(on="refused")
def check_refuses(case: Case) -> None:
    """An architecture that the author names as out of reach is refused with a message, before anything runs."""
    try:
        stack = case.training_stack() if case.subject.implements("train_step") else case.stack()
    except PeftxError as error:
        _is_clear(case, error)
        return
    try:
        _use(case)
    except PeftxError as error:
        raise AssertionError(
            f"it is refused on {case.arch}, but only after the stack was built and worked on: raise that in "
            f"`suits(model)` ({error.message})"
        ) from error
    assert stack is not None
    raise AssertionError(f"it works on {case.arch}; take it out of `refuses`")


CHECKS = (check_carries_or_refuses, check_refuses)
