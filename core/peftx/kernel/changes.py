"""The ways to change a model. Each leaves a part in the ledger, under the plugin's id, that knows how to undo it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftx.errors import ArchitectureError, ConflictError, OptionError, StackError, UnsupportedError
from peftx.kernel import attention, calls, positions, virtual_tokens
from peftx.kernel.anatomy.site import Site
from peftx.kernel.attention import AttentionEdit
from peftx.kernel.call import Call
from peftx.kernel.calls import CallEdit
from peftx.kernel.ledger import Ledger
from peftx.kernel.parts import (
    FREE,
    AttentionPart,
    BasePart,
    CallPart,
    ContextPart,
    DeltaPart,
    FreePart,
    HasTokenizer,
    Part,
    PromptPart,
    ReplacedPart,
    ShiftPart,
    Storage,
    TokenizerPart,
    VocabularyPart,
    configure_for,
    swap,
)
from peftx.kernel.slots import Delta, attach, base_class, kind_of, slot_of, without_fast_path
from peftx.kernel.virtual_tokens import Shift, VirtualTokens
from peftx.kernel.vocabulary import NewLogits, NewRows, scale_of, without


@dataclass(frozen=True)
class Owner:
    """Who changes the model: a plugin's id, and its place in the stack."""

    id: str
    rank: int
    restoring: bool = False
    """A bundle is being loaded: structure only, the tensors come from its file."""


def attach_delta(ledger: Ledger, owner: Owner, site: Site, delta: Delta) -> None:
    """A delta into a site's slot."""
    shared = site.rows is not None or site.kind in ("experts", "block")
    if site.read and site.kind != "linear":
        if site.called:
            raise ArchitectureError(
                f"{owner.id}: a fused kernel may read the packed weight of {site.path} past what stands there",
                hint="leave the layer out of targets, or let the plugin that packs leave it alone",
            )
        raise ArchitectureError(f"{owner.id}: {site.path} is never called, so nothing can act on its output")
    if delta.has_base():
        trained = next((p for p in ledger.all(BasePart) if p.module is site.module), None)
        if trained is not None:
            raise ConflictError(
                f"'{owner.id}' computes {site.path} itself as a frozen layer, and {trained.owner} trains it",
                hint="leave the layer out of one of them",
            )
    _settle(ledger, owner, delta, site.module, full_precision=delta.full_precision)
    attach(
        site.module, delta, owner=owner.id, rank=owner.rank,
        name=f"{owner.id}@{site.role.replace('.', '_')}" if shared else owner.id,
        parameter=site.parameter, rows=site.rows, kind=_carrier(site), bias=site.bias_name,
        transposed=site.transposed,
    )  # fmt: skip
    give_back = without_fast_path(ledger.model, site.path, site.module)
    key = f"{site.path}@{site.role}" if shared else site.path
    ledger.parts.append(DeltaPart(owner.id, key, delta, site.module, site.path, give_back))


