"""Folders damaged in one place, seeded: for tests that no damage goes unseen. `attempt.py` reads them.

A kind of mutation is a function that changes one file and says what it did. They come in layers, as a reader is built:
bytes, whole files (and what is no file: folders, links, pipes, devices), JSON values, lines of text, tensors, and
files that would run code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftx.engines.bundle import own_digest
from peftx.engines.bundle.manifest import MANIFEST
from peftx.engines.files import sha256

CANARY = "executed"
"""A file beside the folder that code from the folder would make."""
HUGE = 1 << 40
_LARGE = 1 << 26  # more is not hashed here
_MARK = "@@here@@"


# ----------------------------------------------------------------------------------------------- what is in a folder
def _regular(path: Path) -> bool:
    """A file with bytes of its own that ends: no link, pipe or device, and of a size that can be read."""
    try:
        about = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(about.st_mode) and about.st_size <= _LARGE


def _files(folder: Path, *endings: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if _regular(p) and (not endings or p.suffix in endings))


def _pick(folder: Path, rng: random.Random, *endings: str) -> Path | None:
    found = _files(folder, *endings)
    return rng.choice(found) if found else None


@dataclass
class _Scene:
    """What a mutation works on. `outside` lies beside the folder, and nothing in it is to be opened."""

    folder: Path
    outside: Path
    rng: random.Random

    def file(self, *endings: str) -> Path | None:
        return _pick(self.folder, self.rng, *endings)

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def canary(self) -> str:
        return str(self.outside / CANARY)


Change = Callable[[_Scene], str | None]
KINDS: dict[str, Change] = {}
"""Every kind of mutation; a change says what it did, or None where the folder has no place for it."""


def _kind(name: str) -> Callable[[Change], Change]:
    def keep(change: Change) -> Change:
        KINDS[name] = change
        return change

    return keep


def mutate(folder: Path, outside: Path, kind: str, rng: random.Random) -> str | None:
    """Make one change of a kind; what it was, or None if nothing in the folder can be changed so."""
    outside.mkdir(exist_ok=True)
    return KINDS[kind](_Scene(folder, outside, rng))


# ----------------------------------------------------------------------------------------------------------- bytes
@_kind("flip bytes")
def _flip(scene: _Scene) -> str | None:
    if (file := scene.file()) is None or not (raw := bytearray(file.read_bytes())):
        return None
    places = [scene.rng.randrange(len(raw)) for _ in range(scene.rng.choice((1, 1, 8)))]
    for place in places:
        raw[place] ^= 1 << scene.rng.randrange(8)
    file.write_bytes(raw)
    return f"{scene.name(file)}: bits at {places}"


@_kind("insert bytes")
def _insert(scene: _Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    raw, place = file.read_bytes(), scene.rng.choice((0, file.stat().st_size, -1))
    place = scene.rng.randrange(len(raw) + 1) if place < 0 else place
    extra = scene.rng.choice((b"\x00", b"\xff\xfe", b"\n", scene.rng.randbytes(64), b"}"))
    file.write_bytes(raw[:place] + extra + raw[place:])
    return f"{scene.name(file)}: {extra[:8]!r} put in at {place}"


@_kind("delete bytes")
def _cut(scene: _Scene) -> str | None:
    if (file := scene.file()) is None or not (raw := file.read_bytes()):
        return None
    place, count = scene.rng.randrange(len(raw)), scene.rng.choice((1, 8, 100))
    file.write_bytes(raw[:place] + raw[place + count :])
    return f"{scene.name(file)}: {count} bytes taken out at {place}"


@_kind("truncate")
def _truncate(scene: _Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    size = file.stat().st_size
    left = scene.rng.choice((size - 1, size // 2, 7, 8, 9, scene.rng.randrange(size + 1)))
    os.truncate(file, max(0, min(left, size)))
    return f"{scene.name(file)}: the first {left} bytes are left"


@_kind("empty")
def _empty(scene: _Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    file.write_bytes(b"")
    return scene.name(file)


# ------------------------------------------------------------------------------------------------------- whole files
def _instead(name: str, make: Callable[[_Scene, Path], None]) -> None:
    """A kind that puts something else where a file was."""

    @_kind(name)
    def change(scene: _Scene) -> str | None:
        if (file := scene.file()) is None:
            return None
        make(scene, file)
        return scene.name(file)


def _to_outside(scene: _Scene, file: Path) -> None:
    shutil.move(file, scene.outside / file.name)
    file.symlink_to(scene.outside / file.name)


def _to_inside(scene: _Scene, file: Path) -> None:
    file.rename(file.with_name(f"real-{file.name}"))
    file.symlink_to(f"real-{file.name}")


def _to_another(scene: _Scene, file: Path) -> None:
    others = [other for other in _files(scene.folder) if other != file]
    file.unlink()
    file.symlink_to(scene.rng.choice(others or [file]))


def _remade(make: Callable[[Path], Any]) -> Callable[[_Scene, Path], None]:
    def change(scene: _Scene, file: Path) -> None:
        file.unlink()
        make(file)

    return change


_instead("directory", _remade(Path.mkdir))
_instead("symlink outside", _to_outside)
_instead("symlink inside", _to_inside)
_instead("symlink to another", _to_another)
_instead("symlink to itself", _remade(lambda file: file.symlink_to(file)))
_instead("symlink to nothing", _remade(lambda file: file.symlink_to("nothing")))
_instead("fifo", _remade(os.mkfifo))
_instead("device", _remade(lambda file: file.symlink_to("/dev/zero")))
_instead("huge", lambda scene, file: os.truncate(file, HUGE))
_instead("delete", lambda scene, file: file.unlink())


@_kind("rename")
def _rename(scene: _Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    new = scene.rng.choice((f"{file.name}.bak", file.name.upper(), f"x{file.name}", f"{file.stem}.bin"))
    file.rename(file.with_name(new))
    return f"{scene.name(file)} -> {new}"


@_kind("duplicate")
def _duplicate(scene: _Scene) -> str | None:
    if (file := scene.file()) is None:
        return None
    shutil.copyfile(file, file.with_name(f"copy-{file.name}"))
    return scene.name(file)


@_kind("swap")
def _swap(scene: _Scene) -> str | None:
    files = _files(scene.folder)
    if len(files) < 2:
        return None
    one, two = scene.rng.sample(files, 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return f"{scene.name(one)} and {scene.name(two)}"


def _first_folder(folder: Path) -> Path:
    return next((p for p in sorted(folder.iterdir()) if p.is_dir()), folder)


@_kind("strange file")
def _strange(scene: _Scene) -> str | None:
    make: dict[str, Callable[[Path], Any]] = {
        "strange.safetensors": lambda file: file.write_bytes(b"no tensors"),
        "strange.json": lambda file: file.write_text("{", "utf-8"),
        "strange.py": lambda file: file.write_text(f"open({scene.canary()!r}, 'w')\n", "utf-8"),
        "pytorch_model.bin": lambda file: file.write_bytes(_unpickles(scene)),
        "two\nlines": Path.touch,
        os.fsdecode(b"\xff\xfe"): Path.touch,
        "x" * 250: Path.touch,
        "pipe": os.mkfifo,
        "loop": lambda file: file.symlink_to("."),
        "zero": lambda file: file.symlink_to("/dev/zero"),
        "checkpoint-99": Path.mkdir,
        "checkpoint-x": lambda file: shutil.copytree(_first_folder(scene.folder), file),
    }
    name = scene.rng.choice(list(make))
    make[name](scene.folder / name)
    return repr(name[:20])


@_kind("folder")
def _folder(scene: _Scene) -> str | None:
    folder = scene.folder
    moved = scene.outside / "moved"
    folder.rename(moved)
    make: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "an empty folder": folder.mkdir,
        "a file": folder.touch,
        "a pipe": lambda: os.mkfifo(folder),
        "a link to itself": lambda: folder.symlink_to(folder),
        "/dev/zero": lambda: folder.symlink_to("/dev/zero"),
    }
    what = scene.rng.choice(list(make))
    make[what]()
    return f"is {what}"


# -------------------------------------------------------------------------------------------------------------- JSON
def _tree(scene: _Scene) -> tuple[Path, Any] | None:
    """A JSON file with something in it."""
    found = []
    for file in _files(scene.folder, ".json"):
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


def _written(file: Path, tree: Any, raw: str) -> None:
    """The tree with `raw` where the mark is: what no tree of Python can hold."""
    text = json.dumps(tree, indent=1)
    assert text.count(_MARK) == 1
    file.write_text(text.replace(f'"{_MARK}"', raw), "utf-8")


def _replacing_node(name: str, choose: Callable[[Any, random.Random], list[str]]) -> None:
    """A kind that puts other JSON text where a value was."""

    @_kind(name)
    def change(scene: _Scene) -> str | None:
        if (found := _tree(scene)) is None:
            return None
        file, tree = found
        parent, key, path = _node(tree, scene.rng)
        if not (raws := choose(parent[key], scene.rng)):
            return None
        raw = scene.rng.choice(raws)
        parent[key] = _MARK
        _written(file, tree, raw)
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


@_kind("json drop")
def _drop_key(scene: _Scene) -> str | None:
    if (found := _tree(scene)) is None:
        return None
    file, tree = found
    parent, key, path = _node(tree, scene.rng)
    del parent[key]
    file.write_text(json.dumps(tree, indent=1), "utf-8")
    return f"{scene.name(file)}: {path[:100]}"


@_kind("json duplicate")
def _duplicate_key(scene: _Scene) -> str | None:
    if (found := _tree(scene)) is None:
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
    parent[key] = _MARK
    again = f", {json.dumps(key)}: "
    _written(file, tree, other + again + value if first else value + again + other)
    return f"{scene.name(file)}: {path[:100]}, {'first' if first else 'then'} {other[:40]}"


@_kind("json path")
def _path(scene: _Scene) -> str | None:
    """A value or a key that names a file names one elsewhere; elsewhere it lies too, byte for byte."""
    trees = []
    names = {scene.name(file): file for file in _files(scene.folder)}
    for file in _files(scene.folder, ".json"):
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


@_kind("json whole")
def _whole(scene: _Scene) -> str | None:
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


# -------------------------------------------------------------------------------------------------------------- text
@_kind("encoding")
def _encoding(scene: _Scene) -> str | None:
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


@_kind("lines")
def _lines(scene: _Scene) -> str | None:
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


# ----------------------------------------------------------------------------------------------------------- tensors
Entries = dict[str, tuple[str, list[int], bytes]]
"""Name -> dtype, shape and bytes."""


def _read_tensors(file: Path) -> Entries:
    raw = file.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]])
        for name, entry in header.items()
    }  # fmt: skip


def _write_tensors(
    file: Path, entries: Entries, edit: Callable[[dict[str, Any]], None] | None = None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    if edit is not None:
        edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in entries.values()))


def _tensor_file(scene: _Scene) -> tuple[Path, Entries, str] | None:
    if (file := scene.file(".safetensors")) is None or not (entries := _read_tensors(file)):
        return None
    return file, entries, scene.rng.choice(list(entries))


def _tensor_kind(name: str) -> Callable[[Callable[[_Scene, Entries, str], str | None]], None]:
    def keep(edit: Callable[[_Scene, Entries, str], str | None]) -> None:
        @_kind(name)
        def change(scene: _Scene) -> str | None:
            if (found := _tensor_file(scene)) is None:
                return None
            file, entries, tensor = found
            if (what := edit(scene, entries, tensor)) is None:
                return None
            _write_tensors(file, entries)
            return f"{scene.name(file)}: {tensor} {what}"

    return keep


@_tensor_kind("tensor drop")
def _drop_tensor(scene: _Scene, entries: Entries, name: str) -> str:
    del entries[name]
    return "is left out"


@_tensor_kind("tensor add")
def _add_tensor(scene: _Scene, entries: Entries, name: str) -> str:
    new = scene.rng.choice(("strange", f"{name}.strange", "../x", "", "a" * 1000, "__metadata"))
    entries[new] = entries[name]
    return f"stands there as {new[:30]!r} too"


@_tensor_kind("tensor rename")
def _rename_tensor(scene: _Scene, entries: Entries, name: str) -> str:
    new = scene.rng.choice((f"{name}x", name.replace("0", "1"), name.upper(), ""))
    entries[new if new != name else f"{name}x"] = entries.pop(name)
    return f"is called {new!r}"


@_tensor_kind("tensor swap")
def _swap_tensors(scene: _Scene, entries: Entries, name: str) -> str | None:
    alike = [
        n for n, (dtype, shape, _) in entries.items() if (dtype, shape) == entries[name][:2] and n != name
    ]
    if not alike:
        return None
    other = scene.rng.choice(alike)
    entries[name], entries[other] = entries[other], entries[name]
    return f"and {other} are swapped"


_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@_tensor_kind("tensor dtype")
def _dtype(scene: _Scene, entries: Entries, name: str) -> str | None:
    """The same bytes under another type, or the same numbers in another."""
    dtype, shape, data = entries[name]
    width = _WIDTHS.get(dtype)
    alike = [other for other, size in _WIDTHS.items() if size == width and other != dtype]
    if not alike:
        return None
    if dtype == "F32" and scene.rng.random() < 0.5:
        narrow = scene.rng.choice((torch.float16, torch.float64, torch.bfloat16))
        values = torch.frombuffer(bytearray(data), dtype=torch.float32).to(narrow)
        new = {torch.float16: "F16", torch.float64: "F64", torch.bfloat16: "BF16"}[narrow]
        entries[name] = (new, shape, values.view(torch.uint8).numpy().tobytes())
        return f"is {new} and was {dtype}"
    other = scene.rng.choice(alike)
    entries[name] = (other, shape, data)
    return f"is said to be {other} and is {dtype}"


@_tensor_kind("tensor shape")
def _shape(scene: _Scene, entries: Entries, name: str) -> str | None:
    dtype, shape, data = entries[name]
    options = [[*shape, 1], [1, *shape]]
    if len(shape) > 1:
        options += [shape[::-1]] * (shape != shape[::-1]) + [[math.prod(shape)]]
    if shape and shape[0] > 1:
        options.append([shape[0] - 1, *shape[1:]])
    if not shape:
        options = [[1], [1, 1]]
    new = scene.rng.choice(options)
    entries[name] = (dtype, new, data[: len(data) * math.prod(new) // max(1, math.prod(shape))])
    return f"has shape {new} and had {shape}"


@_tensor_kind("tensor value")
def _value(scene: _Scene, entries: Entries, name: str) -> str | None:
    dtype, shape, data = entries[name]
    width = _WIDTHS.get(dtype)
    if width is None or not data:
        return None
    place = scene.rng.randrange(len(data) // width) * width
    changed = bytes([data[place + width - 1] ^ 0x01]) if dtype != "BOOL" else bytes([1 - data[place]])
    entries[name] = (dtype, shape, data[: place + width - 1] + changed + data[place + width :])
    return f"has another value at {place // width}"


@_tensor_kind("tensor nan")
def _nan(scene: _Scene, entries: Entries, name: str) -> str | None:
    dtype, shape, data = entries[name]
    if dtype != "F32" or not data:
        return None
    place = scene.rng.randrange(len(data) // 4) * 4
    entries[name] = (
        dtype,
        shape,
        data[:place] + struct.pack("<f", scene.rng.choice((math.nan, math.inf))) + data[place + 4 :],
    )
    return f"is not finite at {place // 4}"


@_kind("tensor header")
def _header(scene: _Scene) -> str | None:
    if (found := _tensor_file(scene)) is None:
        return None
    file, entries, name = found
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    lies = {f"length {n}": n for n in (0, 1, size - 1, size + 1, size + 8, len(raw), 2**32, 2**63, 2**64 - 1)}

    def set_entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: header[name].update({key: value})

    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "an unknown dtype": set_entry("dtype", "F33"),
        "offsets past the end": set_entry("data_offsets", [0, 2**40]),
        "offsets backwards": set_entry("data_offsets", [8, 0]),
        "negative sizes": set_entry("shape", [-1, 4]),
        "a shape that overflows": set_entry("shape", [2**40, 2**40]),
        "no shape": lambda header: header[name].pop("shape"),
        "metadata of numbers": lambda header: header.update(__metadata__={"a": 1}),
        "two tensors in one place": lambda header: header.update(again=dict(header[name])),
    }
    what = scene.rng.choice([*lies, *edits])
    if what in lies:
        file.write_bytes(struct.pack("<Q", lies[what]) + raw[8:])
    else:
        _write_tensors(file, entries, edits[what])
    return f"{scene.name(file)}: {what}"


# ------------------------------------------------------------------------------------------------- what would run code
def _unpickles(scene: _Scene) -> bytes:
    """A pickle that leaves a trace when it is read."""
    return f"cposix\nsystem\n(S'touch {scene.canary()}'\ntR.".encode()


@_kind("auto map")
def _auto_map(scene: _Scene) -> str | None:
    """The config or the tokenizer's config names a class of a module that lies beside it."""
    files = [f for f in _files(scene.folder, ".json") if f.name in ("config.json", "tokenizer_config.json")]
    if not files:
        return None
    file = scene.rng.choice(files)
    config = json.loads(file.read_text("utf-8"))
    strange = scene.rng.random() < 0.5
    if file.name == "config.json":
        auto: Any = {"AutoConfig": "strange.Strange", "AutoModelForCausalLM": "strange.Strange"}
        config |= {"model_type": "strange", "architectures": ["Strange"]} if strange else {}
    else:
        auto = {"AutoTokenizer": ["strange.Strange", "strange.Strange"]}
        config |= {"tokenizer_class": "Strange"} if strange else {}
    file.write_text(json.dumps(config | {"auto_map": auto}), "utf-8")
    code = f"open({scene.canary()!r}, 'w').close()\nclass Strange: pass\n"
    (file.parent / "strange.py").write_text(code, "utf-8")
    return f"{scene.name(file)}{' of an unknown type' if strange else ''}"


