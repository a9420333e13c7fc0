"""Getting a plain `transformers` model: the bundled one, a local folder, a hub id, or a shape on the meta device."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from peftx.engines.checkpoints import check_weights, first_line, read_config
from peftx.engines.files import require_plain
from peftx.engines.hub import is_hub, rows_path
from peftx.errors import BundleError, DataError, OptionError, nearest
from peftx.kernel.chain import is_ours

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).parents[1] / "assets"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


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
    """`peftx:sample/train.jsonl` -> the packaged file; `hub:owner/name/rows.jsonl` -> where it lies once it is fetched;
    any other path as it is.

    Raises:
        DataError: no such packaged file. HubError: a file of the Hub that cannot be fetched.
    """
    if is_hub(path):
        return rows_path(str(path))
    if not str(path).startswith("peftx:"):
        return Path(path)
    file = ASSETS / str(path).removeprefix("peftx:")
    if not file.is_file():
        names = [f"peftx:{p.relative_to(ASSETS)}" for p in (ASSETS / "sample").glob("*")]
        raise DataError(
            f"no packaged data '{path}'", hint=nearest(str(path), names) or f"there are: {', '.join(names)}"
        )
    return file


def lasting(model_id: str) -> str:
    """The name of a model that a program in another folder finds it by: of a local folder its whole path."""
    path = Path(os.path.expanduser(model_id)) if model_id else None
    return str(path.absolute()) if path is not None and path.is_dir() else model_id


def load_model(
    model_id: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    meta: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model in evaluation mode, and its tokenizer if it has one.

    Args:
        model_id: `peftx:tiny`, a local folder, or a hub id.
        dtype: float32, bfloat16, float16 or auto (as saved; float32 where the device cannot compute in that, which a
            warning says). device: a torch device, or auto.
        trust_remote_code: run Python code that lies beside the weights. Without it, such code is never looked at.
        meta: build the shape only, without weights (`peftx plan`).

    Raises:
        BundleError: no such model, one that holds pickles only, or not the tensors that its class has.
        PeftxError: an unknown dtype, or a device that this machine does not have.
    """
    import transformers

    device = usable_device(device)
    if dtype not in (*DTYPES, "auto"):
        raise OptionError(
            f"unknown dtype '{dtype}'", hint=nearest(dtype, DTYPES) or f"one of {', '.join(DTYPES)}, auto"
        )
    path = model_path(model_id)
    local = Path(path).exists() or path.startswith((".", "/", "~"))
    if local:
        check_weights(Path(os.path.expanduser(path)), shape_only=meta)
    # Path.expanduser raises for a user that is not there.
    source = Path(os.path.expanduser(path)) if local else path
    config = read_config(source, trust_remote_code=trust_remote_code)
    names = config.architectures or []
    cls: Any = (
        getattr(transformers, names[0], None)
        if isinstance(names, list) and names and isinstance(names[0], str)
        else None
    )
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        cls = transformers.AutoModelForCausalLM
    wanted = _dtype(dtype, config, "cpu" if meta else device)
    tokenizer = _tokenizer(str(source), trust_remote_code)
    if meta:
        with torch.device("meta"):
            if cls is transformers.AutoModelForCausalLM:  # it knows of code that the checkpoint brings along
                model = cls.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
            else:
                model = cls._from_config(config, dtype=wanted)
        return model.eval(), tokenizer
    return _read_weights(cls, str(source), wanted, trust_remote_code).to(device).eval(), tokenizer


def usable_device(device: str) -> str:
    """`auto` -> an accelerator if there is one, else the CPU; anything else as it is.

    Raises:
        PeftxError: a device that torch does not know, or this machine does not have.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"device '{device}' cannot be used: {first_line(error)}", hint="device: cpu, or auto"
        ) from error
    return device


def _dtype(name: str, config: PretrainedConfig, device: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    saved = config.dtype or torch.float32
    if saved not in DTYPES.values():
        return torch.float32
    if not _computes(saved, device):
        warnings.warn(
            f"{device} cannot compute in {str(saved).removeprefix('torch.')}, the checkpoint's dtype: float32 is used",
            stacklevel=3,
        )
        return torch.float32
    return saved  # type: ignore[no-any-return]


def slow_dtype(dtype: torch.dtype, device: str) -> str:
    """What to tell of a dtype whose products of matrices the device computes, many times slower than float32's; empty
    for any other. Measured with torch 2.13 on an x86 CPU: forward and backward of a layer take 22 times as long."""
    if (dtype, device) != (torch.float16, "cpu"):
        return ""
    return "a CPU trains in float16 many times slower than in float32: model: {dtype: float32}, or bfloat16"


@lru_cache(maxsize=16)
def _computes(dtype: torch.dtype, device: str) -> bool:
    """Are the kernels of a transformer there, forward and backward, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        return _tried(dtype, device)


