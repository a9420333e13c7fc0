"""The scalar rules: YAML 1.2 core and `${env:NAME}`."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftx_spec.scalars import ScalarError, escape, interpolate, parse_scalar

TABLE = [
    *((text, None) for text in ("", "~", "null", "Null", "NULL")),
    *((text, True) for text in ("true", "True", "TRUE")),
    *((text, False) for text in ("false", "False", "FALSE")),
    ("0", 0),
    ("-3", -3),
    ("+4", 4),
    ("007", 7),
    ("0o17", 15),
    ("0x1F", 31),
    ("1e-4", 1e-4),
    ("1e4", 1e4),
    ("1E5", 1e5),
    (".5", 0.5),
    ("-.5e+1", -5.0),
    ("5.", 5.0),
    ("1.0", 1.0),
    (".inf", math.inf),
    ("-.INF", -math.inf),
    ("+.Inf", math.inf),
]
TEXTS = [
    *("yes", "no", "on", "off", "Yes", "ON", "y", "n", "tRUE", "nULL", "none", "None"),
    *(
        "1_000",
        "12:30:45",
        "2024-01-02",
        "0b11",
        "0X1F",
        "0o8",
        "0xg",
        "-0x1F",
        "1e",
        "e4",
        ".",
        "-",
        "+",
        "1.2.3",
    ),
    *("inf", "nan", "NaN", ".iNF", "+.nan", "1e4.5", "\u0663", "1 2", "=", "<<", "1,000"),
]


@pytest.mark.parametrize(("text", "value"), TABLE)
def test_core_schema(text: str, value: object) -> None:
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number(text: str) -> None:
    assert math.isnan(parse_scalar(text))


@pytest.mark.parametrize("text", TEXTS)
def test_everything_else_is_text(text: str) -> None:
    assert parse_scalar(text) == text


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_as_python_writes_them(number: float) -> None:
    assert parse_scalar(repr(number)) == number


@pytest.mark.parametrize("text", ["1e999", "-1e999", "9" * 2000, "0x" + "f" * 2000])
def test_numbers_that_no_type_holds(text: str) -> None:
    with pytest.raises(ScalarError, match=r"too (large|long)"):
        parse_scalar(text)


ENVIRONMENT = {
    "N": "8",
    "F": "1e-4",
    "S": "a b",
    "YES": "yes",
    "EMPTY": "",
    "LIST": "[1, 2]",
    "REF": "${env:N}",
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${env:N}", 8),
        ("${env:F}", 1e-4),
        ("${env:S}", "a b"),
        ("${env:YES}", "yes"),
        ("${env:LIST}", "[1, 2]"),
        ("${env:REF}", "${env:N}"),  # what comes from outside is not looked into again
        ("${env:N}${env:N}", "88"),
        ("x${env:N}", "x8"),
        ("${env:N} ", "8 "),
        ("${env:NONE:-3}", 3),
        ("${env:NONE:-}", None),
        ("${env:NONE:-a:-b}", "a:-b"),
        ("${env:EMPTY:-3}", 3),
        ("${env:N:-3}", 8),
        ("$${env:N}", "${env:N}"),
        ("$$${env:N}", "$${env:N}"),
        ("$${env:N}${env:N}", "${env:N}8"),
        ("${N}", "${N}"),
        ("$env:N", "$env:N"),
    ],
)
@pytest.mark.parametrize("quoted", [False, True])
def test_interpolation(text: str, value: object, quoted: bool) -> None:
    found = interpolate(text, quoted=quoted, environment=ENVIRONMENT).value
    assert found == value
    assert type(found) is type(value)


def test_quotes_matter_without_a_reference() -> None:
    assert interpolate("8", quoted=True, environment={}).value == "8"
    assert interpolate("8", quoted=False, environment={}).value == 8


def test_names_of_the_variables_are_noted() -> None:
    assert interpolate("${env:N}/${env:NONE:-x}", quoted=False, environment=ENVIRONMENT).variables == (
        "N",
        "NONE",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${env:NONE}", "NONE is not set"),
        ("a ${env:EMPTY} b", "EMPTY is empty"),
        ("${env:N", "no closing brace"),
        ("${env:}", "names no variable"),
        ("${env:a-b}", "names no variable"),
        ("${env:1A:-x}", "names no variable"),
        ("${env:BAD}", "not valid UTF-8"),
    ],
)
def test_references_that_fail(text: str, message: str) -> None:
    with pytest.raises(ScalarError, match=message):
        interpolate(text, quoted=False, environment={**ENVIRONMENT, "BAD": "\udcff"})


@settings(deadline=None)
@given(st.text("${env:}AB-") | st.text())
def test_escape_is_undone(text: str) -> None:
    assert interpolate(escape(text), quoted=True, environment={}).value == text
