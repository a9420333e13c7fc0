"""A stack into a bundle."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftx.composition.members import default_id
from peftx.composition.registry import Registry
from peftx.engines.bundle.manifest import (
    BASE,
    BASE_FOLDER,
    CARD,
    FORMAT,
    HISTORY,
    MANIFEST,
    PIPELINE,
    WITHOUT_ZEROS,
    member_file,
    own_digest,
    versions,
)
from peftx.engines.bundle.sizes import pruned_of
from peftx.engines.bundle.sparse import AT, TO, as_bits, pack, smallest_exact, without_zeros
from peftx.engines.bundle.surroundings import (
    TOKENIZER_FOLDER,
    computed_buffers,
    generation_of,
    settings_of,
)
from peftx.engines.files import plain_files, replacing, sha256
from peftx.engines.models import tokenizer_digest
from peftx.errors import BundleError
from peftx.foreign import refuse_wrapped
from peftx.kernel.chain import is_ours
from peftx.kernel.parts import BasePart, DeltaPart, ReplacedPart, VocabularyPart
from peftx.kernel.stack import Stack

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftx.kernel.members import Member
    from peftx.kernel.plugin import Plugin


def save(stack: Stack, path: Path) -> Path:
    """Write a bundle, beside and renamed, so that a kill leaves the old one.

    Raises:
        BundleError: the place is taken by something else, or the disk is full. ConflictError: HF PEFT is on the model.
    """
    for part in stack.ledger.all(DeltaPart):
        if _merged(part):
            raise BundleError(
                "the stack is merged", hint="stack.unmerge() first, or stack.merge(keep=False) for good"
            )
    refuse_wrapped(stack.model, "a bundle")
    _check_base(stack)
    contained = bool(stack.ledger.all(ReplacedPart))
    with replacing(path, marker=MANIFEST) as folder:
        gone = {id(t) for some, _ in pruned_of(stack) for t in some} if stack.trained_steps else set[int]()
        registry = Registry()
        entries = [
            _write_plugin(stack, m, folder, registry, sparse=not contained, pruned=gone)
            for m in stack.members
        ]
        manifest: dict[str, Any] = {
            "format": FORMAT if any(entry.get("zeros") for entry in entries) else WITHOUT_ZEROS,
            "versions": versions(),
            "base": {
                "id": stack.base_id,
                "fingerprint": stack.base_fingerprint,
                "model_type": stack.model.config.model_type,
                "class": type(stack.model).__name__,
                "dtype": str(stack.model.dtype).removeprefix("torch."),
                "settings": settings_of(_base_config(stack)),
                "generation": generation_of(stack.model),
                "buffers": computed_buffers(stack.model),
                "tokenizer": _write_tokenizer(stack, folder, always=contained),
            },
            "seed": stack.seed,
            "trained_steps": stack.trained_steps,
            "plugins": entries,
            "scores": {n: [s.value, s.low, s.high, s.count, s.unit] for n, s in stack.scores.items()},
        }
        if contained:
            manifest["base"]["contained"] = _write_base(stack, folder)
        (folder / PIPELINE).write_text(_pipeline_text(stack, registry), encoding="utf-8")
        if stack.history:
            (folder / HISTORY).write_text(stack.history.text(), encoding="utf-8")
        from peftx.engines.bundle.card import model_card

        (folder / CARD).write_text(model_card(stack, folder, registry), encoding="utf-8")
        manifest["files"] = {f.relative_to(folder).as_posix(): sha256(f) for f in plain_files(folder)}
        manifest["own"] = own_digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _check_base(stack: Stack) -> None:
    """Raises BundleError where tensors of the base changed and no plugin says that it did so: they would be lost."""
    if stack.identity is None:
        return
    tensors = {name: t for name, t in stack.model.named_parameters() if not is_ours(name)}
    owned = {id(t) for part in stack.ledger.all(BasePart) for t in part.tensors().values()}
    known = {name for name, t in tensors.items() if id(t) in owned}
    replaced = tuple(f"{p.key}." for p in stack.ledger.all(ReplacedPart))
    names = [n for n in stack.identity.changed(tensors, left_out=known) if not n.startswith(replaced)]
    if names:
        more = f" and {len(names) - 1} others" if names[1:] else ""
        raise BundleError(
            f"{names[0]}{more} of the base changed, and no plugin of the stack says that it trains them, so no bundle "
            "would hold the change",
            hint="in a plugin: site.train(), or attach a delta; else change the model before the stack is built on it",
        )


def _write_tokenizer(stack: Stack, folder: Path, *, always: bool) -> str | None:
    """Its digest; and its files, unless the base's place has the same one."""
    tokenizer = stack.given_tokenizer
    if tokenizer is None:
        return None
    digest = tokenizer_digest(tokenizer)
    if always or digest != stack.tokenizer_of_base:
        try:
            tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        except UnicodeEncodeError as error:
            raise BundleError(f"the tokenizer's settings hold what no file of text can: {error}") from error
    return digest


def _merged(part: DeltaPart) -> bool:
    from peftx.kernel.slots import slot_of

    slot = slot_of(part.place)
    return slot is not None and any(link.merged for link in slot.links)


