"""A share that leaves nothing is refused with a bound that is enough."""

from __future__ import annotations

import re

import pytest

from peftx.errors import OptionError
from peftx.toolkits.injecting import check_share


@pytest.mark.parametrize("goes", [False, True])
@pytest.mark.parametrize("least", [1, 42])
def test_the_bound_of_the_hint_is_enough_and_close(goes: bool, least: int) -> None:
    for size in [*range(43, 200), 512, 1000, 1024, 4096, 10_000, 176_128, 10**6, 4_358_144, 7 * 10**9]:
        with pytest.raises(
            OptionError, match=rf"x: much 0?.* leaves .* of the {size} entries of W"
        ) as caught:
            check_share("x: much", 1 - 1e-12 if goes else 1e-12, size, "W", goes=goes, least=least)
        found = re.fullmatch(rf"much at {'most' if goes else 'least'} (0\.\d+)", str(caught.value.hint))
        assert found
        bound = float(found[1])
        check_share("x: much", bound, size, "W", goes=goes, least=least)
        left = size * (1 - bound if goes else bound)
        assert least <= round(left, 6) <= least + 1, "and not far more than it takes"
