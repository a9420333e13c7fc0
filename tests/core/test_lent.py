"""Attributes that have another value for a while."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peftx.toolkits.injecting import lent


def test_each_gets_back_its_own_also_when_something_is_raised() -> None:
    first, second = SimpleNamespace(off=False), SimpleNamespace(off=None)

    def within() -> None:
        with lent("off", True, first, second):
            assert first.off is second.off is True
            raise KeyError

    with pytest.raises(KeyError):
        within()
    assert first.off is False
    assert second.off is None
