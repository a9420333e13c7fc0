"""A merged difference into a `lora` of its own, or into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx.composition.registry import Registry
from peftx.errors import MergeError, TargetError
from peftx.interop.importing import entry_of
from peftx.kernel.anatomy.site import LINEAR_KINDS, Site
from peftx.kernel.parts import DeltaPart, swap
from peftx.kernel.targets import Targets
from peftx.merging.factors import Factors
from peftx.merging.sources import Base
from peftx.peft_format import most_common, targets_of
from peftx.stack import Stack

LORA = "lora"


def into_weights(
    model: PreTrainedModel, module: nn.Module, parameter: str, value: Tensor, *, tied: bool
) -> None:
    """Put a weight in the base's place, in its dtype; with `tied` wherever the model has it as well."""
    old = module._parameters[parameter]
    assert old is not None
    new = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=False)
    if tied:
        swap(model, module, {parameter: old}, {parameter: new})
    else:
        module._parameters[parameter] = new


def as_lora(base: Base, factors: Mapping[str, tuple[Site, Factors]], registry: Registry) -> Stack:
    """A stack with one `lora` that adds these.

    Raises:
        MergeError: there is nothing to add. RegistryError: no `lora` is installed.
    """
    if not factors:
        raise MergeError("the adapters add up to nothing")
    plugin = registry.load(LORA)
    every = [site for site in base.stack().anatomy.sites if site.kind in (*LINEAR_KINDS, "embedding")]
    stack = base.stack([(LORA, plugin(**_options(every, factors)))])
    ours = {(site.path, site.parameter, site.rows): pair for site, pair in factors.values()}
    for part in stack.ledger.of(LORA, DeltaPart):
        entry = entry_of(part)
        own: Any = part.module
        rank = own.A.shape[-2]
        found = ours.get((part.path, entry.parameter, entry.rows))
        if found is None:
            continue  # a role of a fused matrix that others of it brought along: its B is 0
        padded = found.padded(rank)
        values = {"A": padded.A, "B": padded.B / own.scale}  # s is 2 without an alpha: this rounds nothing
        # The base's dtype where it says all, else the factors would be rounded before the weights are.
        narrow = {name: value.to(own.A.dtype) for name, value in values.items()}
        exact = all(bool((narrow[name].to(value.dtype) == value).all()) for name, value in values.items())
        for name, value in (narrow if exact else values).items():
            own._parameters[name] = nn.Parameter(value.contiguous())
    return stack


def _options(every: list[Site], factors: Mapping[str, tuple[Site, Factors]]) -> dict[str, Any]:
    """Options of a `lora` with the ranks that the factors have. Where no words tell the roles of a fused matrix apart,
    it takes all of them, at the largest of their ranks."""
    ranks = {key: pair.rank for key, (_, pair) in factors.items()}
    told = _told(every, ranks)
    if told is None:
        largest: dict[str, int] = {}
        for site, pair in factors.values():
            largest[site.path] = max(pair.rank, largest.get(site.path, 0))
        told = _told(every, {site.key: largest[site.path] for site in every if site.path in largest})
    assert told is not None  # whole modules are told by their paths
    return told


def _told(every: list[Site], ranks: Mapping[str, int]) -> dict[str, Any] | None:
    """The options for ranks by sites' keys; None where some of equal rank have no words."""
    usual = most_common(ranks)
    targets = _words(every, set(ranks))
    others = {
        rank: _words(every, {key for key, other in ranks.items() if other == rank})
        for rank in dict.fromkeys(ranks.values())
        if rank != usual
    }
    if targets is None or None in others.values():
        return None
    return {"rank": usual, "targets": targets, "ranks": {words: rank for rank, words in others.items()}}


def _words(every: list[Site], keys: set[str]) -> str | None:
    """What selects these sites and no others: their roles, or those in some layers, or their paths."""
    chosen = [site for site in every if site.key in keys]
    roles = " ".join(sorted({site.role for site in chosen}))
    layers = sorted({site.layer for site in chosen if site.layer is not None})
    depth = 1 + max((site.layer for site in every if site.layer is not None), default=0)
    some = f"{roles} layers={','.join(map(str, layers))}" if layers else roles
    for text in (roles, some, targets_of(list(dict.fromkeys(site.names[-1] for site in chosen)))):
        try:
            found = Targets(text).select(every, layers=depth)
        except TargetError:
            continue  # roles of some architectures are no words
        if {site.key for site in found} == keys:
            return text
    return None
