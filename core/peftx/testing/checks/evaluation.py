"""The `evaluate` hook."""

from __future__ import annotations

import math

import torch

from peftx.errors import PeftxError
from peftx.kernel.plugin import Claim
from peftx.testing.case import Case, assert_close, assert_same_tensors, base_tensors, error_of
from peftx.testing.checks.check import check
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


CHECKS = (check_scores_are_finite, check_classes_are_named)
