"""Metrics with 95 % confidence intervals, and the `Evaluation` that the `evaluate` hook gets.

Score, wilson_interval, bootstrap_ratio   (scores.py)      a number and how far to trust it
score_requests                            (likelihood.py)  log-probabilities of given tokens, batched
perplexity                                (language_modelling.py)
accuracy, head_answers                    (classification.py)
exact_match                               (answers.py)
Evaluation                                (evaluation.py)
"""

from __future__ import annotations

from peftx.kernel.modes import eval_mode, evaluating
from peftx.toolkits.evaluation.answers import exact_match, last_number, normalise_answer
from peftx.toolkits.evaluation.classification import AccuracyResult, ClassCounts, accuracy, head_answers
from peftx.toolkits.evaluation.evaluation import Evaluation
from peftx.toolkits.evaluation.language_modelling import perplexity
from peftx.toolkits.evaluation.likelihood import (
    Request,
    context_window,
    score_requests,
    windows,
)
from peftx.toolkits.evaluation.scores import Score, bootstrap_ratio, wilson_interval

__all__ = [
    "AccuracyResult",
    "ClassCounts",
    "Evaluation",
    "Request",
    "Score",
    "accuracy",
    "bootstrap_ratio",
    "context_window",
    "eval_mode",
    "evaluating",
    "exact_match",
    "head_answers",
    "last_number",
    "normalise_answer",
    "perplexity",
    "score_requests",
    "wilson_interval",
    "windows",
]
