"""What one plugin did in one place: its tensors, how to switch it off, how to take it away.

Every way to change a model has a kind of part of its own, which knows how to undo itself; the ledger keeps the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx.errors import MergeError, UnsupportedError
from peftx.kernel import attention, calls, virtual_tokens
from peftx.kernel.chain import CHILD
from peftx.kernel.slots import detach, enable, follow, kind_of, slot_of

FREE = "peftx_parts"
"""Name of the model's child that holds modules which stand nowhere in particular."""


@runtime_checkable
class Storage(Protocol):
    """A module that can stand in another one's place and be rebuilt from a bundle."""

    def geometry(self) -> dict[str, Any]:
        """JSON-able keyword arguments of the constructor, which then gives the same module with empty tensors."""


def takes_no_fold(module: nn.Module) -> bool:
    """Is it storage whose numbers are packed, so that no delta folds into them; a linear layer that is only narrower
    is none."""
    return isinstance(module, Storage) and kind_of(module) != "plain"


@dataclass(eq=False)
class Part:
    """One thing that one plugin did in one place."""

    what: ClassVar[str]
    """A word for it, as tables show it."""
    trains: ClassVar[bool] = True
    """Are its parameters what the plugin trains."""

    owner: str
    key: str
    """Prefix of its tensors' names in the plugin's file: the module's path (and the role where several share it)."""
    module: nn.Module
    """What it put there: the delta, the edit, the new module; or the module whose own parameters train."""
    final: str = field(default="", kw_only=True)
    """Why it cannot be undone, if it cannot."""

    def places(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(name in the plugin's file, module, attribute) of every parameter and persistent buffer."""
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

    def undo(self) -> None:
        """Take it away; the base is as it was."""
        raise NotImplementedError

    def check_switch(self) -> None:
        """Raises UnsupportedError, MergeError where it cannot be switched off and on now."""

    def switch(self, on: bool) -> None:
        """Put it in or out of effect."""
        raise NotImplementedError


@dataclass(eq=False)
class DeltaPart(Part):
    """A delta in the slot of the module `place` at `path`."""

    what: ClassVar[str] = "delta"

    place: nn.Module
    path: str
    give_back: Callable[[], None]
    """Undoes what had to be changed around the module."""

    def undo(self) -> None:
        detach(self.place, self.owner)
        self.give_back()

    def switch(self, on: bool) -> None:
        enable(self.place, self.owner, on)


@dataclass(eq=False)
class EditPart(Part):
    """An edit in one of the chains that hang at the model itself."""

    chain: ClassVar[ModuleType]
    """Its module, which has `detach` and `enable`."""
    host: nn.Module

    def undo(self) -> None:
        self.chain.detach(self.host, self.owner)

    def switch(self, on: bool) -> None:
        self.chain.enable(self.host, self.owner, on)


class AttentionPart(EditPart):
    """An edit of the attention of one layer."""

    what: ClassVar[str] = "attention"
    chain: ClassVar[ModuleType] = attention


class PromptPart(EditPart):
    """Soft tokens in front of the input."""

    what: ClassVar[str] = "soft tokens"
    chain: ClassVar[ModuleType] = virtual_tokens


class ShiftPart(EditPart):
    """Positions that count from further on; it has no tensors."""

    what: ClassVar[str] = "positions"
    chain: ClassVar[ModuleType] = virtual_tokens


class ContextPart(EditPart):
    """The plugin asks what the model is called on; nothing is changed by it."""

    what: ClassVar[str] = "context"
    chain: ClassVar[ModuleType] = calls


class CallPart(EditPart):
    """An edit around the calls of the whole model."""

    what: ClassVar[str] = "call"
    chain: ClassVar[ModuleType] = calls


class HasTokenizer(Protocol):
    """A stack, as far as tokens concern it."""

    given_tokenizer: Any
    tokenizer_before: Any
    """The base's, where a bundle that has another one was loaded; None elsewhere."""


@dataclass(eq=False)
class TokenizerPart(Part):
    """Another tokenizer in the place of the stack's."""

    what: ClassVar[str] = "tokenizer"
    trains: ClassVar[bool] = False

    holder: HasTokenizer
    before: Any

    def undo(self) -> None:
        self.holder.given_tokenizer = self.before

    def switch(self, on: bool) -> None:
        """Whoever has written a text down needs its ids to stay."""


@dataclass(eq=False)
class VocabularyPart(TokenizerPart):
    """Tokens that a plugin added: to the tokenizer, and to the number that the model is configured for. Their rows are
    deltas of embedding and head, and these are what is switched."""

    what: ClassVar[str] = "vocabulary"

    model: PreTrainedModel
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    known: int
    """Tokens that the model was configured for."""

    def undo(self) -> None:
        super().undo()
        configure_for(self.model, self.known)


def configure_for(model: PreTrainedModel, tokens: int) -> None:
    """Let a model's losses and checks count so many tokens."""
    model.config.get_text_config().vocab_size = tokens
    if "vocab_size" in vars(model):
        model.vocab_size = tokens


@dataclass(eq=False)
class FreePart(Part):
    """A module that stands nowhere in particular, in `model.peftx_parts`."""

    what: ClassVar[str] = "shared"

    model: PreTrainedModel
    name: str

    def undo(self) -> None:
        group: nn.ModuleDict = self.model.get_submodule(FREE)  # type: ignore[assignment]
        mine: nn.ModuleDict = group[self.owner]  # type: ignore[assignment]
        del mine[self.name]
        if not len(mine):
            del group[self.owner]
        if not len(group):
            del self.model._modules[FREE]

    def switch(self, on: bool) -> None:
        """It does nothing by itself."""


@dataclass(eq=False)
class BasePart(Part):
    """Parameters of the base itself that train: `module` got others in their stead."""

    what: ClassVar[str] = "base"

    model: PreTrainedModel
    parameters: tuple[str, ...]
    path: str = ""
    original: dict[str, nn.Parameter] = field(default_factory=dict)
    """The base's own, which stand aside and come back."""
    others: Callable[[BasePart], dict[str, BasePart]] = lambda part: {}
    """Name -> the part of another plugin that trains this parameter of the module too."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    """Entries that train, bool, of parameters of which not all do."""
    on: bool = True
    _aside: dict[str, nn.Parameter] = field(default_factory=dict)
    """The trained ones, while it is switched off."""
    put_back: Callable[[], None] | None = None
    """Of weights that a bundle brought in for good."""

    def places(self) -> Iterator[tuple[str, nn.Module, str]]:
        for name in self.parameters:
            yield f"{self.key}.{name}", self.module, name

    def undo(self) -> None:
        if self.put_back is not None:
            self.put_back()
            return
        kept = self.others(self)
        mine = {name: old for name, old in self.original.items() if name not in kept}
        swap(self.model, self.module, {name: self.module._parameters[name] for name in mine}, mine)

    def mask_gradients(self) -> None:
        """Zero those of entries that do not train."""
        for name, mask in self.masks.items():
            parameter = self.module._parameters[name]
            if parameter is not None and parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0)

    @torch.no_grad()
    def hold(self) -> None:
        """Entries that do not train as they were, to the bit: a weight decay needs no gradient."""
        for name, mask in self.masks.items():
            parameter = self.module._parameters[name]
            if parameter is not None:
                parameter.copy_(torch.where(mask, parameter, self.original[name].to(parameter)))

    def check_switch(self) -> None:
        if self.final:
            raise MergeError(self.final, hint="load the base model again")
        self.check_unmerged()

    def check_unmerged(self) -> None:
        """Raises MergeError where merged deltas would be lost with the parameters that are exchanged."""
        slot = slot_of(self.module)
        if slot is not None and slot.originals:
            merged = next(link.owner for link in slot.links if link.merged)
            raise MergeError(
                f"'{merged}' is merged into {self.key}, which {self.owner} trains",
                hint="stack.unmerge() first",
            )

    def switch(self, on: bool) -> None:
        self.on = on
        others = self.others(self)
        for name, own in self.original.items():
            now = self.module._parameters[name]
            assert now is not None
            if now is not own:
                self._aside[name] = now
            if name not in others or not others[name].on:
                swap(self.model, self.module, {name: now}, {name: self._aside.get(name, own) if on else own})


@dataclass(eq=False)
class ReplacedPart(Part):
    """A module in another one's place."""

    what: ClassVar[str] = "packed"
    trains: ClassVar[bool] = False

    geometry: dict[str, Any]
    """How to build it again."""
    holder: nn.Module
    old: nn.Module | None
    """The one that stood there; None once it was let go."""
    inside: list[Part]
    """What was trained in the old one, or folded into it, and the old one itself where a plugin had put it there: they
    are part of the new module's tensors now. Also what was folded into the new one since."""
    lost: frozenset[str] = frozenset()
    """Owners of what was inside, once that was let go."""

    @property
    def covers(self) -> frozenset[str]:
        """Plugins whose values are part of the new module's tensors."""
        deeper = (part.covers for part in self.inside if isinstance(part, ReplacedPart))
        return self.lost.union((part.owner for part in self.inside), *deeper)

    def undo(self) -> None:
        if self.old is not None:
            setattr(self.holder, self.key.rpartition(".")[2], self.old)

    def check_switch(self) -> None:
        raise UnsupportedError(
            f"'{self.owner}' replaced weights of the model, so it cannot be switched off",
            hint=f"stack.remove('{self.owner}')",
        )


def swap(
    model: PreTrainedModel, module: nn.Module, old: dict[str, Any], new: dict[str, nn.Parameter]
) -> None:
    """Exchange parameters of a module, and wherever they are tied."""
    for name, parameter in new.items():
        follow(parameter, old[name])
        tied = [(m, n) for m in model.modules() for n, p in m._parameters.items() if p is old[name]]
        for owner_module, owner_name in tied or [(module, name)]:
            owner_module._parameters[owner_name] = parameter


def hollowed(model: PreTrainedModel, module: nn.Module, names: Sequence[str]) -> Callable[[], None]:
    """Empty these parameters, wherever they are tied; the inverse."""
    own = dict(module._parameters)
    new = {name: nn.Parameter(hollow(own[name]), requires_grad=False) for name in names}
    module._parameters.update({name: new[name] for name in names if own[name] is None})  # a bias that is new
    there = [name for name in names if own[name] is not None]
    swap(model, module, own, {name: new[name] for name in there})

    def undo() -> None:
        swap(model, module, new, {name: own[name] for name in there})  # type: ignore[misc]
        module._parameters.update(own)

    return undo


def hollow(tensor: Tensor | None) -> Tensor:
    """Shape and dtype of a tensor that is to be filled; empty where a bias is new."""
    return torch.empty(0, device="meta") if tensor is None else torch.empty_like(tensor, device="meta")