def _write_plugin(
    stack: Stack, member: Member, folder: Path, registry: Registry, *, sparse: bool, pruned: Set[int]
) -> dict[str, Any]:
    """`pruned`: ids of the tensors that others have pruned."""
    at, parts = stack.standing[member.id], stack.ledger.of(member.id)
    tensors = stack.ledger.tensors(member.id)
    packed = _packed(stack.ledger.of(member.id, BasePart)) if sparse else {}
    shorter = _shorter(stack, member.id)
    folded = {p.key: list(p.parameters) for p in parts if isinstance(p, BasePart)}
    entry: dict[str, Any] = {
        "id": member.id,
        "use": default_id(type(member.plugin), registry),
        "published": registry.name_of(type(member.plugin)) is not None,
        "version": _version(type(member.plugin), registry),
        "class": f"{type(member.plugin).__module__}:{type(member.plugin).__qualname__}",
        "options": member.plugin.config.model_dump(mode="json"),
        "phase": member.phase,
        "state": member.plugin.state,
        "injected": at.injected,
        "compressed": at.compressed,
        "frozen": at.frozen,
        "folded": folded if at.folded else None,
        "replaced": {p.key: [type(p.module).__name__, p.geometry] for p in parts if isinstance(p, ReplacedPart)},
    }  # fmt: skip
    if packed:
        entry["sparse"] = sorted(packed)
    if shorter:
        told = {
            name: (str(tensors[name].dtype).removeprefix("torch."), list(tensors[name].shape))
            for name in shorter
        }
        entry["shorter"] = told
    if tensors:
        name = member_file(member.id)
        rest = {k: shorter.get(k, t) for k, t in tensors.items() if k not in packed}
        pairs = {k: without_zeros(t, pruned=id(t) in pruned) for k, t in rest.items() if k not in shorter}
        masked = {k: pair for k, pair in pairs.items() if pair is not None}
        if masked:
            entry["zeros"] = {k: list(rest.pop(k).shape) for k in masked}
        found = (packed | masked).items()
        halves = {k + end: t for k, pair in found for end, t in zip((AT, TO), pair, strict=True)}
        save_file({k: t.detach().cpu().contiguous() for k, t in _unshared(rest | halves)}, folder / name)
        entry["file"] = name
    return entry


def _version(plugin: type[Plugin], registry: Registry) -> str | None:
    """Of the distribution that publishes a plugin, if exactly one does."""
    name = registry.name_of(plugin)
    known = name is not None and name in registry.names() and name not in registry.clashes()
    return registry.describe(name).version if known and name is not None else None


def _packed(parts: Sequence[BasePart]) -> dict[str, tuple[Tensor, Tensor]]:
    """What changed in trained parameters of the base, where that is the shorter way to say it."""
    found = {}
    for part in parts:
        for name, old in part.original.items():
            new = part.module._parameters[name]
            if new is not None and (pair := pack(new, old)) is not None:
                found[f"{part.key}.{name}"] = pair
    return found


def _unshared(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """safetensors refuses two names for one memory."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if pointer in seen and pointer else tensor
        seen.add(pointer)


def _shorter(stack: Stack, owner: str) -> dict[str, Tensor]:
    """A plugin's masks as bits; of its frozen layers, those that half precision holds in it."""
    layers = {name for part in stack.ledger.of(owner, ReplacedPart) for name in part.tensors()}
    found = {}
    for name, tensor in stack.ledger.tensors(owner).items():
        if tensor.dtype == torch.bool and tensor.numel() > 1:
            found[name] = as_bits(tensor)
        elif name in layers and (small := smallest_exact(tensor.detach())).dtype != tensor.dtype:
            found[name] = small
    return found


def _write_base(stack: Stack, folder: Path) -> list[str]:
    """What is left of the base beside the replaced modules; exact, in the smallest dtype that holds it."""
    rest = {n: smallest_exact(t.detach().cpu()).contiguous() for n, t in _base_tensors(stack).items()}
    save_file(dict(_unshared(rest)), folder / BASE)
    inner = folder / BASE_FOLDER
    _base_config(stack).save_pretrained(inner)
    if stack.model.can_generate():
        stack.model.generation_config.save_pretrained(inner)
    return sorted(rest)


def _base_config(stack: Stack) -> PretrainedConfig:
    """The configuration of the base, without tokens that plugins added."""
    added = stack.ledger.all(VocabularyPart)
    if not added:
        return stack.model.config
    config = copy.deepcopy(stack.model.config)
    config.get_text_config().vocab_size = added[0].known
    return config


def _base_tensors(stack: Stack) -> dict[str, Tensor]:
    """Name -> tensor of the base that no plugin owns, each shared tensor once."""
    owned = {id(t) for o in stack.plugins for t in stack.ledger.tensors(o).values()}
    replaced = tuple(f"{p.key}." for p in stack.ledger.all(ReplacedPart))
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    persistent = stack.model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if id(tensor) in owned or id(tensor) in seen or name.startswith(replaced) or is_ours(name):
            continue
        seen.add(id(tensor))
        found[name] = tensor
    return found


def _pipeline_text(stack: Stack, registry: Registry) -> str:
    """The spec that a run was made from, with every option of every plugin; of a stack made in Python what it tells."""
    from peftx_spec import dump
    from peftx_spec.models import Pipeline, StackEntry

    entries = []
    for member in stack.members:
        entry: dict[str, Any] = {"use": default_id(type(member.plugin), registry), "id": member.id}
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
