"""Values of JSON, and lines of text."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peftx.testing.mutations.scene import (
    MARK,
    Scene,
    files_in,
    kind_of_change,
)


def json_tree(scene: Scene) -> tuple[Path, Any] | None:
    """A JSON file with something in it."""
    found = []
    for file in files_in(scene.folder, ".json"):
        with contextlib.suppress(ValueError):
            if tree := json.loads(file.read_text("utf-8")):
                found.append((file, tree))
    return scene.rng.choice(found) if found else None


def _node(tree: Any, rng: random.Random) -> tuple[Any, Any, str]:
    """A place below the root: its container, its key there, its path. Deep ones are as likely as shallow ones."""
    path, parent = "", tree
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = rng.choice(keys)
        path += f".{key}" if isinstance(parent, dict) else f"[{key}]"
        inner = parent[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.25:
            return parent, key, path
        parent = inner


def write_json(file: Path, tree: Any, raw: str) -> None:
    """The tree with `raw` where the mark is: what no tree of Python can hold."""
    text = json.dumps(tree, indent=1)
    assert text.count(MARK) == 1
    file.write_text(text.replace(f'"{MARK}"', raw), "utf-8")


def _replacing_node(name: str, choose: Callable[[Any, random.Random], list[str]]) -> None:
    """A kind that puts other JSON text where a value was."""

    @kind_of_change(name)
    def change(scene: Scene) -> str | None:
        if (found := json_tree(scene)) is None:
            return None
        file, tree = found
        parent, key, path = _node(tree, scene.rng)
        if not (raws := choose(parent[key], scene.rng)):
            return None
        raw = scene.rng.choice(raws)
        parent[key] = MARK
        write_json(file, tree, raw)
        return f"{scene.name(file)}: {path[:100]} = {raw[:40]}{'...' if len(raw) > 40 else ''}"


def _other_types(old: Any, rng: random.Random) -> list[str]:
    new: list[Any] = [
        None,
        True,
        3,
        -1,
        1.5,
        "text",
        "",
        [],
        {},
        ["a"],
        {"a": 1},
        [[]],
        [None],
        {"a": {"b": []}},
    ]
    return [json.dumps(value) for value in new if type(value) is not type(old)]


def _other_values(old: Any, rng: random.Random) -> list[str]:
    new: list[Any] = [0]
    if isinstance(old, bool):
        new = [not old]
    elif isinstance(old, int):
        new = [old + 1, -old - 1, 2 * old + 2, 0 if old else 1]
    elif isinstance(old, float):
        new = [old * 1.5 + 1, -old - 1]
    elif isinstance(old, str):
        new = [f"{old}x", old.upper() + "X", old[1:] + "_", ""]
    elif isinstance(old, list) and old:
        new = [old[1:], [*old, old[0]], old[::-1] if old[::-1] != old else old[:-1]]
    elif isinstance(old, dict) and old:
        first, *rest = old
        new = [
            {f"{first}x": old[first]} | {key: old[key] for key in rest},
            {key: old[key] for key in rest},
            old | {"strange": 1},
        ]
    return [json.dumps(value) for value in new]


_replacing_node("json type", _other_types)
_replacing_node("json value", _other_values)
_replacing_node(
    "json number",
    lambda old, rng: [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "9" * 5000,
        str(2**63),
        str(10**12),
        "-1",
        "0",
    ],
)
_replacing_node("json nesting", lambda old, rng: ["[" * n + "]" * n for n in (50, 200, 100_000)])
_replacing_node("json huge string", lambda old, rng: [json.dumps("x" * n) for n in (5000, 10_000_000)])
_replacing_node(
    "json surrogate", lambda old, rng: ['"\\ud800"', '"a\\udfffb.json"', '"\\u0000"', '"\\u001b[2J"']
)


@kind_of_change("json drop")
def _drop_key(scene: Scene) -> str | None:
    if (found := json_tree(scene)) is None:
        return None
    file, tree = found
    parent, key, path = _node(tree, scene.rng)
    del parent[key]
    file.write_text(json.dumps(tree, indent=1), "utf-8")
    return f"{scene.name(file)}: {path[:100]}"


@kind_of_change("json duplicate")
def _duplicate_key(scene: Scene) -> str | None:
    if (found := json_tree(scene)) is None:
        return None
    file, tree = found
    for _ in range(20):
        parent, key, path = _node(tree, scene.rng)
        if isinstance(parent, dict):
            break
    else:
        return None
    other = scene.rng.choice(_other_types(parent[key], scene.rng) + _other_values(parent[key], scene.rng))
    value, first = json.dumps(parent[key]), scene.rng.random() < 0.5
    parent[key] = MARK
    again = f", {json.dumps(key)}: "
    write_json(file, tree, other + again + value if first else value + again + other)
    return f"{scene.name(file)}: {path[:100]}, {'first' if first else 'then'} {other[:40]}"


@kind_of_change("json path")
def _path(scene: Scene) -> str | None:
    """A value or a key that names a file names one elsewhere; elsewhere it lies too, byte for byte."""
    trees = []
    names = {scene.name(file): file for file in files_in(scene.folder)}
    for file in files_in(scene.folder, ".json"):
        with contextlib.suppress(ValueError):
            for parent, key in _strings(json.loads(file.read_text("utf-8"))):
                trees.append((file, parent, key))
    named = [t for t in trees if t[1][t[2]] in names or t[2] in names]
    if not trees:
        return None
    file, parent, key = scene.rng.choice(named or trees)
    aim = names.get(parent[key]) or names.get(key) or file
    shutil.copyfile(aim, scene.outside / aim.name)
    relative = os.path.relpath(scene.outside / aim.name, scene.folder)
    new = scene.rng.choice(
        (relative, str(scene.outside / aim.name), "link", "..", ".", "", "/", f"./{aim.name}")
    )
    if new == "link":
        (scene.folder / "link").symlink_to(scene.outside / aim.name)
    text = file.read_text("utf-8")
    old = json.dumps(key if key in names else parent[key], ensure_ascii=False)
    file.write_text(text.replace(old, json.dumps(new), 1), "utf-8")
    return f"{scene.name(file)}: {old} is {new!r}"


def _strings(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Container and key of every text."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        if isinstance(value, str):
            yield tree, key
        else:
            yield from _strings(value)


@kind_of_change("json whole")
def _whole(scene: Scene) -> str | None:
    if (file := scene.file(".json")) is None:
        return None
    text = file.read_text("utf-8", errors="replace")
    new = {
        "null": "null", "a list": "[]", "an object": "{}", "a number": "5", "a text": '"text"', "NaN": "NaN",
        "in a list": f"[{text}]", "twice": text * 2, "not ended": text.rstrip().removesuffix("}"),
        "deep": "[" * 100_000, "deep objects": '{"a":' * 100_000, "single quotes": text.replace('"', "'"),
    }  # fmt: skip
    what = scene.rng.choice(list(new))
    file.write_text(new[what], "utf-8")
    return f"{scene.name(file)}: {what}"


@kind_of_change("encoding")
def _encoding(scene: Scene) -> str | None:
    if (file := scene.file(".json", ".yaml", ".md", ".txt", ".jinja")) is None:
        return None
    text = file.read_text("utf-8", errors="replace")
    new = {
        "utf-16": text.encode("utf-16"), "utf-8 with a mark": b"\xef\xbb\xbf" + text.encode(),
        "latin-1": "é".encode("latin-1") + text.encode("utf-8"), "zeros": b"\0" * len(text),
    }  # fmt: skip
    what = scene.rng.choice(list(new))
    file.write_bytes(new[what])
    return f"{scene.name(file)}: {what}"


@kind_of_change("lines")
def _lines(scene: Scene) -> str | None:
    if (file := scene.file(".yaml", ".json", ".md", ".txt", ".jinja")) is None:
        return None
    lines = file.read_text("utf-8", errors="replace").splitlines(keepends=True)
    if not lines:
        return None
    place = scene.rng.randrange(len(lines))
    what = scene.rng.choice(
        ("dropped", "twice", "moved", "a tab before it", "an alias bomb before it", "a tag")
    )
    new = {
        "dropped": [], "twice": [lines[place]] * 2, "moved": [], "a tab before it": ["\t" + lines[place]],
        "an alias bomb before it": [*_bomb(), lines[place]],
        "a tag": [f"run: !!python/object/apply:os.system ['touch {scene.canary()}']\n", lines[place]],
    }[what]  # fmt: skip
    rest = [*lines[:place], *new, *lines[place + 1 :]]
    file.write_text("".join(rest + [lines[place]] * (what == "moved")), "utf-8")
    return f"{scene.name(file)}: line {place + 1} {what}"


def _bomb() -> list[str]:
    return ["a0: &a0 [x, x]\n", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))]
