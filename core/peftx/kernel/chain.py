"""What several plugins put in one place of a model: in stack order, each switched on or off, all of it children of the
module that carries it, so that it trains, moves and is saved with the model.

Every place of edits is such a chain: the slots of modules, the attention of a layer, the model's input, its calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

from torch import nn

CHILD = "peftx"
"""Names of child modules that hold what plugins put there are this, or begin with it and an underscore."""

E = TypeVar("E", bound=nn.Module)


@dataclass(eq=False)
class Link(Generic[E]):
    """One edit of a chain. `rank` is the plugin's place in the stack, `name` the edit's among the children."""

    name: str
    owner: str
    rank: int
    edit: E
    enabled: bool = True


class Chain(Generic[E]):
    """Edits in one place.

    Args:
        group: name of the child of the carrying module that holds them.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self.links: list[Link[E]] = []
        self.active: tuple[E, ...] = ()

    def add(self, host: nn.Module, link: Link[E]) -> None:
        """Put an edit in, behind all whose plugins stand before its own."""
        if self.group not in host._modules:
            children = nn.ModuleDict()
            children.__dict__["training"] = host.training
            host._modules[self.group] = children
        place = next((i for i, other in enumerate(self.links) if other.rank > link.rank), len(self.links))
        self.links.insert(place, link)
        # Not through ModuleDict, which refuses `half`, `type` and other names of its methods. In the order of the
        # links, so that parameters keep theirs, by which an optimizer's state goes, when a plugin is built anew.
        host._modules[self.group]._modules = {each.name: each.edit for each in self.links}  # type: ignore[union-attr]
        self.rebuild()

    def append(self, host: nn.Module, edit: E, owner: str, rank: int) -> None:
        """`add` under the owner's own name, numbered where it has put something there before."""
        taken: Mapping[str, object] = children_of(host, self.group)
        self.add(host, Link(own_name(taken, owner), owner, rank, edit))

    def drop(self, host: nn.Module, owner: str) -> bool:
        """Take all of the owner's edits out. Is the chain empty now: then its children are gone too."""
        children = children_of(host, self.group)
        for link in [link for link in self.links if link.owner == owner]:
            self.links.remove(link)
            del children[link.name]
        self.rebuild()
        if not self.links:
            host._modules.pop(self.group, None)
        return not self.links

    def switch(self, owner: str, on: bool) -> None:
        """Switch the owner's edits on or off."""
        for link in self.links:
            if link.owner == owner:
                link.enabled = on
        self.rebuild()

    def rebuild(self) -> None:
        """Settle what runs; called at every change, so that a call decides nothing."""
        self.active = tuple(link.edit for link in self.links if link.enabled)


def children_of(host: nn.Module, group: str) -> dict[str, nn.Module | None]:
    """What a module holds under this name of ours."""
    held = host._modules.get(group)
    return held._modules if held is not None else {}


def own_name(taken: Mapping[str, object], owner: str) -> str:
    """The owner's own name for what it attaches, numbered where it attached there before: `lora`, `lora@2`."""
    return owner if owner not in taken else next(n for i in count(2) if (n := f"{owner}@{i}") not in taken)


def owners_of(host: nn.Module) -> set[str]:
    """Plugins that have put something on this very module."""
    groups = (group for name, group in host._modules.items() if group is not None and is_ours(name))
    return {name.partition("@")[0] for group in groups for name in group._modules}


def is_ours(name: str) -> bool:
    """Whether a dotted name leads into something that a plugin put on the model."""
    return CHILD in name and any(part == CHILD or part.startswith(f"{CHILD}_") for part in name.split("."))
