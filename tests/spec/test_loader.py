"""The YAML loader: plain data with positions, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftx_spec import PeftxError, Position, SpecError, parse, read
from peftx_spec.loader import MAX_BYTES, MAX_DEPTH, parse_value
from peftx_spec.scalars import ScalarError


def fails(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse(text, file="s.yaml", environment={})
    return caught.value


def places(error: SpecError) -> list[tuple[int, int]]:
    return [(problem.line, problem.column) for problem in error.problems]


def test_data_and_positions() -> None:
    document = parse("a: 1\nb:\n  - x\n  - {c: yes, 'd': [2]}\n")
    assert document.data == {"a": 1, "b": ["x", {"c": "yes", "d": [2]}]}
    assert document.position(("a",), key=True) == Position(1, 1)
    assert document.position(("a",)) == Position(1, 4)
    assert document.position(("b", 0)) == Position(3, 5)
    assert document.position(("b", 1, "c"), key=True) == Position(4, 6)
    assert document.position(("b", 1, "d")) == Position(4, 19)
    assert document.position(("b", 1, "d", 0)) == Position(4, 20)


def test_what_is_not_there_stands_where_its_parent_does() -> None:
    document = parse("a:\n  b: {}\n")
    assert document.position(("a", "b", "c", "d")) == Position(2, 3)
    assert document.position(("x",)) == Position(1, 1)


def test_keys_are_text_as_written() -> None:
    assert parse("1: a\non: b\nnull: c\n1e3: d\n'': e\n").data == {
        "1": "a",
        "on": "b",
        "null": "c",
        "1e3": "d",
        "": "e",
    }


@pytest.mark.parametrize("text", ["k: '8'\n", 'k: "8"\n', "k: |-\n  8\n", "k: >-\n  8\n"])
def test_quoted_and_block_scalars_are_text(text: str) -> None:
    assert parse(text).data == {"k": "8"}


def test_crlf_and_byte_order_mark() -> None:
    document = parse("\ufeffa: 1\r\nb: 2\r\n")
    assert document.data == {"a": 1, "b": 2}
    assert document.position(("b",), key=True) == Position(2, 1)
    assert document.lines[:2] == ("a: 1", "b: 2")


def test_aliases_are_followed() -> None:
    assert parse("a: &x {k: [1]}\nb: *x\n").data == {"a": {"k": [1]}, "b": {"k": [1]}}


def test_duplicate_key_names_both_places() -> None:
    error = fails("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 4\n")
    assert places(error) == [(5, 3), (6, 1)]
    assert (
        "'c' stands twice: first at line 3, column 3, again at line 5, column 3" in error.problems[0].message
    )
    assert "first at line 1, column 1" in error.problems[1].message
    assert error.problems[0].path == "b.c"


def test_the_same_key_in_two_mappings_is_fine() -> None:
    assert parse("a: {c: 1}\nb: {c: 1}\n").data == {"a": {"c": 1}, "b": {"c": 1}}


@pytest.mark.parametrize("text", ["'a': 1\na: 2\n", '"\\x61": 1\na: 2\n'])
def test_duplicate_keys_in_other_quotes(text: str) -> None:
    assert places(fails(text)) == [(2, 1)]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("", (1, 1), "the spec is empty"),
        ("# only a comment\n\n", (1, 1), "the spec is empty"),
        ("---\n", (2, 1), "a spec is a mapping"),
        ("- a\n- b\n", (1, 1), "a spec is a mapping"),
        ("hello\n", (1, 1), "a spec is a mapping"),
        ("null\n", (1, 1), "a spec is a mapping"),
        ("a:\n\tb: 1\n", (2, 1), "a tab stands"),
        ("a: 1\n\tb: 1\n", (2, 1), "a tab stands"),
        ("a: 1\n---\nb: 2\n", (2, 1), "second document"),
        ("a: b: c\n", (1, 5), "a ':' where no key can be"),
        ("a: 'b\n", (2, 1), "ends inside a quoted scalar"),
        ("a: [1, 2\n", (2, 1), "expected ',' or ']'"),
        ("a: 1\n b: 2\n", (2, 3), "a ':' where no key can be"),
        ("a: @x\n", (1, 4), "cannot start any token"),
        ("a: *x\n", (1, 4), "undefined alias"),
        ("a: &x [*x]\n", (1, 4), "an alias that contains itself"),
        ("a: !!python/name:os.system x\n", (1, 4), "the tag !!python/name:os.system"),
        ("a: !!str 1\n", (1, 4), "the tag !!str"),
        ("a: !x {}\n", (1, 4), "the tag !x"),
        ("a: ! 1\n", (1, 4), "the tag !"),
        ("a: &x {k: 1}\nb:\n  <<: *x\n", (3, 3), "merge keys"),
        ("? [1]\n: 2\n", (1, 3), "a key is a plain word"),
        ("a: 1\n? \n: 2\n", (2, 2), "a value without a key"),
        ("a: 1\n: 2\n", (2, 1), "by its indentation"),
        ("a: 1\nb: \x07\n", (2, 4), "U+0007"),
        ("a: \ud800\n", (1, 4), "U+D800"),
        ('a: "\\ud800"\n', (1, 4), "lone surrogate"),
        ("a: 1e999\n", (1, 4), "too large"),
        ("a:\n  - ${env:NOPE}\n", (2, 5), "NOPE is not set"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), (1, MAX_DEPTH + 3), "levels deep"),
    ],
)
def test_refused(text: str, place: tuple[int, int], words: str) -> None:
    error = fails(text)
    assert places(error) == [place]
    assert words in error.problems[0].message
    assert str(error).startswith(f"s.yaml:{place[0]}:{place[1]}: ")


def test_deepest_that_is_allowed() -> None:
    depth = MAX_DEPTH - 1  # the root counts
    parse("a: " + "[" * (depth - 1) + "]" * (depth - 1))


def test_many_levels_do_not_exhaust_the_stack() -> None:
    assert "levels deep" in fails("a: " + "[" * 10_000).problems[0].message


def test_billion_laughs() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "more than 20000 values" in fails("\n".join(lines)).problems[0].message


def test_too_long() -> None:
    assert "characters" in fails("#" * (MAX_BYTES + 1)).problems[0].message


def test_faults_come_all_at_once() -> None:
    error = fails("a: ${env:X}\nb: !!int 3\nc: 1\nc: 2\nd: ${env:Y}\n")
    assert sorted(places(error)) == [(1, 4), (2, 4), (4, 1), (5, 4)]


def test_environment_in_values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTX_TEST_N", "8")
    document = parse(
        'a: ${env:PEFTX_TEST_N}\nb: ["${env:PEFTX_TEST_N}", "n=${env:PEFTX_TEST_N}"]\n"${env:X}": 1\n'
    )
    assert document.data == {"a": 8, "b": [8, "n=8"], "${env:X}": 1}
    assert document.variables == {
        ("a",): ("PEFTX_TEST_N",),
        ("b", 0): ("PEFTX_TEST_N",),
        ("b", 1): ("PEFTX_TEST_N",),
    }


def test_read_knows_file_and_folder(spec_file: Callable[[bytes], Path]) -> None:
    path = spec_file("a: 1\nb: ä\n".encode())
    document = read(path)
    assert document.data == {"a": 1, "b": "ä"}
    assert document.file == str(path)
    assert document.folder == path.parent


@pytest.mark.parametrize(
    ("raw", "place", "words"),
    [
        (b"a: 1\nb: caf\xe9\n", (2, 7), "byte 11 is 0xe9"),
        ("ä: ".encode() + b"\xff", (1, 4), "byte 4 is 0xff"),
        (b"PK\x03\x04\x00\x00", (1, 1), "byte 4 is zero"),
        ("a: 1".encode("utf-16"), (1, 1), "is zero"),
        (b"\x89PNG\r\n", (1, 1), "byte 0 is 0x89"),
    ],
)
def test_files_that_are_no_text(
    spec_file: Callable[[bytes], Path], raw: bytes, place: tuple[int, int], words: str
) -> None:
    with pytest.raises(SpecError) as caught:
        read(spec_file(raw))
    assert places(caught.value) == [place]
    assert words in caught.value.problems[0].message


def test_missing_file_names_its_neighbours(spec_file: Callable[[bytes], Path]) -> None:
    path = spec_file(b"a: 1")
    with pytest.raises(PeftxError, match=r"no file .*spek\.yaml\n.*spec\.yaml"):
        read(path.with_name("spek.yaml"))
    with pytest.raises(PeftxError, match="does not exist"):
        read(path.parent / "none" / "spec.yaml")
    with pytest.raises(PeftxError, match="cannot read"):
        read(path.parent)


def test_large_file(spec_file: Callable[[bytes], Path]) -> None:
    with pytest.raises(PeftxError, match="a spec has at most"):
        read(spec_file(b"#" * (MAX_BYTES + 1)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        (" 1e-4 ", 1e-4),
        ("off", "off"),
        ("a: b", "a: b"),
        ("", None),
        ('"8"', "8"),
        ("'a # b'", "a # b"),
        ("[1, x]", [1, "x"]),
        ("{a: .5}", {"a": 0.5}),
    ],
)
def test_lone_values(text: str, value: object) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["[1", '"a', "{a: 1, a: 2}", "1e999", "${env:PEFTX_NOT_SET}"])
def test_lone_values_that_fail(text: str) -> None:
    with pytest.raises(ScalarError):
        parse_value(text)


KEY = st.text("abcdefxyz_-", min_size=1, max_size=6).filter(lambda key: key[0] not in "-_")
TREE = st.recursive(
    st.just("v"),
    lambda inner: (
        st.dictionaries(KEY, inner, min_size=1, max_size=4) | st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=12,
)


class Writer:
    """Writes data as block YAML in a drawn layout, and notes by itself where each key and scalar goes."""

    def __init__(self, draw: Callable[[st.SearchStrategy[int]], int]) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.keys: dict[tuple[str | int, ...], Position] = {}
        self.scalars: dict[tuple[str | int, ...], Position] = {}

    def write(self, value: object, indent: int, path: tuple[str | int, ...]) -> None:
        children = enumerate(value) if isinstance(value, list) else value.items()  # type: ignore[attr-defined]
        for key, child in children:
            for _ in range(self.draw(st.integers(0, 1))):
                self.lines.append("" if self.draw(st.booleans()) else "   # a: comment")
            place = (*path, key)
            if isinstance(key, str):
                quote = '"' if self.draw(st.booleans()) else ""
                head = f"{' ' * indent}{quote}{key}{quote}:"
                self.keys[place] = Position(len(self.lines) + 1, indent + 1)
            else:
                head = f"{' ' * indent}-"
            if isinstance(child, str):
                gap = self.draw(st.integers(1, 3))
                self.scalars[place] = Position(len(self.lines) + 1, len(head) + gap + 1)
                self.lines.append(f"{head}{' ' * gap}{child}")
            else:
                self.lines.append(head)
                self.write(child, indent + self.draw(st.integers(1, 4)), place)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(KEY, TREE, min_size=1, max_size=4), st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_positions_are_where_things_stand(tree: dict[str, object], newline: str, data: st.DataObject) -> None:
    writer = Writer(data.draw)
    writer.write(tree, 0, ())
    document = parse(newline.join(writer.lines))
    assert document.data == tree
    assert dict(document.keys) == writer.keys
    assert {path: document.values[path] for path in writer.scalars} == writer.scalars
