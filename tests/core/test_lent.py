"""Attributes that are lent come back, whatever happened."""

from __future__ import annotations

import pytest
from torch import nn

from peftx.toolkits.injecting import lent


def pair() -> list[nn.Module]:
    return [nn.Identity(), nn.Identity().eval()]


def test_each_owner_has_its_own_value_and_then_what_it_had() -> None:
    owners = pair()
    with lent(owners, "training", (False, True)):
        assert [owner.training for owner in owners] == [False, True]
    assert [owner.training for owner in owners] == [True, False]


def test_an_error_inside_leaves_nothing_lent() -> None:
    owners = pair()
    with pytest.raises(KeyError), lent(owners, "training", (False, True)):
        raise KeyError
    assert [owner.training for owner in owners] == [True, False]


@pytest.mark.parametrize("values", [(False,), (False, True, True)])
def test_another_number_of_values_lends_nothing(values: tuple[bool, ...]) -> None:
    owners = pair()
    with pytest.raises(ValueError, match="zip"), lent(owners, "training", values):
        pass
    assert [owner.training for owner in owners] == [True, False]
