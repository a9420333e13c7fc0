"""What makes the site is under test too: its modules lie in tools/."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from peftx_spec.training import TrainSpec

ROWS = 8

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture
def shorten(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, int]], None]:
    """`shorten({"steps": 4})`: from now on trainings, those of pipelines too, have so much of each option at most, and
    measurements and calibrations that say nothing else have a few rows."""
    from peftx import Stack, pipeline

    train, evaluate, compress, train_stage = Stack.train, Stack.evaluate, Stack.compress, pipeline.train

    def shortened(limits: Mapping[str, int]) -> None:
        def trains(self: Stack, data: Any, **given: Any) -> Any:
            given.pop("num_train_epochs", None)
            most = {name: min(given.get(name, limit), limit) for name, limit in limits.items()}
            return train(self, data, **given | most)

        def evaluates(self: Stack, data: Any = None, **given: Any) -> Any:
            given["limit"] = given.get("limit") or ROWS  # a pipeline says None
            return evaluate(self, data, **given)

        def compresses(self: Stack, *data: Any, **given: Any) -> None:
            compress(self, *data, **{"samples": 4, "length": 64} | given)

        for name, shorter in (("train", trains), ("evaluate", evaluates), ("compress", compresses)):
            monkeypatch.setattr(Stack, name, shorter)

        def trains_in_a_run(stack: Stack, data: Any, *, options: TrainSpec, **given: Any) -> Any:
            said = {name: getattr(options, name) for name in limits}
            most = {name: min(said[name], limit) for name, limit in limits.items() if said[name] is not None}
            shorter = options.model_copy(update=most | {"num_train_epochs": None})
            return train_stage(stack, data, options=shorter, **given)

        monkeypatch.setattr(pipeline, "train", trains_in_a_run)

    return shortened
