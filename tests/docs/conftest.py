"""What makes the site is under test too: its modules lie in tools/."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROWS = 8

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture
def shorten(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, int]], None]:
    """`shorten({"steps": 4})`: from now on trainings have so much of each option at most, and measurements and
    calibrations that say nothing else have a few rows."""
    from peftx import Stack

    train, evaluate, compress = Stack.train, Stack.evaluate, Stack.compress

    def shortened(limits: Mapping[str, int]) -> None:
        def trains(self: Stack, data: Any, **given: Any) -> Any:
            given.pop("num_train_epochs", None)
            most = {name: min(given.get(name, limit), limit) for name, limit in limits.items()}
            return train(self, data, **given | most)

        def evaluates(self: Stack, data: Any = None, **given: Any) -> Any:
            return evaluate(self, data, **{"limit": ROWS} | given)

        def compresses(self: Stack, *data: Any, **given: Any) -> None:
            compress(self, *data, **{"samples": 4, "length": 64} | given)

        for name, shorter in (("train", trains), ("evaluate", evaluates), ("compress", compresses)):
            monkeypatch.setattr(Stack, name, shorter)

    return shortened
