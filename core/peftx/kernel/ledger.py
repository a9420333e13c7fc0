"""What every plugin of a stack did to the model, in order; how it is taken back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, overload
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx.errors import ConflictError, MergeError, PeftxError
from peftx.kernel import attention
from peftx.kernel.chain import own_name, owners_of
from peftx.kernel.parts import (
    FREE,
    AttentionPart,
    BasePart,
    ContextPart,
    DeltaPart,
    FreePart,
    Part,
    ReplacedPart,
    VocabularyPart,
    takes_no_fold,
)
from peftx.kernel.slots import bake, slot_of, snapshot

P = TypeVar("P", bound=Part)
AGAIN = "load the base model again"
_LEDGERS: WeakKeyDictionary[nn.Module, weakref.ref[Ledger]] = WeakKeyDictionary()
"""The ledger of the stack that a model stands in now."""


def carried(model: nn.Module, *, trained: bool = True) -> list[str]:
    """Plugins that stand on the model: those with modules of their own on it, whatever stack put them there, and (with
    `trained`) all of a stack that is still in use."""
    found = {owner for module in model.modules() for owner in owners_of(module)}
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

    @overload
    def of(self, owner: str) -> list[Part]: ...
    @overload
    def of(self, owner: str, kind: type[P]) -> list[P]: ...
    def of(self, owner: str, kind: type[Any] = Part) -> list[Any]:
        """The owner's parts, or those of a kind."""
        return [part for part in self.parts if part.owner == owner and isinstance(part, kind)]

    def all(self, kind: type[P]) -> list[P]:
        """Everybody's parts of a kind."""
        return [part for part in self.parts if isinstance(part, kind)]

    def tensors(self, owner: str) -> dict[str, Tensor]:
        """Everything that a bundle must hold for one plugin."""
        return {name: tensor for part in self.of(owner) for name, tensor in part.tensors().items()}

    def trained(self, *, but: str = "") -> dict[str, Tensor]:
        """All that plugins train, and what they keep beside it (places of sparse entries), each tensor once, by owner
        and name.

        Args:
            but: an owner that is left out.
        """
        parts = [part for part in self.parts if part.trains and part.owner != but]
        found = {f"{part.owner}/{name}": x for part in parts for name, x in part.tensors().items()}
        return dict({id(x): (name, x) for name, x in found.items()}.values())

    def parameters(self, owner: str) -> Iterator[nn.Parameter]:
        """What the plugin trains (whether or not it is frozen at the moment), each once."""
        seen: set[int] = set()
        for part in self.of(owner):
            if not part.trains:
                continue
            for _, module, leaf in part.places():
                parameter = module._parameters.get(leaf)
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def base_parameters(self) -> int:
        """See `Stack.base_parameters`."""
        added = [part for part in self.parts if not isinstance(part, BasePart)]
        own = {id(tensor) for part in added for tensor in part.tensors().values()}
        count = sum(p.numel() for p in self.model.parameters() if id(p) not in own)
        replaced = (part.geometry for part in self.all(ReplacedPart))
        return count + sum(g["out_features"] * (g["in_features"] + g.get("bias", False)) for g in replaced)

    def free_key(self, owner: str, key: str) -> str:
        """`key`, numbered where the plugin did the same in the same place before."""
        return own_name({part.key: part for part in self.of(owner)}, key)

    # -- folding -------------------------------------------------------------------------------------------------

    def carriers(self, owners: Iterable[str]) -> list[nn.Module]:
        """The modules that carry deltas of these plugins, each once."""
        wanted = set(owners)
        return list({id(p.place): p.place for p in self.all(DeltaPart) if p.owner in wanted}.values())

    def merged(self) -> list[str]:
        """Plugins that are merged somewhere, and can be unmerged."""
        slots = [slot_of(place) for place in self.carriers({part.owner for part in self.parts})]
        links = [link for slot in slots if slot is not None for link in slot.links]
        return list(dict.fromkeys(link.owner for link in links if link.merged))

    def check_fold(self, owner: str) -> None:
        """Raises MergeError where a delta of the plugin does not fold."""
        for part in self.of(owner, DeltaPart):
            if takes_no_fold(part.place):
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
        deltas = self.of(owner, DeltaPart)
        places = {id(part.place): (part.place, part.path) for part in deltas}
        reason = f"'{owner}' was folded into the weights for good"
        for place, path in places.values():
            changed = bake(place, owner)
            if changed:
                folded = BasePart(owner, path, place, self.model, changed, final=reason)
                narrow = next((p for p in self.all(ReplacedPart) if p.module is place), None)
                (self.parts if narrow is None else narrow.inside).append(folded)
        self.parts = [part for part in self.parts if part not in deltas]
        for part in self.of(owner, FreePart):  # what the deltas shared: it is in the weights now
            part.undo()
            self.parts.remove(part)

    def hush(self, owner: str) -> None:
        """Let the owner hear no more calls: what it had to say is in the weights."""
        for part in self.of(owner, ContextPart):
            part.undo()
            self.parts.remove(part)

    # -- undoing -------------------------------------------------------------------------------------------------

    def snapshot(self) -> Callable[[], None]:
        """Note what every plugin did so far, before weights are folded and replaced. Returns the way back."""
        parts = list(self.parts)
        inside = {part: list(part.inside) for part in self.all(ReplacedPart)}
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
            for part, before in inside.items():
                part.inside[:] = before

        return restore

    def release(self, owner: str) -> None:
        """Let go of the layers that the plugin replaced: their memory is free, and it stays for good."""
        for part in self.of(owner, ReplacedPart):
            part.old, part.lost = None, part.covers
            part.inside.clear()
            part.final = f"the layers that {owner} replaced were not kept"

    def check_removable(self, owner: str) -> None:
        """Raises ConflictError where other plugins stand on what this one put there, MergeError where its values, or
        others', were folded into weights that it would take away."""
        for replaced in self.all(ReplacedPart):
            if owner in replaced.covers and replaced.owner != owner:
                raise MergeError(
                    f"'{owner}' is in the weights that {replaced.owner} replaced",
                    hint=AGAIN if replaced.final else f"stack.remove('{replaced.owner}') first",
                )
        for part in self.of(owner):
            if part.final:
                raise MergeError(part.final, hint=AGAIN)
        for trained in self.of(owner, BasePart):
            trained.check_unmerged()
            later_ones = self.parts[self.parts.index(trained) + 1 :]
            for later in (p for p in later_ones if isinstance(p, BasePart) and p.module is trained.module):
                if later.final and set(later.parameters) & set(trained.parameters):
                    raise MergeError(
                        f"'{later.owner}' was folded into {trained.key}, which {owner} trained",
                        hint=AGAIN,
                    )
        for added in self.of(owner, VocabularyPart):
            above = [
                part.owner
                for part in self.parts[self.parts.index(added) :]
                if isinstance(part, VocabularyPart)
            ]
            if (other := next((id for id in above if id != owner), None)) is not None:
                raise ConflictError(
                    f"'{other}' added tokens behind those of '{owner}'", hint=f"stack.remove('{other}') first"
                )
        for replaced in self.of(owner, ReplacedPart):
            slot = slot_of(replaced.module)
            others = [link.owner for link in slot.links if link.owner != owner] if slot is not None else []
            if others:
                raise ConflictError(
                    f"'{others[0]}' stands on {replaced.key}, which {owner} replaced",
                    hint=f"stack.remove('{others[0]}') first",
                )

    def remove(self, owner: str) -> None:
        """Undo everything the plugin did, last first.

        Raises:
            ConflictError, MergeError: see `check_removable`; nothing is changed then.
        """
        self.check_removable(owner)
        for part in reversed(self.of(owner)):
            self._take_back(part)
            self.parts.remove(part)
        if not self.all(AttentionPart):
            attention.switch_off(self.model)

    def _take_back(self, part: Part) -> None:
        part.undo()
        if isinstance(part, ReplacedPart):
            self.parts = [each for each in part.inside if each.module is part.old] + self.parts

    def switch(self, owner: str, on: bool) -> None:
        """Switch the plugin's parts on or off.

        Raises:
            UnsupportedError: the plugin replaced weights, which cannot be switched off.
            MergeError: deltas are merged into weights that it trains, or over it; nothing is changed then.
        """
        parts = self.of(owner)
        for part in parts:
            part.check_switch()
        done = []
        try:
            for part in parts:
                part.switch(on)
                done.append(part)
        except PeftxError:
            for part in done:
                part.switch(not on)
            raise
