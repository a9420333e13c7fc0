"""Bytes on disk of what is saved and exported, beside what the peers write of the same numbers.

    python benchmarks/run.py exports

The model is the random Llama of `peers.py`, float32. An adapter, and it merged, stand beside HF PEFT's files of the
same LoRA; a packed model beside that which transformers writes once it has read ours. Whole folders are counted,
without a tokenizer. GGUF stands beside the float16 checkpoint of the bundled model: llama.cpp's converter is in no
package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import model
from transformers import AutoModelForCausalLM

from peftx import Plugin, Stack
from peftx.interop import import_peft, to_compressed_tensors, to_gguf, to_peft
from peftx_prefixquant import PrefixQuant
from peftx_signround import SignRound

TEXTS = [
    "A text to look at, of a hundred letters or so, so that every layer has been given something to be scaled by."
]
PACKED: dict[str, Plugin] = {
    "int4, groups of 32": SignRound(bits=4, group_size=32, steps=0),
    "int8, groups of 32": SignRound(bits=8, group_size=32, steps=0),
    "W8A8": PrefixQuant(weight_bits=8, kv_bits=16, prefix_tokens=0, rotate=False, clip_search=False),
}
GGUF = ("f16", "q8_0", "q4_0")


def size(folder: Path) -> int:
    """Bytes of all files in a folder but those of a tokenizer."""
    files = (file for file in folder.rglob("*") if file.is_file() and "token" not in file.name)
    return sum(file.stat().st_size for file in files)


def beside(ours: Path, theirs: Path, peer: str, limit: float | None) -> dict[str, Any]:
    found = {"peftx": size(ours), "peer": size(theirs)}
    return {"bytes": found, "ratio": found["peftx"] / found["peer"], "limit": limit, "peer": peer}


def adapters(place: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A LoRA as a bundle, as PEFT has it, and merged, beside PEFT's own."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = get_peft_model(model(), config)
    theirs.save_pretrained(place / "peft")
    stack = import_peft(place / "peft", model=model())
    stack.save(place / "bundle")
    to_peft(stack, place / "again")
    stack.export(place / "merged")
    theirs.merge_and_unload().save_pretrained(place / "peft-merged")
    yield "a bundle of LoRA", beside(place / "bundle", place / "peft", "PeftModel.save_pretrained", 1.05)
    yield "--format peft", beside(place / "again", place / "peft", "PeftModel.save_pretrained", 1.0)
    peer = "merge_and_unload().save_pretrained"
    yield "--format hf", beside(place / "merged", place / "peft-merged", peer, 1.001)


def packed(place: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Quantized models, beside what transformers saves once it has loaded them."""
    tokenizer = Stack("peftx:tiny", []).tokenizer
    for name, plugin in PACKED.items():
        stack = Stack(model(), [plugin], tokenizer=tokenizer)
        stack.compress(TEXTS)
        ours = to_compressed_tensors(stack, place / name)
        AutoModelForCausalLM.from_pretrained(ours).save_pretrained(place / f"{name} again")
        peer = "transformers' save_pretrained of it"
        yield f"--format compressed-tensors, {name}", beside(ours, place / f"{name} again", peer, 1.001)


def files(place: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """GGUF of the bundled model, beside its checkpoint in float16."""
    stack = Stack("peftx:tiny", [])
    stack.model.half().save_pretrained(place / "half")
    for type in GGUF:
        to_gguf(stack, place / type, type=type)
        found = beside(place / type, place / "half", "float16 safetensors, without a tokenizer", None)
        yield f"--format gguf, {type}", found


def run(quick: bool = False) -> dict[str, dict[str, Any]]:
    """All measurements; `quick` leaves none out, since nothing is timed."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: row for measure in (adapters, packed, files) for name, row in measure(Path(folder))}