def train_base(ledger: Ledger, owner: Owner, site: Site, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Parameters of the base itself (all of the module's without names), through fresh ones in their places: so the
    base's own come back untouched."""
    module = site.module
    own = dict(module.named_parameters(recurse=False))
    chosen = names or tuple(own)
    _check_trainable(ledger, owner, site, own, chosen)
    others = _trained_by_others(ledger, owner.id, module, restoring=owner.restoring)
    part = BasePart(owner.id, site.path, module, ledger.model, chosen)
    for name in chosen:
        if name in others:
            part.original[name] = others[name].original[name]
            continue
        part.original[name] = own[name]
        new = torch.empty_like(own[name], device="meta") if owner.restoring else own[name].detach().clone()
        swap(ledger.model, module, {name: own[name]}, {name: nn.Parameter(new)})
    part.others = lambda part: _trained_by_others(ledger, part.owner, part.module)
    ledger.parts.append(part)
    return [module._parameters[name] for name in chosen]  # type: ignore[misc]


def _check_trainable(
    ledger: Ledger, owner: Owner, site: Site, own: dict[str, nn.Parameter], chosen: tuple[str, ...]
) -> None:
    slot = slot_of(site.module)
    for link in slot.links if slot is not None else ():
        if link.edit.has_base():
            raise ConflictError(
                f"'{owner.id}' trains the base's {site.path}, which {link.owner} computes itself as a frozen layer",
                hint="leave the layer out of one of them",
            )
    if slot is not None and slot.originals:
        raise ConflictError(f"{owner.id}: {site.path} holds merged deltas", hint="stack.unmerge() first")
    others = _trained_by_others(ledger, owner.id, site.module, restoring=owner.restoring)
    twice = {n for p in ledger.of(owner.id, BasePart) if p.module is site.module for n in p.parameters}
    for name in chosen:
        if name not in own:
            raise ArchitectureError(
                f"{owner.id}: {site.path} ({base_class(site.module).__name__}) has no parameter '{name}'",
                hint=f"it has: {', '.join(own) or 'none'}",
            )
        if name in twice:
            raise ConflictError(
                f"'{owner.id}' is to train the base's {site.path} twice",
                hint="name the layer in one of its options alone",
            )
        # Matrices have one trainer, vectors (norms, biases) any number: each sees the updates of the others.
        if name in others and (own[name].ndim > 1 or name not in others[name].original):
            raise ConflictError(
                f"'{owner.id}' and '{others[name].owner}' both train the base's {site.path}",
                hint="leave it out of the targets of one of them, or keep one of the two",
            )


def _trained_by_others(
    ledger: Ledger, owner: str, module: nn.Module, *, restoring: bool = False
) -> dict[str, BasePart]:
    """Name -> the part of another plugin that trains this parameter of the module."""
    # What was folded for good trains no more: a bundle that is read brings it before those who train beside it.
    parts = (
        p
        for p in ledger.all(BasePart)
        if p.module is module and p.owner != owner and not (restoring and p.final)
    )
    return {name: part for part in parts for name in part.parameters}


def replace_module(ledger: Ledger, owner: Owner, site: Site, module: nn.Module) -> None:
    """A storage module in a site's place."""
    if not isinstance(module, Storage):
        raise UnsupportedError(f"{type(module).__name__} has no geometry(), so no bundle could rebuild it")
    if site.rows is not None:
        raise UnsupportedError(
            f"{owner.id}: {site.role} is a part of {site.path}; replace the whole matrix",
            hint="model.linears(targets, whole=True)",
        )
    old = site.module
    if (slot := slot_of(old)) is not None:
        owners = sorted({link.owner for link in slot.links})
        raise ConflictError(
            f"{owner.id}: {site.path} carries deltas of {', '.join(owners)}",
            hint="merge them for good first: stack.merge(keep=False)",
        )
    parent, _, name = site.path.rpartition(".")
    holder = ledger.model.get_submodule(parent)
    setattr(holder, name, module.train(old.training))  # type: ignore[attr-defined]
    site.module = module
    inside: list[Part] = [
        part for part in ledger.parts if isinstance(part, BasePart | ReplacedPart) and part.module is old
    ]
    ledger.parts = [part for part in ledger.parts if part not in inside]
    ledger.parts.append(ReplacedPart(owner.id, site.path, module, module.geometry(), holder, old, inside))


def keep_module(
    ledger: Ledger, owner: Owner, name: str, module: nn.Module, *, full_precision: bool = False
) -> None:
    """A module of the plugin's own that stands nowhere in particular."""
    model = ledger.model
    if FREE not in model._modules:
        model.add_module(FREE, nn.ModuleDict().train(model.training))
    group: nn.ModuleDict = model.get_submodule(FREE)  # type: ignore[assignment]
    own = nn.ModuleDict().train(model.training)
    # Past ModuleDict itself, which refuses the names of its methods.
    mine: nn.ModuleDict = group._modules.setdefault(owner.id, own)  # type: ignore[assignment]
    if name in mine._modules:
        raise ConflictError(f"'{owner.id}' already keeps a module named '{name}'")
    mine._modules[name] = module
    _settle(ledger, owner, module, model, full_precision=full_precision)
    ledger.parts.append(FreePart(owner.id, f"{FREE}.{name}", module, model, name))


def edit_attention(ledger: Ledger, owner: Owner, site: Site, edit: AttentionEdit) -> None:
    """An edit of one layer's attention."""
    _settle(ledger, owner, edit, site.module)
    attention.attach(ledger.model, site.module, edit, owner=owner.id, rank=owner.rank)
    _note(ledger, AttentionPart(owner.id, f"{site.path}.attention", edit, site.module))


def put_before(ledger: Ledger, owner: Owner, edit: VirtualTokens | Shift) -> None:
    """Soft tokens in front of the input, or positions that count from further on."""
    tokens = isinstance(edit, VirtualTokens)
    positions.check_room(ledger.model, edit.length if tokens else edit.by, owner=owner.id)
    _settle(ledger, owner, edit, ledger.model)
    virtual_tokens.attach(ledger.model, edit, owner=owner.id, rank=owner.rank)
    kind = PromptPart if tokens else ShiftPart
    _note(ledger, kind(owner.id, "prompt" if tokens else "shift", edit, ledger.model))


def edit_calls(ledger: Ledger, owner: Owner, edit: CallEdit) -> None:
    """An edit around every call of the model."""
    _settle(ledger, owner, edit, ledger.model)
    calls.attach(ledger.model, edit, owner=owner.id, rank=owner.rank)
    _note(ledger, CallPart(owner.id, "call", edit, ledger.model))


def call_context(ledger: Ledger, owner: Owner) -> Call:
    """What the model is called on, for the plugin's deltas and edits."""
    known = calls.call_of(ledger.model)
    if known is not None and ledger.of(owner.id, ContextPart):
        return known
    edit = CallEdit().train(ledger.model.training)
    found = calls.attach(ledger.model, edit, owner=owner.id, rank=owner.rank)
    _note(ledger, ContextPart(owner.id, "context", edit, ledger.model))
    return found


def add_tokens(
    ledger: Ledger,
    owner: Owner,
    holder: HasTokenizer,
    sites: tuple[Site, Site | None],
    tokens: Sequence[str],
    init: Tensor | None,
) -> NewRows:
    """New tokens in the tokenizer, with rows of their own in embedding and head; see `ModelView.vocabulary`."""
    model, before = ledger.model, holder.given_tokenizer
    if before is None:
        raise StackError(
            f"{owner.id}: new tokens need a tokenizer", hint="Stack(model, plugins, tokenizer=...)"
        )
    known = int(model.config.get_text_config().vocab_size)
    tokenizer = copy.deepcopy(before)
    there = [token for token in tokens if token in before.get_vocab()]
    if there and not owner.restoring:
        raise OptionError(f"{owner.id}: {there[0]!r} is a token already", hint="add only what is new")
    pieces = [before(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens(list(tokens))
    ids = tuple(int(id) for id in tokenizer.convert_tokens_to_ids(list(tokens)))
    embedding, head = sites
    rows = NewRows(ids, embedding.out_features, scale=scale_of(embedding.module))
    tied = head is not None and head.module._parameters["weight"] is embedding.module._parameters["weight"]
    logits = None if head is None else NewLogits(
        ids, head.out_features, rows=rows if tied else None, width=head.in_features
    )  # fmt: skip
    if not owner.restoring:
        for delta, site in ((rows, embedding), (logits, head)):
            if site is None or delta is None or (delta is logits and tied) or site.weight.is_meta:
                continue
            with torch.no_grad():
                own = site.weight
                means = torch.stack([own[i].mean(0) if i else own.mean(0) for i in pieces])
                delta.R.copy_(means if init is None or delta is logits else init)
    attach_delta(ledger, owner, embedding, rows)
    if logits is not None and head is not None:
        attach_delta(ledger, owner, head, logits)
    holder.given_tokenizer = tokenizer
    plain = without(before, tokens) if there else before  # a bundle's tokenizer knows them
    part = VocabularyPart(
        owner.id, "vocabulary", nn.Module(), holder, plain, model, tuple(tokens), ids, known
    )
    configure_for(model, max(known, max(ids) + 1))
    _note(ledger, part)
    return rows


def other_tokenizer(ledger: Ledger, owner: Owner, holder: HasTokenizer, make: Callable[[Any], Any]) -> Any:
    """Another tokenizer in the place of the stack's; see `ModelView.tokenizer`."""
    now, final = holder.given_tokenizer, ""
    if now is None:
        raise StackError(f"{owner.id}: a tokenizer is needed", hint="Stack(model, plugins, tokenizer=...)")
    before = now
    if owner.restoring and (before := holder.tokenizer_before) is None:
        final = "its bundle holds the tokenizer that it made, and nobody gave the base's"
    holder.given_tokenizer = make(now)
    _note(ledger, TokenizerPart(owner.id, "tokenizer", nn.Module(), holder, before, final=final))
    return holder.given_tokenizer


def _note(ledger: Ledger, part: Part) -> None:
    part.key = ledger.free_key(part.owner, part.key)
    ledger.parts.append(part)


def _settle(
    ledger: Ledger, owner: Owner, module: nn.Module, near: nn.Module, *, full_precision: bool = False
) -> None:
    """Give a new module the mode, device and dtype of the one it stands on, or else of the model (where that one holds
    integers); float32 or more if it asks for that."""
    if module._modules:
        module.train(near.training)
    else:  # most deltas
        module.__dict__["training"] = near.training
    own = _first(module)
    if own is None or own.is_meta:
        return
    weight = _first(near)
    if weight is None or not weight.dtype.is_floating_point:
        weight = _first(ledger.model)
    if weight is None:
        return
    dtype = own.dtype
    if weight.dtype.is_floating_point:
        dtype = torch.promote_types(own.dtype, weight.dtype) if full_precision else weight.dtype
    # A bundle's compressed weights come after the deltas on them: these keep the tables that no file holds.
    device = own.device if weight.is_meta and owner.restoring else weight.device
    parts = (own, *module.parameters()) if module._modules else (own,)  # which need not be made alike
    if any(part.device != device or part.dtype != dtype for part in parts):
        module.to(device=device, dtype=dtype)


def _first(module: nn.Module) -> Tensor | None:
    """A parameter (else a buffer) of the module; its own before its children's."""
    own = next((p for p in module._parameters.values() if p is not None), None)
    if own is None:
        own = next(module.parameters(), None)
    return own if own is not None else next(module.buffers(), None)


def _carrier(site: Site) -> str:
    """Which carrier a site needs."""
    if site.called:
        return "called"
    if site.read:
        return "read"
    own = kind_of(site.module)
    return "weight" if site.kind == "experts" or (site.kind == "router" and own != "plain") else own
