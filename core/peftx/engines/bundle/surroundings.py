"""What decides about the output beside the weights: tokenizer, generation settings, the model's configuration."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers.initialization import no_init_weights

from peftx.engines.models import DTYPES
from peftx.errors import BundleError
from peftx.kernel.chain import is_ours

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENIZER_FOLDER = "tokenizer"
_SILENT = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_from_model_config", "_name_or_path", "architectures",
    "auto_map", "dtype", "id2label", "label2id", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Entries of configurations that say nothing about what is computed, or are told elsewhere."""


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """The configuration's entries that say what is computed, as JSON."""
    return _without_silent(json.loads(config.to_json_string(use_diff=False)))


def generation_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The settings of `generate`, as JSON; None for a model that does not generate."""
    if not model.can_generate():
        return None
    found = _without_silent(json.loads(model.generation_config.to_json_string(use_diff=False)))
    return {name: value for name, value in found.items() if value is not None}


def _without_silent(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_silent(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _SILENT
    }


def computed_buffers(model: PreTrainedModel) -> dict[str, str]:
    """dtypes of those buffers that no checkpoint holds (rotary frequencies) and that are not float32, as they are made:
    `model.to(bfloat16)` casts them too, `from_pretrained(dtype=bfloat16)` does not, and the output differs."""
    return {
        f"{path}.{name}": str(buffer.dtype).removeprefix("torch.")
        for path, module in model.named_modules()
        if not is_ours(path)
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
        and buffer.is_floating_point() and buffer.dtype != torch.float32
    }  # fmt: skip


def cast_buffers(model: PreTrainedModel, dtypes: dict[str, str]) -> None:
    """Cast computed buffers as they were."""
    for name, dtype in dtypes.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module._buffers[leaf] = module.get_buffer(leaf).to(DTYPES[dtype])
        original = vars(module).get(f"original_{leaf}")
        if isinstance(original, torch.Tensor):
            setattr(module, f"original_{leaf}", original.to(DTYPES[dtype]))


def check_settings(saved: dict[str, Any], model: PreTrainedModel, folder: Path) -> None:
    """Raises BundleError, which names the entries, where a model is configured unlike the one that was saved.

    Entries that one of the two does not have are another version's of transformers, and count at their defaults.
    """
    differ = list(_differences(saved, settings_of(model.config)))
    if differ:
        name, was, now = differ[0]
        more = f", and in {', '.join(other for other, _, _ in differ[1:4])}" if differ[1:] else ""
        raise BundleError(
            f"'{folder}' was made with a base configured otherwise: {name} was {was!r}, here it is {now!r}{more}",
            hint="give the base as it was: peftx.load(path, model=...)",
        )


def _differences(
    saved: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in saved.keys() & now.keys():
        one, two = saved[name], now[name]
        if isinstance(one, dict) and isinstance(two, dict):
            yield from _differences(one, two, f"{prefix}{name}.")
        elif one != two:
            yield f"{prefix}{name}", one, two


def compute_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) are computed by the constructors, on the CPU: of the model
    as it was made, with parameters that take no memory."""
    if not any(b is not None and b.is_meta for m in model.modules() for b in m._buffers.values()):
        return
    with init_empty_weights(include_buffers=False), no_init_weights():
        fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    for name, module in model.named_modules():
        hollow = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if not hollow:
            continue
        whole = fresh.get_submodule(name)
        for buffer in hollow:
            module._buffers[buffer] = whole._buffers[buffer]
        for attribute, value in vars(whole).items():
            if isinstance(value, Tensor) and attribute not in whole._buffers:
                setattr(module, attribute, value)
        if any(b is None or b.is_meta for n, b in module._buffers.items() if n in hollow):
            raise BundleError(f"{name}: buffers cannot be computed")
