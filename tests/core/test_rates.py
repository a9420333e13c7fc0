"""Parameters that take longer or shorter steps, and the options that say when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peftx.toolkits.injecting import at_rates
from peftx.toolkits.options import whole_steps


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0, 10.0, torch.tensor([[2.0], [0.5]])])
def test_an_update_is_multiplied(rate: float | torch.Tensor) -> None:
    p, other = (nn.Parameter(torch.randn(2, 3, generator=torch.Generator().manual_seed(n))) for n in (0, 1))
    actions: dict[str, Any] = {}
    step: Any = SimpleNamespace(
        before_update=lambda action: actions.update(before=action),
        after_update=lambda action: actions.update(after=action),
    )
    at_rates(step, [(p, rate), (other, 1.0)])
    with torch.no_grad():
        p += 5  # before the update: what a step does to its parameters earlier is none of it
    old, change = p.detach().clone(), torch.arange(6.0).view(2, 3)
    actions["before"](None)
    with torch.no_grad():
        p += change
        other += change
    moved = other.detach().clone()
    actions["after"](None)
    torch.testing.assert_close(p.detach(), old + rate * change)
    assert torch.equal(other, moved)


def test_steps_are_whole_and_shares_are_not() -> None:
    assert [whole_steps(n) for n in (0, 0.3, 1, 12.0)] == [0, 0.3, 1, 12.0]
    with pytest.raises(ValueError, match="must be whole"):
        whole_steps(1.5)
