"""To and from HF PEFT: adapter_config.json and adapter_model.safetensors, which PEFT, TRL and vLLM read.

For every plugin whose deltas are low-rank updates (`Delta.low_rank`), W x + s B A x.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftx.engines.files import naming, read_json, read_tensors
from peftx.errors import BundleError, PeftxError
from peftx.kernel.parts import BasePart, DeltaPart
from peftx.kernel.slots import LowRank
from peftx.stack import Stack

PREFIX = "base_model.model."
OTHER = (
    "use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip
"""Settings of PEFT with which an adapter is more than W x + s B A x."""
MOVED = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts of PEFT that take something off W, so that A and B do not go with the W of the checkpoint."""
HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}
"""Modules that PEFT's wrapper for a task reads from the adapter's file too."""


_ALL_HEADS = set().union(*HEADS.values())
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def to_peft(stack: Stack, folder: str | Path, *, id: str = "lora") -> Path:
    """Write the adapter `id` of a stack as HF PEFT writes it; of a classifier with the head, as PEFT wants it.

    Raises:
        PeftxError: parts of a fused matrix or stacked experts, which the format cannot say.
    """
    deltas = _deltas(stack, id)
    task, head = _task(stack, deltas)
    tensors = {name: t.detach().cpu().contiguous() for name, t in (_tensors(deltas) | head).items()}
    ranks = {path: delta.A.shape[0] for path, delta in deltas.items()}
    alphas = {path: delta.scale * ranks[path] for path, delta in deltas.items()}  # PEFT's scale is alpha / r
    dropout = getattr(stack.plugins[id].config, "dropout", 0.0)
    config = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": stack.base_id,
        "r": max(ranks.values()), "lora_alpha": max(alphas.values()), "target_modules": sorted(ranks),
        "rank_pattern": ranks, "alpha_pattern": alphas, "lora_dropout": dropout,
        "bias": "none", "inference_mode": True,
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


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
        raise PeftxError(
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
            raise PeftxError(
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
        raise PeftxError(
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
            raise PeftxError(
                f"{id}: {part.key} is no low-rank update alone, which is all that PEFT's format of LoRA can say",
                hint="stack.model.eval() first, if it has dropout",
            )
        if part.key != part.path:
            raise PeftxError(
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


def _task(stack: Stack, deltas: dict[str, LowRank]) -> tuple[str | None, dict[str, Tensor]]:
    """PEFT's name of what the model does, by which it wraps it (None: plainly), and the head that goes with it."""
    from transformers.models.auto import modeling_auto as auto

    tasks = {
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    }
    kind = type(stack.model).__name__
    task = next((task for task, names in tasks.items() if kind in names.values()), None)
    if task not in HEADS:
        return task, {}
    head = {PREFIX + n: p for n, p in stack.model.named_parameters() if HEADS[task] & set(n.split("."))}
    # PEFT's wrapper does not go with an adapted head.
    adapted = any(HEADS[task] & set(path.split(".")) for path in deltas)
    return (None, {}) if adapted or not head else (task, head)
