"""A bundle that holds its base itself, compressed: the base is made empty, and filled from the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftx.engines.bundle.manifest import ANEW, BASE, BASE_FOLDER
from peftx.engines.bundle.surroundings import compute_buffers
from peftx.engines.checkpoints import read_config
from peftx.engines.files import naming
from peftx.engines.tensor_files import read_tensors, tensor_names
from peftx.errors import BundleError
from peftx.kernel.parts import BasePart, hollow, swap

if TYPE_CHECKING:
    from peftx.engines.bundle.manifest import BaseEntry, Manifest
    from peftx.kernel.stack import Stack


CACHE_LINE = 64
"""Bytes."""


@contextmanager
def without(model: PreTrainedModel, biases: Sequence[str]) -> Iterator[None]:
    """A plugin that has none of these stood on its layers before a fold added them."""
    places = [
        (model.get_submodule(path), leaf) for path, _, leaf in (name.rpartition(".") for name in biases)
    ]
    kept = [module._parameters[leaf] for module, leaf in places]
    for module, leaf in places:
        module._parameters[leaf] = None
    try:
        yield
    finally:
        for (module, leaf), bias in zip(places, kept, strict=True):
            module._parameters[leaf] = bias


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would have put it: files pack tensors, and products of one that starts in the middle of a
    cache line may round otherwise than before it was saved."""
    return tensor.clone() if tensor.data_ptr() % CACHE_LINE else tensor


def check_shape(name: str, old: Tensor | None, value: Tensor) -> None:
    """Raises BundleError where a tensor of a file cannot stand in the place of one of the model; None fits any."""
    if old is not None and old.numel() and old.shape != value.shape:
        raise BundleError(
            f"{name} has shape {tuple(value.shape)}, the model needs {tuple(old.shape)}", hint=ANEW
        )
    if old is not None and old.numel() and old.is_floating_point() != value.is_floating_point():
        raise BundleError(f"{name} is {value.dtype}, the model needs {old.dtype}", hint=ANEW)


def empty_base(folder: Path, base: BaseEntry) -> PreTrainedModel:
    """The shape of the contained base: parameters and buffers on the meta device."""
    import transformers

    inner = folder / BASE_FOLDER
    config = read_config(inner, trust_remote_code=False)
    cls = getattr(transformers, base.cls, None)
    kind: Any = cls
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise BundleError(
            f"'{folder}' holds a {base.cls}, which transformers {transformers.__version__} does not have",
            hint="see versions in manifest.json; models of remote code cannot be bundled compressed",
        )
    with naming(inner / "config.json"), torch.device("meta"):
        model = kind._from_config(config, dtype=getattr(torch, base.dtype))
    return model.eval()


def lend(stack: Stack, manifest: Manifest, folder: Path) -> list[nn.Parameter]:
    """Those weights of an empty base that plugins bring, as zeros that take no memory until they come: a plugin before
    them may stand where the base does, and compute first values, in whose place its own tensors are put."""
    files = [folder / entry.file for entry in manifest.plugins if entry.file is not None]
    brought = {name.partition("//")[0] for file in files for name in tensor_names(file)}  # a pair's too
    lent = []
    for name, parameter in list(stack.model.named_parameters()):
        if parameter.is_meta and name in brought:
            path, _, leaf = name.rpartition(".")
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            lent.append(nn.Parameter(zeros, requires_grad=False))
            swap(stack.model, stack.model.get_submodule(path), {leaf: parameter}, {leaf: lent[-1]})
    return lent


def let_go(stack: Stack, manifest: Manifest, lent: Sequence[nn.Parameter]) -> None:
    """A bundle that holds its base, compressed, holds nothing of what the base was before."""
    ids = {id(parameter) for parameter in lent}
    if left := [name for name, parameter in stack.model.named_parameters() if id(parameter) in ids]:
        raise BundleError(f"{left[0]} is not in the bundle", hint=ANEW)
    for part in stack.ledger.all(BasePart):
        for name, own in part.original.items():
            if own.is_meta or id(own) in ids:
                part.original[name] = nn.Parameter(hollow(own), requires_grad=False)
                part.final = (
                    f"the bundle does not hold what {part.key}.{name} was before '{part.owner}' trained it"
                )
    for entry in manifest.plugins:
        stack.ledger.release(entry.id)


def fill_base(stack: Stack, folder: Path, contained: list[str]) -> None:
    """Put the base that a bundle holds into the empty model, and compute what no file holds.

    Raises:
        BundleError: other tensors than the manifest's `contained`, or such as the model has no place for.
    """
    model = stack.model
    tensors = read_tensors(folder / BASE)
    if sorted(tensors) != contained:
        raise BundleError(f"{folder / BASE} does not hold the tensors that the manifest names", hint=ANEW)
    for name, packed in tensors.items():
        value = aligned(packed)
        path, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise BundleError(f"{folder / BASE}: the model has no place for {name}", hint=ANEW) from error
        old = module._parameters.get(leaf)
        if old is None:
            module._buffers[leaf] = value
            continue
        check_shape(name, old, value)
        module._parameters[leaf] = nn.Parameter(value.to(old.dtype), requires_grad=False)
    model.tie_weights()
    compute_buffers(model)
    model.config.name_or_path = stack.base_id
