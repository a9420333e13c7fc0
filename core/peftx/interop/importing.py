"""An adapter of HF PEFT as a stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftx.composition.adapters import (
    TOKENS,
    WEIGHTS,
    Adapter,
    Entry,
    entries,
    plugin_of,
    read_adapter,
)
from peftx.composition.registry import Registry
from peftx.engines.files import naming
from peftx.engines.tensor_files import read_tensors
from peftx.errors import AdapterError
from peftx.kernel.parts import FREE, BasePart, DeltaPart, Part
from peftx.kernel.slots import Entry as Slotted
from peftx.kernel.slots import base_class, slot_of
from peftx.peft_format import INNER, PeftFormat
from peftx.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def import_peft(
    folder: str | Path,
    *,
    model: PreTrainedModel | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    registry: Registry | None = None,
    trust_remote_code: bool = False,
) -> Stack:
    """The stack that an adapter of HF PEFT is: `lora`, `ia3`, ... with the options of its settings, and its numbers.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`. model: the base, or where it lies now; what
            the adapter names if left out.

    Raises:
        RegistryError: no installed plugin computes the method. PeftxError: it has a setting that none honours, a tensor
            too many or too few, or sizes of another model. BundleError: a file is missing or damaged.
    """
    registry = registry or Registry()
    with naming(folder):
        adapter = read_adapter(folder)
        found = entries(adapter, registry)
        base = model if model is not None else adapter.base
        if base is None:
            raise AdapterError(f"'{folder}' does not say which model it is for", hint="name it: --model ID")
        members = {_id(entry, index, found): entry for index, entry in enumerate(found)}
        plugins = [(id, plugin_of(entry, registry)) for id, entry in members.items()]
        stack = Stack(base, plugins, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code)
        fill(stack, adapter, members)
    return stack


def _id(entry: Entry, index: int, found: list[Entry]) -> str:
    """Whole parts of the base may stand twice."""
    return entry.use if [e.use for e in found].index(entry.use) == index else f"{entry.use}-{index}"


def begin_with(stack: Stack, paths: Mapping[str, str | None], registry: Registry) -> None:
    """Put the numbers of adapters into plugins that stand on a model.

    Args:
        paths: id of a plugin -> folder of PEFT; None: it begins as ever.
    """
    owners: dict[str, list[str]] = {}
    for id, path in paths.items():
        if path is not None:
            owners.setdefault(path, []).append(id)
    for path, ids in owners.items():
        adapter = read_adapter(path)
        fill(stack, adapter, dict(zip(ids, entries(adapter, registry), strict=False)))


def fill(stack: Stack, adapter: Adapter, members: Mapping[str, Entry]) -> None:
    """The adapter's numbers into the places of its plugins, all or none.

    Raises:
        PeftxError: names a tensor or a place that has no counterpart, or another size.
    """
    for id, entry in members.items():
        if entry.format is not None:
            names = (*entry.format.tensors.values(), *entry.format.kept.values())
            entry.format.prepare(stack.member(id).plugin, adapter.settings(names))
    saved = read_tensors(adapter.folder / WEIGHTS, links=True)
    left = dict.fromkeys(saved)
    copies: list[tuple[Tensor, Tensor]] = []
    for id, entry in members.items():
        own = _of_base(stack, adapter, id, entry, saved) if entry.format is None else _of_method(
            stack, adapter, id, entry.format, saved
        )  # fmt: skip
        for place, key, value in own:
            if place.shape != value.shape:
                size = _size(saved.get(key, value))
                raise AdapterError(
                    f"{id}: {key} of '{adapter.folder}' is {size}, which does not go with the model's {_size(place)}",
                    hint="it is an adapter of another model",
                )
            left.pop(key, None)
            copies.append((place, value))
    extra = [key for key in left if not _same_as_base(stack, adapter, key, saved[key])]
    if extra:
        raise AdapterError(
            f"'{adapter.folder}': {len(extra)} tensors have no place in the model, e.g. {extra[0]} "
            f"({_size(saved[extra[0]])})",
            hint="it is an adapter of another model, or more than its method: merge it with PEFT",
        )
    with torch.no_grad():
        for place, value in copies:
            place.copy_(value)


Copy = tuple[Tensor, str, Tensor]
"""Place, name in the file, value for the place."""


def _of_method(
    stack: Stack, adapter: Adapter, id: str, format: PeftFormat, saved: Mapping[str, Tensor]
) -> Iterator[Copy]:
    places = adapter.places([*format.tensors.values(), *format.kept.values()])
    for delta in stack.ledger.of(stack.member(id).id, DeltaPart):
        if not format.fused and entry_of(delta).rows is not None:
            raise AdapterError(
                f"{id}: {delta.path} is several matrices in one, of which '{adapter.folder}' has one update, and "
                f"{id} one for each",
                hint="load it with PEFT, and merge it into the base: PeftModel.merge_and_unload",
            )
    for part in stack.ledger.of(stack.member(id).id):
        if isinstance(part, BasePart):  # the head of a classifier, which trains with the first adapter
            for name in part.parameters:
                full = adapter.full.get(f"{part.key}.{name}")
                if full is not None:
                    yield part.module._parameters[name], full, saved[full]  # type: ignore[misc]
        elif isinstance(part, DeltaPart):
            level = places.get(_level(part, adapter, places), {})
            keys: dict[str, str] = {}
            values: dict[str, Tensor] = {}
            own = own_tensors(part.module)
            for name, place in own.items():
                key = level.get(format.tensors.get(name, name))
                if key is not None:
                    keys[name], values[name] = key, _for_part(part, name, saved[key], place, format)
                elif name not in format.own:
                    missing = format.tensors.get(name, name)
                    raise AdapterError(f"{id}: '{adapter.folder}' has no {missing} for {part.path}")
            for name, value in format.read(part.module, values).items():
                yield own[name], keys.get(name, ""), _shaped(value, own[name])
        elif own := own_tensors(part.module):
            keys = {name: format.kept.get(f"{kept_as(part)}.{name}", name) for name in own}
            absent = [key for key in keys.values() if key not in saved]
            if absent:
                raise AdapterError(f"{id}: '{adapter.folder}' has no {absent[0]}")
            for name, value in format.read(part.module, {n: saved[key] for n, key in keys.items()}).items():
                yield own[name], keys[name], _shaped(value, own[name])


def kept_as(part: Part) -> str:
    """The name of what belongs to no module."""
    return part.key.removeprefix(f"{FREE}.")


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer."""
    transient = module._non_persistent_buffers_set
    buffers = {name: t for name, t in module.named_buffers() if name not in transient}
    return dict(module.named_parameters()) | buffers


def _level(part: DeltaPart, adapter: Adapter, places: Mapping[str, object]) -> str:
    """The path under which the file has a part: of several matrices of stacked experts, PEFT wraps one in the other."""
    levels = sorted((p for p in places if p.replace(INNER, "") == part.path), key=len, reverse=True)
    adapted = adapter.settings(()).matrices(part.path)
    wrapped = [n for n in part.place._parameters if f"{part.path}.{n}" in adapted]  # PEFT goes by this order
    if levels and len(levels) != max(1, len(wrapped)):
        raise AdapterError(
            f"'{adapter.folder}' has {len(levels)} updates for {part.path}, and its target_parameters name "
            f"{len(wrapped)} parameters of it"
        )
    at = wrapped.index(entry_of(part).parameter) if wrapped else 0
    return levels[at] if levels else part.path


def _for_part(part: DeltaPart, name: str, value: Tensor, place: Tensor, format: PeftFormat) -> Tensor:
    """What of a tensor in the file belongs to one part: a fused matrix is shared out among its roles, and stacked
    experts lie behind each other."""
    entry, stacked = entry_of(part), experts_of(part)
    if stacked:
        value = unstacked(value, stacked, axis=format.divided.get(name))
    if entry.rows is not None and name in format.divided:
        axis = format.divided[name] + bool(stacked)
        if value.shape[axis] == entry.rows.total:
            value = entry.rows.take(value, axis)
    return _shaped(value, place)


def _shaped(value: Tensor, place: Tensor) -> Tensor:
    """PEFT has a dimension of 1 where a vector will do."""
    vector = value.numel() == place.numel() and value.squeeze().shape == place.squeeze().shape
    return value.reshape(place.shape) if vector else value


def entry_of(part: DeltaPart) -> Slotted:
    """Where the part's delta stands: on which parameter, on which rows of it."""
    slot = slot_of(part.place)
    assert slot is not None
    return next(link for link in slot.links if link.edit is part.module)


def experts_of(part: DeltaPart) -> int:
    """Matrices that are stacked in the parameter of a part; 0 for a matrix alone."""
    weight = part.place._parameters.get(entry_of(part).parameter)
    return len(weight) if weight is not None and weight.ndim == 3 else 0


def bare_parameter(part: DeltaPart) -> str:
    """The name of a matrix whose module is no layer, so that PEFT adapts the parameter (experts, routers); else ""."""
    name = entry_of(part).parameter
    weight = part.place._parameters.get(name)
    layer = issubclass(base_class(part.place), nn.Linear | Conv1D | nn.Embedding)
    return "" if layer or weight is None or weight.ndim < 2 else name


def unstacked(value: Tensor, experts: int, *, axis: int | None) -> Tensor:
    """[E r, in] -> [E, r, in]; with the output's axis first, [out, r E] -> [E, out, r]."""
    if axis is None:
        return value.reshape(experts, -1, value.shape[-1])
    return value.reshape(value.shape[0], -1, experts).permute(2, 0, 1)


def _of_base(
    stack: Stack, adapter: Adapter, id: str, entry: Entry, saved: Mapping[str, Tensor]
) -> Iterator[Copy]:
    """Parameters of the base that the adapter trained as they are."""
    tokens, places = entry.options.get("tokens"), adapter.places([TOKENS])
    for part in stack.ledger.of(stack.member(id).id, BasePart):
        for name in part.parameters:
            parameter = part.module._parameters[name]
            assert parameter is not None
            if tokens:
                key = places[part.key][TOKENS]
                order = torch.tensor(_order(adapter, part.key))
                value = parameter.detach().clone()
                value[order] = saved[key].to(value)
                yield parameter, key, value
                continue
            full = adapter.full.get(f"{part.key}.{name}")
            if full is None:
                raise AdapterError(f"{id}: '{adapter.folder}' has no {part.key}.{name}")
            for key in _shared(stack, adapter, id, f"{part.key}.{name}", saved):
                yield parameter, key, saved[full]
            yield parameter, full, saved[full]


def _shared(stack: Stack, adapter: Adapter, id: str, name: str, saved: Mapping[str, Tensor]) -> list[str]:
    """What the file calls the same parameter elsewhere.

    Raises:
        PeftxError: PEFT trained a copy, and what shares the parameter here stayed as it was.
    """
    everything = dict(stack.model.named_parameters(remove_duplicate=False))
    value, found = saved[adapter.full[name]], []
    tied = adapter.fields.get("ensure_weight_tying") or torch.equal(everything[name].to(value), value)
    for other, parameter in everything.items():
        if other == name or parameter is not everything[name]:
            continue
        held = adapter.full.get(other)
        same = held is not None and torch.equal(saved[held], value)
        if held is not None and same:
            found.append(held)
        elif held is not None or not tied:
            raise AdapterError(
                f"{id}: '{adapter.folder}' has a {name} of its own, which {other} of this model shares, and does not "
                "change that",
                hint="load it with PEFT; adapters with ensure_weight_tying come in",
            )
    return found


def _order(adapter: Adapter, path: str) -> list[int]:
    rows = adapter.fields["trainable_token_indices"]
    if isinstance(rows, dict):
        rows = next(ids for name, ids in rows.items() if path.endswith(name))
    return list(rows)


def _same_as_base(stack: Stack, adapter: Adapter, key: str, value: Tensor) -> bool:
    """A copy of the model's own tensor, as PEFT saves an embedding that it adapts, says nothing."""
    name = next((name for name, held in adapter.full.items() if held == key), None)
    own = dict(stack.model.named_parameters()).get(name or "")
    return own is not None and own.shape == value.shape and torch.equal(own.to(value), value)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
