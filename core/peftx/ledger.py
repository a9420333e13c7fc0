"""What each plugin did to the model: its tensors, how to switch it off, how to take it away."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftx import attention, calls, virtual_tokens
from peftx.errors import ArchitectureError, ConflictError, MergeError, PeftxError, UnsupportedError
from peftx.slots import (
    Delta,
    attach,
    bake,
    base_class,
    child_name,
    detach,
    enable,
    follow,
    is_ours,
    kind_of,
    slot_of,
    snapshot,
    without_fast_path,
)
from peftx.slots.carrier import CHILD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftx.anatomy import ModelView, Site
    from peftx.attention import AttentionEdit
    from peftx.calls import CallEdit
    from peftx.virtual_tokens import VirtualTokens

Kind = Literal["delta", "attention", "prompt", "shift", "call", "free", "base", "replaced"]
FREE = "peftx_parts"
_LEDGERS: WeakKeyDictionary[nn.Module, weakref.ref[Ledger]] = WeakKeyDictionary()
"""The ledger of the stack that a model stands in now."""


@runtime_checkable
class Storage(Protocol):
    """A module that can stand in another one's place and be rebuilt from a bundle."""

    def geometry(self) -> dict[str, Any]:
        """JSON-able keyword arguments of the constructor, which then gives the same module with empty tensors."""


