"""A bundle into a stack."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftx.anatomy import Anatomy
from peftx.bundle.manifest import BASE, BASE_FOLDER, read_manifest
from peftx.errors import BundleError
from peftx.ledger import Part
from peftx.models import load_model
from peftx.plugin import Plugin
from peftx.registry import Registry
from peftx.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftx.conflicts import Member


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
        RegistryError: a plugin that is not installed. ConflictError: a model that carries plugins already.
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
    cls = getattr(transformers, base["class"], None)
    if cls is None:
        raise BundleError(
            f"'{folder}' holds a {base['class']}, which transformers {transformers.__version__} does not have",
            hint="see versions in manifest.json; models of remote code cannot be bundled compressed",
        )
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
