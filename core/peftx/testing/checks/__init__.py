"""All checks, by topic. A plugin gets those that its hooks and claims call for."""

from __future__ import annotations

from peftx.testing.checks import (
    building,
    bundles,
    composition,
    compression,
    configuration,
    copies,
    data,
    decoding,
    evaluation,
    generation,
    inputs,
    others,
    package,
    refusal,
    serving,
    steps,
    training,
    weights,
)
from peftx.testing.checks.check import Check

TOPICS = {
    "configuration": configuration.CHECKS,
    "package": package.CHECKS,
    "building": building.CHECKS,
    "training": training.CHECKS,
    "steps": steps.CHECKS,
    "weights": weights.CHECKS,
    "bundles": bundles.CHECKS,
    "copies": copies.CHECKS,
    "inputs": inputs.CHECKS,
    "generation": generation.CHECKS,
    "decoding": decoding.CHECKS,
    "compression": compression.CHECKS,
    "data": data.CHECKS,
    "evaluation": evaluation.CHECKS,
    "others": others.CHECKS,
    "serving": serving.CHECKS,
    "composition": composition.CHECKS,
    "refusal": refusal.CHECKS,
}
"""Topic -> its checks."""

CHECKS: tuple[Check, ...] = tuple(check for checks in TOPICS.values() for check in checks)

__all__ = ["CHECKS", "TOPICS", "Check"]
