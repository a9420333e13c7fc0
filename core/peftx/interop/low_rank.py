"""A LoRA of HF PEFT into the places of a stack that is there already."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftx.composition.adapters import CONFIG, HEADS, PREFIX, WEIGHTS
from peftx.engines.files import naming, read_json
from peftx.engines.tensor_files import read_tensors
from peftx.errors import AdapterError, BundleError
from peftx.kernel.parts import BasePart, DeltaPart
from peftx.kernel.slots import LowRank
from peftx.stack import Stack

OTHER = (
    "use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip
"""Settings of PEFT with which an adapter is more than W x + s B A x."""
MOVED = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts of PEFT that take something off W, so that A and B do not go with the W of the checkpoint."""
_ALL_HEADS = set().union(*HEADS.values())


def from_peft(stack: Stack, folder: str | Path, *, id: str = "lora") -> None:
    """Fill the adapter `id` of a stack with the weights of an HF PEFT adapter; its targets and ranks must be the same.

    Raises:
        PeftxError: the adapter is more than A and B, or has other modules, sizes or scales; nothing is filled then.
        BundleError: a file of it is missing or damaged, or its weights are a pickle.
    """
    with naming(folder):
        _fill(stack, Path(folder), id)


def _fill(stack: Stack, folder: Path, id: str) -> None:
    config = read_json(folder / CONFIG, links=True)
    if not isinstance(config, dict):
        raise BundleError(f"'{folder / CONFIG}' is corrupted: it holds no settings")
    deltas = _deltas(stack, id)
    heads = _heads(stack, id)
    saved, head = _plain(config, _weights(folder), stack, id, heads)
    tensors = _tensors(deltas)
    differ = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in saved.keys() ^ tensors.keys()}
    if differ:
        raise AdapterError(
            f"{id}: {len(differ)} modules differ from the adapter's, e.g. {min(differ)}", hint="set `targets`"
        )
    for path, delta in deltas.items():
        A, B = (saved[f"{PREFIX}{path}.lora_{name}.weight"] for name in "AB")
        rank = A.shape[0]
        # The first key that matches the path, or all of it behind a dot.
        patterns = (config.get("alpha_pattern") or {}).items()
        given = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", path))
        scale = next(given, config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        same = (A.shape, B.shape) == (delta.A.shape, delta.B.shape)
        if not same or not math.isclose(scale, delta.scale, rel_tol=1e-6):
            raise AdapterError(
                f"{id}: {path} ({delta.B.shape[0]}x{delta.A.shape[1]}) has rank {delta.A.shape[0]} and scale "
                f"{delta.scale:g}, the adapter ({B.shape[0]}x{A.shape[1]}) {rank} and {scale:g}",
                hint="set `rank`, `ranks`, `alpha` and `rank_stabilized` as the adapter has them, on the same base",
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        for name, value in head.items():
            heads[name].copy_(value)


def _weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise BundleError(
            f"'{folder}' has its weights only as a pickle (adapter_model.bin), which peftx does not read",
            hint="convert it where you trust it: PeftModel.save_pretrained(path) writes safetensors",
        )
    return read_tensors(file, links=True)


def _heads(stack: Stack, id: str) -> dict[str, Tensor]:
    """Parameters of the base that train with the plugin, under PEFT's names: the head of a classifier."""
    parts = stack.ledger.of(stack.member(id).id, BasePart)
    return {f"{PREFIX}{part.key}.{n}": part.module._parameters[n] for part in parts for n in part.parameters}  # type: ignore[misc]


def _plain(
    config: dict[str, Any], saved: dict[str, Tensor], stack: Stack, id: str, heads: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B of the adapter, and its head; refused where these and the scale are not all of it."""
    found = {name: config[name] for name in OTHER if config.get(name)}
    if config.get("peft_type") != "LORA":
        found["peft_type"] = config.get("peft_type")
    if config.get("bias", "none") != "none":
        found["bias"] = config["bias"]
    if str(config.get("init_lora_weights")).startswith(MOVED):
        found["init_lora_weights"] = config["init_lora_weights"]
    factors = {n: t for n, t in saved.items() if n.endswith((".lora_A.weight", ".lora_B.weight"))}
    own = dict(stack.model.named_parameters())
    head = {n: t for n, t in saved.items() if n in heads and t.shape == heads[n].shape}
    for name in sorted(saved.keys() - factors.keys() - head.keys()):
        mine = own.get(name.removeprefix(PREFIX))
        same = mine is not None and torch.equal(mine.to(saved[name]), saved[name])
        if not same:  # a head like the model's own is fine
            found[name] = tuple(saved[name].shape)
    if found:
        what = ", ".join(f"{name}={value!r:.80}" for name, value in list(found.items())[:3])
        raise AdapterError(
            f"{id}: the adapter is more than A and B of LoRA, it has {what}",
            hint="load it with PEFT and merge it into the base",
        )
    return factors, head


def _deltas(stack: Stack, id: str) -> dict[str, LowRank]:
    """A, B and s of the plugin's deltas, by the path of their module."""
    deltas = {}
    for part in stack.ledger.of(stack.member(id).id):
        if isinstance(part, BasePart) and _ALL_HEADS & set(part.key.split(".")):
            continue  # goes beside the adapter
        found = part.module.low_rank() if isinstance(part, DeltaPart) else None  # type: ignore[operator]
        if not isinstance(part, DeltaPart) or found is None:
            raise AdapterError(
                f"{id}: {part.key} is no low-rank update alone, which is all that PEFT's format of LoRA can say",
                hint="stack.model.eval() first, if it has dropout",
            )
        if part.key != part.path:
            raise AdapterError(
                f"{id}: {part.key} is a part of a fused or stacked matrix, which PEFT's format cannot name"
            )
        deltas[part.path] = found
    return deltas


def _tensors(deltas: dict[str, LowRank]) -> dict[str, Tensor]:
    """A and B under PEFT's names."""
    return {
        f"{PREFIX}{path}.lora_{name}.weight": getattr(d, name).detach()
        for path, d in deltas.items()
        for name in "AB"
    }
