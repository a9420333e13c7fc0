"""The `evaluate` hook."""

from __future__ import annotations

import math

import torch

from peftx.engines.training.run import as_training_data
from peftx.errors import PeftxError
from peftx.kernel.plugin import Claim
from peftx.stack import Stack
from peftx.testing.case import Case, assert_close, assert_same_tensors, base_tensors, crashed, error_of
from peftx.testing.checks.check import check, injects
from peftx.testing.models import tiny_tokenizer
from peftx.toolkits.evaluation.classification import classify


@check(on="first-generative", when=lambda subject: subject.implements("evaluate"))
def check_scores_are_finite(case: Case) -> None:
    """There are scores, all finite and inside their intervals, and the model is what it was."""
    stack = case.stack()
    before = base_tensors(stack.model)
    scores = stack.evaluate(list(case.subject.rows), metrics=[case.id], max_length=96)
    assert scores, "no score was added"
    for name, score in scores.items():
        assert math.isfinite(score.value), f"{name} is {score.value}"
        if score.low is not None and score.high is not None:
            inside = score.low <= score.value <= score.high
            assert inside, f"{name} = {score.value} lies outside its interval {score.low} to {score.high}"
    assert_same_tensors(base_tensors(stack.model), before, "the model after evaluation and before")


@check(on="text", when=lambda subject: subject.claims(Claim.CLASSIFIES))
def check_classes_are_named(case: Case) -> None:
    """A finite score for every class of every text, whatever texts stand beside it; switched off, no head is left."""
    stack = case.finished()
    head = stack.plugins[case.id]
    texts = [row["text"] for row in case.subject.rows][:3]
    labels, together = classify(stack, head, texts)
    assert together.shape == (len(texts), len(labels)), (
        f"{len(texts)} texts and {len(labels)} labels, but scores of shape {tuple(together.shape)}"
    )
    assert torch.isfinite(together).all(), "a score is not finite"
    unknown = sorted({row["label"] for row in case.subject.rows} - set(labels))
    assert not unknown, f"the rows have labels that the head does not name: {', '.join(unknown)}"
    alone = torch.cat([classify(stack, head, [text])[1] for text in texts])
    assert_close(together, alone, 1e-4, "scores of texts in one batch and one by one")
    with stack.disabled(case.id):
        error = error_of(PeftxError, lambda: stack.classify(texts))
    assert error is not None, "switched off, it still classifies"


@check(on="first-generative", when=lambda subject: subject.claims(Claim.CLASSIFIES) and injects(subject))
def check_base_is_measured_before_inject(case: Case) -> None:
    """Ahead of `inject`, in a run that measures the base first, the base answers; who asks for the head is told so."""
    stack, rows = case.stack(inject=False), list(case.subject.rows)
    texts = [row["text"] for row in rows]
    asked = error_of(PeftxError, lambda: stack.plugins[case.id].classify(stack, texts))
    assert asked is not None, "it classifies before there is a head"
    assert asked.hint, f"no way out of: {asked.message}"
    data = as_training_data(stack, rows, seed=0, max_length=96)
    prepared = error_of(PeftxError, lambda: stack.prepare(data))
    assert prepared is None or not crashed(prepared), f"prepare_data before inject: {prepared}"
    found = stack.evaluate(rows, metrics=["accuracy"])["accuracy"]
    base = Stack(case.model(), tokenizer=tiny_tokenizer()).evaluate(rows, metrics=["accuracy"])["accuracy"]
    assert found == base, f"accuracy before inject is {found.value:.3g}, the base's {base.value:.3g}"
    stack.inject()
    case.train(stack, 2)
    count = stack.evaluate(rows, metrics=["accuracy"])["accuracy"].count
    assert count == len(rows), f"of {len(rows)} rows {count} were named"


CHECKS = (check_scores_are_finite, check_classes_are_named, check_base_is_measured_before_inject)
