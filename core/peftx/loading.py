"""A bundle into a stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from peftx.composition.adapters import is_adapter
from peftx.composition.registry import Registry
from peftx.engines.bundle.contained import (
    aligned,
    check_shape,
    empty_base,
    fill_base,
    lend,
    let_go,
    without,
)
from peftx.engines.bundle.manifest import (
    ANEW,
    BASE_FOLDER,
    MANIFEST,
    BaseEntry,
    Manifest,
    PluginEntry,
    read_history,
    read_manifest,
)
from peftx.engines.bundle.sparse import AT, TO, unpack, widened, with_zeros
from peftx.engines.bundle.surroundings import (
    TOKENIZER_FOLDER,
    cast_buffers,
    check_settings,
    computed_buffers,
    generation_of,
)
from peftx.engines.files import naming
from peftx.engines.models import load_model, read_tokenizer, tokenizer_digest, usable_device
from peftx.engines.tensor_files import read_tensors
from peftx.errors import BundleError
from peftx.interop.importing import import_peft
from peftx.kernel.anatomy.anatomy import Anatomy
from peftx.kernel.identity import fingerprint
from peftx.kernel.parts import BasePart, hollowed
from peftx.kernel.plugin import Plugin
from peftx.kernel.view import ModelView
from peftx.sharing import located
from peftx.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftx.kernel.members import Member
    from peftx.toolkits.evaluation import Score


def load(
    path: str | Path,
    *,
    model: PreTrainedModel | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    registry: Registry | None = None,
    trust_remote_code: bool = False,
) -> Stack:
    """Rebuild a stack from a bundle, bit for bit; or make one of an adapter of HF PEFT (`peftx.interop`).

    Args:
        path: a folder, or `hub:owner/name@revision`.
        model: the base, or where it lies now; the place that the bundle names if left out.

    Raises:
        HubError: a bundle of the Hub that cannot be fetched.
        BundleError: a missing, extra or corrupted file, missing or extra tensors, another base model, a newer format.
        RegistryError: a plugin that is not installed. ConflictError: a model that carries plugins already.
    """
    folder = located(path)
    if is_adapter(folder) and not (folder / MANIFEST).exists():
        given = {"tokenizer": tokenizer, "registry": registry, "trust_remote_code": trust_remote_code}
        return import_peft(folder, model=model, device=usable_device(device), **given)  # type: ignore[arg-type]
    manifest = read_manifest(folder)
    device = usable_device(device)
    with naming(folder):
        return _load(folder, manifest, model, tokenizer, device, registry or Registry(), trust_remote_code)


def _load(
    folder: Path,
    manifest: Manifest,
    model: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str,
    registry: Registry,
    trust_remote_code: bool,
) -> Stack:
    model_given, tokenizer_given = model, tokenizer
    members = [_member(entry, registry) for entry in manifest.plugins]
    base, contained = manifest.base, manifest.base.contained
    tokenizer, came_with = tokenizer or _own_tokenizer(folder), None
    if contained is not None:
        if model is not None:
            raise BundleError(f"'{folder}' holds its base itself, compressed", hint="leave the model out")
        model = empty_base(folder, base)
    elif not isinstance(model, nn.Module):
        source = model or base.id
        model, came_with = load_model(
            source, dtype=base.dtype, device=device, trust_remote_code=trust_remote_code
        )
        if tokenizer is None:
            tokenizer = came_with
            check_tokenizer(tokenizer, base, folder, of=source)
    stack = Stack(model, members, tokenizer=tokenizer, seed=manifest.seed, inject=False)
    model = stack.model
    stack.tokenizer_of_base = None if came_with is None else tokenizer_digest(came_with)
    stack.tokenizer_before = came_with or tokenizer_given
    lent: list[nn.Parameter] = []
    if contained is None:
        _check_base(stack, base, folder)
    stack.base_id = base.id
    if contained is not None:
        fill_base(stack, folder, contained)
        lent = lend(stack, manifest, folder)
        stack.given_fingerprint = base.fingerprint
    if not isinstance(model_given, nn.Module):
        cast_buffers(model, base.buffers)
    elif base.settings is not None and computed_buffers(model) != base.buffers:
        raise BundleError(
            f"'{folder}' was made with a base that was cast as a whole, its tables of positions too",
            hint=f"model.to(torch.{base.dtype}) first, or let peftx.load read the base: leave the model out",
        )
    undo = stack.ledger.snapshot()
    generation = stack.model.generation_config if base.generation is not None else None
    try:
        grown: set[str] = set()
        for index, entry in enumerate(manifest.plugins):
            later = {path for other in manifest.plugins[index + 1 :] for path in other.replaced}
            _restore(stack, entry, folder, later, grown)
        if base.generation is not None and base.generation != generation_of(stack.model):
            stack.model.generation_config = _generation_config(base.generation, folder)
    except BaseException:
        undo()  # the caller's model is as it was
        if generation is not None:
            stack.model.generation_config = generation
        raise
    if contained is not None:
        let_go(stack, manifest, lent)
        stack.model.to(device)
    for entry in manifest.plugins:
        stack.standing[entry.id].frozen = entry.frozen
    stack.settle()
    stack.trained_steps = manifest.trained_steps
    stack.scores = dict(_scores(manifest, folder))
    stack.history = read_history(folder)
    return stack


def _check_base(stack: Stack, base: BaseEntry, folder: Path) -> None:
    """Raises BundleError where the base is another one, or configured otherwise."""
    if base.fingerprint is not None and base.settings is None:  # of a bundle of version 0.1
        found: str | None = fingerprint(stack.model)
    else:  # in the dtype that it was just read in: nothing has cast it since
        found = stack.identity.digest() if stack.identity is not None else None
    if found != base.fingerprint:
        raise BundleError(
            f"'{folder}' was made for '{base.id}', and '{stack.base_id}' is another base model: fingerprint "
            f"{str(base.fingerprint)[:12]}, this one has {str(found)[:12]}",
            hint=f"give the right one: --model {base.id}, or peftx.load(path, model=...)",
        )
    if base.settings is not None:
        check_settings(base.settings, stack.model, folder)


def _own_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The one that the bundle holds; None where the base's place has it."""
    places = (folder / TOKENIZER_FOLDER, folder / BASE_FOLDER)  # version 0.1 kept it with a compressed base
    place = next((p for p in places if (p / "tokenizer_config.json").exists()), None)
    return read_tokenizer(str(place), trust_remote_code=False) if place is not None else None


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, base: BaseEntry, folder: Path, *, of: str = ""
) -> None:
    """Raises BundleError where this is not the tokenizer that a bundle was made with. `of`: where it lies."""
    found = tokenizer_digest(tokenizer) if tokenizer is not None else None
    if base.tokenizer is not None and found != base.tokenizer:
        what = "has another tokenizer than" if found is not None else "has no tokenizer, unlike"
        raise BundleError(
            f"'{of or base.id}' {what} the base that '{folder}' was made with",
            hint="give the right one: peftx.load(path, tokenizer=...)",
        )


