"""Numbers as people read them, in commands and on pages."""

from __future__ import annotations

import math
import random

import pytest

from peftx.quantities import between, count, measure, plain, size, time


@pytest.mark.parametrize(
    ("bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_999, "1 MB"), (2_850_000, "2.85 MB"), (7 * 10**15, "7,000.0 TB")],
)  # fmt: skip
def test_sizes(bytes: int, text: str) -> None:
    assert size(bytes) == text


def test_large_numbers_have_no_exponent() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        value = draw.choice((1.0, draw.uniform(1, 10))) * 10.0 ** draw.randrange(14)
        for text in (
            size(value),
            count(value),
            time(value),
            plain(value),
            plain(value, 2),
            measure(value, "bytes"),
        ):
            assert "e+" not in text, value


def test_a_measure_keeps_its_digits_and_its_unit() -> None:
    assert measure(2_244_192.0, "bytes") == "2.24 MB"
    assert measure(68.5604, "per token") == "68.56 per token"
    assert measure(123_456.7, "") == "123,457"
    assert measure(math.inf, "per token") == "inf per token"
    assert plain(3e-6) == "3e-06"


def test_an_interval() -> None:
    assert between(66.521, 70.731) == "66.52 to 70.73"
    assert between(None, None) == ""


def test_seconds() -> None:
    assert [time(value) for value in (0.0, 0.01234, 0.99999, 1.5, 1234.5)] == [
        "0 s", "12.3 ms", "1,000 ms", "1.5 s", "1,234 s",
    ]  # fmt: skip