@_kind("pickle")
def _pickle(scene: _Scene) -> str | None:
    """Weights that are a pickle, under a name of theirs, under that of safetensors, or named by an index."""
    if (file := scene.file(".safetensors")) is None:
        return None
    names = list(_read_tensors(file))
    how = scene.rng.choice(("beside", "instead", "under its name", "by an index"))
    if how == "under its name":
        file.write_bytes(_unpickles(scene))
        return f"{scene.name(file)} is one"
    (file.parent / "pytorch_model.bin").write_bytes(_unpickles(scene))
    if how == "instead":
        file.unlink()
    if how == "by an index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
        (file.parent / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        file.rename(file.with_name("x.safetensors"))
    return f"{scene.name(file)}: {how}"


@_kind("index")
def _index(scene: _Scene) -> str | None:
    """An index of shards that leads elsewhere."""
    if (file := scene.file(".safetensors")) is None:
        return None
    names = list(_read_tensors(file))
    how = scene.rng.choice(
        ("../", "absolute", "symlink", "missing", "a folder", "no map", "a list", "numbers")
    )
    shutil.copyfile(file, scene.outside / file.name)
    if how == "symlink":
        (scene.folder / "link.safetensors").symlink_to(scene.outside / file.name)
    target: Any = {
        "../": os.path.relpath(scene.outside / file.name, file.parent), "absolute": str(scene.outside / file.name),
        "symlink": os.path.relpath(scene.folder / "link.safetensors", file.parent), "missing": "missing.safetensors",
        "a folder": ".", "numbers": 5,
    }.get(how)  # fmt: skip
    index: Any = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, target)}
    index = {"no map": {}, "a list": {"weight_map": names}}.get(how, index)
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    file.rename(file.with_name("x.safetensors"))
    return f"{scene.name(file)}: {how}"


