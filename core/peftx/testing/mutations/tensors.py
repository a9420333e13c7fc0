"""Tensors of safetensors files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftx.testing.mutations.scene import (
    Scene,
    kind_of_change,
)

Entries = dict[str, tuple[str, list[int], bytes]]
"""Name -> dtype, shape and bytes."""


def read_entries(file: Path) -> Entries:
    raw = file.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]])
        for name, entry in header.items()
    }  # fmt: skip


def write_entries(file: Path, entries: Entries, edit: Callable[[dict[str, Any]], None] | None = None) -> None:
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


def _tensor_file(scene: Scene) -> tuple[Path, Entries, str] | None:
    if (file := scene.file(".safetensors")) is None or not (entries := read_entries(file)):
        return None
    return file, entries, scene.rng.choice(list(entries))


def _tensor_kind(name: str) -> Callable[[Callable[[Scene, Entries, str], str | None]], None]:
    def keep(edit: Callable[[Scene, Entries, str], str | None]) -> None:
        @kind_of_change(name)
        def change(scene: Scene) -> str | None:
            if (found := _tensor_file(scene)) is None:
                return None
            file, entries, tensor = found
            if (what := edit(scene, entries, tensor)) is None:
                return None
            write_entries(file, entries)
            return f"{scene.name(file)}: {tensor} {what}"

    return keep


@_tensor_kind("tensor drop")
def _drop_tensor(scene: Scene, entries: Entries, name: str) -> str:
    del entries[name]
    return "is left out"


@_tensor_kind("tensor add")
def _add_tensor(scene: Scene, entries: Entries, name: str) -> str:
    new = scene.rng.choice(("strange", f"{name}.strange", "../x", "", "a" * 1000, "__metadata"))
    entries[new] = entries[name]
    return f"stands there as {new[:30]!r} too"


@_tensor_kind("tensor rename")
def _rename_tensor(scene: Scene, entries: Entries, name: str) -> str:
    new = scene.rng.choice((f"{name}x", name.replace("0", "1"), name.upper(), ""))
    entries[new if new != name else f"{name}x"] = entries.pop(name)
    return f"is called {new!r}"


@_tensor_kind("tensor swap")
def _swap_tensors(scene: Scene, entries: Entries, name: str) -> str | None:
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
def _dtype(scene: Scene, entries: Entries, name: str) -> str | None:
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
def _shape(scene: Scene, entries: Entries, name: str) -> str | None:
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
def _value(scene: Scene, entries: Entries, name: str) -> str | None:
    dtype, shape, data = entries[name]
    width = _WIDTHS.get(dtype)
    if width is None or not data:
        return None
    place = scene.rng.randrange(len(data) // width) * width
    changed = bytes([data[place + width - 1] ^ 0x01]) if dtype != "BOOL" else bytes([1 - data[place]])
    entries[name] = (dtype, shape, data[: place + width - 1] + changed + data[place + width :])
    return f"has another value at {place // width}"


@_tensor_kind("tensor nan")
def _nan(scene: Scene, entries: Entries, name: str) -> str | None:
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


@kind_of_change("tensor header")
def _header(scene: Scene) -> str | None:
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
        write_entries(file, entries, edits[what])
    return f"{scene.name(file)}: {what}"
