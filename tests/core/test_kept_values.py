"""What a layer keeps of its numbers is theirs: whatever changes them makes it anew."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peftx.toolkits.injecting import Kept


class Doubled:
    def __init__(self) -> None:
        self.p, self.kept, self.made = nn.Parameter(torch.ones(3)), Kept(), 0

    def make(self) -> Tensor:
        self.made += 1
        return self.p.detach() * 2

    def now(self, about: object = None) -> Tensor:
        found: Tensor = self.kept.of((self.p, None), self.make, about=about)
        return found


def another(one: Doubled) -> None:
    one.p = nn.Parameter(torch.full((3,), 5.0))


def written(one: Doubled) -> None:
    with torch.no_grad():
        one.p.add_(1)


def lent(one: Doubled) -> None:
    one.p.data = torch.full((3,), 7.0)


def by_an_optimizer(one: Doubled) -> None:
    one.p.grad = torch.ones(3)
    torch.optim.AdamW([one.p], lr=0.5, foreach=True).step()


@pytest.mark.parametrize("change", [another, written, lent, by_an_optimizer])
def test_a_change_is_seen_and_nothing_else_makes_it_anew(change: Callable[[Doubled], None]) -> None:
    one = Doubled()
    assert one.kept.value is None
    assert one.now() is one.now()
    assert one.made == 1
    change(one)
    assert torch.equal(one.now(), one.p.detach() * 2)
    assert one.made == 2
    assert one.now(torch.bfloat16) is one.now(torch.bfloat16)
    assert one.made == 3, "about another dtype"
    one.kept.forget()
    one.now(torch.bfloat16)
    assert one.made == 4


def test_a_copy_keeps_nothing_of_another_tensor() -> None:
    one = Doubled()
    one.now()
    two = copy.deepcopy(one)
    with torch.no_grad():
        two.p.add_(1)
    assert torch.equal(two.now(), two.p.detach() * 2)
    assert torch.equal(one.now(), one.p.detach() * 2)


def test_what_inference_mode_made_is_kept_by_place() -> None:
    one = Doubled()
    with torch.inference_mode():
        one.p = nn.Parameter(torch.ones(3))
        assert one.now() is one.now()