def _adapter_of(entries: Entries, module: str) -> Entries:
    """An adapter of rank 1, all ones."""
    found: Entries = {}
    for name, (dtype, shape, _) in entries.items():
        if dtype == "F32" and name.endswith(f"{module}.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            for letter, size in (("A", [1, shape[1]]), ("B", [shape[0], 1])):
                found[f"{path}.lora_{letter}.weight"] = (
                    dtype,
                    size,
                    struct.pack("<f", 1.0) * math.prod(size),
                )
    return found


@_kind("redirect")
def _redirect(scene: _Scene) -> str | None:
    """What makes transformers look for weights, a tokenizer or code elsewhere."""
    configs = [f for f in _files(scene.folder, ".json") if f.name == "config.json"]
    if not configs:
        return None
    file = configs[0]
    inner, elsewhere = file.parent, scene.outside / "elsewhere"
    shutil.copytree(inner, elsewhere)
    (inner / "adapter_model.bin").write_bytes(_unpickles(scene))
    for weights in _files(inner, ".safetensors")[:1]:
        _write_tensors(inner / "adapter_model.safetensors", _adapter_of(_read_tensors(weights), "v_proj"))
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(elsewhere),
        "r": 1,
        "target_modules": ["v_proj"],
    }
    edits: dict[str, tuple[str, dict[str, Any]]] = {
        "an adapter of another model": ("adapter_config.json", adapter),
        "weights elsewhere": (
            "config.json",
            {"transformers_weights": "../outside/elsewhere/model.safetensors"},
        ),
        "weights in a pickle": ("config.json", {"transformers_weights": "adapter_model.bin"}),
        "a quantizer": (
            "config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        ),
        "a kernel": (
            "config.json",
            {"attn_implementation": "nobody/kernel", "_attn_implementation": "nobody/kernel"},
        ),
        "a tokenizer elsewhere": (
            "tokenizer_config.json",
            {
                "tokenizer_file": str(elsewhere / "tokenizer.json"),
                "vocab_file": str(elsewhere / "tokenizer.json"),
            },
        ),
        "a tokenizer of a version": (
            "tokenizer_config.json",
            {"fast_tokenizer_files": ["../tokenizer.1.0.json"]},
        ),
    }
    how = scene.rng.choice(list(edits))
    name, more = edits[how]
    target = inner / name
    before = json.loads(target.read_text("utf-8")) if target.exists() else {}
    target.write_text(json.dumps(before | more), "utf-8")
    return f"{scene.name(target)}: {how}"


# ------------------------------------------------------------------------------------------------------------ signing
def sign(folder: Path, manifest_before: bytes) -> None:
    """Make the checksums of a changed bundle agree with it, as another version of peftx, or an attacker, would.

    A manifest that was itself changed keeps its entries: only its own checksum is made anew.
    """
    file = folder / MANIFEST
    if not _regular(file):
        return
    text = file.read_text("utf-8", errors="replace")
    try:
        manifest = json.loads(text)
        old = manifest["own"]
        if text.encode() == manifest_before:
            present = [f for f in sorted(folder.rglob("*")) if f != file and f.is_file()]
            known = manifest["files"]
            manifest["files"] = {
                str(p.relative_to(folder)): _sum(p, known.get(str(p.relative_to(folder)))) for p in present
            }
            text = json.dumps(manifest, indent=1)
        text = text.replace(old, own_digest(manifest))
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return
    file.write_text(text, "utf-8")


def _sum(path: Path, known: str | None) -> str:
    return sha256(path) if path.stat().st_size <= _LARGE else known or ""
