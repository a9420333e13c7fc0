"""What lies in a model's folder: whether it is whole, and runs nobody's code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftx.engines.files import MOST_JSON, read_json, require_plain
from peftx.engines.tensor_files import check_tensors
from peftx.errors import BundleError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TINY = "peftx:tiny"
INDEX = "model.safetensors.index.json"
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""What a Trainer leaves beside the weights."""


def check_weights(path: Path, *, shape_only: bool = False) -> None:
    """Refuse folders without safetensors.

    Args:
        shape_only: a config alone will do, as long as a later run would not stop at the weights beside it.

    Raises:
        BundleError: no such folder, no config, or weights only as pickles.
    """
    if path.exists() and not path.is_dir():
        raise BundleError(
            f"'{path}' is no folder, which a model is", hint="the folder that holds its config.json"
        )
    if not path.is_dir():
        raise BundleError(f"model folder '{path}' does not exist", hint=near_folder(path))
    if not (path / "config.json").exists():
        out = f"it is a bundle: peftx export {path} merged --format hf writes a model, where its plugins fold"
        bundle = (path / "manifest.json").exists()
        raise BundleError(f"'{path}' holds no model: config.json is missing", hint=out if bundle else None)
    for file in path.glob("*.json"):
        require_plain(file, most=MOST_JSON, links=True)
    _check_index(path)
    files = list(path.glob("*.safetensors"))
    shards = [file for file in files if re.search(r"-\d{5}-of-\d{5}\.safetensors$", file.name)]
    if shards and len(shards) == len(files) and not (path / INDEX).exists():
        raise BundleError(
            f"'{path / INDEX}' is missing, and '{shards[0].name}' is a part of a model",
            hint="copy the model again",
        )
    for file in files:
        check_tensors(file, links=True)
    if files:
        return
    pickles = sorted(
        p.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")
        for p in path.glob(pattern)
        if not p.name.startswith(_NO_WEIGHTS)
    )
    if pickles:
        raise BundleError(
            f"'{path}' has its weights only as pickles ({', '.join(pickles[:3])}), which peftx does not read",
            hint="convert them where you trust them: model.save_pretrained(path) writes safetensors",
        )
    if not shape_only:
        raise BundleError(f"'{path}' holds no weights: no *.safetensors")


def _check_index(path: Path) -> None:
    """Raises BundleError where an index of shards names anything but safetensors files of the folder."""
    for index in path.glob("*.index.json"):
        if index.name.startswith("pytorch_model"):
            continue  # of pickles, which nobody reads
        found = read_json(index, links=True)
        shards = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise BundleError(f"'{index}' is corrupted: it has no weight_map from names to files")
        for name in dict.fromkeys(shards.values()):
            if not _is_beside(name):
                raise BundleError(
                    f"'{index}' names {name!r}, which is no safetensors file of this folder",
                    hint="a folder that somebody else packed may want to run code; get it from its authors",
                )
            if not (path / name).exists():
                raise BundleError(
                    f"'{path / name}' is missing, and '{index.name}' says that weights are in it",
                    hint="copy the model again, with every shard",
                )


def read_config(source: str | Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        BundleError: there is none, it is damaged, or needs code of strangers.
    """
    from transformers import AutoConfig

    if isinstance(source, Path):
        found = read_json(source / "config.json", links=True)
        if not isinstance(found, dict):
            raise BundleError(f"'{source / 'config.json'}' is corrupted: it holds no settings")
        _refuse_redirects(source, found)
    try:
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # its classes check as they like: KeyError, TypeError, huggingface_hub's own
        needs_code = "trust_remote_code" in str(error)
        raise BundleError(
            f"model '{source}' cannot be read: {type(error).__name__}: {first_line(error)}",
            hint="it brings Python code along, which --trust-remote-code runs (in Python trust_remote_code=True), for "
            "those who trust its authors"
            if needs_code
            else f"give a local folder, a hub id that is in your cache, or {TINY}",
        ) from error
    if "/" in str(config._attn_implementation):
        raise BundleError(
            f"'{source}' asks for code of the hub: attn_implementation is '{config._attn_implementation}'",
            hint="take that entry out of its config.json",
        )
    return config


def _refuse_redirects(folder: Path, config: dict[str, Any]) -> None:
    """A configuration may name other files to read weights from, and an adapter beside it is put onto the model."""
    weights = config.get("transformers_weights")
    if weights is not None and not (isinstance(weights, str) and _is_beside(weights)):
        raise BundleError(
            f"'{folder / 'config.json'}' has the weights read from {weights!r}, which is no safetensors file beside it"
        )
    if (folder / "adapter_config.json").exists():
        raise BundleError(
            f"'{folder}' holds a base and an adapter of HF PEFT beside it, which transformers would put onto the base",
            hint="move adapter_config.json and its weights to a folder of their own",
        )


def _is_beside(name: str) -> bool:
    """Is it a safetensors file of the same folder."""
    return name.endswith(".safetensors") and Path(name).name == name


def first_line(error: BaseException) -> str:
    """Of what was said, and no more of it than one reads: some messages repeat all of a file."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def near_folder(path: Path) -> str:
    parent = path.parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return nearest(path.name, names) or f"or give {TINY}"