@dataclass(eq=False)
class Part:
    """One thing that one plugin did in one place."""

    owner: str
    kind: Kind
    key: str
    """Prefix of its tensors' names in the plugin's file: the module's path (and the role where several share it)."""
    module: nn.Module
    """What it put there: the delta, the edit, the new module; of kind `base` the module whose parameters train."""
    parameters: tuple[str, ...] = ()
    """Of kind `base`: names of the parameters that train."""
    geometry: dict[str, Any] = field(default_factory=dict)
    """Of kind `replaced`: how to build the module again."""
    place: nn.Module | None = None
    """Of kind `delta`: the module that carries it, at `path`."""
    path: str = ""
    undo: Callable[[], None] = lambda: None
    switch: Callable[[bool], None] | None = None
    on: bool = True
    original: dict[str, nn.Parameter] = field(default_factory=dict)
    """Of kind `base`: the base's own parameters, which stand aside and come back."""
    final: str = ""
    """Why it cannot be undone, if it cannot."""
    covers: frozenset[str] = frozenset()
    """Of kind `replaced`: plugins whose values are part of the new module's tensors."""

    def places(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(name in the plugin's file, module, attribute) of every parameter and persistent buffer."""
        if self.kind == "base":
            for name in self.parameters:
                yield f"{self.key}.{name}", self.module, name
            return
        walk = self.module.named_modules() if self.module._modules else (("", self.module),)
        for path, module in walk:
            if path and CHILD in path.split("."):
                continue  # a delta that a later plugin put on a module of this one
            prefix = f"{self.key}.{path}." if path else f"{self.key}."
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield prefix + name, module, name
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield prefix + name, module, name

    def tensors(self) -> dict[str, Tensor]:
        """Name -> parameter or persistent buffer."""
        return {
            name: module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
            for name, module, leaf in self.places()
        }  # type: ignore[return-value]


def carried(model: nn.Module, *, trained: bool = True) -> list[str]:
    """Plugins that stand on the model: those with modules of their own on it, whatever stack put them there, and (with
    `trained`) all of a stack that is still in use."""
    children = (child for module in model.modules() for child in module._modules.items())
    groups = (group for name, group in children if group is not None and is_ours(name))
    found = {key.partition("@")[0] for group in groups for key in group._modules}
    if not trained:
        return sorted(found)
    if not found and _owners(model):
        gc.collect()  # whether the stack of another cell or function is in use must not be left to chance
    return sorted(found | _owners(model))


def _owners(model: nn.Module) -> set[str]:
    """Of what the stack that the model stands in can still take away."""
    ledger = _LEDGERS.get(model, lambda: None)()
    return {part.owner for part in ledger.parts if not part.final} if ledger is not None else set()


class Ledger:
    """All parts of a stack, by owner, in order of attachment."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts: list[Part] = []
        _LEDGERS[model] = weakref.ref(self)

    def of(self, owner: str) -> list[Part]:
        return [part for part in self.parts if part.owner == owner]

    def tensors(self, owner: str) -> dict[str, Tensor]:
        """Everything that a bundle must hold for one plugin."""
        return {name: tensor for part in self.of(owner) for name, tensor in part.tensors().items()}

    def parameters(self, owner: str) -> Iterator[nn.Parameter]:
        """What the plugin trains (whether or not it is frozen at the moment), each once."""
        seen: set[int] = set()
        for part in self.of(owner):
            if part.kind == "replaced":
                continue
            for _, module, leaf in part.places():
                parameter = module._parameters.get(leaf)
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    # -- noting --------------------------------------------------------------------------------------------------

    def add_delta(self, view: ModelView, site: Site, delta: Delta) -> None:
        shared = site.rows is not None or site.kind in ("experts", "block")
        name = f"{view.owner}@{site.role.replace('.', '_')}" if shared else view.owner
        if site.read and site.kind != "linear":
            raise ArchitectureError(
                f"{view.owner}: {site.path} is never called, so nothing can act on its output"
            )
        kind = _carrier(site)
        if delta.has_base():
            trained = next((p for p in self.parts if p.kind == "base" and p.module is site.module), None)
            if trained is not None:
                raise ConflictError(
                    f"'{view.owner}' computes {site.path} itself as a frozen layer, and {trained.owner} trains it",
                    hint="leave the layer out of one of them",
                )
        self._settle(delta, site.module, full_precision=delta.full_precision)
        attach(
            site.module, delta, name=name, owner=view.owner, rank=view.rank,
            parameter=site.parameter, rows=site.rows, kind=kind, bias=site.bias_name, transposed=site.transposed,
        )  # fmt: skip
        give_back = without_fast_path(self.model, site.path, site.module)
        self.parts.append(
            Part(
                view.owner,
                "delta",
                f"{site.path}@{site.role}" if shared else site.path,
                delta,
                place=site.module,
                path=site.path,
                undo=lambda: self._detach(site.module, view.owner, give_back),
                switch=lambda on: enable(site.module, view.owner, on),
            )
        )

    @staticmethod
    def _detach(module: nn.Module, owner: str, give_back: Callable[[], None]) -> None:
        detach(module, owner)
        give_back()

    def add_base(self, view: ModelView, site: Site, names: tuple[str, ...]) -> list[nn.Parameter]:
        module = site.module
        slot = slot_of(module)
        for entry in slot.entries if slot is not None else ():
            if entry.delta.has_base():
                raise ConflictError(
                    f"'{view.owner}' trains the base's {site.path}, which {entry.owner} computes itself as a frozen "
                    "layer",
                    hint="leave the layer out of one of them",
                )
        if slot is not None and slot.originals:
            raise ConflictError(
                f"{view.owner}: {site.path} holds merged deltas", hint="stack.unmerge() first"
            )
        own = dict(module.named_parameters(recurse=False))
        for name in names:
            if name not in own:
                raise ArchitectureError(
                    f"{view.owner}: {site.path} ({base_class(module).__name__}) has no parameter '{name}'",
                    hint=f"it has: {', '.join(own) or 'none'}",
                )
        chosen = names or tuple(own)
        others = self._trained_by_others(view.owner, module)
        twice = {name for part in self.of(view.owner) if part.kind == "base" and part.module is module
                 for name in part.parameters}  # fmt: skip
        for name in chosen:
            if name in twice:
                raise ConflictError(
                    f"'{view.owner}' is to train the base's {site.path} twice",
                    hint="name the layer in one of its options alone",
                )
            # Matrices have one trainer, vectors (norms, biases) any number: each sees the updates of the others.
            if name in others and (own[name].ndim > 1 or name not in others[name].original):
                raise ConflictError(
                    f"'{view.owner}' and '{others[name].owner}' both train the base's {site.path}",
                    hint="leave it out of the targets of one of them, or keep one of the two",
                )
        part = Part(view.owner, "base", site.path, module, chosen)
        # Fresh parameters, so that the base's own tensors come back untouched on removal.
        for name in chosen:
            if name in others:
                part.original[name] = others[name].original[name]
                continue
            part.original[name] = own[name]
            new = torch.empty_like(own[name], device="meta") if view.restoring else own[name].detach().clone()
            self._swap(module, {name: own[name]}, {name: nn.Parameter(new)})
        part.undo = lambda: self._give_back(part)
        part.switch = self._switch_of(part)
        self.parts.append(part)
        return [module._parameters[name] for name in chosen]  # type: ignore[misc]

    def _trained_by_others(self, owner: str, module: nn.Module) -> dict[str, Part]:
        """Name -> the part of another plugin that trains this parameter of the module."""
        parts = (p for p in self.parts if p.kind == "base" and p.module is module and p.owner != owner)
        return {name: part for part in parts for name in part.parameters}

    def _give_back(self, part: Part) -> None:
        """Put the base's own parameters back in their places, where no other plugin trains them."""
        kept = self._trained_by_others(part.owner, part.module)
        mine = {name: old for name, old in part.original.items() if name not in kept}
        self._swap(part.module, {name: part.module._parameters[name] for name in mine}, mine)

    def _switch_of(self, part: Part) -> Callable[[bool], None]:
        trained = {name: part.module._parameters[name] for name in part.parameters}

        def switch(on: bool) -> None:
            part.on = on
            others = self._trained_by_others(part.owner, part.module)
            for name, own in part.original.items():
                now = part.module._parameters[name]
                if now is not own:
                    trained[name] = now  # a bundle may have put another one there
                if name not in others or not others[name].on:
                    self._swap(part.module, {name: now}, {name: trained[name] if on else own})

        return switch

    def _swap(self, module: nn.Module, old: dict[str, Any], new: dict[str, nn.Parameter]) -> None:
        """Exchange parameters, also where they are tied."""
        for name, parameter in new.items():
            follow(parameter, old[name])
            tied = [
                (m, n) for m in self.model.modules() for n, p in m._parameters.items() if p is old[name]
            ]  # fmt: skip
            for owner_module, owner_name in tied or [(module, name)]:
                owner_module._parameters[owner_name] = parameter

    def add_replacement(self, view: ModelView, site: Site, module: nn.Module) -> None:
        if not isinstance(module, Storage):
            raise UnsupportedError(
                f"{type(module).__name__} has no geometry(), so no bundle could rebuild it"
            )
        if site.rows is not None:
            raise UnsupportedError(
                f"{view.owner}: {site.role} is a part of {site.path}; replace the whole matrix",
                hint="model.linears(targets, whole=True)",
            )
        old = site.module
        if (slot := slot_of(old)) is not None:
            owners = sorted({entry.owner for entry in slot.entries})
            raise ConflictError(
                f"{view.owner}: {site.path} carries deltas of {', '.join(owners)}",
                hint="merge them for good first: stack.merge(keep=False)",
            )
        parent, _, name = site.path.rpartition(".")
        holder = self.model.get_submodule(parent)
        setattr(holder, name, module)
        site.module = module
        # What was folded or trained in the old module is part of the new one's tensors now.
        inside = [part for part in self.parts if part.kind == "base" and part.module is old]
        self.parts = [part for part in self.parts if part not in inside]

        def undo() -> None:
            setattr(holder, name, old)
            self.parts = inside + self.parts

        self.parts.append(
            Part(
                view.owner, "replaced", site.path, module, geometry=module.geometry(), undo=undo,
                covers=frozenset(part.owner for part in inside),
            )
        )  # fmt: skip

    def add_free(self, view: ModelView, name: str, module: nn.Module) -> None:
        if FREE not in self.model._modules:
            self.model.add_module(FREE, nn.ModuleDict())
        group: nn.ModuleDict = self.model.get_submodule(FREE)  # type: ignore[assignment]
        if view.owner not in group._modules:
            group._modules[view.owner] = nn.ModuleDict()  # ModuleDict itself refuses the names of its methods
        mine: nn.ModuleDict = group[view.owner]  # type: ignore[assignment]
        if name in mine._modules:
            raise ConflictError(f"'{view.owner}' already keeps a module named '{name}'")
        mine._modules[name] = module
        self._settle(module, self.model)

        def undo() -> None:
            del mine[name]
            if not len(mine):
                del group[view.owner]
            if not len(group):
                del self.model._modules[FREE]

        self.parts.append(
            Part(view.owner, "free", f"{FREE}.{name}", module, undo=undo, switch=lambda on: None)
        )

    def _free_key(self, owner: str, key: str) -> str:
        """`key`, numbered where the plugin did the same in the same place before."""
        return child_name({part.key: part for part in self.of(owner)}, key)

    def add_attention(self, view: ModelView, site: Site, edit: AttentionEdit) -> None:
        self._settle(edit, site.module)
        attention.attach(self.model, site.module, edit, owner=view.owner, rank=view.rank)
        self.parts.append(
            Part(
                view.owner, "attention", self._free_key(view.owner, f"{site.path}.attention"), edit,
                undo=lambda: attention.detach(site.module, view.owner),
                switch=lambda on: attention.enable(site.module, view.owner, on),
            )
        )  # fmt: skip

    def add_prompt(self, view: ModelView, tokens: VirtualTokens) -> None:
        virtual_tokens.check_room(self.model, tokens.length, owner=view.owner)
        self._settle(tokens, self.model)
        virtual_tokens.attach(self.model, tokens, owner=view.owner, rank=view.rank)
        self.parts.append(
            Part(
                view.owner, "prompt", self._free_key(view.owner, "prompt"), tokens,
                undo=lambda: virtual_tokens.detach(self.model, view.owner),
                switch=lambda on: virtual_tokens.enable(self.model, view.owner, on),
            )
        )  # fmt: skip

    def add_call(self, view: ModelView, edit: CallEdit) -> None:
        self._settle(edit, self.model)
        edits = calls.attach(self.model, edit, owner=view.owner)
        key = self._free_key(view.owner, "call")
        self.parts.append(Part(view.owner, "call", key, edit, undo=edits.remove, switch=edits.switch))

    def add_shift(self, view: ModelView, by: int) -> None:
        virtual_tokens.check_room(self.model, by, owner=view.owner)
        virtual_tokens.shift(self.model, by, owner=view.owner)
        self.parts.append(
            Part(
                view.owner, "shift", self._free_key(view.owner, "shift"), nn.Module(),
                undo=lambda: virtual_tokens.detach(self.model, view.owner),
                switch=lambda on: virtual_tokens.enable(self.model, view.owner, on),
            )
        )  # fmt: skip

    def _settle(self, module: nn.Module, near: nn.Module, *, full_precision: bool = False) -> None:
        """Give a new module the mode, device and dtype of the one it stands on, or else of the model (where that one
        holds integers); float32 or more if it asks for that."""
        if module._modules:
            module.train(near.training)
        else:  # most deltas
            module.__dict__["training"] = near.training
        own = _first(module)
        if own is None or own.is_meta:
            return
        weight = _first(near)
        if weight is None or not weight.dtype.is_floating_point:
            weight = _first(self.model)
        if weight is None:
            return
        dtype = own.dtype
        if weight.dtype.is_floating_point:
            dtype = torch.promote_types(own.dtype, weight.dtype) if full_precision else weight.dtype
        if own.device != weight.device or own.dtype != dtype:
            module.to(device=weight.device, dtype=dtype)

    # -- folding -------------------------------------------------------------------------------------------------

    def carriers(self, owners: Iterable[str]) -> list[nn.Module]:
        """The modules that carry deltas of these plugins, each once."""
        wanted = set(owners)
        return list(
            {id(p.place): p.place for p in self.parts if p.owner in wanted and p.place is not None}.values()
        )

    def merged(self) -> list[str]:
        """Plugins that are merged somewhere, and can be unmerged."""
        slots = [slot_of(place) for place in self.carriers({part.owner for part in self.parts})]
        entries = [entry for slot in slots if slot is not None for entry in slot.entries]
        return list(dict.fromkeys(entry.owner for entry in entries if entry.merged))

    def check_fold(self, owner: str) -> None:
        """Raises MergeError where a delta of the plugin does not fold."""
        for part in self.of(owner):
            if part.kind != "delta":
                continue
            if isinstance(part.place, Storage):
                raise MergeError(
                    f"{owner}: {part.path} is quantized, and a delta does not fold into integers exactly"
                )
            if not part.module.can_fold():  # type: ignore[operator]
                raise MergeError(
                    f"{owner}: {type(part.module).__name__} at {part.key} does not fold into the weights"
                )

    def fold(self, owner: str) -> None:
        """Fold the owner's deltas into the weights for good; the changed weights become the owner's tensors.

        Raises:
            MergeError: a delta that does not fold; nothing is changed then.
        """
        self.check_fold(owner)
        deltas = [part for part in self.of(owner) if part.kind == "delta"]
        places = {id(part.place): (part.place, part.path) for part in deltas}
        reason = f"'{owner}' was folded into the weights for good"
        for place, path in places.values():
            assert place is not None
            changed = bake(place, owner)
            if changed:
                self.parts.append(Part(owner, "base", path, place, changed, final=reason))
        self.parts = [part for part in self.parts if part not in deltas]
        for part in self.of(owner):
            if part.kind == "free":  # what the deltas shared: it is in the weights now
                part.undo()
                self.parts.remove(part)

    # -- undoing -------------------------------------------------------------------------------------------------

    def snapshot(self) -> Callable[[], None]:
        """Note what every plugin did so far, before weights are folded and replaced. Returns the way back."""
        parts = list(self.parts)
        slots = [snapshot(place) for place in self.carriers({part.owner for part in parts})]
        free = self.model._modules.get(FREE)
        kept = (
            {}
            if free is None
            else {name: (group, dict(group._modules)) for name, group in free.named_children()}
        )

        def restore() -> None:
            for part in reversed([part for part in self.parts if part not in parts]):
                part.undo()
            for slot in slots:
                slot()
            if free is not None:
                self.model._modules[FREE] = free
                for name, (group, modules) in kept.items():
                    group._modules = modules
                    free._modules[name] = group
            self.parts = parts

        return restore

    def release(self, owner: str) -> None:
        """Let go of the layers that the plugin replaced: their memory is free, and it stays for good."""
        for part in self.of(owner):
            if part.kind == "replaced":
                part.undo = lambda: None
                part.final = f"the layers that {owner} replaced were not kept"

    def check_removable(self, owner: str) -> None:
        """Raises ConflictError where other plugins stand on what this one put there, MergeError where its values, or
        others', were folded into weights that it would take away."""
        for part in self.parts:
            if part.kind == "replaced" and owner in part.covers and part.owner != owner:
                raise MergeError(
                    f"'{owner}' is in the weights that {part.owner} replaced",
                    hint=f"stack.remove('{part.owner}') first",
                )
        for part in self.of(owner):
            if part.final:
                raise MergeError(part.final, hint="load the base model again")
            if part.kind == "base":
                _check_unmerged(part)
                later = self.parts[self.parts.index(part) + 1 :]
                above = next((p for p in later if p.kind == "base" and p.module is part.module
                              and p.final and set(p.parameters) & set(part.parameters)), None)  # fmt: skip
                if above is not None:
                    raise MergeError(
                        f"'{above.owner}' was folded into {part.path or part.key}, which {owner} trained",
                        hint="load the base model again",
                    )
            slot = slot_of(part.module) if part.kind == "replaced" else None
            others = (
                [entry.owner for entry in slot.entries if entry.owner != owner] if slot is not None else []
            )
            if others:
                raise ConflictError(
                    f"'{others[0]}' stands on {part.key}, which {owner} replaced",
                    hint=f"stack.remove('{others[0]}') first",
                )

    def remove(self, owner: str) -> None:
        """Undo everything the plugin did, last first.

        Raises:
            ConflictError, MergeError: see `check_removable`; nothing is changed then.
        """
        self.check_removable(owner)
        for part in reversed(self.of(owner)):
            part.undo()
            self.parts.remove(part)
        if not any(part.kind == "attention" for part in self.parts):
            attention.switch_off(self.model)

    def switch(self, owner: str, on: bool) -> None:
        """Switch the plugin's parts on or off.

        Raises:
            UnsupportedError: the plugin replaced weights, which cannot be switched off.
            MergeError: deltas are merged into weights that it trains, or over it; nothing is changed then.
        """
        parts = self.of(owner)
        if any(part.switch is None for part in parts):
            raise UnsupportedError(
                f"'{owner}' replaced weights of the model, so it cannot be switched off",
                hint=f"stack.remove('{owner}')",
            )
        for part in parts:
            if part.kind == "base":
                _check_unmerged(part)
        done = []
        try:
            for part in parts:
                part.switch(on)  # type: ignore[misc]
                done.append(part)
        except PeftxError:
            for part in done:
                part.switch(not on)  # type: ignore[misc]
            raise


def _carrier(site: Site) -> str:
    """Which carrier a site needs."""
    if site.called:
        return "called"
    if site.read:
        return "read"
    own = kind_of(site.module)
    return "weight" if site.kind == "experts" or (site.kind == "router" and own != "plain") else own


def _check_unmerged(part: Part) -> None:
    """The parameters of a `base` part are exchanged for others: merged deltas would be lost with them."""
    slot = slot_of(part.module)
    if slot is not None and slot.originals:
        merged = next(entry.owner for entry in slot.entries if entry.merged)
        raise MergeError(
            f"'{merged}' is merged into {part.key}, which {part.owner} trains", hint="stack.unmerge() first"
        )


def _first(module: nn.Module) -> Tensor | None:
    """A parameter (else a buffer) of the module; its own before its children's."""
    own = next((p for p in module._parameters.values() if p is not None), None)
    if own is None:
        own = next(module.parameters(), None)
    return own if own is not None else next(module.buffers(), None)
