"""Bundles: a folder with everything that rebuilds a stack bit for bit.

`pipeline.yaml` (resolved), one safetensors file a plugin, `manifest.json` (hashes of all files, identity of the base,
versions), `README.md` (model card). A bundle of a compressed stack also holds the rest of the base (`base.safetensors`,
config, tokenizer) and needs no base model to load.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftx
from peftx.anatomy import Anatomy
from peftx.errors import BundleError, MergeError, nearest
from peftx.files import aside, replacing, sha256
from peftx.ledger import Part
from peftx.models import load_model
from peftx.plugin import Claim, Plugin
from peftx.registry import Registry
from peftx.stack import Stack, default_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftx.conflicts import Member

FORMAT = 1
MANIFEST = "manifest.json"
PIPELINE = "pipeline.yaml"
CARD = "README.md"
BASE = "base.safetensors"
BASE_FOLDER = "base"
EXPORT = "peftx_export.json"


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
            "versions": _versions(),
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


def own_digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's content, its own entry left out."""
    rest = {name: value for name, value in manifest.items() if name != "own"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _merged(part: Part) -> bool:
    from peftx.slots import slot_of

    slot = slot_of(part.place) if part.place is not None else None
    return slot is not None and any(entry.merged for entry in slot.entries)


def _versions() -> dict[str, str]:
    import transformers

    return {"peftx": peftx.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


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
        if id(tensor) in owned or id(tensor) in seen or name.startswith(replaced) or _is_ours(name):
            continue
        seen.add(id(tensor))
        found[name] = tensor
    return found


def _is_ours(name: str) -> bool:
    return any(
        word in ("peftx", "peftx_attention", "peftx_prompt", "peftx_parts") for word in name.split(".")
    )


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


# -- loading -------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    *,
    model: PreTrainedModel | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    registry: Registry | None = None,
    trust_remote_code: bool = False,
) -> Stack:
    """Rebuild a stack from a bundle, bit for bit.

    Args:
        model: the base, or where it lies now; the place that the bundle names if left out.

    Raises:
        BundleError: a missing, extra or corrupted file, missing or extra tensors, another base model, a newer format.
        RegistryError: a plugin that is not installed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    registry = registry or Registry()
    members = [_member(entry, registry) for entry in manifest["plugins"]]
    base = manifest["base"]
    contained = base.get("contained")
    if contained is not None:
        if model is not None:
            raise BundleError(f"'{folder}' holds its base itself, compressed", hint="leave the model out")
        model, tokenizer = _empty_base(folder, base, tokenizer)
    elif not isinstance(model, nn.Module):
        source = model or base["id"]
        model, found = load_model(
            source, dtype=base["dtype"], device=device, trust_remote_code=trust_remote_code
        )
        tokenizer = tokenizer or found
    stack = Stack(model, members, tokenizer=tokenizer, seed=manifest["seed"], inject=False)
    stack.base_id = base["id"]
    if contained is None and stack.base_fingerprint != base["fingerprint"]:
        raise BundleError(
            f"'{folder}' was made for another base model than '{stack.base_id}': "
            f"fingerprint {base['fingerprint'][:12]}, this one has {str(stack.base_fingerprint)[:12]}",
            hint="give the right one: peftx.load(path, model=...)",
        )
    if contained is not None:
        _fill_base(stack, folder, contained)
    undo = stack.ledger.snapshot()
    try:
        for index, entry in enumerate(manifest["plugins"]):
            later = {path for other in manifest["plugins"][index + 1 :] for path in other["replaced"] or ()}
            _restore(stack, entry, folder, later)
    except BaseException:
        undo()  # the caller's model is as it was
        raise
    if contained is not None:
        stack.base_fingerprint = base["fingerprint"]
        stack.model.to(device)
    stack._frozen = {entry["id"] for entry in manifest["plugins"] if entry["frozen"]}
    stack._set_trainable()
    stack.trained_steps = manifest["trained_steps"]
    from peftx.evaluation import Score

    stack.scores = {
        name: Score(name=name, value=value, low=low, high=high, count=count, unit=unit)
        for name, (value, low, high, count, unit) in manifest["scores"].items()
    }
    return stack


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was checked against it.

    Raises:
        BundleError: see `load`.
    """
    if not folder.exists() and aside(folder.absolute()).exists():
        aside(folder.absolute()).rename(folder)  # a save was killed between its two renames
    file = folder / MANIFEST
    if not folder.is_dir():
        near = [p.name for p in folder.absolute().parent.glob("*") if (p / MANIFEST).exists()]
        raise BundleError(f"no bundle at '{folder}'", hint=nearest(folder.name, near) or None)
    if not file.exists():
        raise BundleError(
            f"'{folder}' is no bundle: {MANIFEST} is missing", hint="stack.save(path) writes one"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        files: dict[str, str] = manifest["files"]
        number = int(manifest["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"'{file}' is corrupted: {type(error).__name__}: {error}") from error
    if number > FORMAT:
        raise BundleError(
            f"'{folder}' has format {number}; this peftx reads up to {FORMAT}",
            hint="pip install --upgrade peftx",
        )
    if manifest.get("own") != own_digest(manifest):
        raise BundleError(
            f"'{file}' is corrupted or was edited (sha256 differs)", hint="change a stack and save it anew"
        )
    present = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    problems = [f"{name} is missing" for name in sorted(files.keys() - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - files.keys())]
    problems += [
        f"{name} is corrupted (sha256 differs)" for name in sorted(files.keys() & present)
        if sha256(folder / name) != files[name]
    ]  # fmt: skip
    if problems:
        raise BundleError(f"'{folder}': {'; '.join(problems)}", hint="copy the bundle again, or save it anew")
    return manifest


def holds_base(path: str | Path) -> bool:
    """Is the base in the bundle itself, compressed, so that none is to be given."""
    return read_manifest(Path(path))["base"].get("contained") is not None


def _member(entry: dict[str, Any], registry: Registry) -> Member:
    from peftx.conflicts import Member

    if entry["use"] in registry.names():
        plugin: type[Plugin] = registry.load(entry["use"])
    else:
        plugin = _unpublished(entry, registry)
    member = Member(entry["id"], plugin(**entry["options"]), phase=entry["phase"])
    member.plugin.state = entry["state"]
    return member


def _unpublished(entry: dict[str, Any], registry: Registry) -> type[Plugin]:
    """A plugin class of the running program (a notebook, a test), which no distribution publishes."""
    for cls in _subclasses(Plugin):
        if f"{cls.__module__}:{cls.__qualname__}" == entry["class"]:
            return cls
    registry.point(entry["use"])  # raises, with the nearest names and how to install
    raise BundleError(f"plugin class {entry['class']} is not defined")


def _subclasses(cls: type[Plugin]) -> Iterator[type[Plugin]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _restore(stack: Stack, entry: dict[str, Any], folder: Path, later: set[str]) -> None:
    """`later`: modules that a later plugin replaces; what was trained in them is part of its tensors."""
    owner = entry["id"]
    member = stack.member(owner)
    view = stack.view(owner, restoring=True)
    file = folder / entry["file"] if "file" in entry else None
    tensors = load_file(file) if file is not None else {}
    if entry["folded"] is not None:
        for path, names in entry["folded"].items():
            module = stack.model.get_submodule(path)
            own = module._parameters
            if unknown := [name for name in names if name not in own]:
                raise BundleError(f"{owner}: {path} has no parameter '{unknown[0]}'")
            undo = partial(own.update, dict(own))
            for name in names:
                own[name] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
            reason = f"{owner} was folded into the weights for good"
            stack.ledger.parts.append(
                Part(owner, "base", path, module, tuple(names), undo=undo, final=reason)
            )
        stack.folded.add(owner)
    elif entry["injected"]:
        stack.inject([owner], restoring=True)
    if entry["compressed"]:
        for path, (kind, geometry) in entry["replaced"].items():
            _rebuild(stack, view, path, kind, geometry, member.plugin)
        member.plugin.restore(view, stack)
        stack.compressed.add(owner)
        stack.anatomy = Anatomy(stack.model)  # its sites still hold the replaced modules
    _fill(stack, owner, tensors, file, later)


def _rebuild(stack: Stack, view: Any, path: str, kind: str, geometry: dict[str, Any], plugin: Plugin) -> None:
    """Build a storage module again: a class of the core, or of the plugin's own module."""
    import sys

    from peftx import compression
    from peftx.anatomy import Site

    cls = vars(compression).get(kind) or vars(sys.modules[type(plugin).__module__]).get(kind)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise BundleError(f"{view.owner}: no storage class '{kind}' for {path}")
    old = stack.model.get_submodule(path)
    view.replace(Site("", path, old, "linear"), cls(**geometry))


def _fill(stack: Stack, owner: str, tensors: dict[str, Tensor], file: Path | None, later: set[str]) -> None:
    """Put the file's tensors in the parts' places; no name may be missing or left over."""
    places = {
        name: (module, leaf, part.kind == "base")
        for part in stack.ledger.of(owner)
        if not (part.kind == "base" and part.key in later)
        for name, module, leaf in part.places()
    }
    missing, extra = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing or extra:
        what = [f"{len(missing)} missing (e.g. {missing[0]})"] if missing else []
        what += [f"{len(extra)} too many (e.g. {extra[0]})"] if extra else []
        raise BundleError(
            f"{file or stack.base_id}: the tensors of '{owner}' do not fit this model: {', '.join(what)}",
            hint="the plugin or the model differs from the one that was saved; see versions in manifest.json",
        )
    device = stack.model.device if stack.model.device.type != "meta" else torch.device("cpu")
    for name, (module, leaf, of_base) in places.items():
        value = _aligned(tensors[name].to(device))
        if leaf in module._parameters:
            old = module._parameters[leaf]
            _check_shape(name, old, value)
            trains = value.is_floating_point() and (old is None or old.requires_grad)
            new = nn.Parameter(value, requires_grad=trains)
            module._parameters[leaf] = new
            if of_base and old is not None:  # it may be tied to another name
                for other in stack.model.modules():
                    for key, parameter in other._parameters.items():
                        if parameter is old:
                            other._parameters[key] = new
        else:
            _check_shape(name, module._buffers[leaf], value)
            module._buffers[leaf] = value


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would have put it: files pack tensors, and products of one that starts in the middle of a
    cache line may round otherwise than before it was saved."""
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def _check_shape(name: str, old: Tensor | None, value: Tensor) -> None:
    if old is not None and old.numel() and old.shape != value.shape:
        raise BundleError(f"{name} has shape {tuple(value.shape)}, the model needs {tuple(old.shape)}")


def _empty_base(
    folder: Path, base: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The shape of the contained base: parameters on the meta device, buffers (rotary tables) computed."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    inner = folder / BASE_FOLDER
    config = AutoConfig.from_pretrained(inner)
    cls = getattr(transformers, base["class"])
    with torch.device("meta"):
        model = cls._from_config(config, dtype=getattr(torch, base["dtype"]))
    model.eval()
    if (inner / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(inner)
    if tokenizer is None and (inner / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(inner)
    return model, tokenizer


def _fill_base(stack: Stack, folder: Path, contained: list[str]) -> None:
    model = stack.model
    tensors = load_file(folder / BASE)
    if sorted(tensors) != contained:
        raise BundleError(f"{folder / BASE} does not hold the tensors that the manifest names")
    for name, packed in tensors.items():
        value = _aligned(packed)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters.get(leaf)
        if old is None:
            module._buffers[leaf] = value
            continue
        _check_shape(name, old, value)
        module._parameters[leaf] = nn.Parameter(value.to(old.dtype), requires_grad=False)
    model.tie_weights()
    _compute_buffers(model)
    model.config.name_or_path = stack.base_id


def _compute_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) are computed by a module's constructor, on the CPU."""
    for name, module in list(model.named_modules()):
        hollow = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if not hollow:
            continue
        fresh = type(module)(model.config)
        for buffer in hollow:
            module._buffers[buffer] = fresh._buffers[buffer]
        for attribute, value in vars(fresh).items():
            if isinstance(value, Tensor) and attribute not in fresh._buffers:
                setattr(module, attribute, value)
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            raise BundleError(f"{name}: buffers cannot be computed")


def export(stack: Stack, path: Path) -> Path:
    """See `Stack.export`."""
    for member in stack.members:
        if not stack.ledger.of(member.id):
            continue
        if Claim.MERGEABLE not in member.plugin.claims and Claim.TRAINS_BASE not in member.plugin.claims:
            raise MergeError(
                f"'{member.id}' does not fold into the weights, so no plain checkpoint can hold it"
            )
    if any(part.kind == "replaced" for part in stack.ledger.parts):
        raise MergeError(
            "a quantized stack has no plain checkpoint", hint="export before compressing, or save a bundle"
        )
    mergeable = [
        m.id
        for m in stack.members
        if m.claims(Claim.MERGEABLE) and m.id not in stack.folded and stack.ledger.of(m.id)
    ]
    if mergeable:
        stack.merge(*mergeable)
    try:
        _refuse_strange_files(path)
        with replacing(path, marker=EXPORT) as folder:
            state = {n: t for n, t in stack.model.state_dict(keep_vars=True).items() if not _is_ours(n)}
            _check_plain(stack.model, state)
            stack.model.save_pretrained(folder, state_dict={n: t.detach() for n, t in state.items()})
            if stack._tokenizer is not None:
                stack._tokenizer.save_pretrained(folder)
            files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
            about = {
                "base": stack.base_id,
                "plugins": list(stack.plugins),
                "versions": _versions(),
                "files": files,
            }
            (folder / EXPORT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    finally:
        if mergeable:
            stack.unmerge()
    return path


def _refuse_strange_files(path: Path) -> None:
    """An earlier export is replaced; what somebody put beside its files is not thrown away."""
    if not (path / EXPORT).exists():
        return
    ours = {*json.loads((path / EXPORT).read_text(encoding="utf-8"))["files"], EXPORT}
    strange = sorted({str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} - ours)
    if strange:
        raise BundleError(
            f"'{path}' holds {strange[0]}, which is not of the checkpoint that stands there, so it is not overwritten",
            hint="choose another folder",
        )


def _check_plain(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Refuse what `from_pretrained` would drop in silence: biases where the class has none, weights it ties."""
    with torch.device("meta"):
        plain = type(model)._from_config(copy.deepcopy(model.config)).state_dict(keep_vars=True)
    kind = type(model).__name__
    extra = sorted(state.keys() - plain.keys())
    if extra:
        raise MergeError(
            f"{kind} has no parameter '{extra[0]}', so no plain checkpoint can hold it",
            hint="save a bundle instead",
        )
    first: dict[int, str] = {}
    for name, tensor in plain.items():
        other = first.setdefault(id(tensor), name)
        if state[name] is not state[other] and not torch.equal(state[name], state[other]):
            raise MergeError(
                f"{kind} uses one matrix as {other} and {name}, and they differ after the merge",
                hint="save a bundle, or set tie_word_embeddings=False before the stack is built",
            )