def _tried(dtype: torch.dtype, device: str) -> bool:
    x = torch.ones(1, 2, 4, 8, dtype=dtype, device=device, requires_grad=True)
    try:
        y = F.scaled_dot_product_attention(F.linear(x, x[0, 0, :, :].repeat(2, 1)), x, x)
        F.silu(F.layer_norm(y, y.shape[-1:])).softmax(-1).sum().backward()
    except RuntimeError:  # "not implemented for 'Half'"
        return False
    return True


def _read_weights(
    cls: type[PreTrainedModel], source: str, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with every tensor of its class from the checkpoint, and every tensor of the checkpoint in it.

    Raises:
        BundleError: tensors are missing, too many or of another shape, or a file of the checkpoint is not there.
    """
    with _quiet(), _silent("transformers.utils.loading_report"):
        try:
            model, report = cls.from_pretrained(
                source, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
        except ImportError as error:  # of what packed them: bitsandbytes, gptq, awq
            raise BundleError(
                f"'{source}': the weights are packed: {first_line(error)}",
                hint="the plain model, which nf4 packs in four bits; or install what is named",
            ) from error
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise BundleError(
                f"'{source}': the weights cannot be read: {first_line(error)}",
                hint="copy the model again, with every file that its index names",
            ) from error
    wrong = {
        "missing": report["missing_keys"],
        "too many": {n for n in report["unexpected_keys"] if not n.endswith(_COMPUTED)},
        "of another shape": {str(key[0]) for key in report["mismatched_keys"]},
    }
    found = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])})" for what, names in wrong.items() if names
    ]
    if found:
        ours = any(is_ours(name) for name in wrong["too many"])
        raise BundleError(
            f"'{source}' does not hold the tensors of a {model.__class__.__name__}: {'; '.join(found)}",
            hint="it was saved with plugins on it: save with stack.save(path) and load with peftx.load(path)"
            if ours
            else "config.json and the weights are not of one model; its 'architectures' names the class",
        )
    return model


_COMPUTED = (".inv_freq", ".masked_bias", ".attn.bias", ".position_ids", ".num_batches_tracked")
"""Ends of names of buffers that older versions saved, and newer ones compute."""


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


@contextmanager
def _silent(*loggers: str) -> Iterator[None]:
    """Without tables on the terminal of what the caller will say as an error."""
    import logging

    chosen = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in chosen]
    try:
        for logger in chosen:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(chosen, levels, strict=True):
            logger.setLevel(level)


def _tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if Path(source).is_dir() and not any(
        (Path(source) / name).exists()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    ):
        return None
    return read_tokenizer(source, trust_remote_code=trust_remote_code)


def read_tokenizer(source: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; its EOS pads where it names nothing else.

    Raises:
        BundleError: it is damaged, or needs code of strangers.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir():
        for file in folder.glob("*.json"):
            require_plain(file, links=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        if not tokenizer("a")["input_ids"]:  # what is damaged may show at the first text only
            raise ValueError("it makes no tokens of text")
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(
            f"the tokenizer of '{source}' cannot be read: {type(error).__name__}: {first_line(error)}",
            hint="copy its files again; code of its own runs with --trust-remote-code alone",
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what makes a tokenizer's ids and chats: its algorithm and vocabulary, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    algorithm = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"
    }
    about = json.dumps([special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(f"{algorithm}\n{about}".encode()).hexdigest()


def reads_alike(one: PreTrainedTokenizerBase, two: PreTrainedTokenizerBase) -> bool:
    """Do two tokenizers make the same tokens of every text, as far as their files tell."""
    if one.get_vocab() != two.get_vocab():
        return False
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, two)]
    if None in backends:
        return True  # of Python's own code nothing more is to be seen
    first, second = (json.loads(backend.to_str()) for backend in backends)  # type: ignore[union-attr]
    return all(first[part] == second[part] for part in ("normalizer", "pre_tokenizer", "model"))


def base_bytes(model_id: str, model: PreTrainedModel) -> int:
    """Bytes of a base's weights on disk; in memory if it lies nowhere as a file."""
    folder = Path(model_path(model_id))
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sum(f.stat().st_size for f in files) or sum(p.nbytes for p in model.parameters())
