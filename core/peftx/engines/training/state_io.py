"""Optimizer, schedule and random states as safetensors and JSON: exact, and readable without pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftx.engines.files import read_json
from peftx.engines.tensor_files import read_tensors
from peftx.errors import BundleError


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """JSON-able copy of `value`; tensors go into `tensors` and leave a reference, dict keys keep their type."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if isinstance(value, dict):
        return {"$dict": [[key, flatten(item, tensors, f"{path}.{key}")] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [flatten(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [flatten(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved in a checkpoint")


def restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(value, list):
        return [restore(item, tensors) for item in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$tuple" in value:
            return tuple(restore(item, tensors) for item in value["$tuple"])
        return {key: restore(item, tensors) for key, item in value["$dict"]}
    return value


def save_state(path: Path, state: Any) -> None:
    """Write `path.json` and, if there are tensors, `path.safetensors`. Floats survive exactly (repr round trip)."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(flatten(state, tensors))
    path.with_suffix(".json").write_text(text, "utf-8")
    if tensors:
        save_file(tensors, path.with_suffix(".safetensors"))


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote. Raises BundleError, which names the file, for anything else."""
    file = path.with_suffix(".safetensors")
    tensors = read_tensors(file) if file.exists() else {}
    found = read_json(path.with_suffix(".json"))
    try:
        return restore(found, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"'{path.with_suffix('.json')}' is corrupted: {error}") from error


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, [int(k) for k in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
