"""Files that would run code, or lead outside of the folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from typing import Any

from peftx.testing.mutations.scene import (
    Scene,
    files_in,
    kind_of_change,
    unpickles,
)
from peftx.testing.mutations.tensors import Entries, read_entries, write_entries


@kind_of_change("auto map")
def _auto_map(scene: Scene) -> str | None:
    """The config or the tokenizer's config names a class of a module that lies beside it."""
    files = [f for f in files_in(scene.folder, ".json") if f.name in ("config.json", "tokenizer_config.json")]
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


@kind_of_change("pickle")
def _pickle(scene: Scene) -> str | None:
    """Weights that are a pickle, under a name of theirs, under that of safetensors, or named by an index."""
    if (file := scene.file(".safetensors")) is None:
        return None
    names = list(read_entries(file))
    how = scene.rng.choice(("beside", "instead", "under its name", "by an index"))
    if how == "under its name":
        file.write_bytes(unpickles(scene))
        return f"{scene.name(file)} is one"
    (file.parent / "pytorch_model.bin").write_bytes(unpickles(scene))
    if how == "instead":
        file.unlink()
    if how == "by an index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
        (file.parent / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        file.rename(file.with_name("x.safetensors"))
    return f"{scene.name(file)}: {how}"


@kind_of_change("index")
def _index(scene: Scene) -> str | None:
    """An index of shards that leads elsewhere."""
    if (file := scene.file(".safetensors")) is None:
        return None
    names = list(read_entries(file))
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


@kind_of_change("redirect")
def _redirect(scene: Scene) -> str | None:
    """What makes transformers look for weights, a tokenizer or code elsewhere."""
    configs = [f for f in files_in(scene.folder, ".json") if f.name == "config.json"]
    if not configs:
        return None
    file = configs[0]
    inner, elsewhere = file.parent, scene.outside / "elsewhere"
    shutil.copytree(inner, elsewhere)
    (inner / "adapter_model.bin").write_bytes(unpickles(scene))
    for weights in files_in(inner, ".safetensors")[:1]:
        write_entries(inner / "adapter_model.safetensors", _adapter_of(read_entries(weights), "v_proj"))
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
