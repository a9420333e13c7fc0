"""Getting a plain `transformers` model: the bundled one, a local folder, a hub id, or a shape on the meta device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftx.errors import ArchitectureError, BundleError, DataError, PeftxError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = "peftx:tiny"
ASSETS = Path(__file__).parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""What a Trainer leaves beside the weights."""


def bundled() -> list[str]:
    """Ids of the bundled models."""
    return sorted(f"peftx:{p.name}" for p in ASSETS.iterdir() if (p / "config.json").exists())


def model_path(model_id: str) -> str:
    """`peftx:tiny` -> its folder; anything else as it is.

    Raises:
        BundleError: an unknown bundled model.
    """
    if not model_id.startswith("peftx:"):
        return model_id
    folder = ASSETS / model_id.removeprefix("peftx:")
    if not (folder / "config.json").exists():
        raise BundleError(
            f"no bundled model '{model_id}'",
            hint=nearest(model_id, bundled()) or f"there are: {', '.join(bundled())}",
        )
    return str(folder)


def asset_path(path: str | Path) -> Path:
    """`peftx:sample/train.jsonl` -> the packaged file; any other path as it is.

    Raises:
        DataError: no such packaged file.
    """
    if not str(path).startswith("peftx:"):
        return Path(path)
    file = ASSETS / str(path).removeprefix("peftx:")
    if not file.is_file():
        names = [f"peftx:{p.relative_to(ASSETS)}" for p in (ASSETS / "sample").glob("*")]
        raise DataError(
            f"no packaged data '{path}'", hint=nearest(str(path), names) or f"there are: {', '.join(names)}"
        )
    return file


def check_weights(path: Path, *, shape_only: bool = False) -> None:
    """Refuse folders without safetensors.

    Args:
        shape_only: a config alone will do, as long as a later run would not stop at the weights beside it.

    Raises:
        BundleError: no such folder, no config, or weights only as pickles.
    """
    if not path.is_dir():
        raise BundleError(f"model folder '{path}' does not exist", hint=_near_folder(path))
    if not (path / "config.json").exists():
        raise BundleError(f"'{path}' holds no model: config.json is missing")
    if any(path.glob("*.safetensors")):
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


def load_model(
    model_id: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    meta: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model in evaluation mode, and its tokenizer if it has one.

    Args:
        model_id: `peftx:tiny`, a local folder, or a hub id.
        dtype: float32, bfloat16, float16 or auto (as saved). device: a torch device, or auto.
        meta: build the shape only, without weights (`peftx plan`).

    Raises:
        BundleError: no such model, or one that holds pickles only.
    """
    import transformers
    from transformers import AutoConfig

    path = model_path(model_id)
    local = Path(path).exists() or path.startswith((".", "/", "~"))
    if local:
        check_weights(Path(path).expanduser(), shape_only=meta)
    source = str(Path(path).expanduser()) if local else path
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"model '{model_id}' cannot be read: {_first_line(error)}",
            hint=f"give a local folder, a hub id that is in your cache, or {TINY}",
        ) from error
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        cls = transformers.AutoModelForCausalLM
    if dtype not in (*DTYPES, "auto"):
        raise PeftxError(
            f"unknown dtype '{dtype}'", hint=nearest(dtype, DTYPES) or f"one of {', '.join(DTYPES)}, auto"
        )
    wanted = DTYPES.get(dtype, config.dtype or torch.float32)
    if meta:
        with torch.device("meta"):
            model = cls._from_config(config, dtype=wanted)
        return model.eval(), _tokenizer(source, trust_remote_code)
    with _quiet():
        model = cls.from_pretrained(
            source, dtype=wanted, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), _tokenizer(source, trust_remote_code)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bars, which would break ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not any(
        (Path(source) / name).exists()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    ):
        return None
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fingerprint(model: PreTrainedModel, *, skip: frozenset[int] = frozenset()) -> str:
    """Identity of a base model in a few milliseconds: a hash of its tensors' names, shapes and dtypes, and of 64
    values of each, evenly spaced.

    Two checkpoints that differ in one unsampled value have the same fingerprint; two trainings never do.

    Args:
        skip: ids of tensors that are not the base's (adapters).

    Raises:
        ArchitectureError: a model on the meta device has no values.
    """
    import hashlib

    digest = hashlib.sha256()
    described, samples = [], []
    for name, tensor in model.named_parameters():
        if id(tensor) in skip:
            continue
        if tensor.is_meta:
            raise ArchitectureError(f"{name} is on the meta device: a fingerprint needs the weights")
        described.append((name, list(tensor.shape), str(tensor.dtype)))
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        samples.append(flat[: 64 * step : step].float())
    digest.update(json.dumps(described).encode())
    if samples:
        digest.update(torch.cat([s.cpu() for s in samples]).numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _near_folder(path: Path) -> str:
    parent = path.parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return nearest(path.name, names) or f"or give {TINY}"
