"""The `evaluate` hook."""

from __future__ import annotations

import math

from peftx.testing.case import Case, assert_same_tensors, base_tensors
from peftx.testing.checks.check import check


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


CHECKS = (check_scores_are_finite,)
