"""A stack into a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftx.bundle.manifest import (
    BASE,
    BASE_FOLDER,
    CARD,
    FORMAT,
    MANIFEST,
    PIPELINE,
    own_digest,
    versions,
)
from peftx.errors import BundleError
from peftx.files import replacing, sha256
from peftx.ledger import Part
from peftx.members import default_id
from peftx.slots import is_ours
from peftx.stack import Stack

if TYPE_CHECKING:
    from peftx.conflicts import Member


def save(stack: Stack, path: Path) -> Path:
    """Write a bundle, beside and renamed, so that a kill leaves the old one.

    Raises:
        BundleError: the place is taken by something else, or the disk is full.
    """
    for part in stack.ledger.parts:
        if part.kind == "delta" and part.place is not None and _merged(part):
            raise BundleError(
                "the stack is merged", hint="stack.unmerge() first, or stack.merge(keep=False) for good"
            )
    with replacing(path, marker=MANIFEST) as folder:
        entries = []
        for member in stack.members:
            entries.append(_write_plugin(stack, member, folder))
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "versions": versions(),
            "base": {
                "id": stack.base_id,
                "fingerprint": stack.base_fingerprint,
                "model_type": stack.model.config.model_type,
                "class": type(stack.model).__name__,
                "dtype": str(stack.model.dtype).removeprefix("torch."),
            },
            "seed": stack.seed,
            "trained_steps": stack.trained_steps,
            "plugins": entries,
            "scores": {n: [s.value, s.low, s.high, s.count, s.unit] for n, s in stack.scores.items()},
        }
        if any(part.kind == "replaced" for part in stack.ledger.parts):
            manifest["base"]["contained"] = _write_base(stack, folder)
        (folder / PIPELINE).write_text(_pipeline_text(stack), encoding="utf-8")
        from peftx.card import model_card

        (folder / CARD).write_text(model_card(stack), encoding="utf-8")
        manifest["files"] = {
            str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()
        }
        manifest["own"] = own_digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _merged(part: Part) -> bool:
    from peftx.slots import slot_of

    slot = slot_of(part.place) if part.place is not None else None
    return slot is not None and any(entry.merged for entry in slot.entries)


def _write_plugin(stack: Stack, member: Member, folder: Path) -> dict[str, Any]:
    parts = stack.ledger.of(member.id)
    tensors = stack.ledger.tensors(member.id)
    folded = {p.path or p.key: list(p.parameters) for p in parts if p.kind == "base"}
    entry: dict[str, Any] = {
        "id": member.id,
        "use": default_id(type(member.plugin)),
        "class": f"{type(member.plugin).__module__}:{type(member.plugin).__qualname__}",
        "options": member.plugin.config.model_dump(mode="json"),
        "phase": member.phase,
        "state": member.plugin.state,
        "injected": member.id in stack.injected,
        "compressed": member.id in stack.compressed,
        "frozen": member.id in stack._frozen,
        "folded": folded if member.id in stack.folded else None,
        "replaced": {p.key: [type(p.module).__name__, p.geometry] for p in parts if p.kind == "replaced"},
    }  # fmt: skip
    if tensors:
        name = f"{member.id}.safetensors"
        save_file({k: t.detach().cpu().contiguous() for k, t in _unshared(tensors)}, folder / name)
        entry["file"] = name
    return entry


def _unshared(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """safetensors refuses two names for one memory."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if pointer in seen and pointer else tensor
        seen.add(pointer)


def smallest_exact(tensor: Tensor) -> Tensor:
    """`tensor` in float16 or bfloat16 if every value survives the round trip, else as it is."""
    if tensor.dtype != torch.float32:
        return tensor
    for dtype in (torch.float16, torch.bfloat16):
        small = tensor.to(dtype)
        if torch.equal(small.to(torch.float32), tensor):
            return small
    return tensor


def _write_base(stack: Stack, folder: Path) -> list[str]:
    """What is left of the base beside the replaced modules; exact, in the smallest dtype that holds it."""
    rest = {n: smallest_exact(t.detach().cpu()).contiguous() for n, t in _base_tensors(stack).items()}
    save_file(dict(_unshared(rest)), folder / BASE)
    inner = folder / BASE_FOLDER
    stack.model.config.save_pretrained(inner)
    if stack.model.can_generate():
        stack.model.generation_config.save_pretrained(inner)
    if stack._tokenizer is not None:
        stack._tokenizer.save_pretrained(inner)
    return sorted(rest)


def _base_tensors(stack: Stack) -> dict[str, Tensor]:
    """Name -> tensor of the base that no plugin owns, each shared tensor once."""
    owned = {id(t) for o in stack.plugins for t in stack.ledger.tensors(o).values()}
    replaced = tuple(f"{p.key}." for p in stack.ledger.parts if p.kind == "replaced")
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    persistent = stack.model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if id(tensor) in owned or id(tensor) in seen or name.startswith(replaced) or is_ours(name):
            continue
        seen.add(id(tensor))
        found[name] = tensor
    return found


def _pipeline_text(stack: Stack) -> str:
    """The spec that a run was made from, with every option of every plugin; of a stack made in Python what it tells."""
    from peftx_spec import dump
    from peftx_spec.models import Pipeline, StackEntry

    entries = []
    for member in stack.members:
        entry: dict[str, Any] = {"use": default_id(type(member.plugin)), "id": member.id}
        if options := member.plugin.config.model_dump(mode="json"):
            entry["with"] = options
        if member.phase:
            entry["phase"] = member.phase
        entries.append(entry)
    made_from = stack.pipeline
    if made_from is not None and [entry.id for entry in made_from.stack] == list(stack.plugins):
        full = tuple(StackEntry.model_validate(entry) for entry in entries)
        return dump(made_from.model_copy(update={"stack": full}))
    dtype = str(stack.model.dtype).removeprefix("torch.")
    pipeline = {"peftx": 1, "model": {"id": stack.base_id, "dtype": dtype}, "stack": entries}
    return dump(Pipeline.model_validate(pipeline))
