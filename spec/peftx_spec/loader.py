"""YAML to plain data, with the position of every key and value.

PyYAML scans and composes; which scalar is what, duplicate keys, interpolation and limits are decided here,
because PyYAML's own rules keep the last of two equal keys, read `1e-4` as text and `off` as false.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from peftx_spec.errors import FileError
from peftx_spec.problems import Path, Position, Problem, SpecError, describe, path_text
from peftx_spec.scalars import ScalarError, interpolate

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_VALUES = 20_000  # after aliases are followed, so nine lines of aliases cannot become a billion values

_TOO_MANY = f"more than {MAX_VALUES} values, aliases followed"

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # as PyYAML counts lines
_UNPRINTABLE = re.compile(
    "[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # as YAML defines it

_WORDS = {
    "found character '\\t' that cannot start any token": "a tab stands where YAML wants spaces",
    "but found another document": "a second document starts here; a spec is one document",
    "mapping values are not allowed here": "a ':' where no key can be: quote the text or check the indent",
    "could not find expected ':'": "a key without ':'",
    "found unexpected end of stream": "the text ends inside a quoted scalar",
}


@dataclass(frozen=True)
class Document:
    """A spec as plain data, and where each part of it stands.

    `keys` and `values` hold, for each path in `data`, the position of the key and of the value; list items
    have no key. `variables` names the environment variables that a value was made of. `written` has, for each
    path whose key goes by another name here, the one that the text says. `folder` is the spec's own folder, or
    None for a text.
    """

    data: object
    file: str
    lines: tuple[str, ...]
    keys: Mapping[Path, Position] = field(default_factory=dict)
    values: Mapping[Path, Position] = field(default_factory=dict)
    variables: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)
    written: Mapping[Path, str] = field(default_factory=dict)
    folder: FilePath | None = None

    def position(self, path: Path, *, key: bool = False) -> Position:
        """Where `path` stands, or the nearest thing around it that does stand in the text."""
        for end in range(len(path), -1, -1):
            place = path[:end]
            if (key or end < len(path)) and place in self.keys:
                return self.keys[place]
            if place in self.values:
                return self.values[place]
        return Position(1, 1)

    def problem(self, message: str, position: Position, path: Path = (), **words: str) -> Problem:
        """A problem in this document; `words` are `expected`, `got`, `suggestion` and `code`."""
        snippet = self.lines[position.line - 1] if position.line <= len(self.lines) else ""
        if path in self.written:  # as the reader knows it
            message = message.replace(f"'{path[-1]}'", f"'{self.written[path]}'")
            path = (*path[:-1], self.written[path])
        return Problem(message, self.file, position.line, position.column, snippet, path_text(path), **words)


@dataclass(frozen=True)
class Fault:
    """A problem that leaves the rest of the document readable; nothing else is said about its path."""

    path: Path
    problem: Problem


def read(path: str | os.PathLike[str]) -> Document:
    """Read a spec from a file. Raises `SpecError` with everything that is wrong with its text."""
    return _strict(*read_tolerantly(path))


def parse(text: str, *, file: str = "<text>", environment: Mapping[str, str] | None = None) -> Document:
    """Read a spec from a text. Raises `SpecError` with everything that is wrong with the text.

    `environment` is where `${env:NAME}` is looked up, by default the process's own.
    """
    return _strict(*parse_tolerantly(text, file=file, environment=environment))


def parse_value(text: str) -> object:
    """The value of a lone scalar or flow collection, as in `--set`: `1e-4`, `off`, `"8"`, `[1, 2]`.

    Raises `ScalarError`.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", '"', "'"):
        return interpolate(text, quoted=False, environment=os.environ).value
    try:
        document, faults = _build(Document(None, "<value>", _lines(text)), text, os.environ)
    except SpecError as error:
        raise ScalarError(error.problems[0].message) from error
    if faults:
        raise ScalarError(faults[0].problem.message)
    return document.data


