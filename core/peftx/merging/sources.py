"""What adapters add to the weights of a base that they share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftx.composition.adapters import is_adapter, read_adapter
from peftx.composition.registry import Registry
from peftx.engines.bundle.manifest import MANIFEST, Manifest, read_manifest
from peftx.engines.bundle.surroundings import cast_buffers, generation_of
from peftx.engines.files import sha256
from peftx.engines.models import load_model, tokenizer_digest
from peftx.errors import BundleError, MergeError, UsageError
from peftx.kernel.anatomy.site import Site
from peftx.kernel.members import Member
from peftx.kernel.parts import BasePart, ContextPart, DeltaPart, FreePart
from peftx.kernel.plugin import Claim
from peftx.kernel.slots import Entry, check_folds, fold_into, slot_of
from peftx.loading import load
from peftx.merging.factors import Factors
from peftx.sharing import located
from peftx.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WAY_OUT = "take it off and save the rest: peftx.load(path), stack.remove('{}'), stack.save(path)"


@dataclass
class Base:
    """The model that the adapters were made for, without any of them."""

    model: PreTrainedModel
    id: str
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_digest: str | None
    """Of the tokenizer that lies beside the model; None of a model that was given."""

    def stack(self, plugins: Sequence[object] = ()) -> Stack:
        """The base with these plugins on it, as if it had been loaded for them."""
        stack = Stack(self.model, plugins, tokenizer=self.tokenizer)  # type: ignore[arg-type]
        stack.base_id, stack.tokenizer_of_base = self.id, self.tokenizer_digest
        return stack


@dataclass
class Source:
    """One adapter, off the model: its deltas, and what it trained of the base.

    Attributes:
        name: as it was given. weight: w. digest: of its numbers, so that their order does not matter.
    """

    name: str
    weight: float
    digest: str
    deltas: dict[str, list[Entry]] = field(default_factory=dict)
    """Path of a module -> what stands on it, from the inside out."""
    trained: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(path of a module, parameter) -> its value; of one that is tied, under its first name."""

    def paths(self) -> list[str]:
        """The modules that it changes."""
        return [*self.deltas, *(path for path, _ in self.trained)]

    def parameters(self, path: str) -> list[str]:
        """The matrices and vectors of a module that the adapter changes; not the biases that its deltas may change."""
        own = [entry.parameter for entry in self.deltas.get(path, ())]
        return list(dict.fromkeys([*own, *(name for at, name in self.trained if at == path)]))

    def not_low_rank(self, path: str, parameter: str) -> str:
        """Who changes a matrix by anything but factors; empty if nobody."""
        if (path, parameter) in self.trained:
            return "what it trained of the base"
        entries = [entry for entry in self.deltas.get(path, ()) if entry.parameter == parameter]
        return next((entry.owner for entry in entries if entry.edit.low_rank() is None), "")

    def factors(self, path: str, site: Site, dtype: torch.dtype) -> list[Factors]:
        """Those of a site's own rows, where `not_low_rank` names nobody; several deltas may stand there."""
        found = []
        for entry in self.deltas.get(path, ()):
            if entry.parameter == site.parameter and entry.rows in (None, site.rows):
                A, B, scale = entry.edit.low_rank()  # type: ignore[misc]
                A, B = A.detach().to(dtype), scale * B.detach().to(dtype)
                own = entry.rows is None and site.rows is not None
                found.append(Factors(A, site.rows.take(B, -2) if own else B))  # type: ignore[union-attr]
        return found

    def differences(self, path: str, module: nn.Module) -> dict[str, Tensor]:
        """Parameter -> what the adapter adds to it, as it is stored, in float32 (of float64 in that).

        Raises:
            MergeError: a bias appears where the module has none.
        """
        base = {name: value.detach() for name, value in module._parameters.items() if value is not None}
        now = base | {name: value for (at, name), value in self.trained.items() if at == path}
        entries = self.deltas.get(path, [])
        for parameter, first in {entry.parameter: entry for entry in entries}.items():
            own = [entry for entry in entries if entry.parameter == parameter]
            now[parameter], bias = fold_into(own, now[parameter], now.get(first.bias))
            if bias is not None:
                now[first.bias] = bias
        if extra := [name for name in now if name not in base]:
            raise MergeError(
                f"'{self.name}': {path} has no {extra[0]}, and {entries[0].owner} would give it one"
            )
        found = {name: _widened(value) - _widened(base[name]) for name, value in now.items()}
        return {name: difference for name, difference in found.items() if difference.any()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def read_sources(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    *,
    model: PreTrainedModel | str | None,
    device: str,
    registry: Registry,
    trust_remote_code: bool,
) -> tuple[Base, list[Source]]:
    """The base, and the adapters off it.

    Raises:
        BundleError: one is missing or damaged. PeftxError: their bases differ. MergeError: one does not fold.
    """
    places = {str(folder): located(folder) for folder in folders}
    manifests = {name: _manifest(place) for name, place in places.items()}
    _check_bases(manifests, model)
    base = _base(manifests, model, device, trust_remote_code)
    own = base.model.generation_config if base.model.can_generate() else None
    names = {id(parameter): name for name, parameter in base.model.named_parameters()}
    settings, sources = [], []
    for folder, weight in zip(folders, weights, strict=True):
        stack = load(
            places[str(folder)], model=base.model, tokenizer=base.tokenizer, registry=registry,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        stack.model.eval()  # dropout is no part of a difference
        sources.append(_taken(stack, str(folder), weight, names))
        for plugin in reversed(list(stack.plugins)):
            stack.remove(plugin)
        if own is not None:
            settings.append((generation_of(base.model), base.model.generation_config))
            base.model.generation_config = own
    if settings and all(told == settings[0][0] for told, _ in settings):
        base.model.generation_config = settings[0][1]  # what all agree on stays
    return base, sources


def _manifest(folder: Path) -> Manifest | None:
    """None of an adapter of HF PEFT."""
    adapter = is_adapter(folder) and not (folder / MANIFEST).exists()
    return None if adapter else read_manifest(folder)


def _check_bases(manifests: dict[str, Manifest | None], model: PreTrainedModel | str | None) -> None:
    """Raises where they cannot be adapters of one base. That they fit the model is seen when each is put on it."""
    prints: dict[bool, tuple[str, str | None]] = {}
    names: dict[str, str] = {}
    for name, manifest in manifests.items():
        if manifest is None:
            names[name] = read_adapter(name).base or ""
            continue
        if manifest.base.contained is not None:
            raise MergeError(
                f"'{name}' is compressed, and a difference does not fold into integers exactly",
                hint="merge the adapters first, and compress what comes out",
            )
        names[name] = manifest.base.id
        old = manifest.base.settings is None  # of version 0.1, which told bases in another way
        other, known = prints.setdefault(old, (name, manifest.base.fingerprint))
        if known != manifest.base.fingerprint:
            raise BundleError(
                f"'{name}' was made for another base than '{other}': fingerprint "
                f"{str(manifest.base.fingerprint)[:12]}, not {str(known)[:12]}",
                hint="only adapters of one base can be merged",
            )
    told = {base: name for name, base in names.items() if base}
    if model is None and len(told) != 1 and None in manifests.values():
        which = ", ".join(f"'{name}' {base}" for base, name in told.items()) or "none"
        raise UsageError(
            f"an adapter of HF PEFT names its base alone, and they name: {which}", hint="--model ID"
        )


def _base(
    manifests: dict[str, Manifest | None], model: PreTrainedModel | str | None, device: str, trust: bool
) -> Base:
    name, first = next(
        ((name, manifest) for name, manifest in manifests.items() if manifest is not None),
        next(iter(manifests.items())),
    )
    known = first.base.id if first is not None else read_adapter(name).base
    if model is not None and not isinstance(model, str):
        return Base(model, known or model.config.name_or_path, None, None)
    source = model or known
    assert source is not None  # else `_check_bases` has raised
    dtype = first.base.dtype if first is not None else "auto"
    loaded, tokenizer = load_model(source, dtype=dtype, device=device, trust_remote_code=trust)
    if first is not None:
        cast_buffers(loaded, first.base.buffers)
    digest = None if tokenizer is None else tokenizer_digest(tokenizer)
    return Base(loaded, known or source, tokenizer, digest)


def _taken(stack: Stack, name: str, weight: float, names: dict[int, str]) -> Source:
    """What an adapter that stands on the base adds to it.

    Args:
        names: id of a parameter of the base -> its first name.

    Raises:
        MergeError: one of its plugins does more than to change weights.
    """
    files = sorted(Path(name).glob("*.safetensors"))
    source = Source(name, weight, hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest())
    for member in stack.members:
        _check_member(stack, member, name)
    for part in stack.ledger.all(DeltaPart):
        slot = slot_of(part.place)
        assert slot is not None
        entries = [entry for entry in slot.links if entry.active]
        _blaming(name, part.place, entries)
        source.deltas[part.path] = entries
    for trained in stack.ledger.all(BasePart):
        for parameter, original in trained.original.items():
            value = trained.module._parameters[parameter]
            assert value is not None
            path, _, leaf = names[id(original)].rpartition(".")
            source.trained[path, leaf] = value.detach()
    if not source.deltas and not source.trained:
        raise MergeError(f"'{name}' changes no weight of the base", hint="leave it out")
    return source


def _blaming(name: str, place: nn.Module, entries: Sequence[Entry]) -> None:
    try:
        check_folds(place, entries)
    except MergeError as error:
        raise MergeError(f"'{name}': {error.message}", hint=WAY_OUT.format(entries[0].owner)) from error


def _check_member(stack: Stack, member: Member, name: str) -> None:
    """Raises MergeError where a plugin does not fold into the weights, as `export` refuses it."""
    at, parts = stack.standing[member.id], stack.ledger.of(member.id)
    if at.folded:
        raise MergeError(
            f"'{name}': '{member.id}' was folded into its base for good, so that nothing is left to combine",
            hint="give the bundle from before that",
        )
    kinds: tuple[type, ...] = (BasePart,)
    if member.claims(Claim.MERGEABLE):
        kinds = (BasePart, DeltaPart, FreePart, ContextPart)
    left = next((part for part in parts if not isinstance(part, kinds)), None)
    if left is not None:
        raise MergeError(
            f"'{name}': '{member.id}' does not fold into the weights ({left.what} at {left.key})",
            hint=WAY_OUT.format(member.id),
        )
    if member.implements("decode"):
        raise MergeError(
            f"'{name}': '{member.id}' decodes, which no weight can", hint=WAY_OUT.format(member.id)
        )