def _generation_config(saved: dict[str, Any], folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig(**saved)
    except (TypeError, ValueError) as error:
        raise BundleError(f"'{folder}': its generation settings are refused: {error}") from error


def _scores(manifest: Manifest, folder: Path) -> Iterator[tuple[str, Score]]:
    from peftx.toolkits.evaluation import Score

    for name, found in manifest.scores.items():
        try:
            value, low, high, number, unit = found
        except ValueError as error:
            raise BundleError(f"'{folder}': the score '{name}' is no score: {found}") from error
        yield name, Score(name=name, value=value, low=low, high=high, count=number, unit=unit)  # type: ignore[arg-type]


def _member(entry: PluginEntry, registry: Registry) -> Member:
    from peftx.kernel.members import Member

    known = entry.published and entry.use in registry.names()
    plugin = registry.load(entry.use) if known else _unpublished(entry, registry)
    member = Member(entry.id, plugin(**entry.options), phase=entry.phase)
    member.plugin.state = entry.state
    return member


def _unpublished(entry: PluginEntry, registry: Registry) -> type[Plugin]:
    """A plugin class of the running program (a notebook, a test), which no distribution publishes."""
    for cls in _subclasses(Plugin):
        if f"{cls.__module__}:{cls.__qualname__}" == entry.cls:
            return cls
    registry.point(entry.use)  # raises, with the nearest names and how to install
    raise BundleError(
        f"the plugin class {entry.cls} is not defined in this program",
        hint=f"import the module that defines it, before the bundle is loaded: {entry.cls.partition(':')[0]}",
    )


def _subclasses(cls: type[Plugin]) -> Iterator[type[Plugin]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _restore(stack: Stack, entry: PluginEntry, folder: Path, later: set[str], grown: set[str]) -> None:
    """Put one plugin on the model, as it was.

    Args:
        later: modules that a later plugin replaces; what was trained in them is part of its tensors.
        grown: biases that folds of plugins before it added; its own are put in.
    """
    owner = entry.id
    member = stack.member(owner)
    view = stack.view(owner, restoring=True)
    file = folder / entry.file if entry.file is not None else None
    tensors = read_tensors(file) if file is not None else {}
    if entry.folded is not None:
        for path, names in entry.folded.items():
            module = stack.model.get_submodule(path)
            if unknown := [name for name in names if name not in module._parameters]:
                raise BundleError(f"{owner}: {path} has no parameter '{unknown[0]}'", hint=ANEW)
            grown |= {f"{path}.{name}" for name in names if module._parameters[name] is None}
            undo = hollowed(stack.model, module, names)
            reason = f"{owner} was folded into the weights for good"
            part = BasePart(owner, path, module, stack.model, tuple(names), final=reason, put_back=undo)
            stack.ledger.parts.append(part)
        stack.standing[owner].folded = True
    elif entry.injected:
        with without(stack.model, [name for name in grown if name not in tensors]):
            stack.inject([owner], restoring=True)
    if entry.compressed:
        stack.standing[owner].compressed = True
    if entry.compressed and entry.folded is None:  # what is folded for good stands in the weights alone
        for path, (kind, geometry) in entry.replaced.items():
            _rebuild(stack, view, path, kind, geometry, member.plugin)
        member.plugin.restore(view, stack)
        stack.anatomy = Anatomy(stack.model)  # its sites still hold the replaced modules
    _unpack(stack, entry, tensors, file)
    _fill(stack, owner, tensors, file, later)


def _unpack(stack: Stack, entry: PluginEntry, tensors: dict[str, Tensor], file: Path | None) -> None:
    """Put whole tensors in the place of what changed in them, or of their shorter forms."""
    for name, (dtype, shape) in entry.shorter.items():
        if name not in tensors:
            continue  # `_fill` says that it is missing
        try:
            tensors[name] = widened(tensors[name], dtype, shape)
        except ValueError as error:
            raise BundleError(f"{file}: {name}: {error}", hint=ANEW) from error
    for name, whole in entry.zeros.items():
        halves = [tensors.pop(name + end, None) for end in (AT, TO)]
        if halves[0] is None or halves[1] is None:
            raise BundleError(
                f"{file}: {name} is to be made of what is not 0 in it, and that is not there", hint=ANEW
            )
        try:
            tensors[name] = with_zeros(halves[0], halves[1], whole)
        except ValueError as error:
            raise BundleError(f"{file}: {name}: {error}", hint=ANEW) from error
    parts = stack.ledger.of(entry.id, BasePart)
    originals = {f"{part.key}.{name}": old for part in parts for name, old in part.original.items()}
    for name in entry.sparse:
        pair = [tensors.pop(name + end, None) for end in (AT, TO)]
        old = originals.get(name)
        if old is None or pair[0] is None or pair[1] is None:
            raise BundleError(
                f"{file}: {name} is to be made of what changed in it, and that is not there", hint=ANEW
            )
        try:
            tensors[name] = unpack(old, pair[0], pair[1])
        except ValueError as error:
            raise BundleError(f"{file}: {name}: {error}", hint=ANEW) from error


def _rebuild(
    stack: Stack, view: ModelView, path: str, kind: str, geometry: dict[str, Any], plugin: Plugin
) -> None:
    """Build a storage module again: a class of the core, or of the plugin's own module."""
    import sys

    from peftx.kernel.anatomy.site import Site
    from peftx.toolkits import compression

    cls = vars(compression).get(kind) or vars(sys.modules[type(plugin).__module__]).get(kind)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise BundleError(f"{view.owner}: no storage class '{kind}' for {path}")
    old = stack.model.get_submodule(path)
    view.bound(Site("", path, old, "linear")).replace(cls(**geometry))


def _fill(stack: Stack, owner: str, tensors: dict[str, Tensor], file: Path | None, later: set[str]) -> None:
    """Put the file's tensors in the parts' places; no name may be missing or left over."""
    places = {
        name: (module, leaf, isinstance(part, BasePart))
        for part in stack.ledger.of(owner)
        if not (isinstance(part, BasePart) and part.key in later)
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
    casts: dict[tuple[int, torch.dtype], tuple[str, torch.dtype]] = {}
    for name, (module, leaf, of_base) in places.items():
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if old is None or not old.is_floating_point():
            continue
        if of_base and tensors[name].dtype != old.dtype:
            raise BundleError(
                f"{file}: {name} is {tensors[name].dtype}, and the base's is {old.dtype}", hint=ANEW
            )
        # A module may have been cast since, but then as a whole.
        other, dtype = casts.setdefault((id(module), old.dtype), (name, tensors[name].dtype))
        if tensors[name].dtype != dtype:
            raise BundleError(
                f"{file}: {name} is {tensors[name].dtype}, and {other} beside it is {dtype}", hint=ANEW
            )
    shared: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    """Of a parameter that stands under several names: what it was (so that its id stays its own), and what it is."""
    for name, (module, leaf, of_base) in places.items():
        value = aligned(tensors[name].to(device))
        if leaf in module._parameters:
            old = module._parameters[leaf]
            check_shape(name, old, value)
            trains = value.is_floating_point() and (old is None or old.requires_grad)
            new = nn.Parameter(value, requires_grad=trains)
            if old is not None:
                first = shared.setdefault(id(old), (old, new))[1]
                new = first if first is new or torch.equal(first, new) else new
            module._parameters[leaf] = new
            if of_base and old is not None:  # it may be tied to another name
                for other in stack.model.modules():
                    for key, parameter in other._parameters.items():
                        if parameter is old:
                            other._parameters[key] = new
        else:
            check_shape(name, module._buffers[leaf], value)
            module._buffers[leaf] = value