def read_tolerantly(path: str | os.PathLike[str]) -> tuple[Document, list[Fault]]:
    """As `read`, but gives back the faults that leave the document readable."""
    place = FilePath(path)
    try:
        with open(place, "rb", opener=_at_once) as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise FileError(f"there is no file {place}", hint=_beside(place)) from error
    except IsADirectoryError as error:
        hint = _beside(place / "spec") or "give a file of YAML"
        raise FileError(f"cannot read {place}: it is a folder", hint=hint) from error
    except ValueError as error:
        raise FileError(f"{str(place)!r} cannot be the name of a file: {error}") from error
    except OSError as error:
        raise FileError(f"cannot read {place}: {error.strerror}", hint="give a file of YAML") from error
    if len(raw) > MAX_BYTES:
        raise FileError(f"{place} is too large: a spec has at most {MAX_BYTES} bytes", hint="is it a spec?")
    text = _decode(raw, str(place))
    return parse_tolerantly(text, file=str(place), folder=place.absolute().parent)


def parse_tolerantly(
    text: str,
    *,
    file: str = "<text>",
    folder: FilePath | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[Document, list[Fault]]:
    """As `parse`, but gives back the faults that leave the document readable."""
    text = text.removeprefix("\ufeff")
    empty = Document(None, file, _lines(text), folder=folder)
    if len(text) > MAX_BYTES:
        raise SpecError(
            [empty.problem(f"{len(text)} characters; a spec has at most {MAX_BYTES}", Position(1, 1))]
        )
    if found := _UNPRINTABLE.search(text):
        words = "this looks like a binary file: " if found[0] == "\0" else ""
        message = f"{words}the character U+{ord(found[0]):04X} cannot stand in YAML"
        raise SpecError([empty.problem(message, _place(text, found.start()))])
    document, faults = _build(empty, text, os.environ if environment is None else environment)
    if not isinstance(document.data, dict):
        message = "a spec is a mapping that starts with 'peftx: 1'"
        position = document.position(())
        raise SpecError(
            [document.problem(message, position, expected="a mapping", got=describe(document.data))]
        )
    return document, faults


def _strict(document: Document, faults: list[Fault]) -> Document:
    if faults:
        raise SpecError([fault.problem for fault in faults])
    return document


def _decode(raw: bytes, file: str) -> str:
    if b"\0" in raw:
        offset = raw.index(b"\0")
        raise SpecError(
            [Problem(f"this is not text: byte {offset} is zero (binary file, or UTF-16?)", file, 1, 1)]
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        position = _place(before, len(before))
        message = f"this is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x} ({error.reason})"
        snippet = _lines(before)[-1]
        raise SpecError([Problem(message, file, position.line, position.column, snippet)]) from error


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe that nobody writes to is empty, one that somebody writes to is read."""
    if not hasattr(os, "O_NONBLOCK"):  # Windows, where no pipe stands among the files
        return os.open(path, flags)
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def _beside(place: FilePath) -> str | None:
    """The specs that stand where a missing one was looked for."""
    try:
        names = sorted(entry.name for entry in place.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    except FileNotFoundError:
        return f"the folder {place.parent} does not exist"
    except OSError:  # no folder, or one that must not be read: nothing is known of it
        return None
    return f"in that folder are: {', '.join(names[:8])}" if names else None


def _lines(text: str) -> tuple[str, ...]:
    return tuple(_BREAK.split(text.removeprefix("\ufeff")))


def _place(text: str, index: int) -> Position:
    """The position of the character at `index`."""
    lines = _BREAK.split(text[:index])
    return Position(len(lines), len(lines[-1]) + 1)


def _at(mark: Any) -> Position:  # yaml.Mark; its C twin has another type
    return Position(mark.line + 1, mark.column + 1)


def _build(empty: Document, text: str, environment: Mapping[str, str]) -> tuple[Document, list[Fault]]:
    """Compose and construct `text`; `empty` carries the file, the lines and the folder."""
    loader = _Loader(text, empty)
    try:
        node = loader.get_single_node()
    except (ValueError, OverflowError) as error:  # PyYAML on "\\UFFFFFFFF", and on numbers after %YAML
        message = "a number here is too large for YAML (a character is at most U+10FFFF)"
        raise SpecError([empty.problem(message, _at(loader.get_mark()))]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context)
        problem = problem.replace("<block end>", "the end of this block, by its indentation")
        raise SpecError(
            [empty.problem(_WORDS.get(problem, problem), _at(mark) if mark else Position(1, 1))]
        ) from error
    finally:
        loader.dispose()
    if node is None:
        raise SpecError(
            [empty.problem("the spec is empty", Position(1, 1), expected="a mapping, 'peftx: 1' first")]
        )
    builder = _Builder(empty, environment, loader.faults)
    data = builder.build(node, ())
    return (
        Document(
            data,
            empty.file,
            empty.lines,
            builder.keys,
            builder.values,
            builder.variables,
            folder=empty.folder,
        ),
        builder.faults,
    )


class _Loader(yaml.SafeLoader):
    """PyYAML's reader, scanner, parser and composer, without its scalar rules, tags and endless depth."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str, document: Document) -> None:
        super().__init__(text)
        self.document = document
        self.depth = 0
        self.count = 0
        self.faults: list[Fault] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            short = event.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the tag {short} is not part of a spec; quote a scalar to make it text"
            self.faults.append(Fault((), self.document.problem(message, _at(event.start_mark))))
        self.depth += 1
        if self.depth > MAX_DEPTH:
            message = f"nested more than {MAX_DEPTH} levels deep"
            raise SpecError([self.document.problem(message, _at(event.start_mark))])
        self.count += 1
        if self.count > 2 * MAX_VALUES:  # a key and a value each; aliases are counted when they are followed
            raise SpecError([self.document.problem(_TOO_MANY, _at(event.start_mark))])
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Builder:
    """Nodes to plain data; notes positions and variables, and collects faults instead of stopping."""

    def __init__(self, document: Document, environment: Mapping[str, str], faults: list[Fault]) -> None:
        self.document = document
        self.environment = environment
        self.faults = faults
        self.keys: dict[Path, Position] = {}
        self.values: dict[Path, Position] = {}
        self.variables: dict[Path, tuple[str, ...]] = {}
        self.open: set[int] = (
            set()
        )  # ids of the nodes that are being built, to see an alias of its own parent
        self.count = 0

    def build(self, node: yaml.Node, path: Path) -> object:
        self.count += 1
        position = _at(node.start_mark)
        if self.count > MAX_VALUES:
            raise SpecError([self.document.problem(_TOO_MANY, position, path)])
        if id(node) in self.open:
            raise SpecError([self.document.problem("an alias that contains itself", position, path)])
        self.values[path] = position
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        self.open.add(id(node))
        value = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.items(node, path)
        self.open.discard(id(node))
        return value

    def scalar(self, node: yaml.ScalarNode, path: Path) -> object:
        try:
            if any("\ud800" <= char <= "\udfff" for char in node.value):
                raise ScalarError("a lone surrogate (\\ud800 to \\udfff) is not a character")
            found = interpolate(node.value, quoted=node.style is not None, environment=self.environment)
        except ScalarError as error:
            self.fault(str(error), _at(node.start_mark), path)
            return node.value
        if found.variables:
            self.variables[path] = found.variables
        return found.value

    def items(self, node: yaml.Node, path: Path) -> list[object]:
        return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        data: dict[str, object] = {}
        for key_node, value_node in node.value:
            position = _at(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self.fault("a key is a plain word, not a list or a mapping", position, path)
                continue
            name = key_node.value  # always text, as it is written: `1:` and `on:` are "1" and "on"
            place = (*path, name)
            if key_node.style is None and name in ("", "<<"):
                message = (
                    "merge keys (<<) are not part of a spec; use an alias"
                    if name
                    else "a value without a key"
                )
                self.fault(message, position, place)
            elif place in self.keys:
                first = self.keys[place]
                self.fault(
                    f"the key '{name}' stands twice: first at {first}, again at {position}", position, place
                )
            else:
                self.keys[place] = position
                data[name] = self.build(value_node, place)
        return data

    def fault(self, message: str, position: Position, path: Path) -> None:
        self.faults.append(Fault(path, self.document.problem(message, position, path)))
